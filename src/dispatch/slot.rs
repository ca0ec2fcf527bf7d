//! The buffers that kernels bind, by name.

/// A buffer that a kernel binds: the name it has in WGSL and the place it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Slot {
    /// The caller's query.
    Query,
    /// The caller's key.
    Key,
    /// The caller's value.
    Value,
    /// The caller's bias.
    Bias,
    /// The caller's boolean mask, one byte an element.
    Mask,
    /// The caller's scales of keys stored as signed bytes.
    KeyScale,
    /// The caller's scales of values stored as signed bytes.
    ValueScale,
    /// Lengths, row ranges, slopes, sinks and the table of pages, side by side.
    RowData,
    /// The caller's output.
    Output,
    /// The caller's log-sum-exp.
    Lse,
    /// The caller's score matrix.
    Scores,
    /// Scores between passes, in the plan's workspace.
    Workspace,
    /// Outputs and log-sum-exps over parts of the keys, in the plan's workspace.
    States,
    /// The outputs of one of those parts.
    PartOutput,
    /// The log-sum-exps of one of those parts.
    PartRowState,
    /// Which heads, rows and keys weights are wanted of.
    Selection,
    /// The caller's selected weights.
    Weights,
    /// The caller's gradient of the output.
    DOutput,
    /// The caller's gradient of the log-sum-exp.
    DLse,
    /// The caller's gradient of chosen weights, which is copied behind the row data.
    DWeights,
    /// Sums of gradients before they are stored, in the plan's workspace.
    Gradients,
    /// The caller's gradient of the query, written.
    DQuery,
    /// The caller's gradient of the key, written.
    DKey,
    /// The caller's gradient of the value, written.
    DValue,
    /// The caller's gradient of the bias, written.
    DBias,
    /// The caller's gradient of the ALiBi slopes, written.
    DAlibiSlopes,
    /// The caller's gradient of the sinks, written.
    DSinks,
    /// The caller's gradient of the scale, written.
    DScale,
}

impl Slot {
    /// `query`, `key`, …
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Query => "query",
            Self::Key => "key",
            Self::Value => "value",
            Self::Bias => "bias",
            Self::Mask => "mask",
            Self::KeyScale => "key_scale",
            Self::ValueScale => "value_scale",
            Self::RowData => "row_data",
            Self::Output => "output",
            Self::Lse => "lse",
            Self::Scores => "scores",
            Self::Workspace => "workspace",
            Self::States => "states",
            Self::PartOutput => "part_output",
            Self::PartRowState => "part_row_state",
            Self::Selection => "selection",
            Self::Weights => "weights",
            Self::DOutput => "d_output",
            Self::DLse => "d_lse",
            Self::DWeights => "d_weights",
            Self::Gradients => "gradients",
            Self::DQuery => "d_query",
            Self::DKey => "d_key",
            Self::DValue => "d_value",
            Self::DBias => "d_bias",
            Self::DAlibiSlopes => "d_alibi_slopes",
            Self::DSinks => "d_sinks",
            Self::DScale => "d_scale",
        }
    }

    /// Whether the buffer is made for the plan, and is none of the caller's.
    pub(crate) const fn is_of_the_plan(self) -> bool {
        match self {
            Self::RowData
            | Self::Workspace
            | Self::States
            | Self::PartOutput
            | Self::PartRowState
            | Self::Selection
            | Self::Gradients => true,
            Self::Query
            | Self::Key
            | Self::Value
            | Self::Bias
            | Self::Mask
            | Self::KeyScale
            | Self::ValueScale
            | Self::Output
            | Self::Lse
            | Self::Scores
            | Self::Weights
            | Self::DOutput
            | Self::DLse
            | Self::DWeights
            | Self::DQuery
            | Self::DKey
            | Self::DValue
            | Self::DBias
            | Self::DAlibiSlopes
            | Self::DSinks
            | Self::DScale => false,
        }
    }

    /// The binding number in every attention shader. To a shader, scores are the same in the workspace and returned, output and
    /// log-sum-exp the same of all keys and of a part of them, and a gradient that is stored is an output.
    pub(crate) const fn binding(self) -> u32 {
        match self {
            Self::Query => 1,
            Self::Key => 2,
            Self::Value => 3,
            Self::Bias => 4,
            Self::Mask => 5,
            Self::RowData => 6,
            Self::Output | Self::PartOutput => 7,
            Self::DQuery | Self::DKey | Self::DValue | Self::DBias => 7,
            Self::DAlibiSlopes | Self::DSinks | Self::DScale => 7,
            Self::Lse | Self::PartRowState => 8,
            Self::Scores | Self::Workspace | Self::States | Self::Gradients => 9,
            Self::Selection => 10,
            Self::Weights => 11,
            Self::KeyScale => 12,
            Self::ValueScale => 13,
            Self::DOutput => 14,
            Self::DLse => 15,
            Self::DWeights => 16,
        }
    }
}
