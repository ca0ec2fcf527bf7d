//! Gradients on the device: of an attention whose inputs and results lie there, or from host memory to host memory.

use crate::backward::{BackwardInputs, BackwardProblem, Gradients};
use crate::dispatch::Slot;
use crate::error::Error;
use crate::gpu::attention::AttentionTensors;
use crate::gpu::bound::{BoundSteps, RowDataCopy};
use crate::gpu::buffers::{
    AttentionBuffers, aligned, check_row_data, enough, needed_bytes, present, row_data_copies, usage,
};
use crate::gpu::error::GpuError;
use crate::gpu::open::Gpu;
use crate::gpu::steps::PreparedSteps;
use crate::plan::BackwardPlan;
use crate::problem::AlibiSlopes;
use crate::tensor::{Element, TensorData, TensorSpec};
use crate::terms::Terms;

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

/// The buffers of one backward call. Optional ones are given where the spec has them.
///
/// What is read and what is written must not be one buffer. Row data (lengths, ranges, slopes, sinks, tables) is copied to where
/// the kernels read it, and needs the usage `COPY_SRC`; all else needs `STORAGE`.
#[derive(Clone, Copy, Debug)]
pub struct BackwardBuffers<'a> {
    /// `[batch, q_heads, q_len, head_dim]`.
    pub query: wgpu::BufferSlice<'a>,
    /// `[batch, kv_heads, kv_len, head_dim]`.
    pub key: wgpu::BufferSlice<'a>,
    /// `[batch, kv_heads, kv_len, v_head_dim]`.
    pub value: wgpu::BufferSlice<'a>,
    /// The rest, as the attention has it.
    pub terms: Terms<wgpu::BufferSlice<'a>>,
    /// What the attention gave, `[batch, q_heads, q_len, v_head_dim]`.
    pub output: wgpu::BufferSlice<'a>,
    /// Maximum and sum of its rows, `[batch, q_heads, q_len, 2]`, f32.
    pub row_state: wgpu::BufferSlice<'a>,
    /// The gradient of the output, `[batch, q_heads, q_len, v_head_dim]`.
    pub d_output: wgpu::BufferSlice<'a>,
    /// The gradient of the log-sum-exp, `[batch, q_heads, q_len]`, f32.
    pub d_lse: Option<wgpu::BufferSlice<'a>>,
    /// The gradient of the chosen weights, f32, in the shape of [`WeightsProblem::shape`](crate::weights::WeightsProblem::shape).
    /// It is copied, and needs the usage `COPY_SRC` alone.
    pub d_weights: Option<wgpu::BufferSlice<'a>>,
    /// `[batch, q_heads, q_len, head_dim]`, written; gaps of layouts are left alone.
    pub d_query: Option<wgpu::BufferSlice<'a>>,
    /// `[batch or 1, kv_heads, kv_len, head_dim]`, written.
    pub d_key: Option<wgpu::BufferSlice<'a>>,
    /// `[batch or 1, kv_heads, kv_len, v_head_dim]`, written.
    pub d_value: Option<wgpu::BufferSlice<'a>>,
    /// `[batch or 1, q_heads or 1, q_len or 1, kv_len or 1]`, written.
    pub d_bias: Option<wgpu::BufferSlice<'a>>,
    /// As many f32 as there are slopes, written.
    pub d_alibi_slopes: Option<wgpu::BufferSlice<'a>>,
    /// `[q_heads]`, f32, written.
    pub d_sinks: Option<wgpu::BufferSlice<'a>>,
    /// One f32, written.
    pub d_scale: Option<wgpu::BufferSlice<'a>>,
}

impl<'a> BackwardBuffers<'a> {
    /// The buffers of an attention that returned maximum and sum of its rows (`row_state`), and the gradient of its output;
    /// gradients that are given or asked for beside can be filled in.
    ///
    /// # Errors
    /// [`GpuError::Missing`] if there is no `lse`.
    pub fn of(attention: &AttentionBuffers<'a>, d_output: wgpu::BufferSlice<'a>) -> Result<Self, GpuError> {
        let AttentionBuffers { query, key, value, terms, output, .. } = *attention;
        let row_state = attention.lse.ok_or(GpuError::Missing { name: "row_state" })?;
        let (d_lse, d_weights, d_query, d_key, d_value, d_bias) = (None, None, None, None, None, None);
        let (d_alibi_slopes, d_sinks, d_scale) = (None, None, None);
        Ok(Self {
            query,
            key,
            value,
            terms,
            output,
            row_state,
            d_output,
            d_lse,
            d_weights,
            d_query,
            d_key,
            d_value,
            d_bias,
            d_alibi_slopes,
            d_sinks,
            d_scale,
        })
    }

