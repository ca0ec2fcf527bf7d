//! Sources on a device: partial outputs side by side, then the merge or the weighted sum, all in the caller's encoder.

use super::run::Ready;
use super::{Combine, Gate, Sources, SourcesError, SourcesOutput};
use crate::dispatch::Variant;
use crate::dispatch::uniforms::CombineParams;
use crate::error::Error;
use crate::gpu::{AttentionBuffers, Context, GpuError, MergeBuffers, PreparedAttention, Uniform};
use crate::inputs::RowState;
use crate::kernels::beside::small::grid;
use crate::problem::AttentionProblem;
use crate::tensor::{Layout, TensorRef};

const STORAGE: wgpu::BufferUsages = wgpu::BufferUsages::STORAGE;
const COPY_DST: wgpu::BufferUsages = wgpu::BufferUsages::COPY_DST;

/// The buffers of one source. Weights before the softmax come as a bias, f32 `[batch, 1, 1, kv_len]` of `ln(weight)`;
/// weights after it are the caller's to multiply the values with, which are then f32 without gaps.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the fields are those of AttentionBuffers")]
pub struct SourceBuffers<'a> {
    pub key: wgpu::BufferSlice<'a>,
    pub value: wgpu::BufferSlice<'a>,
    pub bias: Option<wgpu::BufferSlice<'a>>,
    pub mask: Option<wgpu::BufferSlice<'a>>,
    pub kv_lens: Option<wgpu::BufferSlice<'a>>,
    pub row_start: Option<wgpu::BufferSlice<'a>>,
    pub row_end: Option<wgpu::BufferSlice<'a>>,
    pub alibi_slopes: Option<wgpu::BufferSlice<'a>>,
    pub sinks: Option<wgpu::BufferSlice<'a>>,
}

/// What all sources share.
#[derive(Clone, Copy, Debug)]
pub struct SourcesBuffers<'a> {
    /// `[batch, q_heads, q_len, head_dim]` in the layout of the specs.
    pub query: wgpu::BufferSlice<'a>,
    /// f32 `[sources, batch, q_len]`, 1 where a source has none; where any source has row weights.
    pub row_weights: Option<&'a wgpu::Buffer>,
    /// f32 `[1]` or `[q_heads]`; where the output is gated.
    pub gate: Option<&'a wgpu::Buffer>,
    /// f32 `[batch, q_heads, q_len, v_head_dim]` without gaps, written.
    pub output: &'a wgpu::Buffer,
    /// f32 `[batch, q_heads, q_len, 2]`, maximum and sum of each row, written for one softmax over all.
    pub row_state: &'a wgpu::Buffer,
    /// f32 `[sources, batch, q_heads, q_len, 2]`, maximum and sum of each row over each source alone, written.
    pub source_row_state: &'a wgpu::Buffer,
}

/// Sources with their plans, pipelines and workspace on a device.
#[derive(Clone, Debug)]
pub struct SourcesOnGpu {
    context: Context,
    combine: Combine,
    gate: Gate,
    row_weights: bool,
    attentions: Vec<PreparedAttention>,
    /// `[sources, rows, v_head_dim]`, workspace: written and read within a submission
    part_output: wgpu::Buffer,
    /// one source's maxima and sums, which a binding could not place in the middle of the caller's
    row_state: wgpu::Buffer,
    /// the merged output before its gate
    merged: wgpu::Buffer,
    scales: wgpu::Buffer,
    ones: wgpu::Buffer,
    params: wgpu::Buffer,
    grid: [u32; 3],
}

impl SourcesOnGpu {
    pub(super) async fn new(context: &Context, sources: &Sources) -> Result<Self, Error> {
        let mut attentions = vec![];
        let first = &sources.problems[0];
        let (parts, rows, width) = (sources.problems.len(), first.rows(), first.v_head_dim());
        for (part, problem) in sources.problems.iter().enumerate() {
            let mut spec = problem.spec().clone();
            spec.output.layout = Layout::bhld(spec.output.layout.shape).with_offset(part * rows * width);
            let placed = AttentionProblem::new(spec).map_err(|error| SourcesError::Problem {
                source_name: sources.sources[part].name.clone(),
                error: error.into(),
            })?;
            attentions.push(context.prepare(&placed, None).await?);
        }
        let elements = (rows * width) as u64;
        let count = parts * rows * width;
        let (blocks_per_row, grid) = grid("sources * rows * v_head_dim", rows * width, count, context.caps())
            .map_err(|reason| Error::MergePlan { reason })?;
        let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let sum = sources.combine == Combine::Sum;
        let params = CombineParams {
            parts: if sum { narrow(parts) } else { 1 },
            rows: narrow(rows),
            v_head_dim: narrow(width),
            blocks_per_row,
            q_heads: narrow(first.q_heads()),
            q_len: narrow(first.q_len()),
            weighted: u32::from(sum && sources.any_row_weights()),
            gating: match sources.gate {
                Gate::None => 0,
                Gate::Scalar => 1,
                Gate::Heads => 2,
            },
        };
        // outputs of f32 are not packed: the last one may be followed by nothing
        let part_output = context.allocate("part_output", parts as u64 * elements * 4).await?;
        let scales: Vec<f32> = sources.sources.iter().map(|source| source.scale).collect();
        Ok(Self {
            context: context.clone(),
            combine: sources.combine,
            gate: sources.gate,
            row_weights: sources.any_row_weights(),
            attentions,
            part_output,
            row_state: context.allocate("row_state of a source", (rows * 8) as u64).await?,
            merged: context.allocate("merged output", elements * 4).await?,
            scales: context.upload("scales", &scales).await?,
            ones: context.upload("ones", &[1.0f32]).await?,
            params: context.uniform("params", bytemuck::bytes_of(&params)).await?,
            grid,
        })
    }

