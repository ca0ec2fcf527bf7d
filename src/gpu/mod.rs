//! Everything that holds a wgpu device: contexts, pipelines, recording, reading back.
//!
//! Three levels, each a thin layer over the next: [`Context::attention`] takes slices and gives vectors;
//! [`PreparedAttention`] keeps plan, pipelines and tensors on the device; [`PreparedAttention::encode`] records into a
//! command encoder of the caller's, and neither submits nor waits.

mod adapters;
mod attention;
mod buffers;
mod context;
mod error;
mod merge;
mod pipelines;
#[cfg(feature = "native")]
mod timing;
mod transfer;

pub(crate) use adapters::adapter_name_wanted;
#[cfg(feature = "native")]
pub use adapters::adapters_blocking;
pub use adapters::{AdapterRequest, AdapterSummary, ChosenAdapter, adapters, choose};
pub use attention::{AttentionTensors, BoundAttention, PreparedAttention};
pub use buffers::AttentionBuffers;
pub use context::Context;
pub use error::GpuError;
pub use merge::MergeBuffers;
#[cfg(feature = "tune")]
pub(crate) use timing::Clock;
