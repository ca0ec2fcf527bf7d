//! Why a layer, its weights or its data were refused.

/// What a layer refuses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// A count of the configuration is 0.
    #[error("{name} of the layer is 0, needs at least 1")]
    Zero {
        /// Which field.
        name: &'static str,
    },
    /// Query heads cannot be shared out among key/value heads.
    #[error("{heads} heads cannot be shared out among {kv_heads} kv_heads; heads must be a multiple")]
    Heads {
        /// Query heads.
        heads: usize,
        /// Key/value heads.
        kv_heads: usize,
    },
    /// The widths multiply to more than can be counted.
    #[error("the layer's widths multiply to more than can be counted")]
    TooWide,
    /// The epsilon of a norm is no small positive number.
    #[error("the norm's epsilon is {found}, needs a finite number of at least 0")]
    Epsilon {
        /// As it was given.
        found: String,
    },
    /// A tensor is not in the file.
    #[error("there is no tensor {name:?} for {part}")]
    Missing {
        /// The tensor that was looked for.
        name: String,
        /// What it is for: `query`, `key`, `value`, `out`, with `bias` or `norm`.
        part: &'static str,
    },
    /// A tensor has another shape.
    #[error("{name:?} for {part} has shape {found:?}, needs {expected:?}{}", if *transposed { " ([out, in]); it is transposed" } else { "" })]
    Shape {
        /// The tensor.
        name: String,
        /// What it is for.
        part: &'static str,
        /// The shape that would do.
        expected: Vec<usize>,
        /// The shape that was found.
        found: Vec<usize>,
        /// Whether the transposed tensor would do.
        transposed: bool,
    },
    /// A tensor is of a type that weights cannot have.
    #[error("{name:?} is of type {found}, needs F32, F16 or BF16")]
    Element {
        /// The tensor.
        name: String,
        /// Its type.
        found: String,
    },
    /// States have another number of elements than batch, length and width say.
    #[error("{name} has {found} elements, needs batch {batch} x length {len} x width {width}")]
    States {
        /// `states` or `context`.
        name: &'static str,
        /// Entries of the batch.
        batch: usize,
        /// Tokens of an entry.
        len: usize,
        /// Elements of a token.
        width: usize,
        /// Elements that were given.
        found: usize,
    },
    /// The context has neither one entry nor as many as the states.
    #[error("the context has {found} batch entries, needs 1 or {batch} as the states have")]
    Batch {
        /// Entries of the states.
        batch: usize,
        /// Entries of the context.
        found: usize,
    },
    /// A context was prepared by another layer, or on another device.
    #[error("the context was prepared by another layer; prepare it by this one")]
    OtherLayer,
}
