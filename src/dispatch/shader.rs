//! Which WGSL files there are, and what the host fills their uniforms with.

use super::params::Params;
use super::uniforms::{CombineParams, LinearParams, MergeParams, NormParams};

/// One line a shader: its file in `shaders/` and its uniform.
macro_rules! shaders {
    ($($(#[$doc:meta])* $shader:ident: $name:literal, $params:ident;)*) => {
        /// A WGSL file with an entry point `main`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Shader {
            $($(#[$doc])* $shader,)*
        }

        impl Shader {
            /// Every shader.
            pub const ALL: [Self; [$($name),*].len()] = [$(Self::$shader),*];

            /// The name of its file in `shaders/`, without the ending.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$shader => $name,)*
                }
            }

            /// The text of that file.
            pub(super) const fn text(self) -> &'static str {
                match self {
                    $(Self::$shader => include_str!(concat!("../../shaders/", $name, ".wgsl")),)*
                }
            }

            /// Name and byte offset of each field of the uniform at binding 0, as the host fills it.
            #[doc(hidden)]
            #[must_use]
            pub const fn param_fields(self) -> &'static [(&'static str, usize)] {
                match self {
                    $(Self::$shader => $params::FIELDS,)*
                }
            }
        }
    };
}

shaders! {
    /// Attention with whole rows in each lane of a subgroup.
    Rows: "rows", Params;
    /// Attention over a part of the keys.
    Split: "split", Params;
    /// Merge of the states of parts of the keys.
    Combine: "combine", Params;
    /// The whole attention with register tiles.
    Tiled: "tiled", Params;
    /// The whole attention on matrix units.
    Cooperative: "cooperative", Params;
    /// The whole attention with an online softmax.
    Fused: "fused", Params;
    /// Scores of every pair.
    Scores: "scores", Params;
    /// Softmax of stored scores, in place.
    Softmax: "softmax", Params;
    /// Weighted sum of values.
    WeightedSum: "weighted_sum", Params;
    /// Merge of partial attentions.
    Merge: "merge", MergeParams;
    /// Selected attention weights from the log-sum-exp.
    Weights: "weights", Params;
    /// Gradients by tiles of pairs.
    Backward: "backward", Params;
    /// Maximum, sum and delta of each row.
    BackwardDelta: "backward_delta", Params;
    /// What chosen weights add to delta.
    BackwardChosen: "backward_chosen", Params;
    /// Shares of rows in the gradients of sinks.
    BackwardSinks: "backward_sinks", Params;
    /// Shares of rows summed.
    BackwardSums: "backward_sums", Params;
    /// Gradients stored.
    BackwardStore: "backward_store", Params;
    /// Weighted and gated sum of attentions over several sources.
    CombineSources: "combine_sources", CombineParams;
    /// Linear map of many rows.
    Linear: "linear", LinearParams;
    /// Linear map of at most 4 rows.
    LinearFew: "linear_few", LinearParams;
    /// Norm of each row of a head.
    HeadNorm: "head_norm", NormParams;
}

/// A storage buffer of a shader that is no step of a plan.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// Its number.
    pub binding: u32,
    /// What errors call it.
    pub name: &'static str,
    /// Whether the shader writes it.
    pub written: bool,
}

const fn read(binding: u32, name: &'static str) -> Port {
    Port { binding, name, written: false }
}

const fn written(binding: u32, name: &'static str) -> Port {
    Port { binding, name, written: true }
}

const MERGE: &[Port] = &[read(1, "part_output"), read(2, "part_lse"), written(3, "output"), written(4, "lse")];
const COMBINE_SOURCES: &[Port] =
    &[read(1, "part_output"), read(2, "scales"), read(3, "row_weights"), read(4, "gate"), written(5, "output")];
const LINEAR: &[Port] = &[read(1, "input"), read(2, "weight"), read(3, "bias"), written(7, "output")];

impl Shader {
    /// The storage buffers of a shader beside plans: what is read, then what is written. None of the others, which bind what
    /// their step says.
    #[doc(hidden)]
    #[must_use]
    pub const fn ports(self) -> &'static [Port] {
        match self {
            Self::Merge => MERGE,
            Self::CombineSources => COMBINE_SOURCES,
            Self::Linear | Self::LinearFew | Self::HeadNorm => LINEAR,
            Self::Rows
            | Self::Split
            | Self::Combine
            | Self::Tiled
            | Self::Cooperative
            | Self::Fused
            | Self::Scores
            | Self::Softmax
            | Self::WeightedSum
            | Self::Weights
            | Self::Backward
            | Self::BackwardDelta
            | Self::BackwardChosen
            | Self::BackwardSinks
            | Self::BackwardSums
            | Self::BackwardStore => &[],
        }
    }

    /// Whether it is no step of a plan, and brings a uniform of its own.
    pub(super) const fn is_beside_plans(self) -> bool {
        !self.ports().is_empty()
    }
}
