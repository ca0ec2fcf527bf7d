//! Which WGSL files there are, and what the host fills their uniforms with.

use super::{Params, linear, merge, small};

/// A WGSL file with an entry point `main`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Shader {
    /// Attention with whole rows in each lane of a subgroup.
    Rows,
    /// Attention over a part of the keys.
    Split,
    /// Merge of the states of parts of the keys.
    Combine,
    /// The whole attention with register tiles.
    Tiled,
    /// The whole attention on matrix units.
    Cooperative,
    /// The whole attention with an online softmax.
    Fused,
    /// Scores of every pair.
    Scores,
    /// Softmax of stored scores, in place.
    Softmax,
    /// Weighted sum of values.
    WeightedSum,
    /// Merge of partial attentions.
    Merge,
    /// Selected attention weights from the log-sum-exp.
    Weights,
    /// Weighted and gated sum of attentions over several sources.
    CombineSources,
    /// Stored bytes with scales, as f32.
    ExpandQ8,
    /// Linear map of many rows.
    Linear,
    /// Linear map of at most 4 rows.
    LinearFew,
    /// Norm of each row of a head.
    HeadNorm,
}

impl Shader {
    /// Every shader.
    pub const ALL: [Self; 16] = [
        Self::Rows,
        Self::Split,
        Self::Combine,
        Self::Tiled,
        Self::Cooperative,
        Self::Fused,
        Self::Scores,
        Self::Softmax,
        Self::WeightedSum,
        Self::Merge,
        Self::Weights,
        Self::CombineSources,
        Self::ExpandQ8,
        Self::Linear,
        Self::LinearFew,
        Self::HeadNorm,
    ];

    /// The name of its file in `shaders/`, without the ending.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rows => "rows",
            Self::Split => "split",
            Self::Combine => "combine",
            Self::Tiled => "tiled",
            Self::Cooperative => "cooperative",
            Self::Fused => "fused",
            Self::Scores => "scores",
            Self::Softmax => "softmax",
            Self::WeightedSum => "weighted_sum",
            Self::Merge => "merge",
            Self::Weights => "weights",
            Self::CombineSources => "combine_sources",
            Self::ExpandQ8 => "expand_q8",
            Self::Linear => "linear",
            Self::LinearFew => "linear_few",
            Self::HeadNorm => "head_norm",
        }
    }

    /// Name and byte offset of each field of the uniform at binding 0, as the host fills it.
    #[must_use]
    pub const fn param_fields(self) -> &'static [(&'static str, usize)] {
        match self {
            Self::Merge => merge::Params::FIELDS,
            Self::CombineSources => small::CombineParams::FIELDS,
            Self::ExpandQ8 => small::ExpandParams::FIELDS,
            Self::Linear | Self::LinearFew => linear::Params::FIELDS,
            Self::HeadNorm => linear::NormParams::FIELDS,
            Self::Rows
            | Self::Split
            | Self::Combine
            | Self::Tiled
            | Self::Cooperative
            | Self::Fused
            | Self::Scores
            | Self::Softmax
            | Self::WeightedSum
            | Self::Weights => Params::FIELDS,
        }
    }
}
