//! Scaled dot-product attention where queries and keys come from different sequences.
//!
//! (crate docs to come)

mod caps;
pub mod cpu;
mod device;
mod error;
pub mod gpu;
mod inputs;
pub mod kernels;
pub mod plan;
mod problem;
mod shader;
mod tensor;
mod timing;
pub mod verify;
pub mod workload;

pub use caps::{DeviceCaps, DeviceClass};
pub use device::{Choice, Device, DeviceRequest, KernelChoice, PreparedOn};
pub use error::Error;
pub use half::f16;
pub use inputs::{AttentionData, AttentionInputs, AttentionOutput, InputError};
pub use kernels::Kernel;
pub use plan::{Plan, PlanError};
pub use problem::{AttentionProblem, AttentionSpec, Diagonal, MAX_LEN, ProblemError, ScoreStage};
pub use tensor::{Element, Layout, TensorData, TensorRef, TensorSpec};
pub use timing::{Timing, TimingSource};
pub use wgpu;
