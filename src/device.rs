//! One handle for whatever computes: a GPU if there is one, else the CPU.

mod backward;

pub use backward::PreparedBackward;

use std::str::FromStr;
#[cfg(feature = "native")]
use std::time::{Duration, Instant};

use crate::cpu::{self, CpuKernel, CpuPlan, SimdLevel};
use crate::dispatch::Kernel;
use crate::error::{Error, kernel_names};
use crate::gpu::{self, AdapterRequest, Gpu, GpuError};
use crate::inputs::{AttentionInputs, AttentionOutput, CheckedInputs};
use crate::plan::Plan;
use crate::problem::AttentionProblem;
#[cfg(feature = "native")]
use crate::roofline::Roofline;
#[cfg(feature = "native")]
use crate::timing::{Timing, TimingSource};
use crate::weights::{AttentionWithWeights, WeightsProblem, WeightsSpec};

/// Which device is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceRequest {
    /// A GPU if there is one, else the CPU. A software driver is taken only if `WGPU_ADAPTER_NAME` names it.
    #[default]
    Auto,
    /// The CPU path.
    Cpu,
    /// The oracle: f64, slow, exact as far as f64 goes.
    Oracle,
    /// A GPU, or an error.
    Gpu,
    /// The adapter whose name contains this, in any case; also a software driver.
    Named(String),
    /// The adapter at this place of [`gpu::adapters`], counted from 0; also a software driver.
    Number(usize),
    /// The first adapter of this backend; also a software driver.
    Backend(wgpu::Backend),
}

impl FromStr for DeviceRequest {
    type Err = DeviceRequestError;

    /// In any case: `auto`, `cpu`, `oracle`, `gpu`; a number, which is an adapter's place in the list; a backend, `vulkan`,
    /// `metal`, `dx12`, `gl` or `webgpu`; else a part of an adapter's name.
    fn from_str(text: &str) -> Result<Self, DeviceRequestError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(DeviceRequestError::Empty);
        }
        if text.bytes().all(|byte| byte.is_ascii_digit()) {
            let number = text.parse().map_err(|_| DeviceRequestError::Number { found: text.to_owned() })?;
            return Ok(Self::Number(number));
        }
        let backends = wgpu::Backend::ALL.into_iter().filter(|backend| *backend != wgpu::Backend::Noop);
        let backend = backends.into_iter().find(|backend| text.eq_ignore_ascii_case(backend.to_str()));
        Ok(match (text.to_ascii_lowercase().as_str(), backend) {
            ("auto", _) => Self::Auto,
            ("cpu", _) => Self::Cpu,
            ("oracle", _) => Self::Oracle,
            ("gpu", _) => Self::Gpu,
            (_, Some(backend)) => Self::Backend(backend),
            (_, None) => Self::Named(text.to_owned()),
        })
    }
}

impl std::fmt::Display for DeviceRequest {
    /// What is read back as the same, unless a name is one of the other words.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Oracle => f.write_str("oracle"),
            Self::Gpu => f.write_str("gpu"),
            Self::Named(name) => f.write_str(name),
            Self::Number(number) => write!(f, "{number}"),
            Self::Backend(backend) => f.write_str(backend.to_str()),
        }
    }
}

/// Why a text is no [`DeviceRequest`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceRequestError {
    /// There is nothing in it.
    #[error("a device has no name; needs auto, cpu, oracle, gpu, an adapter's number, a backend, or part of a name")]
    Empty,
    /// A number that no list has.
    #[error("{found} is no adapter's number; they count from 0")]
    Number {
        /// The number.
        found: String,
    },
}

/// Which kernel is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KernelChoice {
    /// What the plan finds best.
    #[default]
    Auto,
    /// This kernel on a GPU.
    Gpu(Kernel),
    /// This kernel on the CPU.
    Cpu(CpuKernel),
}

impl FromStr for KernelChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let gpu = text.parse().ok().map(Self::Gpu);
        let cpu = CpuKernel::ALL.into_iter().find(|kernel| kernel.name() == text).map(Self::Cpu);
        gpu.or(cpu).ok_or_else(|| Error::UnknownKernel { name: text.to_owned() })
    }
}

