//! Gradients on the device: of an attention whose inputs and results lie there, or from host memory to host memory.

mod buffers;

pub use buffers::{BackwardBuffers, GradientBuffers};

use self::buffers::{WRITTEN, gradient_bytes, slopes};
use crate::backward::{BackwardInputs, BackwardProblem, Gradients};
use crate::dispatch::Slot;
use crate::error::Error;
use crate::gpu::attention::AttentionTensors;
use crate::gpu::bound::{BoundSteps, RowDataCopy};
use crate::gpu::buffers::row_data_copies;
use crate::gpu::error::GpuError;
use crate::gpu::open::Gpu;
use crate::gpu::steps::PreparedSteps;
use crate::plan::BackwardPlan;
use crate::tensor::{Element, TensorData, TensorSpec};

/// Gradients with their pipelines, parameters and workspace on a device, to be used for any number of calls.
///
/// ```no_run
/// use cross_attention::backward::{BackwardProblem, BackwardSpec};
/// use cross_attention::gpu::{AdapterRequest, AttentionBuffers, BackwardBuffers, choose};
/// use cross_attention::{AttentionSpec, wgpu};
/// # pollster::block_on(async {
/// let gpu = choose(&AdapterRequest::Hardware).await?.open().await?;
/// let problem = BackwardProblem::new(BackwardSpec::new(AttentionSpec::new([1, 8, 4096, 64], [1, 8, 77, 64])))?;
/// // the attention that keeps maximum and sum of its rows
/// let attention = gpu.prepare(problem.forward(), None).await?;
/// let backward = gpu.prepare_backward(&problem).await?;
/// let [rows, tokens] = [4 * 8 * 4096, 4 * 8 * 77];
/// let [query, output, d_output] =
///     [gpu.allocate("query", rows * 64).await?, gpu.allocate("output", rows * 64).await?, gpu.allocate("d_output", rows * 64).await?];
/// let [key, value] = [gpu.allocate("key", tokens * 64).await?, gpu.allocate("value", tokens * 64).await?];
/// let row_state = gpu.allocate("row_state", rows * 2).await?;
/// let buffers = AttentionBuffers {
///     lse: Some(row_state.slice(..)),
///     ..AttentionBuffers::new(query.slice(..), key.slice(..), value.slice(..), output.slice(..))
/// };
/// let gradients = backward.allocate().await?;
/// let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
/// attention.encode(&mut encoder, &buffers)?;
/// backward.encode(&mut encoder, &gradients.buffers(&buffers, d_output.slice(..))?)?;
/// gpu.queue().submit([encoder.finish()]);
/// # Ok::<(), cross_attention::Error>(())
/// # })?;
/// # Ok::<(), cross_attention::Error>(())
/// ```
///
/// Calls that share one `GpuBackward` share its workspace: recorded into command buffers of one queue they run one after
/// another, which is right.
#[derive(Clone, Debug)]
pub struct GpuBackward {
    gpu: Gpu,
    plan: BackwardPlan,
    steps: PreparedSteps,
    sums: Option<wgpu::Buffer>,
    rows: wgpu::Buffer,
}

impl Gpu {
    /// Plans gradients for this device and makes what they need.
    ///
    /// # Errors
    /// [`Error::BackwardPlan`] if they do not fit the device's limits, [`Error::Gpu`] if the device refuses.
    pub async fn prepare_backward(&self, problem: &BackwardProblem) -> Result<GpuBackward, Error> {
        let plan = BackwardPlan::new(problem, self.caps()).map_err(|reason| Error::BackwardPlan { reason })?;
        self.prepare_backward_plan(plan).await
    }

    /// Makes what a plan needs. The plan may have been made for lower capabilities than the device has.
    ///
    /// # Errors
    /// [`Error::Plan`] if it was made for higher ones, [`Error::Gpu`] if the device refuses.
    pub async fn prepare_backward_plan(&self, plan: BackwardPlan) -> Result<GpuBackward, Error> {
        plan.check(self.caps())?;
        let params: Vec<_> = plan.steps().iter().map(|step| step.params).collect();
        let steps = PreparedSteps::new(self, plan.steps(), &params).await?;
        let sums = match plan.sums_bytes() {
            0 => None,
            bytes => Some(self.allocate("gradients", bytes).await?),
        };
        let rows = self.allocate("row_data", plan.row_bytes()).await?;
        let (chosen, at) = plan.chosen();
        if !chosen.is_empty() {
            self.checked("places of chosen weights", 0, || {
                self.queue().write_buffer(&rows, at * 4, bytemuck::cast_slice(&chosen));
            })
            .await?;
        }
        Ok(GpuBackward { gpu: self.clone(), plan, steps, sums, rows })
    }

