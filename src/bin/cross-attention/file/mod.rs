//! One attention as a file describes it: the problem from its header, the numbers from where they lie in it.

mod flags;
mod form;
mod operands;
mod past;
#[cfg(test)]
mod tests;

use std::path::Path;

use cross_attention::{
    AlibiSlopes, AttentionProblem, AttentionSpec, Diagonal, Element, Layout, Paged, ScoreStage, TensorData, TensorSpec,
};
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

pub(crate) use flags::FileFlags;
pub(crate) use form::one_of;
pub(crate) use form::{Form, Placed};
use form::{SCALES, as_in_file, broadcast, check_shape, floats_of, operand, placed};
use operands::Floats;
pub(crate) use operands::{Operands, reserved};
pub(crate) use past::Past;

use crate::backward::GIVEN;
use crate::error::Error;
use crate::input::{Bytes, Contents, Source};
use crate::options::{AxisOrder, Metadata, is_option, unknown_options};
use crate::terminal::Terminal;
use crate::text::{listed, nearest};

/// One attention, as a file's header and the flags ask for it.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) problem: AttentionProblem,
    /// Query, key and value as they stand in the file.
    pub(crate) placed: [Placed; 3],
    /// Keys and values in front of them.
    pub(crate) past: Option<Past>,
    /// Whether bias or mask is shorter than the keys.
    pub(crate) padded: bool,
    /// The order of tensors of 4 axes.
    pub(crate) order: AxisOrder,
    pub(crate) metadata: Metadata,
    /// What the file says and means nothing here, in sentences.
    pub(crate) notes: Vec<String>,
}

/// What the results shall be; the log-sum-exp is always among them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish {
    pub(crate) output: Element,
    pub(crate) scores: Option<ScoreStage>,
    /// Whether maximum and sum of each row are wanted too.
    pub(crate) row_state: bool,
    /// Whether the file is one for gradients, which holds more.
    pub(crate) backward: bool,
}

impl Wish {
    /// An output of F32, and no more.
    pub(crate) const PLAIN: Self = Self { output: Element::F32, scores: None, row_state: false, backward: false };

    /// What gradients need: they are those of the output before it is rounded to what a file gets.
    pub(crate) const BACKWARD: Self = Self { backward: true, ..Self::PLAIN };
}

