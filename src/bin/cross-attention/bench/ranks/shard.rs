//! What one rank has of a problem: the same buffers, read from its first key on.

use std::ops::Range;

use cross_attention::engine::{Kind, Tensor};
use cross_attention::gpu::Gpu;
use cross_attention::sharded::{ShardInputs, ShardKeys};
use cross_attention::{
    AttentionData, AttentionInputs, AttentionProblem, AttentionSpec, Device, Layout, TensorData, Terms,
};

use crate::error::Error;

/// The keys of a rank, as near to as many as the others have as can be.
pub(super) fn keys_of(kv_len: usize, rank: usize, ranks: usize) -> Range<usize> {
    // a product beyond the machine's words is nothing that could be held either
    let edge = |rank: usize| (kv_len as u128 * rank as u128 / ranks as u128) as usize;
    edge(rank)..edge(rank + 1)
}

/// The attention as the rank sees it that has these keys.
pub(super) fn spec_of(problem: &AttentionProblem, keys: &Range<usize>) -> AttentionSpec {
    let mut spec = problem.spec().clone();
    let along = |layout: &mut Layout, axis: usize| {
        layout.offset += keys.start * layout.strides[axis];
        layout.shape[axis] = keys.len();
    };
    along(&mut spec.key.layout, 2);
    along(&mut spec.value.layout, 2);
    for scale in [&mut spec.key_scale, &mut spec.value_scale].into_iter().flatten() {
        along(&mut scale.layout, 2);
    }
    let of_scores = spec.bias.as_mut().map(|bias| &mut bias.layout).into_iter().chain(&mut spec.mask);
    of_scores.for_each(|layout| along(layout, 3));
    spec
}

/// The same attention to the rank's keys alone, as if there were no others: lengths and ranges of keys count over all of them,
/// and are left out.
pub(super) fn alone(spec: &AttentionSpec) -> AttentionSpec {
    let mut spec = spec.clone();
    (spec.kv_lens, spec.row_ranges) = (false, false);
    spec
}

/// The inputs of [`alone`].
pub(super) fn inputs_alone(data: &AttentionData) -> AttentionInputs<'_> {
    let mut inputs = data.as_inputs();
    (inputs.terms.kv_lens, inputs.terms.row_start, inputs.terms.row_end) = (None, None, None);
    inputs
}

/// What a rank gives to a call, on its device already.
///
/// # Errors
/// A device without room for it.
pub(super) fn inputs<'a>(device: &Device, data: &'a AttentionData) -> Result<ShardInputs<'a>, Error> {
    let terms = &data.terms;
    let place = |name: &str, data: &'a TensorData| place(device, name, data);
    let some = |name: &str, data: &'a Option<TensorData>| data.as_ref().map(|data| place(name, data)).transpose();
    let mask = terms.mask.as_deref().map(|mask| match device {
        Device::Gpu(gpu) => upload(gpu, "mask", bytemuck::cast_slice(mask), Kind::Bool, mask.len()),
        Device::Cpu | Device::Oracle => Ok(mask.into()),
    });
    Ok(ShardInputs {
        query: Some(place("query", &data.query)?),
        keys: ShardKeys::Tensors { key: place("key", &data.key)?, value: place("value", &data.value)? },
        terms: Terms {
            bias: some("bias", &terms.bias)?,
            mask: mask.transpose()?,
            key_scale: some("key_scale", &terms.key_scale)?,
            value_scale: some("value_scale", &terms.value_scale)?,
            // what ranks compare, and cut to their keys, stays on the host
            q_lens: terms.q_lens.as_ref().map(Into::into),
            kv_lens: terms.kv_lens.as_ref().map(Into::into),
            row_start: terms.row_start.as_ref().map(Into::into),
            row_end: terms.row_end.as_ref().map(Into::into),
            alibi_slopes: terms.alibi_slopes.as_ref().map(Into::into),
            sinks: terms.sinks.as_ref().map(Into::into),
            block_table: None,
        },
    })
}

fn place<'a>(device: &Device, name: &str, data: &'a TensorData) -> Result<Tensor<'a>, Error> {
    let Device::Gpu(gpu) = device else { return Ok(data.into()) };
    let data = data.as_ref();
    upload(gpu, name, data.as_bytes(), data.element().into(), data.len())
}

fn upload(gpu: &Gpu, name: &str, bytes: &[u8], kind: Kind, len: usize) -> Result<Tensor<'static>, Error> {
    let buffer = gpu.upload_blocking(name, bytes).map_err(cross_attention::Error::from)?;
    Ok(Tensor::on_device(gpu, buffer.slice(..), kind, len).map_err(cross_attention::Error::from)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_some_ranks() {
        for (kv_len, ranks) in [(10, 3), (2, 4), (0, 2), (usize::MAX, 5)] {
            let all: Vec<_> = (0..ranks).map(|rank| keys_of(kv_len, rank, ranks)).collect();
            assert_eq!((all[0].start, all[ranks - 1].end), (0, kv_len));
            assert!(all.windows(2).all(|pair| pair[0].end == pair[1].start), "{all:?}");
            let lens: Vec<usize> = all.iter().map(Range::len).collect();
            assert!(lens.iter().max().unwrap() - lens.iter().min().unwrap() <= 1, "{lens:?}");
        }
    }
}
