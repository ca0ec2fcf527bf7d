//! Tensors as a safetensors file: the header, then every tensor as it lies in memory, whole or not there.

use std::borrow::Cow;
use std::io::Write;
use std::path::Path;

use cross_attention::files::{Ours, OutputError, OutputFile};
use cross_attention::{AttentionOutput, AttentionProblem, Element, TensorRef};
use indicatif::ProgressBar;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::error::Error;
use crate::options::AxisOrder;

/// What a file must be that is replaced.
pub(crate) const RESULT: Ours = Ours { what: "a result of this program", is: is_result };

/// What a result may hold beside output and lse.
const MORE: [&str; 7] = ["probs", "d_query", "d_key", "d_value", "d_bias", "d_alibi_slopes", "d_sinks"];

/// Bytes between two steps of the bar.
const PART: usize = 8 << 20;

/// Whether a file starts as what [`write`] writes.
fn is_result(head: &[u8]) -> bool {
    let Some((len, rest)) = head.split_first_chunk::<8>() else { return false };
    let header = usize::try_from(u64::from_le_bytes(*len)).ok().and_then(|len| rest.get(..len));
    let header: Option<Map<String, Value>> = header.and_then(|header| serde_json::from_slice(header).ok());
    header.is_some_and(|header| {
        let names = ["__metadata__", "output", "lse"];
        names.iter().all(|name| header.contains_key(*name))
            && header.keys().all(|name| names.contains(&name.as_str()) || MORE.contains(&name.as_str()))
    })
}

/// Writes the results and what gradients there are; the weights only if `probs` says so.
///
/// # Errors
/// [`Error::NotReturned`] and [`Error::Output`].
pub(crate) fn write(
    path: &Path,
    (problem, order): (&AttentionProblem, AxisOrder),
    results: &AttentionOutput,
    probs: bool,
    gradients: Vec<Stored<'_>>,
    about: [(&str, &str); 3],
    bar: &ProgressBar,
) -> Result<(), Error> {
    let lse = results.lse.as_deref().ok_or(Error::NotReturned { name: "lse" })?;
    let lse_shape = vec![problem.batch(), problem.q_heads(), problem.q_len()];
    let output_shape = order.swap(problem.spec().output.layout.shape).to_vec();
    let mut tensors = vec![("lse", TensorRef::F32(lse), lse_shape), ("output", results.output.as_ref(), output_shape)];
    if probs {
        let probs = results.scores.as_deref().ok_or(Error::NotReturned { name: "probs" })?;
        tensors.push(("probs", TensorRef::F32(probs), problem.score_shape().to_vec()));
    }
    let tensors = tensors.into_iter().map(|(name, data, shape)| Stored::of(name, data, shape));
    let tensors = tensors.chain(gradients).collect();
    save(path, RESULT, &about, tensors, bar)
}

/// A tensor as a file holds it.
#[derive(Debug)]
pub(crate) struct Stored<'a> {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Little-endian.
    pub(crate) bytes: Cow<'a, [u8]>,
}

impl<'a> Stored<'a> {
    /// Elements in host memory.
    pub(crate) fn of(name: &str, data: TensorRef<'a>, shape: Vec<usize>) -> Self {
        let dtype = match data.element() {
            Element::F16 => Dtype::F16,
            Element::Bf16 => Dtype::BF16,
            Element::I8 => Dtype::I8,
            _ => Dtype::F32,
        };
        let mut bytes = Cow::Borrowed(data.as_bytes());
        if cfg!(target_endian = "big") {
            // each number turned round
            bytes.to_mut().chunks_mut(data.element().size_bytes()).for_each(<[u8]>::reverse);
        }
        Self { name: name.to_owned(), dtype, shape, bytes }
    }
}

/// Writes a file of tensors, with metadata.
///
/// # Errors
/// [`Error::Output`].
pub(crate) fn save(
    path: &Path,
    ours: Ours,
    metadata: &[(&str, &str)],
    mut tensors: Vec<Stored<'_>>,
    bar: &ProgressBar,
) -> Result<(), Error> {
    // wider elements first, so that all of them are aligned
    tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.dtype.bitsize()));

    // names in the order of the alphabet, so that the same results are the same bytes
    let mut header = Map::new();
    header.insert(
        "__metadata__".to_owned(),
        metadata.iter().map(|(name, text)| ((*name).to_owned(), json!(text))).collect(),
    );
    let mut start = 0;
    for Stored { name, dtype, shape, bytes } in &tensors {
        let end = start + bytes.len();
        let about = json!({ "dtype": format!("{dtype:?}"), "shape": shape, "data_offsets": [start, end] });
        header.insert(name.clone(), about);
        start = end;
    }
    let mut header = Value::Object(header).to_string();
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }

    let mut file = OutputFile::create(path, ours)?;
    let mut write = |bytes: &[u8]| {
        file.write_all(bytes).map_err(|source| OutputError::Io { path: path.to_owned(), source })?;
        bar.inc(bytes.len() as u64);
        Ok::<(), OutputError>(())
    };
    write(&(header.len() as u64).to_le_bytes())?;
    write(header.as_bytes())?;
    for tensor in tensors {
        tensor.bytes.chunks(PART).try_for_each(&mut write)?;
    }
    Ok(file.finish()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_told_from_other_files() {
        let file = |header: &str| [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
        assert!(is_result(&file(r#"{"__metadata__":{},"lse":{},"output":{},"probs":{}}"#)));
        for other in [r#"{"query":{},"key":{},"value":{}}"#, r#"{"__metadata__":{},"lse":{},"output":{},"w":{}}"#, "x"]
        {
            assert!(!is_result(&file(other)), "{other}");
        }
        assert!(!is_result(b"text") && !is_result(&[0xff; 64]));
    }
}