/// What computes.
///
/// ```
/// use cross_attention::{AttentionInputs, AttentionProblem, AttentionSpec, Device};
/// # pollster::block_on(async {
/// // two query rows attend to three keys, one head of width 4
/// let problem = AttentionProblem::new(AttentionSpec::new([1, 1, 2, 4], [1, 1, 3, 4]))?;
/// let (query, key, value) = ([1.0f32; 8], [0.5f32; 12], [2.0f32; 12]);
/// // `Device::choose` takes a GPU where there is one
/// let output = Device::Cpu.attention(&problem, &AttentionInputs::new(&query, &key, &value)).await?;
/// assert_eq!(output.output.to_f32(), [2.0; 8]);
/// # Ok::<(), cross_attention::Error>(())
/// # })?;
/// # Ok::<(), cross_attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub enum Device {
    /// The CPU path, f32, on all threads of the current rayon pool.
    Cpu,
    /// The oracle, f64.
    Oracle,
    /// A device of wgpu.
    Gpu(Gpu),
}

/// A device that was chosen, and why.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The device.
    pub device: Device,
    /// Why this one, in a sentence.
    pub reason: String,
}

impl std::fmt::Display for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.device.name(), self.reason)
    }
}

impl Device {
    /// Chooses a device. Natively, [`choose_blocking`](Self::choose_blocking) does the same without async.
    ///
    /// # Errors
    /// [`GpuError::NoAdapter`] if a GPU is asked for and there is none such, [`GpuError::RequestDevice`]. With
    /// [`DeviceRequest::Auto`] only if `WGPU_ADAPTER_NAME` names an adapter that is not there, or a GPU that is there
    /// gives no device.
    pub async fn choose(request: &DeviceRequest) -> Result<Choice, Error> {
        let adapter = match request {
            DeviceRequest::Cpu => return Ok(Choice { device: Self::Cpu, reason: "asked for by name".to_owned() }),
            DeviceRequest::Oracle => {
                return Ok(Choice { device: Self::Oracle, reason: "asked for by name".to_owned() });
            }
            DeviceRequest::Auto | DeviceRequest::Gpu => AdapterRequest::Hardware,
            DeviceRequest::Named(name) => AdapterRequest::Named(name.clone()),
            DeviceRequest::Number(number) => AdapterRequest::Number(*number),
            DeviceRequest::Backend(backend) => AdapterRequest::Backend(*backend),
        };
        match gpu::choose(&adapter).await {
            Ok(chosen) => {
                let device = Self::Gpu(chosen.open().await?);
                Ok(Choice { device, reason: chosen.reason })
            }
            Err(GpuError::NoAdapter { found, .. })
                if *request == DeviceRequest::Auto && gpu::adapter_name_wanted().is_none() =>
            {
                let reason = format!("no GPU was found (adapters: {found})");
                Ok(Choice { device: Self::Cpu, reason })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// [`choose`](Self::choose), blocking.
    ///
    /// # Errors
    /// As [`choose`](Self::choose).
    #[cfg(feature = "native")]
    pub fn choose_blocking(request: &DeviceRequest) -> Result<Choice, Error> {
        pollster::block_on(Self::choose(request))
    }

    /// A GPU if there is one, else the CPU; blocking. `WGPU_BACKEND` and `WGPU_ADAPTER_NAME` are respected.
    ///
    /// # Errors
    /// As [`choose`](Self::choose) with [`DeviceRequest::Auto`].
    #[cfg(feature = "native")]
    pub fn auto() -> Result<Choice, Error> {
        Self::choose_blocking(&DeviceRequest::Auto)
    }

    /// Name of the adapter, or `cpu (2 threads)`, or `oracle (f64)`.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Cpu => format!("cpu ({} threads)", cpu_threads()),
            Self::Oracle => "oracle (f64)".to_owned(),
            Self::Gpu(gpu) => gpu.info().name.clone(),
        }
    }

    /// Backend and driver of an adapter; the version of this crate for the CPU.
    #[must_use]
    pub fn driver(&self) -> String {
        match self {
            Self::Cpu | Self::Oracle => format!("cross-attention {}", env!("CARGO_PKG_VERSION")),
            Self::Gpu(gpu) => {
                let info = gpu.info();
                format!("{} {}", info.driver, info.driver_info).trim().to_owned()
            }
        }
    }

    /// `vulkan`, `metal`, `dx12`, `gl`, `webgpu`; `cpu` for the CPU.
    #[must_use]
    pub fn backend(&self) -> String {
        match self {
            Self::Cpu | Self::Oracle => "cpu".to_owned(),
            Self::Gpu(gpu) => gpu.info().backend.to_str().to_owned(),
        }
    }

    /// Plans a problem and makes what the plan needs; any number of calls can follow.
    ///
    /// # Errors
    /// [`Error::WrongKernel`] if the kernel is one of another kind of device, [`Error::Plan`], [`Error::Gpu`];
    /// [`Error::HostMemory`] if there is no memory for the CPU's workspace.
    pub async fn prepare(&self, problem: &AttentionProblem, kernel: KernelChoice) -> Result<PreparedAttention, Error> {
        match (self, self.its_kernel(kernel)?) {
            (Self::Cpu, ItsKernel::Cpu(kernel)) => PreparedAttention::cpu(problem, kernel),
            (Self::Gpu(gpu), ItsKernel::Gpu(kernel)) => Ok(PreparedAttention::gpu(gpu.prepare(problem, kernel).await?)),
            _ => Ok(PreparedAttention::Oracle(problem.clone())),
        }
    }

    /// What would run, and why, without making anything of it: no workspace, no pipelines.
    ///
    /// # Errors
    /// [`Error::WrongKernel`] if the kernel is one of another kind of device, [`Error::Plan`].
    pub fn explain(&self, problem: &AttentionProblem, kernel: KernelChoice) -> Result<String, Error> {
        match (self, self.its_kernel(kernel)?) {
            (Self::Cpu, ItsKernel::Cpu(CpuKernel::Fused)) => Ok(fused_text(&CpuPlan::new(problem, SimdLevel::best()))),
            (Self::Cpu, ItsKernel::Cpu(CpuKernel::Plain)) => Ok(plain_text()),
            (Self::Gpu(gpu), ItsKernel::Gpu(kernel)) => Ok(Plan::new(problem, gpu.caps(), kernel)?.to_string()),
            _ => Ok(ORACLE_TEXT.to_owned()),
        }
    }

    /// The kernel as one of this device's.
    fn its_kernel(&self, kernel: KernelChoice) -> Result<ItsKernel, Error> {
        let wrong = |possible: Vec<&'static str>| {
            let kernel = match kernel {
                KernelChoice::Auto => "auto",
                KernelChoice::Gpu(kernel) => kernel.name(),
                KernelChoice::Cpu(kernel) => kernel.name(),
            };
            let possible = possible.join(", ");
            Error::WrongKernel { kernel: kernel.to_owned(), device: self.name(), possible }
        };
        let names = |gpu: bool| kernel_names().into_iter().filter(|name| name.starts_with("cpu_") != gpu).collect();
        match (self, kernel) {
            (Self::Cpu, KernelChoice::Auto) => Ok(ItsKernel::Cpu(CpuKernel::default())),
            (Self::Cpu, KernelChoice::Cpu(kernel)) => Ok(ItsKernel::Cpu(kernel)),
            (Self::Oracle, KernelChoice::Auto) => Ok(ItsKernel::Oracle),
            (Self::Gpu(_), KernelChoice::Auto) => Ok(ItsKernel::Gpu(None)),
            (Self::Gpu(_), KernelChoice::Gpu(kernel)) => Ok(ItsKernel::Gpu(Some(kernel))),
            (Self::Cpu, _) => Err(wrong(names(false))),
            (Self::Oracle, _) => Err(wrong(vec!["auto"])),
            (Self::Gpu(_), _) => Err(wrong(names(true))),
        }
    }

