//! Safetensors files: one attention read from a file, and its results written to one, whole or not at all.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use cross_attention::{
    AttentionData, AttentionOutput, AttentionProblem, AttentionSpec, Element, Layout, ScoreStage, TensorData,
    TensorRef, TensorSpec, f16,
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use crate::error::Error;
use crate::options::{AxisOrder, Metadata, OptionFlags};

/// One attention, as a file and the flags ask for it.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) problem: AttentionProblem,
    pub(crate) data: AttentionData,
    pub(crate) order: AxisOrder,
    pub(crate) metadata: Metadata,
    /// Tensors of the file that mean nothing here.
    pub(crate) ignored: Vec<String>,
}

/// What the results shall be; the log-sum-exp is always among them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish {
    pub(crate) output: Element,
    pub(crate) probs: bool,
}

/// All that a file may hold.
const NAMES: [&str; 10] =
    ["query", "key", "value", "bias", "mask", "kv_lens", "row_start", "row_end", "alibi_slopes", "sinks"];

/// Reads one attention from the file at `path`.
///
/// # Errors
/// What is wrong with the file, by name of the tensor or option.
pub(crate) fn read(path: &Path, flags: &OptionFlags, wish: Wish) -> Result<Request, Error> {
    let bytes = std::fs::read(path).map_err(|source| Error::Read { source })?;
    parse(&bytes, flags, wish)
}

fn parse(bytes: &[u8], flags: &OptionFlags, wish: Wish) -> Result<Request, Error> {
    let format = |source| Error::Format { source };
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(format)?;
    let file = SafeTensors::deserialize(bytes).map_err(format)?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let options = flags.over(&metadata)?;
    let order = options.layout;

    let (query_spec, query) = operand(&file, "query", order)?;
    let (key_spec, key) = operand(&file, "key", order)?;
    let (value_spec, value) = operand(&file, "value", order)?;
    let mut spec = AttentionSpec::from_tensors(query_spec, key_spec, value_spec);
    spec.output = TensorSpec { element: wish.output, layout: order.layout(spec.output.layout.shape) };
    options.apply(&mut spec);
    spec.lse = true;
    spec.scores = wish.probs.then_some(ScoreStage::Probs);

    let bias = match optional(&file, "bias") {
        Some(view) => Some((broadcast("bias", &view)?, floats("bias", &view)?)),
        None => None,
    };
    let mask = match optional(&file, "mask") {
        Some(view) => Some((broadcast("mask", &view)?, bools("mask", &view)?)),
        None => None,
    };
    spec.bias = bias.as_ref().map(|(layout, data)| TensorSpec { element: data.as_ref().element(), layout: *layout });
    spec.mask = mask.as_ref().map(|(layout, _)| *layout);

    let [batch, q_heads, q_len, _] = spec.query.layout.shape;
    let kv_len = spec.key.layout.shape[2];
    let rows = ("[batch, q_len]", [batch, q_len]);
    let heads = ("[q_heads]", [q_heads]);
    let kv_lens = integers(&file, "kv_lens", ("[batch]", [batch]))?.map(|lens| key_lengths(&lens, kv_len));
    let kv_lens = kv_lens.transpose()?;
    let row_start = integers(&file, "row_start", rows)?.map(saturate);
    let row_end = integers(&file, "row_end", rows)?.map(saturate);
    match (&row_start, &row_end) {
        (Some(_), None) => return Err(Error::HalfRange { given: "row_start", missing: "row_end" }),
        (None, Some(_)) => return Err(Error::HalfRange { given: "row_end", missing: "row_start" }),
        _ => {}
    }
    let alibi_slopes = per_head(&file, "alibi_slopes", heads)?;
    let sinks = per_head(&file, "sinks", heads)?;
    spec.kv_lens = kv_lens.is_some();
    spec.row_ranges = row_start.is_some();
    spec.alibi_slopes = alibi_slopes.is_some();
    spec.sinks = sinks.is_some();

    let problem = AttentionProblem::new(spec)?;
    let data = AttentionData {
        query,
        key,
        value,
        bias: bias.map(|(_, data)| data),
        mask: mask.map(|(_, data)| data),
        kv_lens,
        row_start,
        row_end,
        alibi_slopes,
        sinks,
    };
    let mut ignored: Vec<_> =
        file.names().into_iter().filter(|name| !NAMES.contains(name)).map(str::to_owned).collect();
    ignored.sort();
    Ok(Request { problem, data, order, metadata, ignored })
}

fn optional<'a>(file: &SafeTensors<'a>, name: &str) -> Option<TensorView<'a>> {
    file.tensor(name).ok()
}

