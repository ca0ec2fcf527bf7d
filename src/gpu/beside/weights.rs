//! Selected attention weights on the device: a second pass over query and key, with maximum and sum of the rows.

use crate::dispatch::Slot;
use crate::error::Error;
use crate::gpu::attention::AttentionTensors;
use crate::gpu::bound::BoundAttention;
use crate::gpu::buffers::{AttentionBuffers, aligned, enough, needed_bytes, present, usage};
use crate::gpu::context::Context;
use crate::gpu::error::GpuError;
use crate::gpu::steps::PreparedSteps;
use crate::inputs::AttentionInputs;
use crate::plan::WeightsPlan;
use crate::problem::AttentionProblem;
use crate::weights::{AttentionWithWeights, RowNorm, WeightsProblem, WeightsSpec};

/// Selected weights with their pipelines and parameters on a device, to be used for any number of calls.
#[derive(Clone, Debug)]
pub struct PreparedWeights {
    context: Context,
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
    /// `[batch, q_heads, q_len, kv_len]`, broadcast as the spec's layout says.
    pub bias: Option<wgpu::BufferSlice<'a>>,
    /// `[batch, q_heads, q_len, kv_len]`, broadcast as the spec's layout says; one byte an element, 0 = masked.
    pub mask: Option<wgpu::BufferSlice<'a>>,
    /// `[batch]`, u32, in tokens.
    pub kv_lens: Option<wgpu::BufferSlice<'a>>,
    /// `[batch, q_len]`, i32.
    pub row_start: Option<wgpu::BufferSlice<'a>>,
    /// `[batch, q_len]`, i32.
    pub row_end: Option<wgpu::BufferSlice<'a>>,
    /// `[q_heads]`, f32.
    pub alibi_slopes: Option<wgpu::BufferSlice<'a>>,
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
        let AttentionBuffers { query, key, bias, mask, kv_lens, row_start, row_end, alibi_slopes, .. } = *attention;
        let row_state = attention.lse.ok_or(GpuError::Missing { name: "row_state" })?;
        Ok(Self { query, key, bias, mask, kv_lens, row_start, row_end, alibi_slopes, row_state, weights })
    }

    /// The same as buffers of the attention that a [`WeightsProblem`] has inside.
    const fn as_attention(&self) -> AttentionBuffers<'a> {
        let Self { query, key, bias, mask, kv_lens, row_start, row_end, alibi_slopes, row_state, weights } = *self;
        AttentionBuffers {
            query,
            key,
            value: key,
            bias,
            mask,
            kv_lens,
            row_start,
            row_end,
            alibi_slopes,
            sinks: None,
            output: weights,
            lse: Some(row_state),
            scores: None,
            large_values: false,
        }
    }

    fn check(&self, problem: &WeightsProblem, alignment: u32) -> Result<(), GpuError> {
        let scores = problem.scores();
        let spec = scores.spec();
        let as_attention = self.as_attention();
        let weights_bytes = problem.elements() as u64 * 4;
        let tensors = [
            ("query", Some(self.query), true, needed_bytes(scores, Slot::Query)),
            ("key", Some(self.key), true, needed_bytes(scores, Slot::Key)),
            ("bias", self.bias, spec.bias.is_some(), needed_bytes(scores, Slot::Bias)),
            ("mask", self.mask, spec.mask.is_some(), needed_bytes(scores, Slot::Mask)),
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
        let row_data = as_attention.row_data(scores);
        for (name, slice, wanted, words) in row_data {
            if let Some(slice) = present(name, slice, wanted)? {
                enough(name, &slice, words as u64 * 4)?;
                aligned(name, &slice, 4)?;
            }
        }
        let read = tensors[..5].iter().map(|&(name, slice, ..)| (name, slice));
        for (name, slice) in read.chain(row_data.iter().map(|&(name, slice, ..)| (name, slice))) {
            if slice.is_some_and(|slice| slice.buffer() == self.weights.buffer()) {
                return Err(GpuError::Aliased { written: "weights", read: name });
            }
        }
        Ok(())
    }
}

