//! A prepared attention: pipelines and workspace of a plan, bound to buffers, recorded into a command encoder.

use futures_util::FutureExt;
use futures_util::future::{OptionFuture, join3, try_join, try_join_all, try_join4};

use super::bound::{BoundSteps, RowDataCopy};
use super::buffers::{AttentionBuffers, row_data_copies, single_row_data};
use super::error::GpuError;
use super::open::Gpu;
use super::steps::PreparedSteps;
use crate::dispatch::{Kernel, Slot};
use crate::error::Error;
use crate::inputs::{AttentionInputs, AttentionOutput, CheckedInputs, RowState};
use crate::plan::Plan;
use crate::problem::AttentionProblem;
use crate::tensor::{Element, TensorData};
use crate::terms::{HostTerms, Terms};

/// A plan with its pipelines, parameters and workspace on a device, to be used for any number of calls.
///
/// ```no_run
/// use cross_attention::gpu::{AdapterRequest, AttentionBuffers, choose};
/// use cross_attention::{AttentionProblem, AttentionSpec, wgpu};
/// # pollster::block_on(async {
/// let gpu = choose(&AdapterRequest::Hardware).await?.open().await?;
/// let problem = AttentionProblem::new(AttentionSpec::new([1, 8, 4096, 64], [1, 8, 77, 64]))?;
/// let attention = gpu.prepare(&problem, None).await?;
/// // buffers of the caller's, written by whatever comes before
/// let query = gpu.allocate("query", 4 * 8 * 4096 * 64).await?;
/// let [key, value] = [gpu.allocate("key", 4 * 8 * 77 * 64).await?, gpu.allocate("value", 4 * 8 * 77 * 64).await?];
/// let output = gpu.allocate("output", query.size()).await?;
/// let buffers = AttentionBuffers::new(query.slice(..), key.slice(..), value.slice(..), output.slice(..));
/// let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
/// attention.encode(&mut encoder, &buffers)?;
/// gpu.queue().submit([encoder.finish()]);
/// # Ok::<(), cross_attention::Error>(())
/// # })?;
/// # Ok::<(), cross_attention::Error>(())
/// ```
///
/// Calls that share one `GpuAttention` share its workspace: recorded into command buffers of one queue they run
/// one after another, which is right.
#[derive(Clone, Debug)]
pub struct GpuAttention {
    gpu: Gpu,
    plan: Plan,
    /// With the parameters of each step, then those for large values.
    steps: PreparedSteps,
    scores: Option<wgpu::Buffer>,
    states: Option<wgpu::Buffer>,
    row_data: Option<wgpu::Buffer>,
}

impl Gpu {
    /// Plans a problem for this device and makes what the plan needs; `kernel` forces a kernel.
    ///
    /// # Errors
    /// [`Error::Plan`] if no kernel will do, [`Error::Gpu`] if the device refuses.
    pub async fn prepare(&self, problem: &AttentionProblem, kernel: Option<Kernel>) -> Result<GpuAttention, Error> {
        let plan = Plan::new(problem, self.caps(), kernel)?;
        self.prepare_plan(plan).await
    }

    /// Makes what a plan needs. The plan may have been made for lower capabilities than the device has.
    ///
    /// # Errors
    /// [`Error::Plan`] if it was made for higher ones, [`Error::Gpu`] if the device refuses.
    pub async fn prepare_plan(&self, plan: Plan) -> Result<GpuAttention, Error> {
        plan.check(self.caps())?;
        let usual = plan.steps().iter().map(|step| step.params);
        let params: Vec<_> = usual.clone().chain(usual.map(|usual| usual.for_large_values(plan.problem()))).collect();
        let held = async |name, bytes: u64| {
            let buffer = (bytes > 0).then(|| self.allocate(name, bytes));
            OptionFuture::from(buffer).await.transpose()
        };
        // together: in a browser each answer is a way to another process and back
        let (steps, scores, states, row_data) = try_join4(
            PreparedSteps::new(self, plan.steps(), &params),
            held("workspace", plan.scores_bytes()),
            held("states", plan.states_bytes()),
            held("row_data", u64::from(plan.row_data().words) * 4),
        )
        .await?;
        Ok(GpuAttention { gpu: self.clone(), plan, steps, scores, states, row_data })
    }

