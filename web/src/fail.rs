//! Errors as JavaScript has them: the crate's sentence, and a `kind` that programs can tell apart.

use cross_attention::backward::BackwardError;
use cross_attention::gpu::GpuError;
use cross_attention::{Error, InputError};
use wasm_bindgen::JsValue;

use crate::options::set;

/// Why a call failed.
#[derive(Debug)]
pub(crate) struct Fail {
    kind: &'static str,
    message: String,
}

impl Fail {
    pub(crate) fn new(kind: &'static str, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// An option that is not what it must be.
    pub(crate) fn option(message: impl Into<String>) -> Self {
        Self::new("option", message)
    }
}

impl From<Fail> for JsValue {
    fn from(fail: Fail) -> Self {
        let error = js_sys::Error::new(&fail.message);
        error.set_name("AttentionError");
        set(&error, "kind", fail.kind);
        error.into()
    }
}

impl<E: Into<Error>> From<E> for Fail {
    fn from(error: E) -> Self {
        let error = error.into();
        Self { kind: kind(&error), message: error.to_string() }
    }
}

/// The list stands in js/index.d.ts too; a test compares.
fn kind(error: &Error) -> &'static str {
    match error {
        Error::Problem(_) => "problem",
        Error::Input(InputError::Memory { .. }) | Error::HostMemory { .. } => "memory",
        Error::Input(_) | Error::Place(_) => "input",
        Error::Plan(_) | Error::WeightsPlan { .. } | Error::BackwardPlan { .. } => "plan",
        Error::Backward(BackwardError::Attention(_)) => "problem",
        Error::Weights(_) | Error::Backward(BackwardError::Weights(_)) => "weights",
        Error::Backward(_) => "backward",
        Error::Context(_) => "context",
        Error::WrongKernel { .. } | Error::UnknownKernel { .. } => "kernel",
        Error::Gpu(error) => gpu_kind(error),
        _ => "other",
    }
}

fn gpu_kind(error: &GpuError) -> &'static str {
    match error {
        GpuError::OutOfMemory { .. } => "outOfMemory",
        GpuError::DeviceLost { .. } => "deviceLost",
        GpuError::Validation { .. } => "validation",
        GpuError::Internal { .. } => "internal",
        GpuError::ReadBack { .. } => "readBack",
        GpuError::NoAdapter { .. } | GpuError::RequestDevice { .. } => "noAdapter",
        // what is wrong with a buffer of the caller's
        _ => "buffer",
    }
}
