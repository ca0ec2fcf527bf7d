//! Keys and values of contexts, where they are attended to and as they are stored.

use super::{ContextError, ContextSpec};
use crate::device::Device;
use crate::engine::{Recording, Tensor};
use crate::error::Error;
use crate::problem::AttentionSpec;
use crate::quantize::{QuantizeError, Quantized};
use crate::tensor::{Element, TensorData, TensorRef, TensorSpec};

/// Where a context begins: at a multiple of so many bytes, so that it can be bound alone.
const ALIGNMENT: usize = 256;

/// All contexts, as many side by side as a device binds at once.
#[derive(Debug)]
pub(super) struct Store {
    shelves: Vec<Shelf>,
    /// Contexts of every shelf but the last.
    pub(super) per_shelf: usize,
    /// Elements from one context to the next, of [`TENSORS`].
    strides: [usize; 4],
}

/// Key and value of contexts that lie side by side, and their scales where they have any.
#[derive(Debug)]
struct Shelf {
    tensors: [Option<Tensor<'static>>; 4],
}

/// The tensors of a shelf.
const TENSORS: [&str; 4] = ["key", "value", "key_scale", "value_scale"];

/// The tensors of a spec, in that order.
fn tensors_of(spec: &AttentionSpec) -> [Option<TensorSpec>; 4] {
    [Some(spec.key), Some(spec.value), spec.key_scale, spec.value_scale]
}

fn tensors_of_mut(spec: &mut AttentionSpec) -> [Option<&mut TensorSpec>; 4] {
    let AttentionSpec { key, value, key_scale, value_scale, .. } = spec;
    [Some(key), Some(value), key_scale.as_mut(), value_scale.as_mut()]
}

/// Elements of one context, rounded up to where the next one may begin.
fn stride(of: &TensorSpec) -> usize {
    let [_, heads, len, width] = of.layout.shape;
    (heads * len * width).next_multiple_of(ALIGNMENT / of.element.size_bytes())
}

impl Store {
    /// `form` is the attention to a single context.
    pub(super) async fn new(
        device: &Device,
        spec: &ContextSpec,
        form: &AttentionSpec,
        key: TensorRef<'_>,
        value: TensorRef<'_>,
    ) -> Result<Self, Error> {
        let of = tensors_of(form);
        let strides = of.map(|of| of.map_or(0, |of| stride(&of)));
        let largest = of.iter().flatten().map(|of| (stride(of) * of.element.size_bytes()) as u64).max().unwrap_or(1);
        let most = usize::try_from(device.max_binding_bytes() / largest.max(1)).unwrap_or(usize::MAX);
        let per_shelf = spec.contexts.min(most).max(1);
        let recording = Recording::new(device);
        let mut shelves = vec![];
        for first in (0..spec.contexts).step_by(per_shelf) {
            let contexts = first..(first + per_shelf).min(spec.contexts);
            let mut shelf = Shelf { tensors: [const { None }; 4] };
            for (n, data) in [key, value].into_iter().enumerate() {
                let Some(tensor) = of[n] else { continue };
                let (numbers, scales) = stored(TENSORS[n], tensor, of[n + 2], data, contexts.clone())?;
                shelf.tensors[n] = Some(recording.place(TENSORS[n], &Tensor::held(numbers)).await?);
                if let Some(scales) = scales {
                    shelf.tensors[n + 2] = Some(recording.place(TENSORS[n + 2], &Tensor::held(scales)).await?);
                }
            }
            shelves.push(shelf);
        }
        Ok(Self { shelves, per_shelf, strides })
    }

    /// Bytes of all that is stored.
    pub(super) fn bytes(&self) -> u64 {
        self.shelves.iter().flat_map(|shelf| &shelf.tensors).flatten().map(Tensor::bytes).sum()
    }

