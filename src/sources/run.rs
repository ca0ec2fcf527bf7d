//! Sources: checked, weighted, attended to one by one, combined.

use super::{Combine, Gate, Source, SourceInputs, Sources, SourcesError, SourcesOutput, SourcesTensors};
use crate::device::{Device, KernelChoice, PreparedAttention};
use crate::engine::{self, Combining, Inputs, Kind, Outputs, PlaceError, Recording, Tensor};
use crate::error::Error;
use crate::inputs::RowState;
use crate::problem::AttentionProblem;
use crate::tensor::{Layout, TensorData, TensorRef};

/// Sources that are planned and prepared on a device; any number of calls can follow.
#[derive(Clone, Debug)]
pub struct PreparedSources {
    sources: Sources,
    device: Device,
    /// One for each source; the output of each lies behind those before it.
    attentions: Vec<PreparedAttention>,
    /// Factors of a sum, or 1.
    scales: Tensor<'static>,
}

impl Sources {
    /// Plans the attention to every source and makes what is needed.
    ///
    /// # Errors
    /// [`Error::Plan`], [`Error::Gpu`], [`Error::Sources`] for outputs beyond what can be counted.
    pub async fn prepare(&self, device: &Device) -> Result<PreparedSources, Error> {
        let mut attentions = vec![];
        for (part, problem) in self.problems.iter().enumerate() {
            let mut spec = problem.spec().clone();
            let before = part * problem.rows() * problem.v_head_dim();
            spec.output.layout = Layout::bhld(spec.output.layout.shape).with_offset(before);
            let placed = AttentionProblem::new(spec).map_err(|error| SourcesError::Problem {
                source_name: self.sources[part].name.clone(),
                error: error.into(),
            })?;
            attentions.push(device.prepare(&placed, KernelChoice::Auto).await?);
        }
        let scales = match self.combine {
            Combine::Softmax => vec![1.0],
            Combine::Sum => self.sources.iter().map(|source| source.scale).collect(),
        };
        let scales = Recording::new(device).place("scales", &Tensor::held(TensorData::F32(scales))).await?;
        Ok(PreparedSources { sources: self.clone(), device: device.clone(), attentions, scales })
    }

    /// [`prepare`](Self::prepare), blocking.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare).
    #[cfg(feature = "threads")]
    pub fn prepare_blocking(&self, device: &Device) -> Result<PreparedSources, Error> {
        device.block_on(self.prepare(device))
    }

    /// Compares the data with the description, and works weights in.
    fn ready<'a>(
        &self,
        query: &Tensor<'a>,
        inputs: &[SourceInputs<'a>],
        gate: Option<&Tensor<'_>>,
    ) -> Result<Vec<Inputs<'a>>, Error> {
        if inputs.len() != self.sources.len() {
            return Err(SourcesError::Count { wanted: self.sources.len(), found: inputs.len() }.into());
        }
        tensor_of_numbers("gate", "the output", gate, self.gates())?;
        let each = self.sources.iter().zip(&self.problems).zip(inputs);
        each.map(|((source, problem), inputs)| ready(source, problem, query, inputs)).collect()
    }
}