/// Query, key or value.
fn operand(file: &SafeTensors<'_>, name: &'static str, order: AxisOrder) -> Result<(TensorSpec, TensorData), Error> {
    let view = optional(file, name).ok_or_else(|| {
        let mut names = file.names();
        names.sort_unstable();
        let found = if names.is_empty() { "nothing".to_owned() } else { format!("{names:?}") };
        Error::MissingTensor { name, found }
    })?;
    let axes = <[usize; 4]>::try_from(view.shape()).map_err(|_| Error::Rank {
        name,
        found: view.shape().to_vec(),
        wanted: format!("4 axes, {}", order.axes()),
    })?;
    let data = floats(name, &view)?;
    Ok((TensorSpec { element: data.as_ref().element(), layout: order.layout(order.swap(axes)) }, data))
}

/// The layout of a tensor of up to four axes that broadcasts from the right.
fn broadcast(name: &'static str, view: &TensorView<'_>) -> Result<Layout, Error> {
    let mut axes = [1; 4];
    let missing = axes.len().checked_sub(view.shape().len()).ok_or_else(|| Error::Rank {
        name,
        found: view.shape().to_vec(),
        wanted: "at most 4 axes, [batch, q_heads, q_len, kv_len], missing ones on the left, each of them may be 1"
            .to_owned(),
    })?;
    axes[missing..].copy_from_slice(view.shape());
    Ok(Layout::bhld(axes))
}

fn floats(name: &'static str, view: &TensorView<'_>) -> Result<TensorData, Error> {
    match view.dtype() {
        Dtype::F32 => Ok(TensorData::F32(numbers(view, f32::from_le_bytes))),
        Dtype::F16 => Ok(TensorData::F16(numbers(view, f16::from_le_bytes))),
        found => Err(Error::ElementType { name, found, possible: "F32, F16" }),
    }
}

fn bools(name: &'static str, view: &TensorView<'_>) -> Result<Vec<bool>, Error> {
    match view.dtype() {
        Dtype::BOOL | Dtype::U8 => Ok(view.data().iter().map(|&byte| byte != 0).collect()),
        found => Err(Error::ElementType { name, found, possible: "BOOL, U8" }),
    }
}

