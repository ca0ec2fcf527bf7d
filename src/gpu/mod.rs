//! Everything that holds a wgpu device: contexts, pipelines, recording, reading back.
//!
//! Three levels, each a thin layer over the next: [`Context::attention`] takes slices and gives vectors;
//! [`PreparedAttention`] keeps plan, pipelines and tensors on the device; [`PreparedAttention::encode`] records into a
//! command encoder of the caller's, and neither submits nor waits.

mod adapters;
mod arrival;
mod attention;
mod beside;
mod bound;
mod buffers;
mod context;
mod error;
mod experimental;
#[cfg(feature = "native")]
mod measure;
#[cfg(feature = "native")]
mod pipeline_cache;
mod pipelines;
mod probe;
mod steps;
mod transfer;

pub(crate) use adapters::adapter_name_wanted;
#[cfg(feature = "native")]
pub use adapters::adapters_blocking;
pub use adapters::{AdapterRequest, AdapterSummary, ChosenAdapter, adapters, choose};
pub use attention::{AttentionTensors, PreparedAttention};
#[cfg(feature = "layer")]
pub(crate) use beside::PreparedNorm;
pub use beside::{
    LinearError, LinearInput, LinearOutput, MergeBuffers, PreparedLinear, PreparedWeights, WeightsBuffers,
};
pub use bound::BoundAttention;
pub use buffers::AttentionBuffers;
pub use context::Context;
pub use error::GpuError;
#[cfg(feature = "tune")]
pub(crate) use measure::Stopwatch;
#[cfg(feature = "native")]
pub use measure::{HostCost, KernelTiming};
#[cfg(feature = "native")]
pub use pipeline_cache::{PipelineCacheFault, PipelineCacheState};