impl Context {
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
        Ok(PreparedWeights { context: self.clone(), plan, steps, selection, row_data })
    }

    /// [`prepare_weights`](Self::prepare_weights), blocking.
    ///
    /// # Errors
    /// As [`prepare_weights`](Self::prepare_weights).
    #[cfg(feature = "native")]
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
        let bias = match inputs.bias {
            Some(bias) => Some(self.upload_tensor("bias", bias).await?),
            None => None,
        };
        let mask = self.upload_optional("mask", inputs.mask).await?;
        let kv_lens = self.upload_optional("kv_lens", inputs.kv_lens).await?;
        let row_start = self.upload_optional("row_start", inputs.row_start).await?;
        let row_end = self.upload_optional("row_end", inputs.row_end).await?;
        let alibi_slopes = self.upload_optional("alibi_slopes", inputs.alibi_slopes).await?;
        let row_state = self.upload("row_state", &norm.pairs()).await?;
        let weights = prepared.allocate().await?;
        let bound = prepared.bind(&WeightsBuffers {
            query: query.slice(..),
            key: key.slice(..),
            bias: whole(&bias),
            mask: whole(&mask),
            kv_lens: whole(&kv_lens),
            row_start: whole(&row_start),
            row_end: whole(&row_end),
            alibi_slopes: whole(&alibi_slopes),
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
    #[cfg(feature = "native")]
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
    #[cfg(feature = "native")]
    pub fn attention_with_weights_blocking(
        &self,
        problem: &AttentionProblem,
        inputs: &AttentionInputs<'_>,
        spec: &WeightsSpec,
    ) -> Result<AttentionWithWeights, Error> {
        self.block_on(self.attention_with_weights(problem, inputs, spec))
    }

    async fn upload_optional<T: bytemuck::NoUninit>(
        &self,
        name: &str,
        data: Option<&[T]>,
    ) -> Result<Option<wgpu::Buffer>, GpuError> {
        match data {
            Some(data) => Ok(Some(self.upload(name, data).await?)),
            None => Ok(None),
        }
    }

    async fn submit_all(&self, what: &str, bound: &[&BoundAttention]) -> Result<(), GpuError> {
        self.check_faults()?;
        self.checked(what, 0, || {
            let mut encoder = self.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            BoundAttention::encode_all(bound.iter().copied(), &mut encoder);
            self.queue().submit([encoder.finish()]);
        })
        .await
    }
}

fn whole(buffer: &Option<wgpu::Buffer>) -> Option<wgpu::BufferSlice<'_>> {
    buffer.as_ref().map(|buffer| buffer.slice(..))
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
        self.context.allocate("weights", self.problem().elements() as u64 * 4).await
    }

    /// Binds the caller's buffers. What is bound can be recorded again and again, alone or behind the attention whose
    /// maxima and sums it reads ([`BoundAttention::encode_all`]); the contents may change between.
    ///
    /// # Errors
    /// [`GpuError`] names the buffer that is missing, too small, made for other uses, or read and written at once.
    pub fn bind(&self, buffers: &WeightsBuffers<'_>) -> Result<BoundAttention, GpuError> {
        let caps = self.context.caps();
        buffers.check(self.problem(), caps.min_storage_buffer_offset_alignment)?;
        let as_attention = buffers.as_attention();
        let (row_data, copies) = match &self.row_data {
            None => (None, vec![]),
            Some(packed) => match as_attention.single_row_data(caps) {
                Some(slice) => (Some(slice), vec![]),
                None => {
                    let copies = as_attention.row_data_copies(self.problem().scores(), packed)?;
                    (Some(packed.slice(..)), copies)
                }
            },
        };
        let slice = |slot: Slot| match slot {
            Slot::RowData => row_data,
            Slot::Selection => Some(self.selection.slice(..)),
            Slot::Weights => Some(buffers.weights),
            slot => as_attention.slice(slot),
        };
        self.context.checked_now("bind groups of weights", || {
            let dispatches = self.steps.bind(&self.context, self.plan.steps(), 0, slice);
            BoundAttention { dispatches, copies }
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