    /// [`prepare_backward`](Self::prepare_backward), blocking.
    ///
    /// # Errors
    /// As [`prepare_backward`](Self::prepare_backward).
    #[cfg(feature = "threads")]
    pub fn prepare_backward_blocking(&self, problem: &BackwardProblem) -> Result<GpuBackward, Error> {
        self.block_on(self.prepare_backward(problem))
    }

    /// Gradients from host memory to host memory; see [`cpu::backward`](crate::cpu::backward).
    ///
    /// # Errors
    /// [`Error::Input`], [`Error::BackwardPlan`], [`Error::Gpu`].
    pub async fn backward(&self, problem: &BackwardProblem, inputs: &BackwardInputs<'_>) -> Result<Gradients, Error> {
        inputs.check(problem)?;
        self.prepare_backward(problem).await?.run(inputs).await
    }

    /// [`backward`](Self::backward), blocking.
    ///
    /// # Errors
    /// As [`backward`](Self::backward).
    #[cfg(feature = "threads")]
    pub fn backward_blocking(
        &self,
        problem: &BackwardProblem,
        inputs: &BackwardInputs<'_>,
    ) -> Result<Gradients, Error> {
        self.block_on(self.backward(problem, inputs))
    }
}

impl GpuBackward {
    /// Which gradients are computed.
    #[must_use]
    pub const fn problem(&self) -> &BackwardProblem {
        self.plan.problem()
    }

    /// What runs.
    #[must_use]
    pub const fn plan(&self) -> &BackwardPlan {
        &self.plan
    }

    /// The device it was prepared on.
    #[must_use]
    pub const fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Buffers for the gradients that are asked for.
    ///
    /// # Errors
    /// [`GpuError::BufferTooLarge`], [`GpuError::OutOfMemory`].
    pub async fn allocate(&self) -> Result<GradientBuffers, GpuError> {
        let mut written = [const { None }; 7];
        for (place, slot) in written.iter_mut().zip(WRITTEN) {
            if let Some(bytes) = gradient_bytes(self.problem(), slot) {
                *place = Some(self.gpu.allocate(slot.name(), bytes).await?);
            }
        }
        Ok(GradientBuffers { written })
    }

    /// Binds the caller's buffers. What is bound can be recorded again and again, alone or behind the attention whose results
    /// it reads ([`BoundSteps::encode_all`]); the contents may change between.
    ///
    /// # Errors
    /// [`GpuError`] names the buffer that is missing, too small, made for other uses, or read and written at once.
    pub fn bind(&self, buffers: &BackwardBuffers<'_>) -> Result<BoundSteps, GpuError> {
        buffers.check(self.problem(), self.gpu.caps().min_storage_buffer_offset_alignment)?;
        let mut copies = row_data_copies(&buffers.terms, self.problem().forward(), &self.rows)?;
        let bytes = self.problem().weights().map_or(0, |weights| weights.elements() as u64 * 4);
        if let Some(d_weights) = buffers.d_weights.filter(|_| bytes > 0) {
            copies.push(RowDataCopy {
                from: d_weights.buffer().clone(),
                from_bytes: d_weights.offset(),
                to: self.rows.clone(),
                to_bytes: self.plan.d_weights_at() * 4,
                bytes,
            });
        }
        let slice = |slot: Slot| match slot {
            Slot::RowData => Some(self.rows.slice(..)),
            Slot::Gradients => self.sums.as_ref().map(|sums| sums.slice(..)),
            slot => buffers.slice(slot),
        };
        self.gpu.checked_now("bind groups of gradients", || {
            let dispatches = self.steps.bind(&self.gpu, self.plan.steps(), 0, slice);
            BoundSteps { dispatches, copies }
        })
    }

    /// Records the gradients over the caller's buffers into the caller's encoder. Does not submit, wait, or poll.
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub fn encode(&self, encoder: &mut wgpu::CommandEncoder, buffers: &BackwardBuffers<'_>) -> Result<(), GpuError> {
        self.bind(buffers)?.encode(encoder);
        Ok(())
    }

    /// Submits what is bound, once. Returns when it is on the queue, not when it is done.
    ///
    /// # Errors
    /// [`GpuError`] if the device refuses or was lost.
    pub async fn submit(&self, bound: &BoundSteps) -> Result<(), GpuError> {
        self.gpu.check_faults()?;
        self.gpu
            .checked("the submission of gradients", 0, || {
                let mut encoder = self.gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
                bound.encode(&mut encoder);
                self.gpu.queue().submit([encoder.finish()]);
            })
            .await
    }

    /// One call from host memory to host memory.
    ///
    /// # Errors
    /// [`Error::Input`], [`Error::Gpu`].
    pub async fn run(&self, inputs: &BackwardInputs<'_>) -> Result<Gradients, Error> {
        let (bound, gradients) = self.upload(inputs).await?;
        self.submit(&bound).await?;
        self.read(&gradients).await
    }