    /// [`prepare`](Self::prepare), blocking.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare).
    #[cfg(feature = "native")]
    pub fn prepare_blocking(
        &self,
        problem: &AttentionProblem,
        kernel: KernelChoice,
    ) -> Result<PreparedAttention, Error> {
        self.block_on(self.prepare(problem, kernel))
    }

    /// One attention from host memory to host memory.
    ///
    /// # Errors
    /// [`Error::Input`], [`Error::Plan`], [`Error::Gpu`].
    pub async fn attention(
        &self,
        problem: &AttentionProblem,
        inputs: &AttentionInputs<'_>,
    ) -> Result<AttentionOutput, Error> {
        let inputs = inputs.checked(problem)?;
        self.prepare(problem, KernelChoice::Auto).await?.run_checked(inputs).await
    }

    /// [`attention`](Self::attention), blocking.
    ///
    /// # Errors
    /// As [`attention`](Self::attention).
    #[cfg(feature = "native")]
    pub fn attention_blocking(
        &self,
        problem: &AttentionProblem,
        inputs: &AttentionInputs<'_>,
    ) -> Result<AttentionOutput, Error> {
        self.block_on(self.attention(problem, inputs))
    }

    /// One attention and some of its weights, from host memory to host memory; on a GPU in one submission.
    ///
    /// ```
    /// use cross_attention::weights::{HeadReduce, WeightsSpec};
    /// use cross_attention::{AttentionInputs, AttentionProblem, AttentionSpec, Device};
    /// # pollster::block_on(async {
    /// let problem = AttentionProblem::new(AttentionSpec::new([1, 2, 3, 4], [1, 2, 5, 4]))?;
    /// let (query, key, value) = (vec![0.5f32; 24], vec![0.25f32; 40], vec![1.0f32; 40]);
    /// let mean = WeightsSpec { reduce: HeadReduce::Mean, ..WeightsSpec::default() };
    /// let inputs = AttentionInputs::new(&query, &key, &value);
    /// let result = Device::Cpu.attention_with_weights(&problem, &inputs, &mean).await?;
    /// assert_eq!(result.shape, [1, 1, 3, 5]);
    /// assert!(result.weights.iter().all(|weight| (weight - 0.2).abs() < 1e-6));
    /// # Ok::<(), cross_attention::Error>(())
    /// # })?;
    /// # Ok::<(), cross_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Input`], [`Error::Weights`], [`Error::Plan`], [`Error::WeightsPlan`], [`Error::Gpu`].
    pub async fn attention_with_weights(
        &self,
        problem: &AttentionProblem,
        inputs: &AttentionInputs<'_>,
        spec: &WeightsSpec,
    ) -> Result<AttentionWithWeights, Error> {
        if let Self::Gpu(gpu) = self {
            return gpu.attention_with_weights(problem, inputs, spec).await;
        }
        let checked = inputs.checked(problem)?;
        let wanted = WeightsProblem::new(problem, spec)?;
        let prepared = self.prepare(&problem.with_row_state(), KernelChoice::Auto).await?;
        let mut attention = prepared.run_checked(checked).await?;
        let row_state = attention.row_state.take().unwrap_or_default();
        let weights = match self {
            Self::Oracle => cpu::reference_weights(&wanted, problem, inputs),
            Self::Cpu | Self::Gpu(_) => cpu::weights(&wanted, inputs, &row_state)?,
        };
        if problem.spec().row_state {
            attention.row_state = Some(row_state);
        }
        Ok(AttentionWithWeights { attention, weights, shape: wanted.shape() })
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

    /// Measures what the device can do at most, spending about `budget` on each of its two roofs; blocking. `None` for
    /// the oracle, and where the CPU has no memory for it.
    ///
    /// # Errors
    /// [`Error::Gpu`].
    #[cfg(feature = "native")]
    pub fn roofline_blocking(&self, budget: Duration) -> Result<Option<Roofline>, Error> {
        Ok(match self {
            Self::Cpu => cpu::roofline(budget),
            Self::Oracle => None,
            Self::Gpu(gpu) => Some(gpu.roofline_blocking(budget)?),
        })
    }

    /// Bytes that a tensor may have to be bound.
    pub(crate) fn max_binding_bytes(&self) -> u64 {
        match self {
            Self::Cpu | Self::Oracle => u64::MAX,
            Self::Gpu(gpu) => {
                let caps = gpu.caps();
                caps.max_storage_buffer_binding_size.min(caps.max_buffer_size)
            }
        }
    }

    /// Looks whether it is lost.
    pub(crate) fn check_alive(&self) -> Result<(), Error> {
        match self {
            Self::Cpu | Self::Oracle => Ok(()),
            Self::Gpu(gpu) => Ok(gpu.check_alive()?),
        }
    }

    #[cfg(feature = "native")]
    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        match self {
            Self::Cpu | Self::Oracle => pollster::block_on(future),
            Self::Gpu(gpu) => gpu.block_on(future),
        }
    }
}