/// Compares the data of one source with its description.
fn ready<'a>(
    source: &Source,
    problem: &AttentionProblem,
    query: &Tensor<'a>,
    inputs: &SourceInputs<'a>,
) -> Result<Inputs<'a>, Error> {
    let [batch, _, q_len, kv_len] = problem.score_shape();
    let weights = |name, given, asked: bool, non_negative| {
        numbers(name, &source.name, given, if asked { batch * kv_len } else { 0 }, non_negative)
    };
    weights("key_weights", inputs.key_weights, source.key_weights, true)?;
    weights("after_weights", inputs.after_weights, source.after_weights, false)?;
    let row_weights = if source.row_weights { batch * q_len } else { 0 };
    tensor_of_numbers("row_weights", &source.name, inputs.row_weights.as_ref(), row_weights)?;
    // as it was described, before weights are worked in
    let described = AttentionProblem::new(source.spec.clone())
        .map_err(|error| SourcesError::Problem { source_name: source.name.clone(), error: error.into() })?;
    let mut ready = Inputs {
        query: query.clone(),
        key: inputs.key.clone(),
        value: inputs.value.clone(),
        terms: inputs.terms.clone(),
    };
    ready.check(&described).map_err(|error| match error {
        Error::Input(error) => SourcesError::Input { source_name: source.name.clone(), error }.into(),
        Error::Place(error) => SourcesError::Place { source_name: source.name.clone(), error }.into(),
        other => other,
    })?;
    if source.key_weights {
        let bias = inputs.key_weights.unwrap_or_default().iter().map(|w| w.ln()).collect();
        ready.terms.bias = Some(Tensor::held(TensorData::F32(bias)));
    }
    if source.after_weights {
        let value = inputs.value.host().ok_or(PlaceError::NeedsHost {
            name: "value",
            reason: "its rows are multiplied with after_weights there",
        })?;
        let scaled = weighted(&described, value.tensor(), inputs.after_weights.unwrap_or_default());
        ready.value = Tensor::held(TensorData::F32(scaled));
    }
    Ok(ready)
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

/// The same for a tensor, whose numbers are looked at where they are on the host.
fn tensor_of_numbers(name: &'static str, of: &str, given: Option<&Tensor<'_>>, wanted: usize) -> Result<(), Error> {
    let found = given.map_or(0, Tensor::len);
    if let Some(tensor) = given {
        engine::is_a(name, tensor, Kind::F32)?;
        if let Some(read) = tensor.host() {
            return Ok(numbers(name, of, Some(read.f32()), wanted, false)?);
        }
    }
    if found != wanted {
        return Err(SourcesError::Len { name, of: of.to_owned(), wanted, found }.into());
    }
    Ok(())
}

impl PreparedSources {
    /// What it was prepared for.
    #[must_use]
    pub const fn sources(&self) -> &Sources {
        &self.sources
    }

    /// Where it was prepared.
    #[must_use]
    pub const fn device(&self) -> &Device {
        &self.device
    }

    /// The prepared attention of each source, to see its plan and problem.
    #[must_use]
    pub fn attentions(&self) -> &[PreparedAttention] {
        &self.attentions
    }

    /// One call with its results in host memory; on a GPU one submission. `query` is `[batch, q_heads, q_len, head_dim]` in the
    /// layout of the specs, `gate` is f32 `[1]` or `[q_heads]`.
    ///
    /// # Errors
    /// As [`record`](Self::record), and [`Error::Gpu`].
    pub async fn run<'a>(
        &self,
        query: impl Into<Tensor<'a>>,
        inputs: &[SourceInputs<'a>],
        gate: Option<Tensor<'_>>,
    ) -> Result<SourcesOutput, Error> {
        let mut recording = Recording::new(&self.device);
        let tensors = self.record(&mut recording, query, inputs, gate).await?;
        recording.submit().await?;
        let mut lse = None;
        if let Some(state) = &tensors.row_state {
            lse = Some(RowState::from_pairs(&state.read_f32("row_state").await?).lse());
        }
        Ok(SourcesOutput {
            output: tensors.output.read_f32("output").await?,
            lse,
            source_lse: RowState::from_pairs(&tensors.source_row_state.read_f32("source_row_state").await?).lse(),
        })
    }