    /// The device.
    #[must_use]
    pub const fn context(&self) -> &Context {
        &self.context
    }

    /// The prepared attention of each source, to see its plan and problem.
    #[must_use]
    pub fn attentions(&self) -> &[PreparedAttention] {
        &self.attentions
    }

    /// Records all attentions and what makes them one into the caller's encoder. Does not submit, wait or poll.
    ///
    /// # Errors
    /// [`Error::Sources`] for another number of sources, [`Error::Gpu`] names the buffer that is missing, too small, made
    /// for other uses, or read and written at once.
    pub async fn encode(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        sources: &[SourceBuffers<'_>],
        shared: &SourcesBuffers<'_>,
    ) -> Result<(), Error> {
        if sources.len() != self.attentions.len() {
            return Err(SourcesError::Count { wanted: self.attentions.len(), found: sources.len() }.into());
        }
        let problem = self.attentions[0].problem();
        let (parts, rows, width) = (self.attentions.len(), problem.rows(), problem.v_head_dim());
        let (weights, gates) = self.check(shared)?;
        if rows == 0 {
            return Ok(());
        }
        // all are bound before anything is recorded: what is refused leaves the encoder as it was
        let mut bound = vec![];
        for (attention, source) in self.attentions.iter().zip(sources) {
            bound.push(attention.bind(&AttentionBuffers {
                query: shared.query,
                key: source.key,
                value: source.value,
                bias: source.bias,
                mask: source.mask,
                kv_lens: source.kv_lens,
                row_start: source.row_start,
                row_end: source.row_end,
                alibi_slopes: source.alibi_slopes,
                sinks: source.sinks,
                output: self.part_output.slice(..),
                lse: Some(self.row_state.slice(..)),
                scores: None,
                large_values: true,
            })?);
        }
        let bytes = (rows * 8) as u64;
        for (part, attention) in bound.iter().enumerate() {
            attention.encode(encoder);
            encoder.copy_buffer_to_buffer(&self.row_state, 0, shared.source_row_state, part as u64 * bytes, bytes);
        }
        let gated = self.gate != Gate::None;
        let (from, scales) = match self.combine {
            Combine::Softmax => {
                let output = if gated { &self.merged } else { shared.output };
                let (part_output, part_lse) = (&self.part_output, shared.source_row_state);
                let buffers = MergeBuffers { part_output, part_lse, output, lse: shared.row_state };
                self.context.encode_merge_states(encoder, parts, rows, width, &buffers).await?;
                if !gated {
                    return Ok(());
                }
                (&self.merged, &self.ones)
            }
            Combine::Sum => (&self.part_output, &self.scales),
        };
        let bound = [from, scales, weights, gates, shared.output].map(|buffer| (buffer, buffer.size()));
        let (variant, params) = (Variant::combine_sources(), Uniform::Kept(&self.params));
        Ok(self.context.encode_beside(encoder, &variant, params, &bound, self.grid).await?)
    }

    /// The buffers of row weights and gates, where there are any; others stand in where there are none.
    fn check<'a>(&'a self, shared: &SourcesBuffers<'a>) -> Result<(&'a wgpu::Buffer, &'a wgpu::Buffer), GpuError> {
        let problem = self.attentions[0].problem();
        let given = |name, buffer: Option<&'a wgpu::Buffer>, needed: usize| match (buffer, needed) {
            (None, 0) => Ok(&self.ones),
            (None, _) => Err(GpuError::Missing { name }),
            (Some(_), 0) => Err(GpuError::Unexpected { name }),
            (Some(buffer), _) => fits(name, buffer, needed, STORAGE).map(|()| buffer),
        };
        let weights = if self.row_weights { self.attentions.len() * problem.batch() * problem.q_len() } else { 0 };
        let gates = match self.gate {
            Gate::None => 0,
            Gate::Scalar => 1,
            Gate::Heads => problem.q_heads(),
        };
        let found = (given("row_weights", shared.row_weights, weights)?, given("gate", shared.gate, gates)?);
        fits("output", shared.output, problem.rows() * problem.v_head_dim(), STORAGE)?;
        let states = problem.rows() * 2;
        fits("source_row_state", shared.source_row_state, self.attentions.len() * states, STORAGE | COPY_DST)?;
        if self.combine == Combine::Softmax {
            fits("row_state", shared.row_state, states, STORAGE)?;
        }
        // bound or not: what is written must be nothing else of the call
        let written =
            [("output", shared.output), ("row_state", shared.row_state), ("source_row_state", shared.source_row_state)];
        for (n, (name, buffer)) in written.into_iter().enumerate() {
            let query = ("query", Some(shared.query.buffer()));
            let read = [query, ("row_weights", shared.row_weights), ("gate", shared.gate)];
            let others = written[n + 1..].iter().map(|&(name, other)| (name, Some(other)));
            for (read, other) in read.into_iter().chain(others) {
                if other == Some(buffer) {
                    return Err(GpuError::Aliased { written: name, read });
                }
            }
        }
        Ok(found)
    }

    pub(super) async fn run(
        &self,
        sources: &Sources,
        query: TensorRef<'_>,
        ready: &[Ready<'_>],
        gate: Option<&[f32]>,
    ) -> Result<SourcesOutput, Error> {
        let context = &self.context;
        let problem = self.attentions[0].problem();
        let (rows, width) = (problem.rows(), problem.v_head_dim());
        let query_buffer = context.upload_tensor("query", query).await?;
        let mut tensors = vec![];
        for (attention, ready) in self.attentions.iter().zip(ready) {
            let inputs = ready.inputs(query);
            let key = context.upload_tensor("key", inputs.key).await?;
            let value = context.upload_tensor("value", inputs.value).await?;
            tensors.push(attention.upload_terms(&inputs, [query_buffer.clone(), key, value]).await?);
        }
        let places = problem.batch() * problem.q_len();
        let mut row_weights = None;
        if self.row_weights {
            let mut all = Vec::with_capacity(ready.len() * places);
            for ready in ready {
                match ready.row_weights {
                    Some(weights) => all.extend_from_slice(weights),
                    None => all.resize(all.len() + places, 1.0),
                }
            }
            row_weights = Some(context.upload("row_weights", &all).await?);
        }
        let mut gates = None;
        if let Some(gate) = gate {
            gates = Some(context.upload("gate", gate).await?);
        }
        let output = context.allocate("output", (rows * width * 4) as u64).await?;
        // what a call writes belongs to the call: two of them may be on their way at once
        let row_state = context.allocate("row_state", (rows * 8) as u64).await?;
        let source_row_state = context.allocate("source_row_state", (ready.len() * rows * 8) as u64).await?;
        let buffers: Vec<_> = tensors
            .iter()
            .map(|tensors| {
                let all = tensors.buffers();
                SourceBuffers {
                    key: all.key,
                    value: all.value,
                    bias: all.bias,
                    mask: all.mask,
                    kv_lens: all.kv_lens,
                    row_start: all.row_start,
                    row_end: all.row_end,
                    alibi_slopes: all.alibi_slopes,
                    sinks: all.sinks,
                }
            })
            .collect();
        let shared = SourcesBuffers {
            query: query_buffer.slice(..),
            row_weights: row_weights.as_ref(),
            gate: gates.as_ref(),
            output: &output,
            row_state: &row_state,
            source_row_state: &source_row_state,
        };
        let mut encoder = context.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        self.encode(&mut encoder, &buffers, &shared).await?;
        context.check_faults()?;
        context.checked("the submission of sources", 0, || context.queue().submit([encoder.finish()])).await?;
        let merged = match sources.combine {
            Combine::Softmax => Some(context.read("row_state", row_state.slice(..), rows * 2).await?),
            Combine::Sum => None,
        };
        let of_sources: Vec<f32> =
            context.read("source_row_state", source_row_state.slice(..), ready.len() * rows * 2).await?;
        Ok(SourcesOutput {
            output: context.read("output", output.slice(..), rows * width).await?,
            lse: merged.map(|pairs: Vec<f32>| RowState::from_pairs(&pairs).lse()),
            source_lse: RowState::from_pairs(&of_sources).lse(),
        })
    }
}

fn fits(name: &'static str, buffer: &wgpu::Buffer, words: usize, wanted: wgpu::BufferUsages) -> Result<(), GpuError> {
    let needed = words as u64 * 4;
    if buffer.size() < needed {
        return Err(GpuError::BufferTooSmall { name, needed, found: buffer.size() });
    }
    let found = buffer.usage();
    if found.contains(wanted) { Ok(()) } else { Err(GpuError::Usage { name, needed: wanted, found }) }
}
