//! Everything that holds a wgpu device: contexts, pipelines, recording, reading back.
//!
//! Three levels, each a thin layer over the next: [`Context::attention`] takes slices and gives vectors;
//! [`PreparedAttention`] keeps plan, pipelines and tensors on the device; [`PreparedAttention::encode`] records into a
//! command encoder of the caller's, and neither submits nor waits.

mod adapters;
mod arrival;
mod attention;
mod bound;
mod buffers;
#[cfg(feature = "native")]
mod cache;
#[cfg(feature = "native")]
#[allow(
    unsafe_code,
    reason = "a driver's own data can only be given back to it by an unsafe call; why it may be: there"
)]
mod cache_data;
#[cfg(feature = "native")]
mod cache_file;
mod context;
mod error;
mod experimental;
#[cfg(feature = "native")]
mod host_cost;
mod linear;
mod merge;
#[cfg(feature = "layer")]
mod norm;
#[cfg(feature = "native")]
mod peak;
mod pipelines;
mod probe;
mod small;
#[cfg(feature = "native")]
mod timing;
mod transfer;
mod weights;

pub(crate) use adapters::adapter_name_wanted;
#[cfg(feature = "native")]
pub use adapters::adapters_blocking;
pub use adapters::{AdapterRequest, AdapterSummary, ChosenAdapter, adapters, choose};
pub use attention::{AttentionTensors, PreparedAttention};
pub use bound::BoundAttention;
pub use buffers::AttentionBuffers;
#[cfg(feature = "native")]
pub use cache::{PipelineCacheFault, PipelineCacheState};
pub use context::Context;
pub use error::GpuError;
#[cfg(feature = "native")]
pub use host_cost::HostCost;
pub use linear::{LinearError, LinearInput, LinearOutput, PreparedLinear};
pub use merge::MergeBuffers;
#[cfg(feature = "layer")]
pub(crate) use norm::PreparedNorm;
#[cfg(feature = "native")]
pub use timing::KernelTiming;
#[cfg(feature = "tune")]
pub(crate) use timing::Stopwatch;
pub use weights::{PreparedWeights, WeightsBuffers};