/// All that a file may hold.
const NAMES: [&str; 18] = [
    "query",
    "key",
    "value",
    "qkv",
    "kv",
    "past_key",
    "past_value",
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

/// Tensors that have the order of axes that is asked for, where they have 4.
const ORDERED: [&str; 7] = ["query", "key", "value", "past_key", "past_value", "key_scale", "value_scale"];

/// Whether it is the name of a tensor that a file may hold.
pub(crate) fn is_tensor(name: &str) -> bool {
    NAMES.contains(&name) || GIVEN.contains(&name)
}

/// Reads the problem of the file at `path`, of which only the header is looked at.
///
/// # Errors
/// What is wrong with the file, by its name and that of the tensor or option.
pub(crate) fn problem(
    path: &Path,
    flags: &FileFlags,
    wish: Wish,
    terminal: &Terminal,
) -> Result<AttentionProblem, Error> {
    let source = Source::of(path);
    let named = |error| Error::Input { path: source.label(), source: Box::new(error) };
    let request = Contents::read(&source).and_then(|contents| request(&contents, flags, wish)).map_err(named)?;
    request.warn(&source.label(), terminal);
    Ok(request.problem)
}

impl Request {
    /// The order of the output's axes, where it is another one than usual.
    pub(crate) const fn layout_name(&self) -> Option<&'static str> {
        match self.placed[0].form {
            Form::Four(AxisOrder::Blhd) => Some("blhd"),
            Form::Four(AxisOrder::Bhld) | Form::Joined => None,
        }
    }

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
pub(crate) fn request(file: &Contents, flags: &FileFlags, wish: Wish) -> Result<Request, Error> {
    let reading = flags.over(&file.metadata)?;
    let (options, order) = (&reading.options, reading.options.layout);
    let placed = placed(file, &reading)?;
    if let Some(asked) = flags.options.order() {
        let ordered = |name: &&str| file.info(name).is_some_and(|info| info.shape.len() == 4);
        let packed = placed.iter().any(|placed| placed.form == Form::Four(asked));
        if !packed && !ORDERED.iter().any(ordered) {
            return Err(Error::NoOrder { found: placed.map(|placed| placed.tensor) });
        }
    }
    let [query, key, value] = placed.map(|placed| placed.spec);
    let mut spec = AttentionSpec::from_tensors(query, key, value);
    let heads = ("kv_heads", Some(key.layout.shape[1]));
    for (name, scale) in [("key_scale", &mut spec.key_scale), ("value_scale", &mut spec.value_scale)] {
        if file.info(name).is_some() {
            *scale = Some(operand(file, name, heads, order, &SCALES)?.0);
        }
    }
    let past = Past::new(file, &placed, order)?;
    if let Some(past) = &past {
        past.join(&mut spec);
    }
    spec.output = TensorSpec { element: wish.output, layout: placed[0].form.layout(spec.output.layout.shape) };
    options.apply(&mut spec);
    spec.lse = true;
    spec.scores = wish.scores;
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

    let padded = pad(&mut spec, reading.pad_mask)?;
    spec.row_state = wish.backward || wish.row_state;
    let mut notes: Vec<String> =
        unknown_tensors(file, wish.backward).into_iter().chain(unknown_options(&file.metadata)).collect();
    notes.extend(options.idle(&spec).into_iter().map(str::to_owned));
    if reading.pad_mask && spec.bias.is_none() && spec.mask.is_none() {
        notes.push("pad_mask does nothing: there is neither a bias nor a mask".to_owned());
    }
    if let Some(past) = past.as_ref().filter(|past| past.len > 0 && spec.causal == Some(Diagonal::TopLeft)) {
        notes.push(format!(
            "causal top_left puts the first query on the first key of the past; fixed:{} puts it on the first new key",
            past.len
        ));
    }
    let problem = AttentionProblem::new(spec).map_err(|error| as_in_file(placed.map(|placed| placed.form), error))?;
    Ok(Request { problem, placed, past, padded, order, metadata: file.metadata.clone(), notes })
}

/// Widens bias and mask that are shorter than the keys, if that is asked for; whether one of them was.
fn pad(spec: &mut AttentionSpec, asked: bool) -> Result<bool, Error> {
    let [batch, q_heads, q_len, _] = spec.query.layout.shape;
    // pages have as many keys as bias and mask speak of
    let kv_len = spec.paged.map_or(spec.key.layout.shape[2], |paged| paged.kv_len);
    let mut padded = false;
    let pairs = [("bias", spec.bias.as_mut().map(|bias| &mut bias.layout)), ("mask", spec.mask.as_mut())];
    for (name, layout) in pairs.into_iter().filter_map(|(name, layout)| Some((name, layout?))) {
        let found = layout.shape;
        // one key is a length like any other where that is asked for, else it stands for all keys
        if found[3] >= kv_len || (!asked && found[3] == 1) {
            continue;
        }
        if !asked {
            return Err(Error::ShortMask { name, found, wanted: [batch, q_heads, q_len, kv_len] });
        }
        let [batch, heads, rows, _] = found;
        *layout = Layout::bhld([batch, heads, rows, kv_len]);
        padded = true;
    }
    Ok(padded)
}

/// Tensors that mean nothing here, in a sentence.
fn unknown_tensors(file: &Contents, backward: bool) -> Option<String> {
    let mut names = file.names();
    let more: &[&str] = if backward { &GIVEN } else { &[] };
    names.retain(|name| !NAMES.contains(&name.as_str()) && !more.contains(&name.as_str()));
    let shown = listed(names.iter().map(String::as_str));
    let known: Vec<&str> = NAMES.iter().chain(more).copied().collect();
    let meant: Vec<_> = names.iter().filter_map(|name| nearest(name, &known)).collect();
    let option = names.iter().find(|name| is_option(name));
    let hint = match (option, &meant[..]) {
        (Some(name), _) => {
            format!("; the option {name} is a text of the metadata, in an .npz an array without axes")
        }
        (None, []) => String::new(),
        (None, _) => format!("; is {} meant?", meant.join(", ")),
    };
    match names.len() {
        0 => None,
        1 => Some(format!("tensor {shown} is not one of attention's, ignored{hint}")),
        count => Some(format!("{count} tensors are not attention's, ignored: {shown}{hint}")),
    }
}

/// A tensor of F32, F16 or BF16, and its shape.
///
/// # Errors
/// [`Error::ElementType`], [`Error::Memory`].
pub(crate) fn floats(
    contents: &Contents,
    bytes: &[u8],
    name: &'static str,
) -> Result<Option<(TensorData, Vec<usize>)>, Error> {
    let Some(info) = contents.info(name) else { return Ok(None) };
    floats_of(name, info)?;
    let data = Floats::new(contents.data(bytes, info), info.dtype)?;
    Ok(Some((data.as_ref().to_owned(), info.shape.clone())))
}

/// A file that was opened, and what it asks for.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) request: Request,
    contents: Contents,
    bytes: Bytes,
}

impl Opened {
    /// Opens an input.
    ///
    /// # Errors
    /// As [`request`]; the input is not named.
    pub(crate) fn open(source: &Source, flags: &FileFlags, wish: Wish, terminal: &mut Terminal) -> Result<Self, Error> {
        let bar = terminal.start_bytes("reading", source.len());
        let opened = Bytes::open(source, &bar);
        bar.finish_and_clear();
        Self::of(opened?, flags, wish)
    }

    /// The same of what was read.
    ///
    /// # Errors
    /// As [`request`].
    pub(crate) fn of((contents, bytes): (Contents, Bytes), flags: &FileFlags, wish: Wish) -> Result<Self, Error> {
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
    /// As [`floats`].
    pub(crate) fn floats(&self, name: &'static str) -> Result<Option<(TensorData, Vec<usize>)>, Error> {
        floats(&self.contents, &self.bytes, name)
    }

    /// The numbers.
    ///
    /// # Errors
    /// As [`Operands::new`].
    pub(crate) fn operands(&self) -> Result<Operands<'_>, Error> {
        Operands::new(&self.contents, &self.bytes, &self.request)
    }
}