fn per_head(
    file: &SafeTensors<'_>,
    name: &'static str,
    wanted: (&'static str, [usize; 1]),
) -> Result<Option<Vec<f32>>, Error> {
    let Some(view) = optional(file, name) else { return Ok(None) };
    check_shape(name, &view, wanted)?;
    Ok(Some(floats(name, &view)?.to_f32()))
}

fn integers<const N: usize>(
    file: &SafeTensors<'_>,
    name: &'static str,
    wanted: (&'static str, [usize; N]),
) -> Result<Option<Vec<i64>>, Error> {
    let Some(view) = optional(file, name) else { return Ok(None) };
    check_shape(name, &view, wanted)?;
    match view.dtype() {
        Dtype::I32 => Ok(Some(numbers(&view, |bytes| i64::from(i32::from_le_bytes(bytes))))),
        Dtype::I64 => Ok(Some(numbers(&view, i64::from_le_bytes))),
        found => Err(Error::ElementType { name, found, possible: "I32, I64" }),
    }
}

fn check_shape<const N: usize>(
    name: &'static str,
    view: &TensorView<'_>,
    (words, wanted): (&'static str, [usize; N]),
) -> Result<(), Error> {
    if view.shape() == wanted {
        return Ok(());
    }
    Err(Error::Rank { name, found: view.shape().to_vec(), wanted: format!("{words} = {wanted:?}") })
}

/// The elements, copied to where they are aligned. The file's bytes are little-endian.
fn numbers<const N: usize, T>(view: &TensorView<'_>, from_le_bytes: impl Fn([u8; N]) -> T) -> Vec<T> {
    view.data().as_chunks::<N>().0.iter().map(|&bytes| from_le_bytes(bytes)).collect()
}

fn key_lengths(lens: &[i64], kv_len: usize) -> Result<Vec<u32>, Error> {
    lens.iter()
        .enumerate()
        .map(|(batch, &found)| match u32::try_from(found) {
            Ok(len) if len as usize <= kv_len => Ok(len),
            _ => Err(Error::KvLen { batch, found, kv_len }),
        })
        .collect()
}

/// Bounds of key ranges; beyond 32 bits there are no keys, so what is off the end may as well be at it.
#[expect(clippy::cast_possible_truncation, reason = "clamped to the range of i32")]
fn saturate(bounds: Vec<i64>) -> Vec<i32> {
    bounds.into_iter().map(|bound| bound.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32).collect()
}

/// Writes the results beside `path` and then moves them there, so that the file is whole or not there; the weights
/// only if `probs` says so.
///
/// # Errors
/// [`Error::NotReturned`], [`Error::Layout`] and [`Error::Write`].
pub(crate) fn write(
    path: &Path,
    request: &Request,
    results: &AttentionOutput,
    probs: bool,
    about: HashMap<String, String>,
) -> Result<(), Error> {
    write_whole(path, &serialize(path, request, results, probs, about)?)
}

/// Writes beside `path` and then moves what is written there.
///
/// # Errors
/// [`Error::Write`].
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let failed = |source| Error::Write { path: path.to_owned(), source };
    let mut file = temporary_beside(path).map_err(failed)?;
    file.write_all(bytes).and_then(|()| file.flush()).map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}

fn serialize(
    path: &Path,
    request: &Request,
    results: &AttentionOutput,
    probs: bool,
    about: HashMap<String, String>,
) -> Result<Vec<u8>, Error> {
    let failed = |source| Error::Layout { path: path.to_owned(), source };
    let problem = &request.problem;
    let spec = problem.spec();
    let lse = results.lse.as_deref().ok_or(Error::NotReturned { name: "lse" })?;
    let lse_shape = vec![problem.batch(), problem.q_heads(), problem.q_len()];
    let mut tensors = vec![
        ("output", results.output.as_ref(), request.order.swap(spec.output.layout.shape).to_vec()),
        ("lse", TensorRef::F32(lse), lse_shape),
    ];
    if probs {
        let probs = results.scores.as_deref().ok_or(Error::NotReturned { name: "probs" })?;
        tensors.push(("probs", TensorRef::F32(probs), problem.score_shape().to_vec()));
    }
    let bytes: Vec<_> = tensors.iter().map(|&(_, data, _)| le_bytes(data)).collect();
    let mut views = Vec::new();
    for ((name, data, shape), bytes) in tensors.into_iter().zip(&bytes) {
        let dtype = match data.element() {
            Element::F32 => Dtype::F32,
            Element::F16 => Dtype::F16,
        };
        views.push((name, TensorView::new(dtype, shape, bytes).map_err(failed)?));
    }
    safetensors::serialize(views, Some(about)).map_err(failed)
}

fn le_bytes(data: TensorRef<'_>) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        return Cow::Borrowed(data.as_bytes());
    }
    Cow::Owned(match data {
        TensorRef::F32(data) => data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        TensorRef::F16(data) => data.iter().flat_map(|x| x.to_le_bytes()).collect(),
    })
}

/// A file in the folder of `path`, gone when dropped, with the permissions of any other new file.
pub(crate) fn temporary_beside(path: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".cross-attention-").suffix(".part");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Tensor = (&'static str, Dtype, Vec<usize>);

    /// Bytes of a file with these tensors, all zeros.
    fn file(tensors: &[Tensor], metadata: &[(&str, &str)]) -> Vec<u8> {
        let zeros = vec![0; 1 << 16];
        let views = tensors.iter().map(|(name, dtype, shape)| {
            let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            (*name, TensorView::new(*dtype, shape.clone(), &zeros[..bytes]).unwrap())
        });
        let metadata = metadata.iter().map(|&(name, text)| (name.to_owned(), text.to_owned())).collect();
        safetensors::serialize(views, Some(metadata)).unwrap()
    }

    fn with(more: &[Tensor]) -> Vec<Tensor> {
        let mut tensors = vec![
            ("query", Dtype::F32, vec![2, 4, 3, 8]),
            ("key", Dtype::F16, vec![1, 2, 5, 8]),
            ("value", Dtype::F16, vec![1, 2, 5, 6]),
        ];
        for tensor in more {
            tensors.retain(|&(name, ..)| name != tensor.0);
            tensors.push(tensor.clone());
        }
        tensors
    }

    fn load(tensors: &[Tensor], metadata: &[(&str, &str)]) -> Result<Request, Error> {
        let wish = Wish { output: Element::F32, probs: false };
        parse(&file(tensors, metadata), &OptionFlags::default(), wish)
    }

    fn refusal(more: &[Tensor]) -> String {
        load(&with(more), &[]).unwrap_err().to_string()
    }

    #[test]
    fn types_mix_and_a_context_is_shared() {
        let request = load(&with(&[]), &[]).unwrap();
        let spec = request.problem.spec();
        assert_eq!((spec.query.element, spec.key.element), (Element::F32, Element::F16));
        assert_eq!(spec.key.layout.shape, [2, 2, 5, 8]);
        assert_eq!(spec.output, TensorSpec::f32(Layout::bhld([2, 4, 3, 6])));
        assert!(spec.lse && spec.scores.is_none());
    }

    #[test]
    fn lengths_may_stand_outside_heads() {
        let tensors = [
            ("query", Dtype::F32, vec![2, 3, 4, 8]),
            ("key", Dtype::F32, vec![2, 5, 2, 8]),
            ("value", Dtype::F32, vec![2, 5, 2, 6]),
        ];
        let request = load(&tensors, &[("layout", "blhd")]).unwrap();
        let spec = request.problem.spec();
        assert_eq!(spec.query.layout, Layout::blhd([2, 4, 3, 8]));
        assert_eq!(spec.value.layout, Layout::blhd([2, 2, 5, 6]));
        assert_eq!(spec.output.layout, Layout::blhd([2, 4, 3, 6]));
    }

    #[test]
    fn bias_and_mask_broadcast_from_the_right() {
        for (shape, strides) in [
            (vec![], [0, 0, 0, 0]),
            (vec![5], [0, 0, 0, 1]),
            (vec![3, 1], [0, 0, 1, 0]),
            (vec![4, 3, 5], [0, 15, 5, 1]),
            (vec![2, 1, 1, 5], [5, 0, 0, 1]),
        ] {
            let tensors = with(&[("bias", Dtype::F16, shape.clone()), ("mask", Dtype::BOOL, shape.clone())]);
            let request = load(&tensors, &[]).unwrap();
            let spec = request.problem.spec();
            let bias = spec.bias.unwrap();
            assert_eq!((bias.layout.shape, bias.layout.strides), ([2, 4, 3, 5], strides), "{shape:?}");
            assert_eq!(bias.element, Element::F16);
            assert_eq!(spec.mask.unwrap().strides, strides, "{shape:?}");
        }
    }

    #[test]
    fn empty_tensors_are_read() {
        let request = load(
            &with(&[
                ("query", Dtype::F32, vec![2, 4, 0, 8]),
                ("row_start", Dtype::I32, vec![2, 0]),
                ("row_end", Dtype::I64, vec![2, 0]),
            ]),
            &[],
        );
        assert!(request.unwrap().problem.is_empty());
        assert!(
            load(&with(&[("key", Dtype::F32, vec![2, 2, 0, 8]), ("value", Dtype::F32, vec![2, 2, 0, 6])]), &[]).is_ok()
        );
    }

    #[test]
    fn refusals_name_the_tensor() {
        assert_eq!(
            load(&[("key", Dtype::F32, vec![1])], &[]).unwrap_err().to_string(),
            "tensor query is missing: the file holds [\"key\"], needs at least query, key and value"
        );
        assert_eq!(
            refusal(&[("query", Dtype::F32, vec![2, 3, 8])]),
            "query has shape [2, 3, 8], needs 4 axes, [batch, heads, len, dim]"
        );
        assert_eq!(refusal(&[("key", Dtype::BF16, vec![1, 2, 5, 8])]), "key has element type BF16, possible: F32, F16");
        assert_eq!(refusal(&[("mask", Dtype::F32, vec![5])]), "mask has element type F32, possible: BOOL, U8");
        assert!(refusal(&[("bias", Dtype::F32, vec![1, 1, 1, 1, 5])]).contains("needs at most 4 axes"));
        assert!(refusal(&[("bias", Dtype::F32, vec![4])]).contains("bias has shape [1, 1, 1, 4], needs [2, 4, 3, 5]"));
        assert_eq!(refusal(&[("sinks", Dtype::F32, vec![2])]), "sinks has shape [2], needs [q_heads] = [4]");
        assert_eq!(refusal(&[("kv_lens", Dtype::F32, vec![2])]), "kv_lens has element type F32, possible: I32, I64");
        assert_eq!(
            refusal(&[("row_end", Dtype::I32, vec![2, 3])]),
            "row_end is there without row_start; row ranges need both row_start and row_end"
        );
        assert_eq!(
            key_lengths(&[5, -1], 5).unwrap_err().to_string(),
            "kv_lens[1] is -1, possible: 0 to 5, the number of keys"
        );
        assert!(key_lengths(&[6], 5).is_err());
        assert!(key_lengths(&[i64::MAX], 5).is_err());
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let whole = file(&with(&[]), &[]);
        let wish = Wish { output: Element::F32, probs: false };
        for len in 0..whole.len() {
            let error = parse(&whole[..len], &OptionFlags::default(), wish).unwrap_err();
            assert!(matches!(error, Error::Format { .. }), "{len}: {error}");
        }
    }

    #[test]
    fn unknown_tensors_are_told() {
        let request = load(&with(&[("labels", Dtype::I64, vec![3])]), &[]).unwrap();
        assert_eq!(request.ignored, ["labels"]);
    }

    #[test]
    fn ranges_beyond_32_bits_mean_all_or_nothing() {
        assert_eq!(saturate(vec![i64::MIN, -1, 7, i64::MAX]), [i32::MIN, -1, 7, i32::MAX]);
    }
}
