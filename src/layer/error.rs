//! Why a layer, or a call of one, was refused.

use super::names::LoadError;
use crate::tensor::Element;

/// Why a layer was refused, or refused a call.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// A size is 0.
    #[error("{name} is 0, needs at least 1")]
    Zero {
        /// Which size.
        name: &'static str,
    },
    /// Heads cannot be shared evenly.
    #[error("kv_heads is {kv_heads}, which does not divide heads {heads}")]
    Heads {
        /// Heads of the query.
        heads: usize,
        /// Heads of key and value.
        kv_heads: usize,
    },
    /// A norm's epsilon is no number that can be added.
    #[error("epsilon of a norm is {epsilon}, needs a finite number of at least 0")]
    Epsilon {
        /// What was given.
        epsilon: f32,
    },
    /// A weight has another size.
    #[error("{name} has {found} elements, needs {wanted}")]
    Weight {
        /// Which weight.
        name: &'static str,
        /// Elements that would do.
        wanted: usize,
        /// Elements that were given.
        found: usize,
    },
    /// The config asks for a weight that is not given.
    #[error("{name} is missing; the config says there is one")]
    Missing {
        /// Which weight.
        name: &'static str,
    },
    /// A weight is given that the config does not ask for.
    #[error("{name} is given; the config says there is none")]
    Unexpected {
        /// Which weight.
        name: &'static str,
    },
    /// States or context end within a token.
    #[error("{name} has {found} elements, needs a multiple of batch {batch} times width {width}")]
    Tokens {
        /// `states` or `context`.
        name: &'static str,
        /// Entries of the batch.
        batch: usize,
        /// Elements of a token.
        width: usize,
        /// Elements that were given.
        found: usize,
    },
    /// The mask's data does not fit its shape.
    #[error("the mask has {found} elements, its shape {shape:?} needs {wanted}")]
    Mask {
        /// Its shape.
        shape: [usize; 4],
        /// Elements that would do.
        wanted: usize,
        /// Elements that were given.
        found: usize,
    },
    /// A context is not kept like that.
    #[error("a context is kept in f32, f16 or bf16, not in {found}; `context::PreparedContext` stores signed bytes")]
    Element {
        /// What was asked.
        found: Element,
    },
    /// A context was prepared by another layer.
    #[error("the context was prepared by another layer; prepare it with this one")]
    OtherLayer,
    /// A context was prepared on another device.
    #[error(
        "the context was prepared on {found}, the layer is on {wanted}; prepare it there, devices of one name included"
    )]
    OtherDevice {
        /// The layer's device.
        wanted: String,
        /// The context's device.
        found: String,
    },
    /// The oracle computes attention only.
    #[error("the oracle has no layers; a layer runs on the CPU or a GPU")]
    Oracle,
    /// Weights could not be read.
    #[error(transparent)]
    Load(#[from] LoadError),
}
