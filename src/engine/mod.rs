//! Where things run: tensors on the host or on a device, and a recording of what is done with them.
//!
//! What is built on attention ([contexts](crate::context), [sources](crate::sources), [pools](crate::pool), layers) is
//! written once, over a [`Recording`]: on a device it records commands into an encoder, its own or the caller's; on the host
//! it computes each command at once. What it takes and gives are [`Tensor`]s, and they may lie on either side: what lies in
//! host memory is copied to the device that records. There are these two places and no more.

mod commands;
mod inputs;
#[cfg(feature = "layer")]
mod linear;
mod recording;
mod tensor;

pub use inputs::Inputs;
pub use recording::Recording;
pub use tensor::Tensor;

pub use crate::slice::Kind;

pub(crate) use commands::{Combining, Outputs};
#[cfg(feature = "mpi")]
pub(crate) use inputs::HostInputs;
pub(crate) use inputs::{check_terms, element_of, is_a, reaches};
#[cfg(feature = "layer")]
pub(crate) use linear::{Lies, Linear, RowNorm, Weight};

/// Why a tensor cannot be where it is, or what it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlaceError {
    /// It is on a device, and what takes it runs on the host.
    #[error("{name} is on a device, and this runs on {device}; read it first, or run on its device")]
    OnDevice {
        /// Which tensor.
        name: &'static str,
        /// Where it would be needed.
        device: String,
    },
    /// It is on another device.
    #[error("{name} is on another device than {device}; devices of one name are not the same")]
    OtherDevice {
        /// Which tensor.
        name: &'static str,
        /// Where it would be needed.
        device: String,
    },
    /// It has to be in host memory.
    #[error("{name} is on a device, and must be in host memory: {reason}")]
    NeedsHost {
        /// Which tensor.
        name: &'static str,
        /// Why.
        reason: &'static str,
    },
    /// A slice of a buffer ends before the elements.
    #[error("the slice has {found} bytes, its elements take {needed}")]
    TooShort {
        /// Bytes of all elements.
        needed: u64,
        /// Bytes of the slice.
        found: u64,
    },
    /// A recording was made for another place than what it is to record was prepared for.
    #[error("it was prepared on {prepared}, and the recording is on {recording}; prepare it there")]
    OtherRecording {
        /// Where it was prepared.
        prepared: String,
        /// Where the recording is.
        recording: String,
    },
}
