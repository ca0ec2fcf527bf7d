//! The commands of a recording: each on the device, and as its twin on the host.

use super::inputs::{HostInputs, Inputs, on_host};
use super::recording::Recording;
use super::tensor::Tensor;
use crate::cpu::{MergedStates, StatePart, merge_states, weights};
use crate::device::PreparedAttention;
use crate::dispatch::Variant;
use crate::dispatch::uniforms::CombineParams;
use crate::error::Error;
use crate::gpu::{AttentionBuffers, MergeBuffers, WeightsBuffers};
use crate::inputs::RowState;
use crate::kernels::beside::small::grid;
use crate::slice::HostSlice;
use crate::tensor::TensorRef;
use crate::terms::Terms;
use crate::weights::WeightsProblem;

/// Where an attention writes.
#[derive(Clone, Debug)]
pub(crate) struct Outputs {
    /// In the layout of the spec's `output`, from its offset on.
    pub(crate) output: Tensor<'static>,
    /// `[rows]`, the log-sum-exp, or `[rows, 2]` where the spec asks for `row_state`.
    pub(crate) rows: Option<Tensor<'static>>,
    /// `[rows, kv_len]`.
    pub(crate) scores: Option<Tensor<'static>>,
}

/// How attentions over several sources are added up, and what the sum is multiplied with.
#[derive(Clone, Debug)]
pub(crate) struct Combining<'a> {
    /// How many there are.
    pub(crate) parts: usize,
    /// Batch, query heads, query rows, width of a row.
    pub(crate) shape: [usize; 4],
    /// `[parts]`.
    pub(crate) scales: &'a Tensor<'a>,
    /// `[parts, batch, q_len]`.
    pub(crate) row_weights: Option<&'a Tensor<'a>>,
    /// `[1]` or `[q_heads]`.
    pub(crate) gate: Option<&'a Tensor<'a>>,
}

