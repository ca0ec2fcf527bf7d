//! One handle for whatever computes: a GPU if there is one, else the CPU.

mod backward;
mod prepared;
mod request;

#[cfg(feature = "threads")]
use std::time::Duration;

pub use backward::PreparedBackward;
pub use prepared::PreparedAttention;
pub use request::{DeviceRequest, DeviceRequestError, KernelChoice};

use self::prepared::{ORACLE_TEXT, fused_text, plain_text};

use crate::cpu::{self, CpuKernel, CpuPlan, SimdLevel};
use crate::dispatch::Kernel;
use crate::error::{Error, kernel_names};
use crate::gpu::{self, AdapterRequest, Gpu, GpuError};
use crate::inputs::{AttentionInputs, AttentionOutput};
use crate::plan::Plan;
use crate::problem::AttentionProblem;
#[cfg(feature = "threads")]
use crate::roofline::Roofline;
use crate::weights::{AttentionWithWeights, WeightsProblem, WeightsSpec};

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
    #[cfg(feature = "threads")]
    pub fn choose_blocking(request: &DeviceRequest) -> Result<Choice, Error> {
        pollster::block_on(Self::choose(request))
    }

    /// A GPU if there is one, else the CPU; blocking. `WGPU_BACKEND` and `WGPU_ADAPTER_NAME` are respected.
    ///
    /// # Errors
    /// As [`choose`](Self::choose) with [`DeviceRequest::Auto`].
    #[cfg(feature = "threads")]
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
    #[cfg(feature = "threads")]
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
    #[cfg(feature = "threads")]
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
    #[cfg(feature = "threads")]
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
    #[cfg(feature = "threads")]
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

    #[cfg(feature = "threads")]
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
    #[cfg(feature = "threads")]
    return rayon::current_num_threads();
    #[cfg(not(feature = "threads"))]
    1
}
