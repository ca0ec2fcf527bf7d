//! One attention as a file describes it: the problem from its header, the numbers from where they lie in it.

use std::borrow::Cow;
use std::path::Path;

use cross_attention::{
    AlibiSlopes, AttentionInputs, AttentionProblem, AttentionSpec, Element, Layout, Paged, ProblemError, ScoreStage,
    TensorData, TensorRef, TensorSpec, Terms, bf16, f16,
};
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use crate::backward::GIVEN;
use crate::error::Error;
use crate::input::{Bytes, Contents};
use crate::options::{AxisOrder, Metadata, OptionFlags, unknown_options};
use crate::terminal::Terminal;
use crate::text::{listed, nearest};

/// One attention, as a file's header and the flags ask for it.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) problem: AttentionProblem,
    pub(crate) order: AxisOrder,
    pub(crate) metadata: Metadata,
    /// What the file says and means nothing here, in sentences.
    pub(crate) notes: Vec<String>,
}

/// What the results shall be; the log-sum-exp is always among them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish {
    pub(crate) output: Element,
    pub(crate) probs: bool,
    /// Whether the file is one for gradients, which holds more.
    pub(crate) backward: bool,
}

/// All that a file may hold.
const NAMES: [&str; 14] = [
    "query",
    "key",
    "value",
    "bias",
    "mask",
    "key_scale",
    "value_scale",
    "q_lens",
    "kv_lens",
    "row_start",
    "row_end",
    "alibi_slopes",
    "sinks",
    "block_table",
];

/// Reads the problem of the file at `path`, of which only the header is looked at.
///
/// # Errors
/// What is wrong with the file, by its name and that of the tensor or option.
pub(crate) fn problem(
    path: &Path,
    flags: &OptionFlags,
    wish: Wish,
    terminal: &Terminal,
) -> Result<AttentionProblem, Error> {
    let named = |source| Error::Input { path: path.to_owned(), source: Box::new(source) };
    let request = Contents::read(path).and_then(|contents| request(&contents, flags, wish)).map_err(named)?;
    request.warn(path, terminal);
    Ok(request.problem)
}

impl Request {
    /// Says what the file says and means nothing here.
    pub(crate) fn warn(&self, path: &Path, terminal: &Terminal) {
        for note in &self.notes {
            terminal.note(format_args!("warning: {}: {note}", path.display()));
        }
    }
}

