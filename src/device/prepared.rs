//! An attention that is prepared on a device, for any number of calls.

#[cfg(feature = "threads")]
use std::time::Duration;

use super::cpu_threads;
use crate::cpu::{self, CpuKernel, CpuPlan, SimdLevel};
use crate::error::Error;
use crate::gpu;
use crate::inputs::{AttentionInputs, AttentionOutput, CheckedInputs};
use crate::problem::AttentionProblem;
#[cfg(feature = "threads")]
use crate::timing::{Timing, time_calls};

pub(super) fn fused_text(plan: &CpuPlan) -> String {
    format!("{plan}threads    {}\n", cpu_threads())
}

pub(super) fn plain_text() -> String {
    format!("kernel     cpu_plain, on {} threads: all scores of a row, one row after another\n", cpu_threads())
}

pub(super) const ORACLE_TEXT: &str = "kernel     oracle: f64, all scores of a row, one row after another\n";

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
    pub(super) fn cpu(problem: &AttentionProblem, kernel: CpuKernel) -> Result<Self, Error> {
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

    pub(super) fn gpu(prepared: gpu::GpuAttention) -> Self {
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
    pub(super) async fn run_checked(&self, inputs: CheckedInputs<'_, '_>) -> Result<AttentionOutput, Error> {
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
    #[cfg(feature = "threads")]
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
    #[cfg(feature = "threads")]
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
        time_calls(min_rounds, budget, on_round, || {
            match self {
                Self::Cpu(prepared) => prepared.run_into(inputs, (&mut output).into())?,
                _ => drop(self.run_blocking(inputs)?),
            }
            Ok(())
        })
    }
}
