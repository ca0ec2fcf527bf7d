//! Why sources were refused.

use crate::inputs::InputError;
use crate::problem::ProblemError;

/// Why a description of sources, or the data for one, was refused. `source_name` is the name that the caller gave.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SourcesError {
    /// There is nothing to attend to.
    #[error("there are no sources, needs at least 1")]
    NoSources,
    /// A source is made for another query than the first.
    #[error("source {source_name} is for another query than the first: {found:?}, needs {wanted:?}")]
    Query {
        /// Which source.
        source_name: String,
        /// Shape of the query that would do.
        wanted: [usize; 4],
        /// Shape that was found; where it is the same, strides, offset or element differ.
        found: [usize; 4],
    },
    /// A source has values of another width than the first.
    #[error("source {source_name} has v_head_dim {found}, needs {wanted} as source {first} has")]
    ValueWidth {
        /// Which source.
        source_name: String,
        /// The first source.
        first: String,
        /// Width that would do.
        wanted: usize,
        /// Width that was found.
        found: usize,
    },
    /// The spec of a source is not sound.
    #[error("source {source_name}: {error}")]
    Problem {
        /// Which source.
        source_name: String,
        /// Why.
        error: Box<ProblemError>,
    },
    /// The data of a source is not what its spec says.
    #[error("source {source_name}: {error}")]
    Input {
        /// Which source.
        source_name: String,
        /// Why.
        error: InputError,
    },
    /// A source asks for its scores, which are not returned.
    #[error("source {source_name} asks for scores, which are not returned for sources; ask for them of one attention")]
    Scores {
        /// Which source.
        source_name: String,
    },
    /// Weights before the softmax are a bias themselves.
    #[error("source {source_name} has a bias and key_weights; add ln(weight) to the bias")]
    BiasAndWeights {
        /// Which source.
        source_name: String,
    },
    /// A term of the weighted sum, where one softmax goes over all sources.
    #[error("source {source_name} has {name}, which only Combine::Sum has a use for")]
    SumOnly {
        /// Which source.
        source_name: String,
        /// `scale` or `row_weights`.
        name: &'static str,
    },
    /// The scale of a source is not a finite number.
    #[error("source {source_name} has scale {scale}, needs a finite number")]
    Scale {
        /// Which source.
        source_name: String,
        /// What was found.
        scale: f32,
    },
    /// A tensor of a source is of another type.
    #[error("source {source_name}: {error}")]
    Place {
        /// Which source.
        source_name: String,
        /// Why.
        error: crate::engine::PlaceError,
    },
    /// Data of another number of sources is given.
    #[error("data of {found} sources is given, needs {wanted}")]
    Count {
        /// Sources that were described.
        wanted: usize,
        /// Sources that were given.
        found: usize,
    },
    /// Weights or gates are said to be given and are not, or the other way round, or have another length.
    #[error("{name} of {of}: {found} numbers are given, needs {wanted}")]
    Len {
        /// `key_weights`, `after_weights`, `row_weights` or `gate`.
        name: &'static str,
        /// Name of the source; `the output` for gates.
        of: String,
        /// Numbers that would do; 0 where none are asked for.
        wanted: usize,
        /// Numbers that were given.
        found: usize,
    },
    /// A weight or gate is no number, or is negative where that has no meaning.
    #[error("{name}[{at}] of {of} is {value}, needs a finite number{}", if *.non_negative { ", at least 0" } else { "" })]
    Weight {
        /// `key_weights`, `after_weights`, `row_weights` or `gate`.
        name: &'static str,
        /// Name of the source; `the output` for gates.
        of: String,
        /// Which number.
        at: usize,
        /// What was found.
        value: f32,
        /// Whether it may not be negative.
        non_negative: bool,
    },
}
