//! How tensors may lie in a file, and of which shapes and element types they may be.

use cross_attention::{Element, Layout, ProblemError, TensorSpec};
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use super::flags::Reading;
use crate::error::Error;
use crate::input::Contents;
use crate::options::AxisOrder;
use crate::text::listed;

/// The types of elements that stand for themselves, of keys and values, and of scales; each with its name.
pub(super) const FLOATS: ([Dtype; 3], &str) = ([Dtype::F32, Dtype::F16, Dtype::BF16], "F32, F16, BF16");
pub(super) const STORED: ([Dtype; 4], &str) = ([Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::I8], "F32, F16, BF16, I8");
pub(super) const SCALES: ([Dtype; 2], &str) = ([Dtype::F32, Dtype::F16], "F32, F16");

/// How a tensor of heads lies in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Four axes in this order.
    Four(AxisOrder),
    /// `[batch, len, heads * dim]`: the rows of all heads side by side.
    Joined,
}

impl Form {
    /// A tensor of shape `[batch, heads, len, dim]`, without gaps, in this form.
    pub(crate) const fn layout(self, shape: [usize; 4]) -> Layout {
        match self {
            Self::Four(order) => order.layout(shape),
            Self::Joined => Layout::blhd(shape),
        }
    }

    /// The axes of `[batch, heads, len, dim]` as a file has them.
    pub(crate) fn shape(self, shape: [usize; 4]) -> Vec<usize> {
        match self {
            Self::Four(order) => order.swap(shape).to_vec(),
            Self::Joined => {
                let [batch, heads, len, dim] = shape;
                vec![batch, len, heads.saturating_mul(dim)]
            }
        }
    }

    /// The other way round, with so many heads where they are joined; `None` if the axes are not of this form.
    pub(crate) fn axes(self, found: &[usize], heads: usize) -> Option<[usize; 4]> {
        match (self, found) {
            (Self::Four(order), &[a, b, c, d]) => Some(order.swap([a, b, c, d])),
            (Self::Joined, &[batch, len, width]) if heads > 0 && width.is_multiple_of(heads) => {
                Some([batch, heads, len, width / heads])
            }
            _ => None,
        }
    }

    /// The names of the axes.
    pub(crate) const fn words(self) -> &'static str {
        match self {
            Self::Four(order) => order.axes(),
            Self::Joined => "[batch, len, heads * dim]",
        }
    }
}

/// Query, key or value, and where it stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placed {
    /// The tensor that holds it, which may be that of all three.
    pub(crate) tensor: &'static str,
    /// Elements of that tensor that stand before it.
    pub(super) start: usize,
    pub(crate) spec: TensorSpec,
    pub(crate) form: Form,
}

impl Placed {
    /// Whether it has a tensor of its own, of its own name.
    pub(crate) fn is_apart(&self) -> bool {
        !matches!(self.tensor, QKV | KV)
    }

