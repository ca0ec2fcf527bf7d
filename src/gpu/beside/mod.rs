//! What runs beside attentions, in the same encoder.

mod backward;
mod linear;
mod merge;
#[cfg(feature = "layer")]
mod norm;
mod record;
mod weights;

pub use backward::{BackwardBuffers, GpuBackward, GradientBuffers};
#[cfg(feature = "layer")]
pub(crate) use linear::Factor;
pub use linear::{LinearError, LinearInput, LinearOutput, PreparedLinear};
pub use merge::MergeBuffers;
#[cfg(feature = "layer")]
pub(crate) use norm::PreparedNorm;
pub use weights::{PreparedWeights, WeightsBuffers};