    /// [`prepare_plan`](Self::prepare_plan), blocking.
    ///
    /// # Errors
    /// As [`prepare_plan`](Self::prepare_plan).
    #[cfg(feature = "threads")]
    pub fn prepare_plan_blocking(&self, plan: Plan) -> Result<GpuAttention, Error> {
        self.block_on(self.prepare_plan(plan))
    }

    /// One attention from host memory to host memory: upload, run, read back.
    ///
    /// # Errors
    /// [`Error::Input`], [`Error::Plan`], [`Error::Gpu`].
    pub async fn attention(
        &self,
        problem: &AttentionProblem,
        inputs: &AttentionInputs<'_>,
        kernel: Option<Kernel>,
    ) -> Result<AttentionOutput, Error> {
        let inputs = inputs.checked(problem)?;
        self.prepare(problem, kernel).await?.run_checked(inputs).await
    }

    /// [`prepare`](Self::prepare), blocking.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare).
    #[cfg(feature = "threads")]
    pub fn prepare_blocking(&self, problem: &AttentionProblem, kernel: Option<Kernel>) -> Result<GpuAttention, Error> {
        self.block_on(self.prepare(problem, kernel))
    }

    /// [`attention`](Self::attention), blocking.
    ///
    /// # Errors
    /// As [`attention`](Self::attention).
    #[cfg(feature = "threads")]
    pub fn attention_blocking(
        &self,
        problem: &AttentionProblem,
        inputs: &AttentionInputs<'_>,
        kernel: Option<Kernel>,
    ) -> Result<AttentionOutput, Error> {
        self.block_on(self.attention(problem, inputs, kernel))
    }
}

impl GpuAttention {
    /// What runs.
    #[must_use]
    pub const fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What it was prepared for.
    #[must_use]
    pub const fn problem(&self) -> &AttentionProblem {
        self.plan.problem()
    }

    /// The device it was prepared on.
    #[must_use]
    pub const fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Bytes of device memory that it holds.
    pub(crate) fn held_bytes(&self) -> u64 {
        let own = [&self.scores, &self.states, &self.row_data];
        let own = own.into_iter().flatten().map(wgpu::Buffer::size).sum::<u64>();
        self.steps.held_bytes() + own
    }

    /// Binds the caller's buffers. What is bound can be recorded again and again; the contents may change between.
    ///
    /// # Errors
    /// [`GpuError`] names the buffer that is missing, too small, made for other uses, or read and written at once.
    pub fn bind(&self, buffers: &AttentionBuffers<'_>) -> Result<BoundSteps, GpuError> {
        buffers.check(self.problem(), &self.plan, self.gpu.caps())?;
        let (row_data, copies) = self.row_data(buffers)?;
        self.gpu.checked_now("bind groups", || {
            let slice = self.slices(buffers, row_data);
            let dispatches = self.steps.bind(&self.gpu, self.plan.steps(), self.first_params(buffers), slice);
            BoundSteps { dispatches, copies }
        })
    }

    /// Where the parameters of a call begin.
    fn first_params(&self, buffers: &AttentionBuffers<'_>) -> usize {
        if buffers.large_values { self.plan.steps().len() } else { 0 }
    }

