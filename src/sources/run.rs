//! Sources in host memory: checked, weighted, attended to one by one, combined.

use super::gpu::SourcesOnGpu;
use super::{Combine, Gate, Source, SourceInputs, Sources, SourcesError, SourcesOutput};
use crate::cpu::{MergedStates, StatePart, merge_states};
use crate::device::{Device, KernelChoice, PreparedOn};
use crate::error::Error;
use crate::problem::AttentionProblem;
use crate::tensor::TensorRef;

/// Sources that are planned and prepared on a device; any number of calls can follow.
#[derive(Clone, Debug)]
pub struct PreparedSources {
    sources: Sources,
    backend: Backend,
}

#[derive(Clone, Debug)]
enum Backend {
    Host(Vec<PreparedOn>),
    Gpu(Box<SourcesOnGpu>),
}

/// The data of a source, weights worked in.
pub(super) struct Ready<'a> {
    pub(super) inputs: SourceInputs<'a>,
    /// `[batch, kv_len]`, the logarithm of the weights.
    bias: Option<Vec<f32>>,
    /// The values times their weights.
    value: Option<Vec<f32>>,
    pub(super) row_weights: Option<&'a [f32]>,
}

impl Ready<'_> {
    /// What the attention to this source takes.
    pub(super) fn inputs<'b>(&'b self, query: TensorRef<'b>) -> crate::AttentionInputs<'b> {
        let mut inputs = self.inputs.with_query(query);
        if let Some(bias) = &self.bias {
            inputs.bias = Some(bias.into());
        }
        if let Some(value) = &self.value {
            inputs.value = value.into();
        }
        inputs
    }
}

impl Sources {
    /// Plans the attention to every source and makes what is needed.
    ///
    /// # Errors
    /// [`Error::Plan`], [`Error::Gpu`], [`Error::MergePlan`] if there are more elements than the device can count.
    pub async fn prepare(&self, device: &Device) -> Result<PreparedSources, Error> {
        let backend = match device {
            Device::Cpu | Device::Oracle => {
                let mut prepared = vec![];
                for problem in &self.problems {
                    prepared.push(device.prepare(problem, KernelChoice::Auto).await?);
                }
                Backend::Host(prepared)
            }
            Device::Gpu(context) => Backend::Gpu(Box::new(SourcesOnGpu::new(context, self).await?)),
        };
        Ok(PreparedSources { sources: self.clone(), backend })
    }

    /// [`prepare`](Self::prepare), blocking.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare).
    #[cfg(feature = "native")]
    pub fn prepare_blocking(&self, device: &Device) -> Result<PreparedSources, Error> {
        device.block_on(self.prepare(device))
    }

    /// Compares the data with the description, and works weights in.
    fn ready<'a>(
        &self,
        query: TensorRef<'a>,
        inputs: &[SourceInputs<'a>],
        gate: Option<&[f32]>,
    ) -> Result<Vec<Ready<'a>>, SourcesError> {
        if inputs.len() != self.sources.len() {
            return Err(SourcesError::Count { wanted: self.sources.len(), found: inputs.len() });
        }
        numbers("gate", "the output", gate, self.gates(), false)?;
        let each = self.sources.iter().zip(&self.problems).zip(inputs);
        each.map(|((source, problem), inputs)| ready(source, problem, query, inputs)).collect()
    }
}

/// Compares the data of one source with its description.
fn ready<'a>(
    source: &Source,
    problem: &AttentionProblem,
    query: TensorRef<'a>,
    inputs: &SourceInputs<'a>,
) -> Result<Ready<'a>, SourcesError> {
    let [batch, _, q_len, kv_len] = problem.score_shape();
    let weights = |name, given, asked: bool, wanted: usize, non_negative| {
        numbers(name, &source.name, given, if asked { wanted } else { 0 }, non_negative)
    };
    weights("key_weights", inputs.key_weights, source.key_weights, batch * kv_len, true)?;
    weights("after_weights", inputs.after_weights, source.after_weights, batch * kv_len, false)?;
    weights("row_weights", inputs.row_weights, source.row_weights, batch * q_len, false)?;
    let of_input = |error| SourcesError::Input { source_name: source.name.clone(), error };
    // as it was described, before weights are worked in
    let described = AttentionProblem::new(source.spec.clone())
        .map_err(|error| SourcesError::Problem { source_name: source.name.clone(), error: error.into() })?;
    inputs.with_query(query).check(&described).map_err(of_input)?;
    let bias = source.key_weights.then(|| inputs.key_weights.unwrap_or_default().iter().map(|w| w.ln()).collect());
    let value = source.after_weights.then(|| {
        let weights = inputs.after_weights.unwrap_or_default();
        weighted(&described, inputs.value, weights)
    });
    Ok(Ready { inputs: *inputs, bias, value, row_weights: inputs.row_weights })
}