    /// Tensors of one shelf, and in the spec where they lie there: those of one context for each of so many entries, or as
    /// pages by a table.
    pub(super) fn tensors(
        &self,
        shelf: usize,
        one_context: Option<usize>,
        entries: usize,
        spec: &mut AttentionSpec,
    ) -> [Option<Tensor<'static>>; 4] {
        let contexts = self.contexts_of(shelf);
        let mut tensors = self.shelves[shelf].tensors.clone();
        for ((tensor, of), stride) in tensors.iter_mut().zip(tensors_of_mut(spec)).zip(self.strides) {
            let (Some(held), Some(of)) = (tensor.as_mut(), of) else { continue };
            match one_context {
                Some(context) => {
                    (of.layout.shape[0], of.layout.strides[0]) = (entries, 0);
                    *held = held.cut(context * stride..(context + 1) * stride);
                }
                None => (of.layout.shape[0], of.layout.strides[0]) = (contexts, stride),
            }
        }
        tensors
    }

    fn contexts_of(&self, shelf: usize) -> usize {
        let held = self.shelves[shelf].tensors[0].as_ref().map_or(0, Tensor::len);
        held.checked_div(self.strides[0]).unwrap_or(self.per_shelf)
    }
}

/// Contexts of `[contexts, heads, len, width]` as they are stored: a stride apart, and with scales where they have any. Errors
/// name the element within all of the data.
fn stored(
    name: &'static str,
    of: TensorSpec,
    scale: Option<TensorSpec>,
    data: TensorRef<'_>,
    contexts: std::ops::Range<usize>,
) -> Result<(TensorData, Option<TensorData>), Error> {
    let [_, heads, len, width] = of.layout.shape;
    let each = heads * len * width;
    let mut all = TensorData::zeros(of.element, stride(&of) * contexts.len());
    let mut scales = scale.map(|scale| TensorData::zeros(scale.element, stride(&scale) * contexts.len()));
    for (n, context) in contexts.enumerate() {
        let numbers: Vec<f32> = (context * each..(context + 1) * each).map(|at| data.get(at)).collect();
        let at = n * stride(&of);
        let (Some(scale), Some(scales)) = (scale, &mut scales) else {
            put(&mut all, at, TensorData::from_f32(of.element, numbers));
            continue;
        };
        let block = width / scale.layout.shape[3].max(1);
        let quantized = Quantized::new(&numbers, block, scale.element).map_err(|error| match error {
            QuantizeError::NotStorable { at, value, scale } => {
                Error::from(ContextError::NotStorable { name, at: context * each + at, value, scale })
            }
            // widths were compared with blocks
            other => ContextError::Quantize { name, source: other }.into(),
        })?;
        put(&mut all, at, TensorData::I8(quantized.bytes));
        put(scales, n * stride(&scale), quantized.scales);
    }
    Ok((all, scales))
}

/// Copies elements of one type to a place.
fn put(to: &mut TensorData, at: usize, from: TensorData) {
    match (to, from) {
        (TensorData::F32(to), TensorData::F32(from)) => to[at..at + from.len()].copy_from_slice(&from),
        (TensorData::F16(to), TensorData::F16(from)) => to[at..at + from.len()].copy_from_slice(&from),
        (TensorData::Bf16(to), TensorData::Bf16(from)) => to[at..at + from.len()].copy_from_slice(&from),
        (TensorData::I8(to), TensorData::I8(from)) => to[at..at + from.len()].copy_from_slice(&from),
        // both were made for one element
        _ => {}
    }
}

/// The element of the scales of a storage and how many columns have one; `None`: it has no scales.
pub(super) fn scales(storage: super::ContextStorage, width: usize) -> Option<(Element, usize)> {
    match storage {
        super::ContextStorage::F32 | super::ContextStorage::F16 | super::ContextStorage::Bf16 => None,
        super::ContextStorage::Q8_0 => Some((Element::F16, super::Q8_0_BLOCK)),
        super::ContextStorage::Int8 => Some((Element::F32, width)),
    }
}