/// What a header asks for.
///
/// # Errors
/// What is wrong with it, by name of the tensor or option.
pub(crate) fn request(file: &Contents, flags: &OptionFlags, wish: Wish) -> Result<Request, Error> {
    let options = flags.over(&file.metadata)?;
    let order = options.layout;
    let query = operand(file, "query", order, &FLOATS)?;
    let [key, value] = [operand(file, "key", order, &STORED)?, operand(file, "value", order, &STORED)?];
    let mut spec = AttentionSpec::from_tensors(query, key, value);
    for (name, scale) in [("key_scale", &mut spec.key_scale), ("value_scale", &mut spec.value_scale)] {
        if file.info(name).is_some() {
            *scale = Some(operand(file, name, order, &SCALES)?);
        }
    }
    spec.output = TensorSpec { element: wish.output, layout: order.layout(spec.output.layout.shape) };
    options.apply(&mut spec);
    spec.lse = true;
    spec.scores = wish.probs.then_some(ScoreStage::Probs);
    if let Some(info) = file.info("bias") {
        spec.bias = Some(TensorSpec { element: floats_of("bias", info)?, layout: broadcast("bias", info)? });
    }
    if let Some(info) = file.info("mask") {
        let layout = broadcast("mask", info)?;
        one_of("mask", info, &[Dtype::BOOL, Dtype::U8], "BOOL, U8")?;
        spec.mask = Some(layout);
    }
    let [batch, q_heads, q_len, _] = spec.query.layout.shape;
    if let Some(info) = file.info("block_table") {
        one_of("block_table", info, &[Dtype::I32, Dtype::I64], "I32, I64")?;
        let [of_batch, table_len] = <[usize; 2]>::try_from(&info.shape[..]).unwrap_or_default();
        if of_batch != batch || info.shape.len() != 2 {
            let wanted = format!("[batch, pages of an entry] = [{batch}, any]");
            return Err(Error::Rank { name: "block_table", found: info.shape.clone(), wanted });
        }
        // as many keys as bias or mask speak of, or as the pages hold
        let pairs = spec.bias.iter().map(|bias| bias.layout).chain(spec.mask).map(|layout| layout.shape[3]);
        let all = table_len.saturating_mul(spec.key.layout.shape[2]);
        let kv_len = pairs.filter(|keys| *keys > 1).max().unwrap_or(all);
        spec.paged = Some(Paged { table_len, kv_len });
    }
    let rows = ("[batch, q_len]", &[batch, q_len][..]);
    let heads = ("[q_heads]", &[q_heads][..]);
    let entries = ("[batch]", &[batch][..]);
    let given = |name, wanted, of: fn(&'static str, &TensorInfo) -> Result<(), Error>| match file.info(name) {
        None => Ok(false),
        Some(info) => check_shape(name, info, wanted).and_then(|()| of(name, info)).map(|()| true),
    };
    let integers = |name, info: &TensorInfo| one_of(name, info, &[Dtype::I32, Dtype::I64], "I32, I64");
    let floats = |name, info: &TensorInfo| floats_of(name, info).map(drop);
    spec.q_lens = given("q_lens", entries, integers)?;
    spec.kv_lens = given("kv_lens", entries, integers)?;
    spec.row_ranges = match [given("row_start", rows, integers)?, given("row_end", rows, integers)?] {
        [true, false] => return Err(Error::HalfRange { given: "row_start", missing: "row_end" }),
        [false, true] => return Err(Error::HalfRange { given: "row_end", missing: "row_start" }),
        [given, _] => given,
    };
    // those of two axes are of every batch entry
    let by_batch = file.info("alibi_slopes").is_some_and(|info| info.shape.len() == 2);
    let (slopes, shape) = match by_batch {
        true => (AlibiSlopes::PerBatchAndHead, ("[batch, q_heads]", &[batch, q_heads][..])),
        false => (AlibiSlopes::PerHead, heads),
    };
    spec.alibi_slopes = given("alibi_slopes", shape, floats)?.then_some(slopes);
    spec.sinks = given("sinks", heads, floats)?;

    spec.row_state = wish.backward;
    let mut notes: Vec<String> =
        unknown_tensors(file, wish.backward).into_iter().chain(unknown_options(&file.metadata)).collect();
    notes.extend(options.idle(&spec).into_iter().map(str::to_owned));
    let problem = AttentionProblem::new(spec).map_err(|error| order.as_in_file(error))?;
    Ok(Request { problem, order, metadata: file.metadata.clone(), notes })
}

/// Tensors that mean nothing here, in a sentence.
fn unknown_tensors(file: &Contents, backward: bool) -> Option<String> {
    let mut names = file.names();
    let more: &[&str] = if backward { &GIVEN } else { &[] };
    names.retain(|name| !NAMES.contains(&name.as_str()) && !more.contains(&name.as_str()));
    let shown = listed(names.iter().map(String::as_str));
    let meant: Vec<_> = names.iter().filter_map(|name| nearest(name, &NAMES)).collect();
    let hint = if meant.is_empty() { String::new() } else { format!("; is {} meant?", meant.join(", ")) };
    match names.len() {
        0 => None,
        1 => Some(format!("tensor {shown} is not one of attention's, ignored{hint}")),
        count => Some(format!("{count} tensors are not attention's, ignored: {shown}{hint}")),
    }
}

/// The numbers of one attention; those of query, key, value and bias lie in the file where they can.
#[derive(Debug)]
pub(crate) struct Operands<'a> {
    query: Floats<'a>,
    key: Floats<'a>,
    value: Floats<'a>,
    terms: Terms<Floats<'a>, Vec<bool>, Vec<u32>, Vec<i32>, Vec<f32>>,
}