/// A kernel of the device that it was asked of; `None` lets the plan choose.
enum ItsKernel {
    Cpu(CpuKernel),
    Oracle,
    Gpu(Option<Kernel>),
}

fn cpu_threads() -> usize {
    #[cfg(feature = "native")]
    return rayon::current_num_threads();
    #[cfg(not(feature = "native"))]
    1
}

fn fused_text(plan: &CpuPlan) -> String {
    format!("{plan}threads    {}\n", cpu_threads())
}

fn plain_text() -> String {
    format!("kernel     cpu_plain, on {} threads: all scores of a row, one row after another\n", cpu_threads())
}

const ORACLE_TEXT: &str = "kernel     oracle: f64, all scores of a row, one row after another\n";

/// An attention that is planned and prepared on a device: what a problem costs once is spent, and calls follow.
///
/// ```
/// use cross_attention::{AttentionInputs, AttentionProblem, AttentionSpec, Device, KernelChoice};
/// # pollster::block_on(async {
/// let problem = AttentionProblem::new(AttentionSpec::new([1, 1, 1, 2], [1, 1, 2, 2]))?;
/// let prepared = Device::Cpu.prepare(&problem, KernelChoice::Auto).await?;
/// println!("{}", prepared.plan_text());
/// let (key, value) = ([0.0f32; 4], [1.0f32, 2.0, 3.0, 4.0]);
/// for query in [[1.0f32, 0.0], [0.0, 1.0]] {
///     let output = prepared.run(&AttentionInputs::new(&query, &key, &value)).await?;
///     assert_eq!(output.output.to_f32(), [2.0, 3.0]);
/// }
/// # Ok::<(), cross_attention::Error>(())
/// # })?;
/// # Ok::<(), cross_attention::Error>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum PreparedAttention {
    /// On the CPU, with the fused kernel.
    Cpu(Box<cpu::CpuAttention>),
    /// On the CPU, with the plain kernel.
    CpuPlain(AttentionProblem),
    /// By the oracle.
    Oracle(AttentionProblem),
    /// On a device of wgpu.
    Gpu(Box<gpu::GpuAttention>),
}