/// Values times the weights of their keys, `[batch, kv_heads, kv_len, v_head_dim]`.
fn weighted(problem: &AttentionProblem, value: TensorRef<'_>, weights: &[f32]) -> Vec<f32> {
    let layout = &problem.spec().value.layout;
    let [batch, kv_heads, kv_len, width] = layout.shape;
    let mut scaled = Vec::with_capacity(batch * kv_heads * kv_len * width);
    for (b, h) in (0..batch).flat_map(|b| (0..kv_heads).map(move |h| (b, h))) {
        for j in 0..kv_len {
            let weight = weights[b * kv_len + j];
            let of = |d| if weight == 0.0 { 0.0 } else { weight * value.get(layout.index([b, h, j, d])) };
            scaled.extend((0..width).map(of));
        }
    }
    scaled
}

/// Compares weights with how many are asked for and what they may be.
fn numbers(
    name: &'static str,
    of: &str,
    given: Option<&[f32]>,
    wanted: usize,
    non_negative: bool,
) -> Result<(), SourcesError> {
    let numbers = given.unwrap_or_default();
    if numbers.len() != wanted {
        return Err(SourcesError::Len { name, of: of.to_owned(), wanted, found: numbers.len() });
    }
    let bad = numbers.iter().position(|x| !x.is_finite() || (non_negative && *x < 0.0));
    bad.map_or(Ok(()), |at| Err(SourcesError::Weight { name, of: of.to_owned(), at, value: numbers[at], non_negative }))
}

impl PreparedSources {
    /// What it was prepared for.
    #[must_use]
    pub const fn sources(&self) -> &Sources {
        &self.sources
    }

    /// One call from host memory to host memory; on a GPU one submission. `query` is
    /// `[batch, q_heads, q_len, head_dim]` in the layout of the specs, `gate` is `[1]` or `[q_heads]`.
    ///
    /// # Errors
    /// [`Error::Sources`] if the data is not what was described, [`Error::Gpu`].
    pub async fn run(
        &self,
        query: TensorRef<'_>,
        inputs: &[SourceInputs<'_>],
        gate: Option<&[f32]>,
    ) -> Result<SourcesOutput, Error> {
        let ready = self.sources.ready(query, inputs, gate)?;
        match &self.backend {
            Backend::Host(prepared) => on_host(&self.sources, prepared, query, &ready, gate).await,
            Backend::Gpu(prepared) => prepared.run(&self.sources, query, &ready, gate).await,
        }
    }

    /// [`run`](Self::run), blocking.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    #[cfg(feature = "native")]
    pub fn run_blocking(
        &self,
        query: TensorRef<'_>,
        inputs: &[SourceInputs<'_>],
        gate: Option<&[f32]>,
    ) -> Result<SourcesOutput, Error> {
        match &self.backend {
            Backend::Host(_) => pollster::block_on(self.run(query, inputs, gate)),
            Backend::Gpu(prepared) => prepared.context().block_on(self.run(query, inputs, gate)),
        }
    }

    /// The sources on their device, to record; `None` where that is the CPU.
    #[must_use]
    pub fn on_gpu(&self) -> Option<&SourcesOnGpu> {
        match &self.backend {
            Backend::Host(_) => None,
            Backend::Gpu(prepared) => Some(prepared),
        }
    }
}

async fn on_host(
    sources: &Sources,
    prepared: &[PreparedOn],
    query: TensorRef<'_>,
    ready: &[Ready<'_>],
    gate: Option<&[f32]>,
) -> Result<SourcesOutput, Error> {
    let problem = &sources.problems[0];
    let width = problem.v_head_dim();
    let mut states = vec![];
    for (prepared, ready) in prepared.iter().zip(ready) {
        let result = prepared.run(&ready.inputs(query)).await?;
        states.push((result.output.to_f32(), result.row_state.unwrap_or_default()));
    }
    let (mut output, lse) = match sources.combine {
        Combine::Softmax => {
            let parts: Vec<_> = states.iter().map(|(output, state)| StatePart::new(output, state)).collect();
            let MergedStates { output, state } = merge_states(&parts, width)?;
            (output, Some(state.lse()))
        }
        Combine::Sum => {
            let mut output = vec![0.0; problem.rows() * width];
            for ((source, ready), (part, _)) in sources.sources.iter().zip(ready).zip(&states) {
                for (row, (to, from)) in output.chunks_exact_mut(width).zip(part.chunks_exact(width)).enumerate() {
                    let (b, i) = (row / (problem.q_len() * problem.q_heads()), row % problem.q_len());
                    let by_row = ready.row_weights.map_or(1.0, |weights| weights[b * problem.q_len() + i]);
                    let weight = source.scale * by_row;
                    if weight != 0.0 {
                        to.iter_mut().zip(from).for_each(|(to, from)| *to += weight * from);
                    }
                }
            }
            (output, None)
        }
    };
    let gates = gate.unwrap_or_default();
    for (row, output) in output.chunks_exact_mut(width).enumerate() {
        let head = row / problem.q_len() % problem.q_heads();
        let factor = match sources.gate {
            Gate::None => 1.0,
            Gate::Scalar => gates[0].tanh(),
            Gate::Heads => gates[head].tanh(),
        };
        for x in output {
            *x *= factor;
            if *x == 0.0 {
                // without a sign
                *x = 0.0;
            }
        }
    }
    Ok(SourcesOutput { output, lse, source_lse: states.iter().flat_map(|(_, state)| state.lse()).collect() })
}