impl<'a> Operands<'a> {
    /// Finds the numbers of a request in the bytes of its file.
    ///
    /// # Errors
    /// [`Error::Length`]; [`Error::Memory`] where something has to be copied and cannot be.
    pub(crate) fn new(file: &Contents, bytes: &'a [u8], problem: &AttentionProblem) -> Result<Self, Error> {
        let data = |name| file.info(name).map(|info| (file.data(bytes, info), info.dtype));
        let floats = |name| data(name).map(|(bytes, dtype)| Floats::new(bytes, dtype)).transpose();
        let needed = |name| floats(name)?.ok_or(Error::MissingTensor { name, found: "nothing".to_owned() });
        let per_head = |name| Ok::<_, Error>(floats(name)?.map(|data| data.to_f32()));
        let integers = |name| data(name).map(|(bytes, dtype)| integers(bytes, dtype)).transpose();
        let lens = |name, most| integers(name)?.map(|lens| lengths(name, &lens, most)).transpose();
        // what does not fit 32 bits is no page either
        let bounds = |name| Ok::<_, Error>(integers(name)?.map(saturate));
        let mask = |(bytes, _): (&[u8], Dtype)| {
            let mut mask = reserved(bytes.len())?;
            mask.extend(bytes.iter().map(|&byte| byte != 0));
            Ok::<_, Error>(mask)
        };
        Ok(Self {
            query: needed("query")?,
            key: needed("key")?,
            value: needed("value")?,
            terms: Terms {
                bias: floats("bias")?,
                mask: data("mask").map(mask).transpose()?,
                key_scale: floats("key_scale")?,
                value_scale: floats("value_scale")?,
                q_lens: lens("q_lens", problem.q_len())?,
                kv_lens: lens("kv_lens", problem.kv_len())?,
                row_start: bounds("row_start")?,
                row_end: bounds("row_end")?,
                alibi_slopes: per_head("alibi_slopes")?,
                sinks: per_head("sinks")?,
                block_table: bounds("block_table")?,
            },
        })
    }

    pub(crate) fn as_inputs(&self) -> AttentionInputs<'_> {
        AttentionInputs {
            query: self.query.as_ref(),
            key: self.key.as_ref(),
            value: self.value.as_ref(),
            terms: self.terms.by_kind(Floats::as_ref, Vec::as_slice, Vec::as_slice, Vec::as_slice, Vec::as_slice),
        }
    }
}

/// Elements where they lie, or a copy where they are not aligned.
#[derive(Debug)]
enum Floats<'a> {
    F32(Cow<'a, [f32]>),
    F16(Cow<'a, [f16]>),
    Bf16(Cow<'a, [bf16]>),
    I8(Cow<'a, [i8]>),
}

impl<'a> Floats<'a> {
    fn new(bytes: &'a [u8], dtype: Dtype) -> Result<Self, Error> {
        Ok(match dtype {
            Dtype::F16 => Self::F16(numbers(bytes, f16::from_le_bytes)?),
            Dtype::BF16 => Self::Bf16(numbers(bytes, bf16::from_le_bytes)?),
            Dtype::I8 => Self::I8(numbers(bytes, i8::from_le_bytes)?),
            _ => Self::F32(numbers(bytes, f32::from_le_bytes)?),
        })
    }

    fn as_ref(&self) -> TensorRef<'_> {
        match self {
            Self::F32(data) => TensorRef::F32(data),
            Self::F16(data) => TensorRef::F16(data),
            Self::Bf16(data) => TensorRef::Bf16(data),
            Self::I8(data) => TensorRef::I8(data),
        }
    }

    fn to_f32(&self) -> Vec<f32> {
        let data = self.as_ref();
        (0..data.len()).map(|n| data.get(n)).collect()
    }
}

/// The elements of little-endian bytes.
fn numbers<const N: usize, T: bytemuck::Pod>(
    bytes: &[u8],
    from_le_bytes: impl Fn([u8; N]) -> T,
) -> Result<Cow<'_, [T]>, Error> {
    if cfg!(target_endian = "little")
        && let Ok(numbers) = bytemuck::try_cast_slice(bytes)
    {
        return Ok(Cow::Borrowed(numbers));
    }
    let mut numbers = reserved(bytes.len() / N)?;
    numbers.extend(bytes.as_chunks::<N>().0.iter().map(|&bytes| from_le_bytes(bytes)));
    Ok(Cow::Owned(numbers))
}

fn integers(bytes: &[u8], dtype: Dtype) -> Result<Vec<i64>, Error> {
    let mut numbers = reserved(bytes.len() * 8 / dtype.bitsize())?;
    if dtype == Dtype::I32 {
        numbers.extend(bytes.as_chunks().0.iter().map(|&bytes| i64::from(i32::from_le_bytes(bytes))));
    } else {
        numbers.extend(bytes.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)));
    }
    Ok(numbers)
}

