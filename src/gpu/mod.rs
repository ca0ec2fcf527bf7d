//! Everything that holds a wgpu device: an open GPU, its pipelines, recording, reading back.
//!
//! Three levels, each a thin layer over the next: [`Gpu::attention`] takes slices and gives vectors;
//! [`GpuAttention`] keeps plan, pipelines and tensors on the device; [`GpuAttention::encode`] records into a
//! command encoder of the caller's, and neither submits nor waits.

mod adapters;
mod arrival;
mod attention;
mod beside;
mod bound;
mod buffers;
mod error;
mod experimental;
#[cfg(feature = "threads")]
mod measure;
mod open;
#[cfg(feature = "threads")]
mod pipeline_cache;
mod pipelines;
mod probe;
mod steps;
mod transfer;

pub(crate) use adapters::adapter_name_wanted;
#[cfg(feature = "threads")]
pub use adapters::adapters_blocking;
pub use adapters::{AdapterRequest, AdapterSummary, ChosenAdapter, adapters, built_backends, choose};
pub use attention::{AttentionTensors, GpuAttention};
pub use beside::{
    BackwardBuffers, GpuBackward, GradientBuffers, LinearError, LinearInput, LinearOutput, MergeBuffers,
    PreparedLinear, PreparedWeights, WeightsBuffers,
};
#[cfg(feature = "layer")]
pub(crate) use beside::{Factor, PreparedNorm};
pub use bound::BoundSteps;
pub use buffers::AttentionBuffers;
pub use error::GpuError;
#[cfg(feature = "tune")]
pub(crate) use measure::Stopwatch;
#[cfg(feature = "threads")]
pub use measure::{HostCost, KernelTiming};
pub use open::Gpu;
#[cfg(feature = "threads")]
pub use pipeline_cache::{PipelineCacheFault, PipelineCacheState};