    /// The same in a recording: nothing is submitted or read.
    ///
    /// # Errors
    /// [`Error::Sources`], [`Error::Place`] if the data is not what was described, [`Error::MergePlan`] if there are more
    /// elements than the device can count, [`Error::Gpu`].
    pub async fn record<'a>(
        &self,
        recording: &mut Recording<'_>,
        query: impl Into<Tensor<'a>>,
        inputs: &[SourceInputs<'a>],
        gate: Option<Tensor<'_>>,
    ) -> Result<SourcesTensors, Error> {
        recording.check_device(&self.device)?;
        let query = query.into();
        let ready = self.sources.ready(&query, inputs, gate.as_ref())?;
        let problem = &self.sources.problems[0];
        let (parts, rows, width) = (self.attentions.len(), problem.rows(), problem.v_head_dim());
        let query = recording.place("query", &query).await?;
        // what a call writes belongs to the call: two of them may be on their way at once
        let output = recording.allocate("output", Kind::F32, rows * width).await?;
        let part_output = recording.allocate("part_output", Kind::F32, parts * rows * width).await?;
        let row_state = recording.allocate("row_state", Kind::F32, rows * 2).await?;
        let source_row_state = recording.allocate("source_row_state", Kind::F32, parts * rows * 2).await?;
        let softmax = self.sources.combine == Combine::Softmax;
        let tensors = SourcesTensors {
            output: output.clone(),
            row_state: softmax.then(|| row_state.clone()),
            source_row_state: source_row_state.clone(),
        };
        if rows == 0 {
            return Ok(tensors);
        }
        for (part, (attention, ready)) in self.attentions.iter().zip(&ready).enumerate() {
            let inputs = Inputs {
                query: query.clone(),
                key: recording.place("key", &ready.key).await?,
                value: recording.place("value", &ready.value).await?,
                terms: recording.place_terms(&ready.terms).await?,
            };
            let to = Outputs { output: part_output.clone(), rows: Some(row_state.clone()), scores: None };
            recording.attend(attention, &inputs, &to)?;
            recording.copy(&row_state, &source_row_state, part * rows * 2)?;
        }
        let gate = match &gate {
            Some(gate) => {
                let gate = recording.place("gate", gate).await?;
                Some(recording.at_start("gate", &gate).await?)
            }
            None => None,
        };
        let mut parts_to_add = parts;
        let mut added = part_output.clone();
        if softmax {
            let merged = match &gate {
                Some(_) => recording.allocate("merged output", Kind::F32, rows * width).await?,
                None => output.clone(),
            };
            let from = [&part_output, &source_row_state];
            recording.merge([parts, rows, width], from, [&merged, &row_state]).await?;
            (parts_to_add, added) = (1, merged);
            if self.sources.gate == Gate::None {
                return Ok(tensors);
            }
        }
        let row_weights = self.row_weights(recording, inputs).await?;
        let combining = Combining {
            parts: parts_to_add,
            shape: [problem.batch(), problem.q_heads(), problem.q_len(), width],
            scales: &self.scales,
            row_weights: row_weights.as_ref(),
            gate: gate.as_ref(),
        };
        recording.combine(&combining, &added, &output).await?;
        Ok(tensors)
    }

    /// `[sources, batch, q_len]`, 1 where a source has none; where any has them.
    async fn row_weights(
        &self,
        recording: &mut Recording<'_>,
        inputs: &[SourceInputs<'_>],
    ) -> Result<Option<Tensor<'static>>, Error> {
        if !self.sources.any_row_weights() {
            return Ok(None);
        }
        let problem = &self.sources.problems[0];
        let places = problem.batch() * problem.q_len();
        let all = recording.allocate("row_weights", Kind::F32, inputs.len() * places).await?;
        let ones = Tensor::held(TensorData::F32(vec![1.0; places]));
        for (n, inputs) in inputs.iter().enumerate() {
            let weights = recording.place("row_weights", inputs.row_weights.as_ref().unwrap_or(&ones)).await?;
            recording.copy(&weights, &all, n * places)?;
        }
        Ok(Some(all))
    }

    /// [`run`](Self::run), blocking.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    #[cfg(feature = "threads")]
    pub fn run_blocking<'a>(
        &self,
        query: impl Into<Tensor<'a>>,
        inputs: &[SourceInputs<'a>],
        gate: Option<Tensor<'_>>,
    ) -> Result<SourcesOutput, Error> {
        self.device.block_on(self.run(query, inputs, gate))
    }
}