impl PreparedAttention {
    fn cpu(problem: &AttentionProblem, kernel: CpuKernel) -> Result<Self, Error> {
        match kernel {
            CpuKernel::Fused => {
                let plan = CpuPlan::new(problem, SimdLevel::best());
                let bytes = cpu_threads() as u128 * plan.workspace_bytes() as u128 + plan.partial_bytes() as u128;
                // asked for and given back: a workspace that cannot be allocated would end the process
                let there = usize::try_from(bytes).is_ok_and(|n| Vec::<u8>::new().try_reserve_exact(n).is_ok());
                if !there {
                    return Err(Error::HostMemory { bytes });
                }
                Ok(Self::Cpu(Box::new(cpu::prepare(problem))))
            }
            CpuKernel::Plain => Ok(Self::CpuPlain(problem.clone())),
        }
    }

    fn gpu(prepared: gpu::GpuAttention) -> Self {
        Self::Gpu(Box::new(prepared))
    }

    /// `fused`, `plain`, `cpu_fused`, …, `oracle`.
    #[must_use]
    pub fn kernel_name(&self) -> &'static str {
        match self {
            Self::Cpu(_) => CpuKernel::Fused.name(),
            Self::CpuPlain(_) => CpuKernel::Plain.name(),
            Self::Oracle(_) => "oracle",
            Self::Gpu(prepared) => prepared.plan().kernel().name(),
        }
    }

    /// What will run, and why.
    #[must_use]
    pub fn plan_text(&self) -> String {
        match self {
            Self::Cpu(prepared) => fused_text(prepared.plan()),
            Self::CpuPlain(_) => plain_text(),
            Self::Oracle(_) => ORACLE_TEXT.to_owned(),
            Self::Gpu(prepared) => prepared.plan().to_string(),
        }
    }

    /// One call from host memory to host memory.
    ///
    /// # Errors
    /// [`Error::Input`], [`Error::Gpu`].
    pub async fn run(&self, inputs: &AttentionInputs<'_>) -> Result<AttentionOutput, Error> {
        self.run_checked(inputs.checked(self.problem())?).await
    }

    /// The same of inputs that were compared with the problem.
    async fn run_checked(&self, inputs: CheckedInputs<'_, '_>) -> Result<AttentionOutput, Error> {
        match self {
            Self::Cpu(prepared) => Ok(prepared.run_checked(inputs)?),
            Self::CpuPlain(problem) => Ok(cpu::attention_checked(CpuKernel::Plain, problem, inputs)?),
            Self::Oracle(problem) => Ok(cpu::reference::attention(problem, &inputs)?.to_output(problem)),
            Self::Gpu(prepared) => prepared.run_checked(inputs).await,
        }
    }

    /// [`run`](Self::run) without waiting, where it is prepared on the host; `None` where it is not.
    pub(crate) fn run_on_host(&self, inputs: &AttentionInputs<'_>) -> Option<Result<AttentionOutput, Error>> {
        if matches!(self, Self::Gpu(_)) {
            return None;
        }
        let mut run = std::pin::pin!(self.run(inputs));
        match run.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop())) {
            std::task::Poll::Ready(result) => Some(result),
            // nothing there waits for anything
            std::task::Poll::Pending => None,
        }
    }

    /// The problem it is prepared for.
    #[must_use]
    pub fn problem(&self) -> &AttentionProblem {
        match self {
            Self::Cpu(prepared) => prepared.problem(),
            Self::CpuPlain(problem) | Self::Oracle(problem) => problem,
            Self::Gpu(prepared) => prepared.problem(),
        }
    }

    /// [`run`](Self::run), blocking.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    #[cfg(feature = "native")]
    pub fn run_blocking(&self, inputs: &AttentionInputs<'_>) -> Result<AttentionOutput, Error> {
        match self {
            Self::Cpu(_) | Self::CpuPlain(_) | Self::Oracle(_) => pollster::block_on(self.run(inputs)),
            Self::Gpu(prepared) => prepared.run_blocking(inputs),
        }
    }

    /// Times the attention alone: inputs in place, pipelines warm; blocking. At least `min_rounds` rounds, until `budget`
    /// is used up; `on_round` is called after each.
    ///
    /// # Errors
    /// [`Error::Input`], [`Error::Gpu`].
    #[cfg(feature = "native")]
    pub fn time_blocking(
        &self,
        inputs: &AttentionInputs<'_>,
        min_rounds: usize,
        budget: Duration,
        on_round: &mut (dyn FnMut() + '_),
    ) -> Result<Timing, Error> {
        if let Self::Gpu(prepared) = self {
            let gpu = prepared.gpu();
            let tensors = gpu.block_on(prepared.upload(inputs))?;
            let bound = prepared.bind(&tensors.buffers())?;
            return Ok(prepared.time_blocking(&bound, min_rounds, budget, on_round)?);
        }
        let mut output = self.run_blocking(inputs)?;
        let mut millis = vec![];
        let begin = Instant::now();
        while millis.len() < min_rounds || begin.elapsed() < budget {
            let start = Instant::now();
            match self {
                Self::Cpu(prepared) => prepared.run_into(inputs, (&mut output).into())?,
                _ => drop(self.run_blocking(inputs)?),
            }
            millis.push(start.elapsed().as_secs_f64() * 1e3);
            on_round();
        }
        Ok(Timing { millis, source: TimingSource::Cpu })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_back() {
        let requests = [
            DeviceRequest::Auto,
            DeviceRequest::Cpu,
            DeviceRequest::Oracle,
            DeviceRequest::Gpu,
            DeviceRequest::Named("llvmpipe (LLVM 15)".to_owned()),
            DeviceRequest::Number(12),
            DeviceRequest::Backend(wgpu::Backend::Vulkan),
            DeviceRequest::Backend(wgpu::Backend::BrowserWebGpu),
        ];
        for request in requests {
            assert_eq!(request.to_string().parse(), Ok(request));
        }
    }
}