    /// What is bound for each slot.
    fn slices<'a>(
        &'a self,
        buffers: &AttentionBuffers<'a>,
        row_data: Option<wgpu::BufferSlice<'a>>,
    ) -> impl Fn(Slot) -> Option<wgpu::BufferSlice<'a>> {
        let buffers = *buffers;
        move |slot| match slot {
            Slot::RowData => row_data,
            Slot::Workspace => self.scores.as_ref().map(|scores| scores.slice(..)),
            Slot::States | Slot::PartOutput | Slot::PartRowState => self.states.as_ref().map(|states| states.slice(..)),
            slot => buffers.slice(slot),
        }
    }

    /// Where row data is bound, and the copies that put it there first.
    pub(super) fn row_data<'a>(
        &'a self,
        buffers: &AttentionBuffers<'a>,
    ) -> Result<(Option<wgpu::BufferSlice<'a>>, Vec<RowDataCopy>), GpuError> {
        let Some(packed) = &self.row_data else { return Ok((None, vec![])) };
        Ok(match single_row_data(&buffers.terms, self.gpu.caps()) {
            Some(slice) => (Some(slice), vec![]),
            None => (Some(packed.slice(..)), row_data_copies(&buffers.terms, self.problem(), packed)?),
        })
    }

    /// What each step binds, and the layout of its bind group.
    #[cfg(feature = "threads")]
    pub(super) fn entries<'a>(
        &'a self,
        buffers: &AttentionBuffers<'a>,
        row_data: Option<wgpu::BufferSlice<'a>>,
    ) -> impl Iterator<Item = (Vec<wgpu::BindGroupEntry<'a>>, &'a wgpu::BindGroupLayout)> {
        let slice = self.slices(buffers, row_data);
        let first = self.first_params(buffers);
        let entries = move |(n, step)| self.steps.entries(&self.gpu, step, first + n, &slice).collect();
        self.plan.steps().iter().enumerate().map(entries).zip(self.steps.layouts())
    }

    /// Records one attention over the caller's buffers into the caller's encoder. Does not submit, wait, or poll.
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub fn encode(&self, encoder: &mut wgpu::CommandEncoder, buffers: &AttentionBuffers<'_>) -> Result<(), GpuError> {
        self.bind(buffers)?.encode(encoder);
        Ok(())
    }

    /// One call from host memory to host memory.
    ///
    /// # Errors
    /// [`Error::Input`], [`Error::Gpu`].
    pub async fn run(&self, inputs: &AttentionInputs<'_>) -> Result<AttentionOutput, Error> {
        self.run_checked(inputs.checked(self.problem())?).await
    }

    /// The same of inputs that were compared with the problem.
    pub(crate) async fn run_checked(&self, inputs: CheckedInputs<'_, '_>) -> Result<AttentionOutput, Error> {
        let tensors = self.upload_checked(inputs).await?;
        let bound = self.bind(&tensors.buffers())?;
        self.submit(&bound).await?;
        self.read_output(&tensors).await
    }

    /// [`run`](Self::run), blocking.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    #[cfg(feature = "threads")]
    pub fn run_blocking(&self, inputs: &AttentionInputs<'_>) -> Result<AttentionOutput, Error> {
        self.gpu.block_on(self.run(inputs))
    }

    /// Submits what is bound, once. Returns when it is on the queue, not when it is done.
    ///
    /// # Errors
    /// [`GpuError`] if the device refuses or was lost.
    pub async fn submit(&self, bound: &BoundSteps) -> Result<(), GpuError> {
        self.gpu.check_faults()?;
        self.gpu
            .checked("the submission of an attention", 0, || {
                let mut encoder = self.gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
                bound.encode(&mut encoder);
                self.gpu.queue().submit([encoder.finish()]);
            })
            .await
    }

    /// Copies all inputs to the device and makes the outputs there.
    ///
    /// # Errors
    /// [`Error::Input`] if they are not what the problem says, [`Error::Gpu`].
    pub async fn upload(&self, inputs: &AttentionInputs<'_>) -> Result<AttentionTensors, Error> {
        self.upload_checked(inputs.checked(self.problem())?).await
    }

    async fn upload_checked(&self, inputs: CheckedInputs<'_, '_>) -> Result<AttentionTensors, Error> {
        let (gpu, spec) = (&self.gpu, self.problem().spec());
        let bytes = |slot| super::buffers::needed_bytes(self.problem(), slot);
        let allocate = |asked: bool, name, slot| OptionFuture::from(asked.then(|| gpu.allocate(name, bytes(slot))));
        let inputs_there = try_join4(
            gpu.upload_tensor("query", inputs.query),
            gpu.upload_tensor("key", inputs.key),
            gpu.upload_tensor("value", inputs.value),
            gpu.upload_terms(&inputs.terms),
        );
        let outputs_there = join3(
            gpu.allocate("output", bytes(Slot::Output)),
            allocate(spec.returns_rows(), "lse", Slot::Lse),
            allocate(spec.scores.is_some(), "scores", Slot::Scores),
        );
        let ((query, key, value, terms), (output, lse, scores)) = try_join(inputs_there, outputs_there.map(Ok)).await?;
        Ok(AttentionTensors {
            query,
            key,
            value,
            terms,
            output: output?,
            lse: lse.transpose()?,
            scores: scores.transpose()?,
            large_values: inputs.may_overflow(self.problem()),
        })
    }

    /// [`upload`](Self::upload), blocking.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    #[cfg(feature = "threads")]
    pub fn upload_blocking(&self, inputs: &AttentionInputs<'_>) -> Result<AttentionTensors, Error> {
        self.gpu.block_on(self.upload(inputs))
    }

    /// Reads the outputs back.
    ///
    /// # Errors
    /// [`Error::Gpu`].
    pub async fn read_output(&self, tensors: &AttentionTensors) -> Result<AttentionOutput, Error> {
        let gpu = &self.gpu;
        let spec = self.problem().spec();
        let len = spec.output.layout.extent().unwrap_or(0);
        let output = match spec.output.element {
            Element::F32 => TensorData::F32(gpu.read("output", tensors.output.slice(..), len).await?),
            Element::F16 => TensorData::F16(gpu.read("output", tensors.output.slice(..), len).await?),
            Element::Bf16 => TensorData::Bf16(gpu.read("output", tensors.output.slice(..), len).await?),
            // refused as an output where problems are made
            Element::I8 => TensorData::zeros(Element::I8, 0),
        };
        let (mut lse, mut row_state) = (None, None);
        if let Some(buffer) = &tensors.lse {
            let words = self.problem().rows() * spec.lse_width();
            let read: Vec<f32> = gpu.read("lse", buffer.slice(..), words).await?;
            if spec.row_state {
                let state = RowState::from_pairs(&read);
                lse = spec.lse.then(|| state.lse());
                row_state = Some(state);
            } else {
                lse = Some(read);
            }
        }
        let mut scores = None;
        if let Some(buffer) = &tensors.scores {
            scores = Some(gpu.read("scores", buffer.slice(..), self.problem().rows() * self.problem().kv_len()).await?);
        }
        Ok(AttentionOutput { output, lse, row_state, scores })
    }

    /// [`read_output`](Self::read_output), blocking.
    ///
    /// # Errors
    /// As [`read_output`](Self::read_output).
    #[cfg(feature = "threads")]
    pub fn read_output_blocking(&self, tensors: &AttentionTensors) -> Result<AttentionOutput, Error> {
        self.gpu.block_on(self.read_output(tensors))
    }
}