    /// Inputs of the host on the device, bound to gradients that are to be written.
    async fn upload(&self, inputs: &BackwardInputs<'_>) -> Result<(BoundSteps, GradientBuffers), Error> {
        inputs.check(self.problem())?;
        let gpu = &self.gpu;
        let given = &inputs.attention;
        let attention = AttentionTensors {
            query: gpu.upload_tensor("query", given.query).await?,
            key: gpu.upload_tensor("key", given.key).await?,
            value: gpu.upload_tensor("value", given.value).await?,
            terms: gpu.upload_terms(&given.terms).await?,
            output: gpu.upload_tensor("output", inputs.output).await?,
            lse: Some(gpu.upload("row_state", &inputs.row_state.to_pairs()).await?),
            scores: None,
            large_values: false,
        };
        let d_output = gpu.upload_tensor("d_output", inputs.d_output).await?;
        let d_lse = match inputs.d_lse {
            Some(d_lse) => Some(gpu.upload("d_lse", d_lse).await?),
            None => None,
        };
        let d_weights = match inputs.d_weights {
            Some(d_weights) => Some(gpu.upload("d_weights", d_weights).await?),
            None => None,
        };
        let gradients = self.allocate().await?;
        let mut buffers = gradients.buffers(&attention.buffers(), d_output.slice(..))?;
        buffers.d_lse = d_lse.as_ref().map(|d_lse| d_lse.slice(..));
        buffers.d_weights = d_weights.as_ref().map(|d_weights| d_weights.slice(..));
        Ok((self.bind(&buffers)?, gradients))
    }

    /// Times the backward alone, inputs in place and pipelines warm; blocking. At least `min_rounds` rounds, until `budget` is used
    /// up; `on_round` is called after each.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    #[cfg(feature = "threads")]
    pub fn time_blocking(
        &self,
        inputs: &BackwardInputs<'_>,
        min_rounds: usize,
        budget: std::time::Duration,
        on_round: &mut (dyn FnMut() + '_),
    ) -> Result<crate::timing::Timing, Error> {
        self.gpu.block_on(async {
            let (bound, _gradients) = self.upload(inputs).await?;
            Ok(self.gpu.time_bound(&bound, min_rounds, budget, on_round).await?)
        })
    }

    /// [`run`](Self::run), blocking.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    #[cfg(feature = "threads")]
    pub fn run_blocking(&self, inputs: &BackwardInputs<'_>) -> Result<Gradients, Error> {
        self.gpu.block_on(self.run(inputs))
    }

    /// Reads the gradients back.
    ///
    /// # Errors
    /// [`Error::Gpu`].
    pub async fn read(&self, gradients: &GradientBuffers) -> Result<Gradients, Error> {
        let spec = self.problem().spec();
        let d_scale = self.read_numbers(gradients, Slot::DScale, 1).await?;
        Ok(Gradients {
            d_query: self.read_tensor(gradients, Slot::DQuery, spec.d_query).await?,
            d_key: self.read_tensor(gradients, Slot::DKey, spec.d_key).await?,
            d_value: self.read_tensor(gradients, Slot::DValue, spec.d_value).await?,
            d_bias: self.read_tensor(gradients, Slot::DBias, spec.d_bias).await?,
            d_alibi_slopes: self.read_numbers(gradients, Slot::DAlibiSlopes, slopes(self.problem())).await?,
            d_sinks: self.read_numbers(gradients, Slot::DSinks, self.problem().forward().q_heads()).await?,
            d_scale: d_scale.and_then(|d_scale| d_scale.first().copied()),
        })
    }

    async fn read_tensor(
        &self,
        gradients: &GradientBuffers,
        slot: Slot,
        tensor: Option<TensorSpec>,
    ) -> Result<Option<TensorData>, GpuError> {
        let (Some(buffer), Some(tensor)) = (gradients.buffer(slot), tensor) else { return Ok(None) };
        let (slice, len) = (buffer.slice(..), tensor.layout.extent().unwrap_or(0));
        Ok(Some(match tensor.element {
            Element::F32 => TensorData::F32(self.gpu.read(slot.name(), slice, len).await?),
            Element::F16 => TensorData::F16(self.gpu.read(slot.name(), slice, len).await?),
            Element::Bf16 => TensorData::Bf16(self.gpu.read(slot.name(), slice, len).await?),
            // refused as a gradient where problems are made
            Element::I8 => TensorData::zeros(Element::I8, 0),
        }))
    }

    async fn read_numbers(
        &self,
        gradients: &GradientBuffers,
        slot: Slot,
        len: usize,
    ) -> Result<Option<Vec<f32>>, GpuError> {
        match gradients.buffer(slot) {
            Some(buffer) => self.gpu.read(slot.name(), buffer.slice(..), len).await.map(Some),
            None => Ok(None),
        }
    }
}