impl Recording<'_> {
    /// One attention. Its tensors are where the recording runs, and were compared with the problem.
    pub(crate) fn attend(
        &mut self,
        prepared: &PreparedAttention,
        inputs: &Inputs<'_>,
        to: &Outputs,
    ) -> Result<(), Error> {
        let device = self.device();
        match (self.gpu(), prepared) {
            (Some((_, encoder)), PreparedAttention::Gpu(attention)) => {
                let buffers = AttentionBuffers {
                    query: bound("query", &inputs.query)?,
                    key: bound("key", &inputs.key)?,
                    value: bound("value", &inputs.value)?,
                    terms: inputs.terms.try_map(|name, tensor| bound(name, tensor))?,
                    output: bound("output", &to.output)?,
                    lse: to.rows.as_ref().map(|rows| bound("lse", rows)).transpose()?,
                    scores: to.scores.as_ref().map(|scores| bound("scores", scores)).transpose()?,
                    large_values: true,
                };
                attention.encode(encoder, &buffers)?;
            }
            (None, prepared) => {
                let name = device.name();
                let result = {
                    let read = HostInputs::new(inputs, &name)?;
                    prepared.run_on_host(&read.get())
                };
                let Some(result) = result.transpose()? else {
                    let prepared = prepared.kernel_name().to_owned();
                    return Err(super::PlaceError::OtherRecording { prepared, recording: name }.into());
                };
                let offset = prepared.problem().spec().output.layout.offset;
                let output = result.output.as_ref();
                let output = output.cut(offset.min(output.len())..output.len());
                put("output", &to.output, offset, HostSlice::Tensor(output))?;
                if let Some(rows) = &to.rows {
                    let data = match (&result.row_state, &result.lse) {
                        (Some(state), _) => state.to_pairs(),
                        (None, Some(lse)) => lse.clone(),
                        (None, None) => vec![],
                    };
                    put("lse", rows, 0, floats(&data))?;
                }
                if let (Some(to), Some(scores)) = (&to.scores, &result.scores) {
                    put("scores", to, 0, floats(scores))?;
                }
            }
            (Some(_), _) => {
                let prepared = prepared.kernel_name().to_owned();
                return Err(super::PlaceError::OtherRecording { prepared, recording: device.name() }.into());
            }
        }
        Ok(())
    }

    /// Chosen weights of an attention, out of what its rows are divided by, `[rows, 2]`, maximum and sum, whoever found them. Value
    /// and sinks are not looked at.
    pub(crate) async fn weights(
        &mut self,
        problem: &WeightsProblem,
        inputs: &Inputs<'_>,
        row_state: &Tensor<'_>,
        to: &Tensor<'static>,
    ) -> Result<(), Error> {
        let device = self.device();
        if let Some((gpu, encoder)) = self.gpu() {
            let terms = inputs.terms.try_map(|name, tensor| bound(name, tensor))?;
            let buffers = WeightsBuffers {
                query: bound("query", &inputs.query)?,
                key: bound("key", &inputs.key)?,
                terms: Terms { sinks: None, ..terms },
                row_state: bound("row_state", row_state)?,
                weights: bound("weights", to)?,
            };
            gpu.prepare_weights(problem).await?.encode(encoder, &buffers)?;
            return Ok(());
        }
        let weights = {
            let (given, rows) = (HostInputs::new(inputs, &device.name())?, read("row_state", row_state)?);
            weights(problem, &given.get(), &RowState::from_pairs(rows.f32()))?
        };
        put("weights", to, 0, floats(&weights))
    }

    /// Merges `[parts, rows, width]` with maxima and sums `[parts, rows, 2]` into `[rows, width]` and `[rows, 2]`.
    pub(crate) async fn merge(
        &mut self,
        [parts, rows, width]: [usize; 3],
        [part_output, part_rows]: [&Tensor<'static>; 2],
        [output, merged_rows]: [&Tensor<'static>; 2],
    ) -> Result<(), Error> {
        if let Some((gpu, encoder)) = self.gpu() {
            let buffers = MergeBuffers {
                part_output: bound("part_output", part_output)?.buffer(),
                part_lse: bound("part_row_state", part_rows)?.buffer(),
                output: bound("output", output)?.buffer(),
                lse: bound("row_state", merged_rows)?.buffer(),
            };
            return gpu.encode_merge_states(encoder, parts, rows, width, &buffers).await;
        }
        let merged = {
            let (outputs, pairs) = (read("part_output", part_output)?, read("part_row_state", part_rows)?);
            let states: Vec<_> =
                (0..parts).map(|n| RowState::from_pairs(&pairs.f32()[n * rows * 2..][..rows * 2])).collect();
            let outputs = outputs.f32();
            let parts: Vec<_> = states
                .iter()
                .enumerate()
                .map(|(n, state)| StatePart::new(&outputs[n * rows * width..][..rows * width], state))
                .collect();
            merge_states(&parts, width)?
        };
        let MergedStates { output: data, state } = merged;
        put("output", output, 0, floats(&data))?;
        put("row_state", merged_rows, 0, floats(&state.to_pairs()))
    }

    /// `tanh(gate) * sum over parts of scale * row_weight * part`, `[batch, q_heads, q_len, width]`.
    pub(crate) async fn combine(
        &mut self,
        of: &Combining<'_>,
        parts: &Tensor<'static>,
        output: &Tensor<'static>,
    ) -> Result<(), Error> {
        let [batch, q_heads, q_len, width] = of.shape;
        let rows = batch * q_heads * q_len;
        if let Some((gpu, encoder)) = self.gpu() {
            let count = of.parts * rows * width;
            let (blocks_per_row, grid) = grid("sources * rows * v_head_dim", rows * width, count, gpu.caps())
                .map_err(|reason| Error::MergePlan { reason })?;
            let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            let params = CombineParams {
                parts: narrow(of.parts),
                rows: narrow(rows),
                v_head_dim: narrow(width),
                blocks_per_row,
                q_heads: narrow(q_heads),
                q_len: narrow(q_len),
                weighted: u32::from(of.row_weights.is_some()),
                gating: match of.gate {
                    None => 0,
                    Some(gate) if gate.len() == 1 => 1,
                    Some(_) => 2,
                },
            };
            // something must be bound, which is not read
            let bind = |name, tensor: &Tensor<'_>, elements: usize| -> Result<_, Error> {
                Ok((bound(name, tensor)?.buffer().clone(), elements as u64 * 4))
            };
            let or_scales = |name, tensor: Option<&Tensor<'_>>, elements: usize| match tensor {
                Some(tensor) => bind(name, tensor, elements),
                None => bind("scales", of.scales, 1),
            };
            let buffers = [
                bind("part_output", parts, count)?,
                bind("scales", of.scales, of.parts)?,
                or_scales("row_weights", of.row_weights, of.parts * batch * q_len)?,
                or_scales("gate", of.gate, of.gate.map_or(1, Tensor::len))?,
                bind("output", output, rows * width)?,
            ];
            let buffers: Vec<_> = buffers.iter().map(|(buffer, bytes)| (buffer, *bytes)).collect();
            let params = bytemuck::bytes_of(&params);
            gpu.encode_beside(encoder, &Variant::combine_sources(), params, &buffers, grid).await?;
            return Ok(());
        }
        let sum = {
            let (parts, scales) = (read("part_output", parts)?, read("scales", of.scales)?);
            let weights = of.row_weights.map(|weights| read("row_weights", weights)).transpose()?;
            let gate = of.gate.map(|gate| read("gate", gate)).transpose()?;
            let mut sum = vec![0.0; rows * width];
            for (part, (data, scale)) in parts.f32().chunks_exact(rows * width).zip(scales.f32()).enumerate() {
                for (row, (to, from)) in sum.chunks_exact_mut(width).zip(data.chunks_exact(width)).enumerate() {
                    let place = (part * batch + row / (q_len * q_heads)) * q_len + row % q_len;
                    let weight = scale * weights.as_ref().map_or(1.0, |weights| weights.f32()[place]);
                    if weight != 0.0 {
                        to.iter_mut().zip(from).for_each(|(to, from)| *to += weight * from);
                    }
                }
            }
            for (row, output) in sum.chunks_exact_mut(width).enumerate() {
                let factor = match gate.as_ref().map(super::tensor::HostRead::f32) {
                    None => 1.0,
                    Some([gate]) => gate.tanh(),
                    Some(gates) => gates[row / q_len % q_heads].tanh(),
                };
                for x in output {
                    *x *= factor;
                    if *x == 0.0 {
                        // without a sign
                        *x = 0.0;
                    }
                }
            }
            sum
        };
        put("output", output, 0, floats(&sum))
    }

    /// Copies all elements to those from `at` on, of the same type; bytes are multiples of 4.
    pub(crate) fn copy(&mut self, from: &Tensor<'_>, to: &Tensor<'static>, at: usize) -> Result<(), Error> {
        if let Some((_, encoder)) = self.gpu() {
            let (source, target) = (bound("copied", from)?, bound("copy", to)?);
            let at = target.offset() + at as u64 * to.kind().size_bytes() as u64;
            encoder.copy_buffer_to_buffer(source.buffer(), source.offset(), target.buffer(), at, from.bytes());
            return Ok(());
        }
        if to.write_from(at, from) { Ok(()) } else { Err(crate::InputError::Missing { name: "copied" }.into()) }
    }
}

/// The part of a buffer; a tensor on the host gets here only where it was not put in place.
pub(super) fn bound<'t>(name: &'static str, tensor: &'t Tensor<'_>) -> Result<wgpu::BufferSlice<'t>, Error> {
    tensor.buffer_slice().ok_or(Error::Gpu(crate::gpu::GpuError::Missing { name }))
}

pub(super) fn read<'t>(name: &'static str, tensor: &'t Tensor<'_>) -> Result<super::tensor::HostRead<'t>, Error> {
    Ok(on_host(name, tensor, "the host")?)
}

pub(super) fn floats(data: &[f32]) -> HostSlice<'_> {
    HostSlice::Tensor(TensorRef::F32(data))
}

pub(super) fn put(name: &'static str, to: &Tensor<'static>, at: usize, data: HostSlice<'_>) -> Result<(), Error> {
    if to.write(at, data) { Ok(()) } else { Err(crate::InputError::Missing { name }.into()) }
}