/// Every tensor of one call, on the device; shapes and types are those of [`AttentionBuffers`].
#[derive(Clone, Debug)]
pub struct AttentionTensors {
    /// `[batch, q_heads, q_len, head_dim]`.
    pub query: wgpu::Buffer,
    /// `[batch, kv_heads, kv_len, head_dim]`.
    pub key: wgpu::Buffer,
    /// `[batch, kv_heads, kv_len, v_head_dim]`.
    pub value: wgpu::Buffer,
    /// The rest, as the spec asks for it.
    pub terms: Terms<wgpu::Buffer>,
    /// `[batch, q_heads, q_len, v_head_dim]`, written.
    pub output: wgpu::Buffer,
    /// `[batch, q_heads, q_len]`, or with `row_state` `[batch, q_heads, q_len, 2]`; written.
    pub lse: Option<wgpu::Buffer>,
    /// `[batch, q_heads, q_len, kv_len]`, written.
    pub scores: Option<wgpu::Buffer>,
    /// As [`AttentionBuffers::large_values`].
    pub large_values: bool,
}

impl AttentionTensors {
    /// The whole buffers, to bind.
    #[must_use]
    pub fn buffers(&self) -> AttentionBuffers<'_> {
        AttentionBuffers {
            query: self.query.slice(..),
            key: self.key.slice(..),
            value: self.value.slice(..),
            terms: self.terms.map(|buffer| buffer.slice(..)),
            output: self.output.slice(..),
            lse: self.lse.as_ref().map(|buffer| buffer.slice(..)),
            scores: self.scores.as_ref().map(|buffer| buffer.slice(..)),
            large_values: self.large_values,
        }
    }
}

impl Gpu {
    /// Copies terms to new buffers.
    pub(super) async fn upload_terms(&self, terms: &HostTerms<'_>) -> Result<Terms<wgpu::Buffer>, GpuError> {
        let slices = terms.slices();
        let uploads = slices.list().map(|(name, slice)| async move {
            match slice {
                Some(slice) => self.upload(name, slice.bytes()).await.map(Some),
                None => Ok(None),
            }
        });
        let mut uploaded = Terms::default();
        for (to, buffer) in uploaded.places().into_iter().zip(try_join_all(uploads).await?) {
            *to = buffer;
        }
        Ok(uploaded)
    }
}