/// Room for `len` elements.
fn reserved<T>(len: usize) -> Result<Vec<T>, Error> {
    let mut room = vec![];
    room.try_reserve_exact(len).map_err(|_| Error::Memory { bytes: len as u128 * size_of::<T>() as u128 })?;
    Ok(room)
}

/// The types of elements that stand for themselves, of keys and values, and of scales; each with its name.
const FLOATS: ([Dtype; 3], &str) = ([Dtype::F32, Dtype::F16, Dtype::BF16], "F32, F16, BF16");
const STORED: ([Dtype; 4], &str) = ([Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::I8], "F32, F16, BF16, I8");
const SCALES: ([Dtype; 2], &str) = ([Dtype::F32, Dtype::F16], "F32, F16");

/// Query, key or value, or scales of these.
fn operand<const N: usize>(
    file: &Contents,
    name: &'static str,
    order: AxisOrder,
    (dtypes, possible): &([Dtype; N], &'static str),
) -> Result<TensorSpec, Error> {
    let info = file.info(name).ok_or_else(|| {
        let names = file.names();
        let found = if names.is_empty() {
            "nothing".to_owned()
        } else {
            format!("[{}]", listed(names.iter().map(String::as_str)))
        };
        Error::MissingTensor { name, found }
    })?;
    let axes = <[usize; 4]>::try_from(&info.shape[..]).map_err(|_| Error::Rank {
        name,
        found: info.shape.clone(),
        wanted: format!("4 axes, {}", order.axes()),
    })?;
    one_of(name, info, dtypes, possible)?;
    Ok(TensorSpec { element: element_of(info.dtype), layout: order.layout(order.swap(axes)) })
}

/// The layout of a tensor of up to four axes that broadcasts from the right.
fn broadcast(name: &'static str, info: &TensorInfo) -> Result<Layout, Error> {
    let mut axes = [1; 4];
    let missing = axes.len().checked_sub(info.shape.len()).ok_or_else(|| Error::Rank {
        name,
        found: info.shape.clone(),
        wanted: "at most 4 axes, [batch, q_heads, q_len, kv_len], missing ones on the left, each of them may be 1"
            .to_owned(),
    })?;
    axes[missing..].copy_from_slice(&info.shape);
    Ok(Layout::bhld(axes))
}

fn floats_of(name: &'static str, info: &TensorInfo) -> Result<Element, Error> {
    let (dtypes, possible) = FLOATS;
    one_of(name, info, &dtypes, possible)?;
    Ok(element_of(info.dtype))
}

/// The element of a type that was found possible.
const fn element_of(dtype: Dtype) -> Element {
    match dtype {
        Dtype::F16 => Element::F16,
        Dtype::BF16 => Element::Bf16,
        Dtype::I8 => Element::I8,
        _ => Element::F32,
    }
}

fn one_of(name: &'static str, info: &TensorInfo, dtypes: &[Dtype], possible: &'static str) -> Result<(), Error> {
    let found = info.dtype;
    if dtypes.contains(&found) { Ok(()) } else { Err(Error::ElementType { name, found, possible }) }
}

fn check_shape(name: &'static str, info: &TensorInfo, (words, wanted): (&str, &[usize])) -> Result<(), Error> {
    if info.shape == wanted {
        return Ok(());
    }
    Err(Error::Rank { name, found: info.shape.clone(), wanted: format!("{words} = {wanted:?}") })
}

impl AxisOrder {
    /// A refusal with shapes in the order of the file's axes.
    fn as_in_file(self, error: ProblemError) -> Error {
        match error {
            ProblemError::Shape {
                name: name @ ("query" | "key" | "value" | "output" | "key_scale" | "value_scale"),
                wanted,
                found,
            } if self != Self::Bhld => {
                let [wanted, found] = [wanted, found].map(|shape| self.swap(shape));
                let axes = self.axes();
                Error::Rank {
                    name,
                    found: found.to_vec(),
                    wanted: format!("{axes} = {wanted:?} (batch may also be 1)"),
                }
            }
            ProblemError::PageShape { name, wanted, found } if self != Self::Bhld => {
                let [wanted, found] = [wanted, found].map(|shape| self.swap(shape));
                ProblemError::PageShape { name, wanted, found }.into()
            }
            ProblemError::Overflow { name, shape, .. } => {
                let shape = if matches!(name, "bias" | "mask" | "scores") { shape } else { self.swap(shape) };
                Error::TooLarge { name, shape }
            }
            error => error.into(),
        }
    }
}

/// Bytes that a tensor takes.
pub(crate) const fn bytes_of(info: &TensorInfo) -> usize {
    info.data_offsets.1 - info.data_offsets.0
}

/// Lengths, one for each entry of the batch, of at most so many tokens.
fn lengths(name: &'static str, lens: &[i64], most: usize) -> Result<Vec<u32>, Error> {
    lens.iter()
        .enumerate()
        .map(|(batch, &found)| match u32::try_from(found) {
            Ok(len) if len as usize <= most => Ok(len),
            _ => Err(Error::Length { name, batch, found, most }),
        })
        .collect()
}

/// Bounds of key ranges; beyond 32 bits there are no keys, so what is off the end may as well be at it.
#[expect(clippy::cast_possible_truncation, reason = "clamped to the range of i32")]
fn saturate(bounds: Vec<i64>) -> Vec<i32> {
    bounds.into_iter().map(|bound| bound.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32).collect()
}

/// A file that was opened, and what it asks for.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) request: Request,
    contents: Contents,
    bytes: Bytes,
}