    fn slice(&self, slot: Slot) -> Option<wgpu::BufferSlice<'a>> {
        match slot {
            Slot::Query => Some(self.query),
            Slot::Key => Some(self.key),
            Slot::Value => Some(self.value),
            Slot::Bias => self.terms.bias,
            Slot::Mask => self.terms.mask,
            Slot::KeyScale => self.terms.key_scale,
            Slot::ValueScale => self.terms.value_scale,
            Slot::Output => Some(self.output),
            Slot::Lse => Some(self.row_state),
            Slot::DOutput => Some(self.d_output),
            Slot::DLse => self.d_lse,
            Slot::DWeights => self.d_weights,
            Slot::DQuery => self.d_query,
            Slot::DKey => self.d_key,
            Slot::DValue => self.d_value,
            Slot::DBias => self.d_bias,
            Slot::DAlibiSlopes => self.d_alibi_slopes,
            Slot::DSinks => self.d_sinks,
            Slot::DScale => self.d_scale,
            _ => None,
        }
    }

    fn check(&self, problem: &BackwardProblem, alignment: u32) -> Result<(), GpuError> {
        let (spec, forward) = (problem.spec(), problem.forward());
        let of = forward.spec();
        let inputs = [
            (Slot::Query, true),
            (Slot::Key, true),
            (Slot::Value, true),
            (Slot::Bias, of.bias.is_some()),
            (Slot::Mask, of.mask.is_some()),
            (Slot::KeyScale, of.key_scale.is_some()),
            (Slot::ValueScale, of.value_scale.is_some()),
            (Slot::Output, true),
            (Slot::Lse, true),
        ];
        let inputs = inputs.map(|(slot, wanted)| (slot, wanted.then(|| needed_bytes(forward, slot))));
        let given = [
            (Slot::DOutput, Some(tensor_bytes(&spec.d_output))),
            (Slot::DLse, spec.d_lse.then_some(forward.rows() as u64 * 4)),
        ];
        let written = WRITTEN.map(|slot| (slot, gradient_bytes(problem, slot)));
        for (slot, needed) in inputs.into_iter().chain(given).chain(written) {
            // maximum and sum of rows stand in the place of the log-sum-exp
            let name = if slot == Slot::Lse { "row_state" } else { slot.name() };
            if let Some(slice) = present(name, self.slice(slot), needed.is_some())? {
                enough(name, &slice, needed.unwrap_or(0))?;
                usage(name, &slice, wgpu::BufferUsages::STORAGE)?;
                aligned(name, &slice, alignment)?;
            }
        }
        check_row_data(&self.terms, forward)?;
        let wanted = problem.weights().map(|weights| weights.elements() as u64 * 4);
        if let Some(slice) = present("d_weights", self.d_weights, wanted.is_some())? {
            enough("d_weights", &slice, wanted.unwrap_or(0))?;
            usage("d_weights", &slice, wgpu::BufferUsages::COPY_SRC)?;
            aligned("d_weights", &slice, 4)?;
        }
        self.check_aliases()
    }

    fn check_aliases(&self) -> Result<(), GpuError> {
        let tensors = [Slot::Query, Slot::Key, Slot::Value, Slot::Output, Slot::Lse, Slot::DOutput, Slot::DLse];
        let tensors = tensors.into_iter().chain([Slot::DWeights]);
        let tensors = tensors.map(|slot| (slot.name(), self.slice(slot)));
        let terms = self.terms.list().into_iter().map(|(name, slice)| (name, slice.copied()));
        let read: Vec<_> = tensors.chain(terms).filter_map(|(name, slice)| Some((name, slice?))).collect();
        for (n, slot) in WRITTEN.into_iter().enumerate() {
            let Some(slice) = self.slice(slot) else { continue };
            let others = WRITTEN[n + 1..].iter().filter_map(|other| Some((other.name(), self.slice(*other)?)));
            for (name, other) in read.iter().copied().chain(others) {
                if slice.buffer() == other.buffer() {
                    return Err(GpuError::Aliased { written: slot.name(), read: name });
                }
            }
        }
        Ok(())
    }
}

