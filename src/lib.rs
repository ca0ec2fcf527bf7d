//! Scaled dot-product attention where queries and keys come from different sequences.
//!
//! (crate docs to come)

pub mod cpu;
mod inputs;
mod problem;
mod tensor;

pub use half::f16;
pub use inputs::{AttentionData, AttentionInputs, AttentionOutput, InputError};
pub use problem::{AttentionProblem, AttentionSpec, Diagonal, MAX_LEN, ProblemError, ScoreStage};
pub use tensor::{Element, Layout, TensorData, TensorRef, TensorSpec};
pub use wgpu;
