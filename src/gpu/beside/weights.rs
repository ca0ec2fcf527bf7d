//! Selected attention weights on the device: a second pass over query and key, with maximum and sum of the rows.

use crate::dispatch::Slot;
use crate::error::Error;
use crate::gpu::attention::AttentionTensors;
use crate::gpu::bound::BoundSteps;
use crate::gpu::buffers::{
    AttentionBuffers, aligned, check_row_data, enough, needed_bytes, present, row_data_copies, single_row_data, usage,
};
use crate::gpu::error::GpuError;
use crate::gpu::open::Gpu;
use crate::gpu::steps::PreparedSteps;
use crate::inputs::AttentionInputs;
use crate::plan::WeightsPlan;
use crate::problem::AttentionProblem;
use crate::terms::Terms;
use crate::weights::{AttentionWithWeights, RowNorm, WeightsProblem, WeightsSpec};

/// Selected weights with their pipelines and parameters on a device, to be used for any number of calls.
#[derive(Clone, Debug)]
pub struct PreparedWeights {
    gpu: Gpu,
    plan: WeightsPlan,
    steps: PreparedSteps,
    selection: wgpu::Buffer,
    row_data: Option<wgpu::Buffer>,
}

/// The buffers of a pass for selected weights. Optional ones are given where the attention has them, as in
/// [`AttentionBuffers`]; a sink has its share in `row_state`.
#[derive(Clone, Copy, Debug)]
pub struct WeightsBuffers<'a> {
    /// `[batch, q_heads, q_len, head_dim]`.
    pub query: wgpu::BufferSlice<'a>,
    /// `[batch, kv_heads, kv_len, head_dim]`.
    pub key: wgpu::BufferSlice<'a>,
    /// The rest, as the attention has it, but for sinks.
    pub terms: Terms<wgpu::BufferSlice<'a>>,
    /// `[batch, q_heads, q_len, 2]`, f32, maximum and sum of each row, as an attention writes them whose spec asks for
    /// `row_state`. Who knows a log-sum-exp alone may take it for the maximum, and 1 for the sum; how far that can be off
    /// stands at [`RowNorm::Lse`].
    pub row_state: wgpu::BufferSlice<'a>,
    /// `[batch, heads or 1, rows, keys or segments]`, f32, written.
    pub weights: wgpu::BufferSlice<'a>,
}

impl<'a> WeightsBuffers<'a> {
    /// The buffers of an attention that returns maximum and sum of its rows (`row_state`), and one for the weights.
    ///
    /// # Errors
    /// [`GpuError::Missing`] if there is no `lse`.
    pub fn of(attention: &AttentionBuffers<'a>, weights: wgpu::BufferSlice<'a>) -> Result<Self, GpuError> {
        let AttentionBuffers { query, key, terms, .. } = *attention;
        let row_state = attention.lse.ok_or(GpuError::Missing { name: "row_state" })?;
        Ok(Self { query, key, terms: Terms { sinks: None, ..terms }, row_state, weights })
    }

    fn slice(&self, slot: Slot) -> Option<wgpu::BufferSlice<'a>> {
        match slot {
            Slot::Query => Some(self.query),
            Slot::Key => Some(self.key),
            Slot::Bias => self.terms.bias,
            Slot::Mask => self.terms.mask,
            Slot::KeyScale => self.terms.key_scale,
            Slot::Lse => Some(self.row_state),
            Slot::Weights => Some(self.weights),
            _ => None,
        }
    }

    fn check(&self, problem: &WeightsProblem, alignment: u32) -> Result<(), GpuError> {
        let scores = problem.scores();
        let spec = scores.spec();
        let weights_bytes = problem.elements() as u64 * 4;
        let tensors = [
            ("query", Some(self.query), true, needed_bytes(scores, Slot::Query)),
            ("key", Some(self.key), true, needed_bytes(scores, Slot::Key)),
            ("bias", self.terms.bias, spec.bias.is_some(), needed_bytes(scores, Slot::Bias)),
            ("mask", self.terms.mask, spec.mask.is_some(), needed_bytes(scores, Slot::Mask)),
            ("key_scale", self.terms.key_scale, spec.key_scale.is_some(), needed_bytes(scores, Slot::KeyScale)),
            ("row_state", Some(self.row_state), true, needed_bytes(scores, Slot::Lse)),
            ("weights", Some(self.weights), true, weights_bytes),
        ];
        for (name, slice, wanted, needed) in tensors {
            if let Some(slice) = present(name, slice, wanted)? {
                enough(name, &slice, needed)?;
                usage(name, &slice, wgpu::BufferUsages::STORAGE)?;
                aligned(name, &slice, alignment)?;
            }
        }
        check_row_data(&self.terms, scores)?;
        let read = tensors[..6].iter().map(|&(name, slice, ..)| (name, slice));
        for (name, slice) in read.chain(self.terms.row_data().map(|(name, slice)| (name, slice.copied()))) {
            if slice.is_some_and(|slice| slice.buffer() == self.weights.buffer()) {
                return Err(GpuError::Aliased { written: "weights", read: name });
            }
        }
        Ok(())
    }
}

