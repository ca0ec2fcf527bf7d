//! Results as a safetensors file: the header, then every tensor as it lies in memory, whole or not there.

use std::io::Write;
use std::path::Path;

use cross_attention::files::{Ours, OutputError, OutputFile};
use cross_attention::{AttentionOutput, AttentionProblem, TensorRef};
use indicatif::ProgressBar;
use serde_json::{Map, Value, json};

use crate::error::Error;
use crate::options::AxisOrder;

/// What a file must be that is replaced.
pub(crate) const RESULT: Ours = Ours { what: "a result of this program", is: is_result };

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
            && header.keys().all(|name| names.contains(&name.as_str()) || name == "probs")
    })
}

/// Writes the results; the weights only if `probs` says so.
///
/// # Errors
/// [`Error::NotReturned`] and [`Error::Output`].
pub(crate) fn write(
    path: &Path,
    (problem, order): (&AttentionProblem, AxisOrder),
    results: &AttentionOutput,
    probs: bool,
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
    // wider elements first, so that all of them are aligned
    tensors.sort_by_key(|(_, data, _)| std::cmp::Reverse(data.element().size_bytes()));

    // names in the order of the alphabet, so that the same results are the same bytes
    let mut header = Map::new();
    header.insert(
        "__metadata__".to_owned(),
        about.into_iter().map(|(name, text)| (name.to_owned(), json!(text))).collect(),
    );
    let mut start = 0;
    for (name, data, shape) in &tensors {
        // safetensors has the same names in capitals
        let dtype = data.element().name().to_uppercase();
        let end = start + data.len() * data.element().size_bytes();
        header.insert((*name).to_owned(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, end] }));
        start = end;
    }
    let mut header = Value::Object(header).to_string();
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }

    let mut file = OutputFile::create(path, RESULT)?;
    let mut write = |bytes: &[u8]| {
        file.write_all(bytes).map_err(|source| OutputError::Io { path: path.to_owned(), source })?;
        bar.inc(bytes.len() as u64);
        Ok::<(), OutputError>(())
    };
    write(&(header.len() as u64).to_le_bytes())?;
    write(header.as_bytes())?;
    for (_, data, _) in tensors {
        if cfg!(target_endian = "little") {
            data.as_bytes().chunks(PART).try_for_each(&mut write)?;
        } else {
            // numbers are little-endian in the file: each one turned round
            let size = data.element().size_bytes();
            for number in data.as_bytes().chunks(size) {
                write(&number.iter().rev().copied().collect::<Vec<_>>())?;
            }
        }
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