impl Opened {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// As [`request`]; the file is not named.
    pub(crate) fn open(path: &Path, flags: &OptionFlags, wish: Wish, terminal: &mut Terminal) -> Result<Self, Error> {
        let bar = terminal.start_bytes("reading", std::fs::metadata(path).map_or(0, |metadata| metadata.len()));
        let opened = Bytes::open(path, &bar);
        bar.finish_and_clear();
        let (contents, bytes) = opened?;
        Ok(Self { request: request(&contents, flags, wish)?, contents, bytes })
    }

    /// Its header.
    pub(crate) const fn contents(&self) -> &Contents {
        &self.contents
    }

    /// The bytes of a tensor.
    pub(crate) fn data(&self, info: &TensorInfo) -> &[u8] {
        self.contents.data(&self.bytes, info)
    }

    /// The shape of a tensor as the file has it.
    pub(crate) fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.contents.info(name).map(|info| info.shape.clone())
    }

    /// A tensor that is no input of the attention, F32, F16 or BF16, and its shape.
    ///
    /// # Errors
    /// [`Error::ElementType`], [`Error::Memory`].
    pub(crate) fn floats(&self, name: &'static str) -> Result<Option<(TensorData, Vec<usize>)>, Error> {
        let Some(info) = self.contents.info(name) else { return Ok(None) };
        floats_of(name, info)?;
        let data = Floats::new(self.data(info), info.dtype)?;
        Ok(Some((data.as_ref().to_owned(), info.shape.clone())))
    }

    /// The numbers.
    ///
    /// # Errors
    /// As [`Operands::new`].
    pub(crate) fn operands(&self) -> Result<Operands<'_>, Error> {
        Operands::new(&self.contents, &self.bytes, &self.request.problem)
    }
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

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
        parse(&file(tensors, metadata))
    }

    /// All that is read of a file.
    fn parse(bytes: &[u8]) -> Result<Request, Error> {
        let contents = Contents::parse(bytes, bytes.len() as u64)?;
        let request =
            request(&contents, &OptionFlags::default(), Wish { output: Element::F32, probs: false, backward: false })?;
        Operands::new(&contents, bytes, &request.problem)?;
        Ok(request)
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
        let f64s = refusal(&[("key", Dtype::F64, vec![1, 2, 5, 8])]);
        assert_eq!(f64s, "key has element type F64, possible: F32, F16, BF16, I8");
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
            lengths("kv_lens", &[5, -1], 5).unwrap_err().to_string(),
            "kv_lens[1] is -1, possible: 0 to 5, the tokens of the sequence"
        );
        assert!(lengths("kv_lens", &[6], 5).is_err());
        assert!(lengths("kv_lens", &[i64::MAX], 5).is_err());
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let whole = file(&with(&[]), &[]);
        for len in 0..whole.len() {
            let error = parse(&whole[..len]).unwrap_err();
            assert!(matches!(error, Error::Format { .. }), "{len}: {error}");
        }
    }

    #[test]
    fn what_means_nothing_is_told_once() {
        let notes = |tensors: &[Tensor], metadata: &[(&str, &str)]| load(&with(tensors), metadata).unwrap().notes;
        let long = |name| (name, Dtype::I64, vec![3]);
        assert_eq!(notes(&[long("labels")], &[]), [r#"tensor "labels" is not one of attention's, ignored"#]);
        assert_eq!(
            notes(&[long("maks"), long("a\u{1b}")], &[]),
            [r#"2 tensors are not attention's, ignored: "a\u001b", "maks"; is mask meant?"#]
        );
        assert_eq!(
            notes(&[], &[("scael", "2"), ("producer", "somebody")]),
            [r#"metadata "scael" is not one of attention's options, ignored; is scale meant?"#]
        );
        assert!(notes(&[], &[("offset", "fixed:2")])[0].starts_with("offset does nothing"));
        assert!(notes(&[], &[("offset", "fixed:2"), ("window_left", "3")]).is_empty());
    }

    #[test]
    fn a_name_stands_there_once() {
        for (once, twice) in [("\"key\"", "\"query\""), ("\"offset\":\"top_left\"", "\"layout\":\"top_left\"")] {
            let whole = file(&with(&[]), &[("layout", "bhld"), ("offset", "top_left")]);
            assert!(parse(&whole).is_ok());
            let len = 8 + usize::try_from(u64::from_le_bytes(whole[..8].try_into().unwrap())).unwrap();
            let header = std::str::from_utf8(&whole[8..len]).unwrap();
            assert!(header.contains(once));
            let header = header.replace(once, twice);
            let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &whole[len..]].concat();
            assert!(parse(&bytes).unwrap_err().to_string().contains("stands there twice"), "{header}");
        }
    }

    #[test]
    fn numbers_that_are_not_aligned_are_copied() {
        let bytes = [0u8, 0, 0, 128, 63, 0, 0, 0, 64, 0];
        let found = numbers(&bytes[1..9], f32::from_le_bytes).unwrap();
        let aligned = numbers(&bytes[1..9], f32::from_le_bytes).unwrap().to_vec();
        assert_eq!((&found[..], aligned.len()), (&[1.0, 2.0][..], 2));
    }

    #[test]
    fn refusals_have_the_axes_of_the_file() {
        let tensors = [
            ("query", Dtype::F32, vec![2, 3, 4, 8]),
            ("key", Dtype::F32, vec![2, 5, 2, 8]),
            ("value", Dtype::F32, vec![2, 6, 2, 6]),
        ];
        assert_eq!(
            load(&tensors, &[("layout", "blhd")]).unwrap_err().to_string(),
            "value has shape [2, 6, 2, 6], needs [batch, len, heads, dim] = [2, 5, 2, 6] (batch may also be 1)"
        );
    }

    #[test]
    fn ranges_beyond_32_bits_mean_all_or_nothing() {
        assert_eq!(saturate(vec![i64::MIN, -1, 7, i64::MAX]), [i32::MIN, -1, 7, i32::MAX]);
    }
}
