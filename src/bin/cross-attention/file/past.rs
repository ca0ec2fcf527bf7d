//! Keys and values of before, put in front of those of a file.

use std::borrow::Cow;

use cross_attention::{AttentionSpec, Element, Layout, TensorSpec};

use super::form::{Placed, one_of};
use super::operands::{Floats, reserved};
use crate::error::Error;
use crate::input::Contents;
use crate::options::AxisOrder;

/// Keys and values in front of those of the file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Past {
    /// How many there are.
    pub(crate) len: usize,
    /// The order of their axes.
    pub(crate) order: AxisOrder,
}

/// Their names.
const NAMES: [&str; 2] = ["past_key", "past_value"];

impl Past {
    /// What a file holds of it.
    ///
    /// # Errors
    /// [`Error::HalfPast`], [`Error::PastForm`], [`Error::Rank`], [`Error::ElementType`].
    pub(super) fn new(file: &Contents, placed: &[Placed; 3], order: AxisOrder) -> Result<Option<Self>, Error> {
        let [key, value] = NAMES.map(|name| file.info(name));
        let (key, value) = match (key, value) {
            (None, None) => return Ok(None),
            (Some(key), Some(value)) => (key, value),
            (Some(_), None) => return Err(Error::HalfPast { given: NAMES[0], missing: NAMES[1] }),
            (None, Some(_)) => return Err(Error::HalfPast { given: NAMES[1], missing: NAMES[0] }),
        };
        if file.info("block_table").is_some() {
            return Err(Error::PastForm { found: "in pages" });
        }
        let [_, new_key, new_value] = placed;
        let mut past_len = None;
        for (name, info, new) in [(NAMES[0], key, new_key), (NAMES[1], value, new_value)] {
            if new.spec.element == Element::I8 {
                return Err(Error::PastForm { found: "of I8" });
            }
            let (dtype, possible) = match new.spec.element {
                Element::F16 => (safetensors::Dtype::F16, "F16, as what it stands before"),
                Element::Bf16 => (safetensors::Dtype::BF16, "BF16, as what it stands before"),
                _ => (safetensors::Dtype::F32, "F32, as what it stands before"),
            };
            one_of(name, info, &[dtype], possible)?;
            let [batch, heads, _, dim] = new.spec.layout.shape;
            let axes = <[usize; 4]>::try_from(&info.shape[..]).ok().map(|axes| order.swap(axes));
            let len = axes.map_or(0, |axes| axes[2]);
            let wanted = [batch, heads, past_len.unwrap_or(len), dim];
            if axes != Some(wanted) {
                let wanted = order.swap(wanted).map(|n| n.to_string());
                let mut wanted = wanted;
                if past_len.is_none() {
                    wanted[if order == AxisOrder::Bhld { 2 } else { 1 }] = "any".to_owned();
                }
                return Err(Error::Rank {
                    name,
                    found: info.shape.clone(),
                    wanted: format!("{} = [{}]", order.axes(), wanted.join(", ")),
                });
            }
            past_len = Some(len);
        }
        Ok(Some(Self { len: past_len.unwrap_or(0), order }))
    }

    /// Makes key and value of a spec as long as both together.
    pub(super) fn join(&self, spec: &mut AttentionSpec) {
        for tensor in [&mut spec.key, &mut spec.value] {
            let [batch, heads, len, dim] = tensor.layout.shape;
            tensor.layout = self.order.layout([batch, heads, len.saturating_add(self.len), dim]);
        }
    }

    /// The elements of one of them.
    pub(super) fn floats<'a>(&self, file: &Contents, bytes: &'a [u8], name: &'static str) -> Result<Floats<'a>, Error> {
        let info = file.info(name).ok_or_else(|| Error::MissingTensor { name, found: "nothing".to_owned() })?;
        Floats::new(file.data(bytes, info), info.dtype)
    }

    /// Past elements and new ones as one tensor.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub(super) fn with<'a>(&self, past: Floats<'_>, new: Floats<'_>, of_new: &TensorSpec) -> Result<Floats<'a>, Error> {
        // as many entries as are stored, which a batch may share
        let [batch, heads, len, dim] = of_new.layout.shape;
        let (from, all) = (self.order.layout([batch, heads, self.len, dim]), [batch, heads, self.len + len, dim]);
        let layouts = [&from, &of_new.layout, &self.order.layout(all)];
        Ok(match (past, new) {
            (Floats::F32(past), Floats::F32(new)) => Floats::F32(joined(&past, &new, layouts)?),
            (Floats::F16(past), Floats::F16(new)) => Floats::F16(joined(&past, &new, layouts)?),
            (Floats::Bf16(past), Floats::Bf16(new)) => Floats::Bf16(joined(&past, &new, layouts)?),
            // types were compared with the header
            _ => return Err(Error::PastForm { found: "of another type" }),
        })
    }
}

fn joined<'a, T: Copy + Default>(past: &[T], new: &[T], layouts: [&Layout; 3]) -> Result<Cow<'a, [T]>, Error>
where
    [T]: ToOwned<Owned = Vec<T>>,
{
    let [of_past, of_new, of_all] = layouts;
    let [batch, heads, len, dim] = of_all.shape;
    let mut all = reserved(of_all.elements().unwrap_or(usize::MAX))?;
    all.resize(of_all.elements().unwrap_or(0), T::default());
    for b in 0..batch {
        for h in 0..heads {
            for i in 0..len {
                let (from, start) = match i.checked_sub(of_past.shape[2]) {
                    None => (past, of_past.index([b, h, i, 0])),
                    Some(i) => (new, of_new.index([b, h, i, 0])),
                };
                let to = of_all.index([b, h, i, 0]);
                all[to..to + dim].copy_from_slice(&from[start..start + dim]);
            }
        }
    }
    Ok(Cow::Owned(all))
}