/// The gradients that are written.
const WRITTEN: [Slot; 7] =
    [Slot::DQuery, Slot::DKey, Slot::DValue, Slot::DBias, Slot::DAlibiSlopes, Slot::DSinks, Slot::DScale];

fn tensor_bytes(tensor: &TensorSpec) -> u64 {
    let elements = tensor.layout.extent().unwrap_or(usize::MAX) as u64;
    elements.saturating_mul(tensor.element.size_bytes() as u64).next_multiple_of(4)
}

fn slopes(problem: &BackwardProblem) -> usize {
    let forward = problem.forward();
    match forward.spec().alibi_slopes {
        Some(AlibiSlopes::PerBatchAndHead) => forward.batch() * forward.q_heads(),
        Some(AlibiSlopes::PerHead) => forward.q_heads(),
        None => 0,
    }
}

/// Bytes that the buffer of a gradient needs; `None` where it is not asked for.
fn gradient_bytes(problem: &BackwardProblem, slot: Slot) -> Option<u64> {
    let spec = problem.spec();
    let numbers = |asked: bool, n: usize| asked.then_some(n as u64 * 4);
    match slot {
        Slot::DQuery => spec.d_query.as_ref().map(tensor_bytes),
        Slot::DKey => spec.d_key.as_ref().map(tensor_bytes),
        Slot::DValue => spec.d_value.as_ref().map(tensor_bytes),
        Slot::DBias => spec.d_bias.as_ref().map(tensor_bytes),
        Slot::DAlibiSlopes => numbers(spec.d_alibi_slopes, slopes(problem)),
        Slot::DSinks => numbers(spec.d_sinks, problem.forward().q_heads()),
        Slot::DScale => numbers(spec.d_scale, 1),
        _ => None,
    }
}

/// The gradients of one call, on the device: those that the spec asks for; shapes are those of [`BackwardBuffers`].
#[derive(Clone, Debug)]
pub struct GradientBuffers {
    /// `d_query`, `d_key`, `d_value`, `d_bias`, `d_alibi_slopes`, `d_sinks`, `d_scale`.
    written: [Option<wgpu::Buffer>; 7],
}

impl GradientBuffers {
    /// What a backward call binds that comes after an attention over these buffers, whose `lse` is maximum and sum of its rows.
    /// Where the spec says that gradients of the log-sum-exp and of chosen weights are given, they can be filled in.
    ///
    /// # Errors
    /// As [`BackwardBuffers::of`].
    pub fn buffers<'a>(
        &'a self,
        attention: &AttentionBuffers<'a>,
        d_output: wgpu::BufferSlice<'a>,
    ) -> Result<BackwardBuffers<'a>, GpuError> {
        let of = |slot: Slot| self.buffer(slot).map(|buffer| buffer.slice(..));
        Ok(BackwardBuffers {
            d_query: of(Slot::DQuery),
            d_key: of(Slot::DKey),
            d_value: of(Slot::DValue),
            d_bias: of(Slot::DBias),
            d_alibi_slopes: of(Slot::DAlibiSlopes),
            d_sinks: of(Slot::DSinks),
            d_scale: of(Slot::DScale),
            ..BackwardBuffers::of(attention, d_output)?
        })
    }

    /// That of one of these: [`Slot::DQuery`], [`Slot::DKey`], [`Slot::DValue`], [`Slot::DBias`], [`Slot::DAlibiSlopes`],
    /// [`Slot::DSinks`], [`Slot::DScale`].
    #[must_use]
    pub fn buffer(&self, slot: Slot) -> Option<&wgpu::Buffer> {
        let place = WRITTEN.iter().position(|written| *written == slot)?;
        self.written[place].as_ref()
    }
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
    #[cfg(feature = "native")]
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
    #[cfg(feature = "native")]
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
    #[cfg(feature = "native")]
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
    #[cfg(feature = "native")]
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