impl Gpu {
    /// Plans selected weights for this device and makes what they need.
    ///
    /// # Errors
    /// [`Error::WeightsPlan`] if they do not fit the device's limits, [`Error::Gpu`] if the device refuses.
    pub async fn prepare_weights(&self, problem: &WeightsProblem) -> Result<PreparedWeights, Error> {
        let plan = WeightsPlan::new(problem, self.caps()).map_err(|reason| Error::WeightsPlan { reason })?;
        self.prepare_weights_plan(plan).await
    }

    /// Makes what a plan needs. The plan may have been made for lower capabilities than the device has.
    ///
    /// # Errors
    /// [`Error::Plan`] if it was made for higher ones, [`Error::Gpu`] if the device refuses.
    pub async fn prepare_weights_plan(&self, plan: WeightsPlan) -> Result<PreparedWeights, Error> {
        plan.check(self.caps())?;
        let params: Vec<_> = plan.steps().iter().map(|step| step.params).collect();
        let steps = PreparedSteps::new(self, plan.steps(), &params).await?;
        let selection = self.upload("selection", plan.selection()).await?;
        let row_data = match plan.row_data_words() {
            0 => None,
            words => Some(self.allocate("row_data", u64::from(words) * 4).await?),
        };
        Ok(PreparedWeights { gpu: self.clone(), plan, steps, selection, row_data })
    }

    /// [`prepare_weights`](Self::prepare_weights), blocking.
    ///
    /// # Errors
    /// As [`prepare_weights`](Self::prepare_weights).
    #[cfg(feature = "threads")]
    pub fn prepare_weights_blocking(&self, problem: &WeightsProblem) -> Result<PreparedWeights, Error> {
        self.block_on(self.prepare_weights(problem))
    }

