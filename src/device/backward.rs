//! Gradients on a device, prepared or in one call.

#[cfg(feature = "threads")]
use std::time::Duration;

use super::{Device, cpu_threads};
use crate::backward::{BackwardInputs, BackwardProblem, Gradients};
use crate::cpu::reference;
use crate::cpu::{CpuBackward, SimdLevel};
use crate::error::Error;
use crate::gpu::GpuBackward;
use crate::plan::BackwardPlan;
#[cfg(feature = "threads")]
use crate::timing::{Timing, time_calls};

/// A backward that is planned and prepared on a device: what a problem costs once is spent, and calls follow.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum PreparedBackward {
    /// On the CPU.
    Cpu(Box<CpuBackward>),
    /// By the oracle, rounded once.
    Oracle(Box<BackwardProblem>),
    /// On a device of wgpu.
    Gpu(Box<GpuBackward>),
}

impl Device {
    /// Plans and prepares the backward of an attention on this device.
    ///
    /// # Errors
    /// [`Error::HostMemory`], [`Error::BackwardPlan`], [`Error::Gpu`].
    pub async fn prepare_backward(&self, problem: &BackwardProblem) -> Result<PreparedBackward, Error> {
        match self {
            Self::Cpu => {
                let prepared = CpuBackward::try_new(problem, SimdLevel::best());
                Ok(PreparedBackward::Cpu(Box::new(prepared.map_err(|bytes| Error::HostMemory { bytes })?)))
            }
            Self::Oracle => Ok(PreparedBackward::Oracle(Box::new(problem.clone()))),
            Self::Gpu(gpu) => Ok(PreparedBackward::Gpu(Box::new(gpu.prepare_backward(problem).await?))),
        }
    }

    /// [`prepare_backward`](Self::prepare_backward), blocking.
    ///
    /// # Errors
    /// As [`prepare_backward`](Self::prepare_backward).
    #[cfg(feature = "threads")]
    pub fn prepare_backward_blocking(&self, problem: &BackwardProblem) -> Result<PreparedBackward, Error> {
        self.block_on(self.prepare_backward(problem))
    }

    /// What would run for gradients, and why, without making anything of it: no workspace, no pipelines.
    ///
    /// # Errors
    /// [`Error::BackwardPlan`] if they do not fit the device's limits.
    pub fn explain_backward(&self, problem: &BackwardProblem) -> Result<String, Error> {
        match self {
            Self::Cpu => Ok(cpu_text(CpuBackward::explain(problem, SimdLevel::best()))),
            Self::Oracle => Ok(ORACLE_TEXT.to_owned()),
            Self::Gpu(gpu) => {
                let plan = BackwardPlan::new(problem, gpu.caps()).map_err(|reason| Error::BackwardPlan { reason })?;
                Ok(plan.to_string())
            }
        }
    }

    /// The gradients of one attention, from host memory to host memory.
    ///
    /// # Errors
    /// [`Error::Input`], and those of [`prepare_backward`](Self::prepare_backward).
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

const ORACLE_TEXT: &str = "kernel     oracle: f64, one pair after another\n";

fn cpu_text(plan: String) -> String {
    plan + &format!("threads    {}\n", cpu_threads())
}

impl PreparedBackward {
    /// What runs: `cpu_backward`, `oracle`, `backward`.
    #[must_use]
    pub const fn kernel_name(&self) -> &'static str {
        match self {
            Self::Cpu(_) => "cpu_backward",
            Self::Oracle(_) => "oracle",
            Self::Gpu(_) => "backward",
        }
    }

    /// What will run, and why.
    #[must_use]
    pub fn plan_text(&self) -> String {
        match self {
            Self::Cpu(prepared) => cpu_text(prepared.plan_text()),
            Self::Oracle(_) => ORACLE_TEXT.to_owned(),
            Self::Gpu(prepared) => prepared.plan().to_string(),
        }
    }

    /// The problem it is prepared for.
    #[must_use]
    pub const fn problem(&self) -> &BackwardProblem {
        match self {
            Self::Cpu(prepared) => prepared.problem(),
            Self::Oracle(problem) => problem,
            Self::Gpu(prepared) => prepared.problem(),
        }
    }

    /// One call from host memory to host memory.
    ///
    /// # Errors
    /// [`Error::Input`], [`Error::Gpu`].
    pub async fn run(&self, inputs: &BackwardInputs<'_>) -> Result<Gradients, Error> {
        match self {
            Self::Cpu(prepared) => Ok(prepared.run(inputs)?),
            Self::Oracle(problem) => Ok(reference::backward(problem, inputs)?.to_gradients(problem)),
            Self::Gpu(prepared) => prepared.run(inputs).await,
        }
    }

    /// [`run`](Self::run), blocking.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    #[cfg(feature = "threads")]
    pub fn run_blocking(&self, inputs: &BackwardInputs<'_>) -> Result<Gradients, Error> {
        match self {
            Self::Cpu(_) | Self::Oracle(_) => pollster::block_on(self.run(inputs)),
            Self::Gpu(prepared) => prepared.run_blocking(inputs),
        }
    }

    /// Times the backward alone, its inputs and the results of the forward in place; blocking. At least `min_rounds` rounds, until
    /// `budget` is used up; `on_round` is called after each.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    #[cfg(feature = "threads")]
    pub fn time_blocking(
        &self,
        inputs: &BackwardInputs<'_>,
        min_rounds: usize,
        budget: Duration,
        on_round: &mut (dyn FnMut() + '_),
    ) -> Result<Timing, Error> {
        if let Self::Gpu(prepared) = self {
            return prepared.time_blocking(inputs, min_rounds, budget, on_round);
        }
        let mut gradients = self.run_blocking(inputs)?;
        time_calls(min_rounds, budget, on_round, || {
            match self {
                Self::Cpu(prepared) => prepared.run_into(inputs, (&mut gradients).into())?,
                Self::Oracle(_) | Self::Gpu(_) => drop(self.run_blocking(inputs)?),
            }
            Ok(())
        })
    }
}
