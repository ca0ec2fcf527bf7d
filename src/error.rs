//! The umbrella error: one variant for each stage, and for choosing a device.

use crate::backward::BackwardError;
use crate::context::ContextError;
use crate::cpu::{CpuKernel, MergeError};
use crate::dispatch::{Kernel, Rejection, Unsupported};
use crate::engine::PlaceError;
use crate::gpu::{GpuError, LinearError};
use crate::inputs::InputError;
use crate::plan::PlanError;
use crate::pool::PoolError;
use crate::problem::ProblemError;
use crate::sources::SourcesError;
use crate::weights::WeightsError;

/// Any error of this crate.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A spec was refused.
    #[error(transparent)]
    Problem(#[from] ProblemError),
    /// The data of a call was refused.
    #[error(transparent)]
    Input(#[from] InputError),
    /// No kernel will do.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A device failed or refused.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// Partial states do not fit together.
    #[error(transparent)]
    Merge(#[from] MergeError),
    /// Partial states are too many or too large for the device's merge kernel.
    #[error("the device cannot merge this: {reason}")]
    MergePlan {
        /// Why.
        reason: Unsupported,
    },
    /// Attention weights were asked for that are not there.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// Attention weights are too many or too large for the device.
    #[error("the device cannot return these weights: {reason}")]
    WeightsPlan {
        /// Why.
        reason: Rejection,
    },
    /// Gradients were asked for that there are not.
    #[error(transparent)]
    Backward(#[from] BackwardError),
    /// Gradients are too many or too large for the device, or it does not compute them.
    #[error("the device cannot return these gradients: {reason}")]
    BackwardPlan {
        /// Why.
        reason: Rejection,
    },
    /// A pool of passages refused a call.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// A prepared context refused a call.
    #[error(transparent)]
    Context(#[from] ContextError),
    /// Sources do not fit together, or their data does not fit them.
    #[error(transparent)]
    Sources(#[from] SourcesError),
    /// A tensor is on another device, or of another type.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// Sizes of a linear map do not fit together.
    #[error(transparent)]
    Linear(#[from] LinearError),
    /// A linear map is too large for the device's kernels.
    #[error("the device cannot map this: {reason}")]
    LinearPlan {
        /// Why.
        reason: Unsupported,
    },
    /// An attention over several ranks was refused or failed.
    #[cfg(feature = "mpi")]
    #[error(transparent)]
    Sharded(#[from] crate::sharded::ShardedError),
    /// A cross-attention layer refused what it was given.
    #[cfg(feature = "layer")]
    #[error(transparent)]
    Layer(#[from] crate::layer::LayerError),
    /// A kernel was asked for that the chosen device does not have.
    #[error("kernel {kernel} does not run on {device}; possible there: {possible}")]
    WrongKernel {
        /// The kernel that was asked for.
        kernel: String,
        /// The device that was chosen.
        device: String,
        /// Kernels of that device.
        possible: String,
    },
    /// Inputs and outputs take more memory of the host than there is.
    #[error("inputs, outputs and workspace would take {bytes} bytes, more memory than the host has")]
    HostMemory {
        /// Bytes needed.
        bytes: u128,
    },
    /// No kernel has this name.
    #[error("there is no kernel {name:?}; possible: auto, {}", kernel_names().join(", "))]
    UnknownKernel {
        /// The name that was given.
        name: String,
    },
}

/// Names of all kernels, those of GPUs first.
pub(crate) fn kernel_names() -> Vec<&'static str> {
    Kernel::ALL.iter().map(|kernel| kernel.name()).chain(CpuKernel::ALL.iter().map(|kernel| kernel.name())).collect()
}