    /// Selected weights from host memory to host memory; see [`cpu::weights`](crate::cpu::weights).
    ///
    /// # Errors
    /// [`Error::Input`], [`Error::WeightsPlan`], [`Error::Gpu`].
    pub async fn weights<'n>(
        &self,
        problem: &WeightsProblem,
        inputs: &AttentionInputs<'_>,
        norm: impl Into<RowNorm<'n>>,
    ) -> Result<Vec<f32>, Error> {
        let norm = norm.into();
        let inputs = problem.inputs(inputs, norm)?;
        let prepared = self.prepare_weights(problem).await?;
        let query = self.upload_tensor("query", inputs.query).await?;
        let key = self.upload_tensor("key", inputs.key).await?;
        let terms = self.upload_terms(&inputs.terms).await?;
        let row_state = self.upload("row_state", &norm.pairs()).await?;
        let weights = prepared.allocate().await?;
        let bound = prepared.bind(&WeightsBuffers {
            query: query.slice(..),
            key: key.slice(..),
            terms: terms.map(|buffer| buffer.slice(..)),
            row_state: row_state.slice(..),
            weights: weights.slice(..),
        })?;
        self.submit_all("the submission of selected weights", &[&bound]).await?;
        Ok(self.read("weights", weights.slice(..), problem.elements()).await?)
    }

    /// [`weights`](Self::weights), blocking.
    ///
    /// # Errors
    /// As [`weights`](Self::weights).
    #[cfg(feature = "threads")]
    pub fn weights_blocking<'n>(
        &self,
        problem: &WeightsProblem,
        inputs: &AttentionInputs<'_>,
        norm: impl Into<RowNorm<'n>>,
    ) -> Result<Vec<f32>, Error> {
        self.block_on(self.weights(problem, inputs, norm))
    }

    /// One attention and some of its weights in one submission, from host memory to host memory; query and key are
    /// uploaded once, and what is known of the rows between the two stays on the device.
    ///
    /// # Errors
    /// [`Error::Input`], [`Error::Weights`], [`Error::Plan`], [`Error::WeightsPlan`], [`Error::Gpu`].
    pub async fn attention_with_weights(
        &self,
        problem: &AttentionProblem,
        inputs: &AttentionInputs<'_>,
        spec: &WeightsSpec,
    ) -> Result<AttentionWithWeights, Error> {
        inputs.check(problem)?;
        let weights_problem = WeightsProblem::new(problem, spec)?;
        let attention = self.prepare(&problem.with_row_state(), None).await?;
        let pass = self.prepare_weights(&weights_problem).await?;
        let tensors: AttentionTensors = attention.upload(inputs).await?;
        let weights = pass.allocate().await?;
        let buffers = tensors.buffers();
        let bound = attention.bind(&buffers)?;
        let bound_weights = pass.bind(&WeightsBuffers::of(&buffers, weights.slice(..))?)?;
        self.submit_all("the submission of an attention and its weights", &[&bound, &bound_weights]).await?;
        let mut output = attention.read_output(&tensors).await?;
        if !problem.spec().row_state {
            output.row_state = None;
        }
        Ok(AttentionWithWeights {
            attention: output,
            weights: self.read("weights", weights.slice(..), weights_problem.elements()).await?,
            shape: weights_problem.shape(),
        })
    }

    /// [`attention_with_weights`](Self::attention_with_weights), blocking.
    ///
    /// # Errors
    /// As [`attention_with_weights`](Self::attention_with_weights).
    #[cfg(feature = "threads")]
    pub fn attention_with_weights_blocking(
        &self,
        problem: &AttentionProblem,
        inputs: &AttentionInputs<'_>,
        spec: &WeightsSpec,
    ) -> Result<AttentionWithWeights, Error> {
        self.block_on(self.attention_with_weights(problem, inputs, spec))
    }

    async fn submit_all(&self, what: &str, bound: &[&BoundSteps]) -> Result<(), GpuError> {
        self.check_faults()?;
        self.checked(what, 0, || {
            let mut encoder = self.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            BoundSteps::encode_all(bound.iter().copied(), &mut encoder);
            self.queue().submit([encoder.finish()]);
        })
        .await
    }
}

impl PreparedWeights {
    /// Which weights are computed.
    #[must_use]
    pub const fn problem(&self) -> &WeightsProblem {
        self.plan.problem()
    }

    /// What runs.
    #[must_use]
    pub const fn plan(&self) -> &WeightsPlan {
        &self.plan
    }

    /// A buffer for the result.
    ///
    /// # Errors
    /// [`GpuError::BufferTooLarge`], [`GpuError::OutOfMemory`].
    pub async fn allocate(&self) -> Result<wgpu::Buffer, GpuError> {
        self.gpu.allocate("weights", self.problem().elements() as u64 * 4).await
    }

    /// Binds the caller's buffers. What is bound can be recorded again and again, alone or behind the attention whose
    /// maxima and sums it reads ([`BoundSteps::encode_all`]); the contents may change between.
    ///
    /// # Errors
    /// [`GpuError`] names the buffer that is missing, too small, made for other uses, or read and written at once.
    pub fn bind(&self, buffers: &WeightsBuffers<'_>) -> Result<BoundSteps, GpuError> {
        let caps = self.gpu.caps();
        buffers.check(self.problem(), caps.min_storage_buffer_offset_alignment)?;
        let (row_data, copies) = match &self.row_data {
            None => (None, vec![]),
            Some(packed) => match single_row_data(&buffers.terms, caps) {
                Some(slice) => (Some(slice), vec![]),
                None => {
                    let copies = row_data_copies(&buffers.terms, self.problem().scores(), packed)?;
                    (Some(packed.slice(..)), copies)
                }
            },
        };
        let slice = |slot: Slot| match slot {
            Slot::RowData => row_data,
            Slot::Selection => Some(self.selection.slice(..)),
            slot => buffers.slice(slot),
        };
        self.gpu.checked_now("bind groups of weights", || {
            let dispatches = self.steps.bind(&self.gpu, self.plan.steps(), 0, slice);
            BoundSteps { dispatches, copies }
        })
    }

    /// Records the pass over the caller's buffers into the caller's encoder. Does not submit, wait, or poll.
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub fn encode(&self, encoder: &mut wgpu::CommandEncoder, buffers: &WeightsBuffers<'_>) -> Result<(), GpuError> {
        self.bind(buffers)?.encode(encoder);
        Ok(())
    }
}