    /// A tensor of its own.
    fn apart<const N: usize>(
        file: &Contents,
        name: &'static str,
        (flag, heads): (&'static str, Option<usize>),
        order: AxisOrder,
        types: &([Dtype; N], &'static str),
    ) -> Result<Self, Error> {
        let (spec, form) = operand(file, name, (flag, heads), order, types)?;
        Ok(Self { tensor: name, start: 0, spec, form })
    }

    /// A part of a packed tensor.
    fn part(tensor: &'static str, info: &TensorInfo, layout: Layout, form: Form) -> Result<Self, Error> {
        let element = floats_of(tensor, info)?;
        Ok(Self { tensor, start: layout.offset, spec: TensorSpec { element, layout: layout.with_offset(0) }, form })
    }
}

/// Query, key and value in one tensor; key and value in one.
const QKV: &str = "qkv";
const KV: &str = "kv";

/// Query, key and value, from wherever they stand.
///
/// # Errors
/// [`Error::MissingTensor`], [`Error::Packed`], [`Error::Rank`], [`Error::Heads`], [`Error::NoHeads`], [`Error::ElementType`].
pub(super) fn placed(file: &Contents, reading: &Reading) -> Result<[Placed; 3], Error> {
    let order = reading.options.layout;
    for (packed, parts) in [(QKV, &["query", "key", "value", KV][..]), (KV, &["key", "value"])] {
        let twice = parts.iter().copied().find(|part| file.info(part).is_some());
        if let (Some(_), Some(part)) = (file.info(packed), twice) {
            return Err(Error::Packed { packed, part });
        }
    }
    if let Some(info) = file.info(QKV) {
        return all_packed(info, reading);
    }
    let query = Placed::apart(file, "query", ("q_heads", reading.q_heads), order, &FLOATS)?;
    let [_, q_heads, _, head_dim] = query.spec.layout.shape;
    let kv_heads = reading.kv_heads.unwrap_or(q_heads);
    if let Some(info) = file.info(KV) {
        let [key, value] = keys_packed(info, (kv_heads, head_dim), reading)?;
        return Ok([query, key, value]);
    }
    let of = |name| {
        // four axes say how many heads there are
        let joined = file.info(name).is_some_and(|info| info.shape.len() == 3);
        let heads = if joined { Some(kv_heads) } else { reading.kv_heads };
        Placed::apart(file, name, ("kv_heads", heads), order, &STORED)
    };
    Ok([query, of("key")?, of("value")?])
}

/// `[batch, len, 3, heads, dim]`, or rows of all query heads, all key heads, all value heads.
fn all_packed(info: &TensorInfo, reading: &Reading) -> Result<[Placed; 3], Error> {
    let part = |layout, form| Placed::part(QKV, info, layout, form);
    match info.shape[..] {
        [batch, len, 3, heads, dim] => {
            for (flag, asked) in [("q_heads", reading.q_heads), ("kv_heads", reading.kv_heads)] {
                same_heads(QKV, flag, asked, heads)?;
            }
            let form = Form::Four(AxisOrder::Blhd);
            let of = |n| part(Layout::packed([batch, heads, len, dim], 3, n), form);
            Ok([of(0)?, of(1)?, of(2)?])
        }
        [batch, len, width] => {
            let q_heads = reading.q_heads.ok_or_else(|| no_heads(QKV, info, "q_heads"))?;
            let kv_heads = reading.kv_heads.unwrap_or(q_heads);
            let heads = kv_heads.checked_mul(2).and_then(|heads| heads.checked_add(q_heads)).filter(|heads| *heads > 0);
            let dim = heads.filter(|heads| width.is_multiple_of(*heads)).map(|heads| width / heads);
            let dim = dim.ok_or_else(|| Error::Rank {
                name: QKV,
                found: info.shape.clone(),
                wanted: format!(
                    "rows of (q_heads + 2 * kv_heads) * head_dim columns, q_heads {q_heads}, kv_heads {kv_heads}"
                ),
            })?;
            let of = |heads, first| part(rows([batch, heads, len, dim], width, first), Form::Joined);
            Ok([of(q_heads, 0)?, of(kv_heads, q_heads * dim)?, of(kv_heads, (q_heads + kv_heads) * dim)?])
        }
        _ => Err(Error::Rank {
            name: QKV,
            found: info.shape.clone(),
            wanted: "[batch, len, 3, heads, dim], or [batch, len, (q_heads + 2 * kv_heads) * dim] and --q-heads"
                .to_owned(),
        }),
    }
}

/// `[batch, len, 2, heads, dim]`, or rows of all key heads, all value heads.
fn keys_packed(
    info: &TensorInfo,
    (kv_heads, head_dim): (usize, usize),
    reading: &Reading,
) -> Result<[Placed; 2], Error> {
    let part = |layout, form| Placed::part(KV, info, layout, form);
    match info.shape[..] {
        [batch, len, 2, heads, dim] => {
            same_heads(KV, "kv_heads", reading.kv_heads, heads)?;
            let of = |n| part(Layout::packed([batch, heads, len, dim], 2, n), Form::Four(AxisOrder::Blhd));
            Ok([of(0)?, of(1)?])
        }
        [batch, len, width] => {
            // what is not key is value
            let both = (kv_heads > 0 && width.is_multiple_of(kv_heads)).then(|| width / kv_heads);
            let v_head_dim = both.and_then(|both| both.checked_sub(head_dim)).filter(|dim| *dim > 0);
            let v_head_dim = v_head_dim.ok_or_else(|| Error::Rank {
                name: KV,
                found: info.shape.clone(),
                wanted: format!(
                    "rows of kv_heads * (head_dim + v_head_dim) columns, kv_heads {kv_heads}, head_dim {head_dim}"
                ),
            })?;
            let of = |dim, first| part(rows([batch, kv_heads, len, dim], width, first), Form::Joined);
            Ok([of(head_dim, 0)?, of(v_head_dim, kv_heads * head_dim)?])
        }
        _ => Err(Error::Rank {
            name: KV,
            found: info.shape.clone(),
            wanted: "[batch, len, 2, heads, dim], or [batch, len, kv_heads * (head_dim + v_head_dim)]".to_owned(),
        }),
    }
}

/// Heads side by side from a column on, in rows of so many columns.
fn rows(shape: [usize; 4], width: usize, first: usize) -> Layout {
    let [_, _, len, dim] = shape;
    Layout::bhld(shape).with_strides([len.saturating_mul(width), dim, width, 1]).with_offset(first)
}

fn no_heads(name: &'static str, info: &TensorInfo, flag: &'static str) -> Error {
    Error::NoHeads { name, found: info.shape.clone(), flag }
}

/// Whether a tensor has the heads that were asked for.
fn same_heads(name: &'static str, flag: &'static str, asked: Option<usize>, found: usize) -> Result<(), Error> {
    match asked {
        Some(asked) if asked != found => Err(Error::Heads { name, flag, asked, found }),
        _ => Ok(()),
    }
}

/// A tensor of heads, of 4 axes, or of 3 where it is known how many heads there are.
///
/// # Errors
/// As [`placed`].
pub(super) fn operand<const N: usize>(
    file: &Contents,
    name: &'static str,
    (flag, heads): (&'static str, Option<usize>),
    order: AxisOrder,
    (dtypes, possible): &([Dtype; N], &'static str),
) -> Result<(TensorSpec, Form), Error> {
    let info = file.info(name).ok_or_else(|| {
        let names = file.names();
        let found = if names.is_empty() {
            "nothing".to_owned()
        } else {
            format!("[{}]", listed(names.iter().map(String::as_str)))
        };
        Error::MissingTensor { name, found }
    })?;
    let form = if info.shape.len() == 3 { Form::Joined } else { Form::Four(order) };
    if form == Form::Joined && heads.is_none() {
        return Err(no_heads(name, info, flag));
    }
    let axes = form.axes(&info.shape, heads.unwrap_or(0)).ok_or_else(|| {
        let wanted = match (form, heads) {
            (Form::Joined, Some(heads)) => format!("{} with {flag} {heads}", form.words()),
            _ => format!("4 axes, {}", order.axes()),
        };
        Error::Rank { name, found: info.shape.clone(), wanted }
    })?;
    if let Form::Four(_) = form {
        same_heads(name, flag, heads, axes[1])?;
    }
    one_of(name, info, dtypes, possible)?;
    Ok((TensorSpec { element: element_of(info.dtype), layout: form.layout(axes) }, form))
}

/// The layout of a tensor of up to four axes that broadcasts from the right.
pub(super) fn broadcast(name: &'static str, info: &TensorInfo) -> Result<Layout, Error> {
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

pub(super) fn floats_of(name: &'static str, info: &TensorInfo) -> Result<Element, Error> {
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

pub(crate) fn one_of(
    name: &'static str,
    info: &TensorInfo,
    dtypes: &[Dtype],
    possible: &'static str,
) -> Result<(), Error> {
    let found = info.dtype;
    if dtypes.contains(&found) { Ok(()) } else { Err(Error::ElementType { name, found, possible }) }
}

pub(super) fn check_shape(
    name: &'static str,
    info: &TensorInfo,
    (words, wanted): (&str, &[usize]),
) -> Result<(), Error> {
    if info.shape == wanted {
        return Ok(());
    }
    Err(Error::Rank { name, found: info.shape.clone(), wanted: format!("{words} = {wanted:?}") })
}

/// A refusal with shapes in the order of the file's axes, given the forms of query, key and value.
pub(super) fn as_in_file([query, key, value]: [Form; 3], error: ProblemError) -> Error {
    let form = |name| match name {
        "key" | "key_scale" => key,
        "value" | "value_scale" => value,
        _ => query,
    };
    let plain = Form::Four(AxisOrder::Bhld);
    match error {
        ProblemError::Shape {
            name: name @ ("query" | "key" | "value" | "output" | "key_scale" | "value_scale"),
            wanted,
            found,
        } if form(name) != plain => {
            let (found, wanted) = (form(name).shape(found), form(name).shape(wanted));
            let axes = form(name).words();
            Error::Rank { name, found, wanted: format!("{axes} = {wanted:?} (batch may also be 1)") }
        }
        ProblemError::PageShape { name, wanted, found } => match form(name) {
            Form::Four(order) => {
                let [wanted, found] = [wanted, found].map(|shape| order.swap(shape));
                ProblemError::PageShape { name, wanted, found }.into()
            }
            joined @ Form::Joined => {
                let (found, wanted) = (joined.shape(found), joined.shape(wanted));
                Error::Rank { name, found, wanted: format!("[pages, page_len, heads * dim] = {wanted:?}") }
            }
        },
        ProblemError::Overflow { name, shape, .. } => {
            let shape = match form(name) {
                Form::Four(order) if !matches!(name, "bias" | "mask" | "scores") => order.swap(shape),
                _ => shape,
            };
            Error::TooLarge { name, shape }
        }
        error => error.into(),
    }
}
