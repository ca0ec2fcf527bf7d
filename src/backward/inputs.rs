//! The host side of one backward call: what it reads, compared with the problem, and what it gives.

use super::BackwardProblem;
use crate::inputs::{AttentionInputs, AttentionOutput, InputError, RowState, check_tensor};
use crate::tensor::{TensorData, TensorRef};

/// Data of one backward call in host memory. What is given must be what the [`BackwardSpec`](super::BackwardSpec) says is given.
#[derive(Clone, Copy, Debug)]
pub struct BackwardInputs<'a> {
    /// What the attention was called with.
    pub attention: AttentionInputs<'a>,
    /// What it gave, `[batch, q_heads, q_len, v_head_dim]` in the layout of the attention's `output`.
    pub output: TensorRef<'a>,
    /// Maximum and sum of its rows, each `[batch, q_heads, q_len]`.
    pub row_state: &'a RowState,
    /// The gradient of the output, in the layout of the spec's `d_output`.
    pub d_output: TensorRef<'a>,
    /// The gradient of the log-sum-exp, `[batch, q_heads, q_len]`, if the spec says so.
    pub d_lse: Option<&'a [f32]>,
    /// The gradient of the chosen weights, if the spec says so.
    pub d_weights: Option<&'a [f32]>,
}

impl<'a> BackwardInputs<'a> {
    /// Inputs and results of a forward call, and the gradient of its output.
    ///
    /// # Errors
    /// [`InputError::Missing`] if the forward call did not return maximum and sum of its rows, as that of
    /// [`BackwardProblem::forward`] does.
    pub fn new(
        attention: AttentionInputs<'a>,
        forward: &'a AttentionOutput,
        d_output: impl Into<TensorRef<'a>>,
    ) -> Result<Self, InputError> {
        let row_state = forward.row_state.as_ref().ok_or(InputError::Missing { name: "row_state" })?;
        let (output, d_output) = (forward.output.as_ref(), d_output.into());
        Ok(Self { attention, output, row_state, d_output, d_lse: None, d_weights: None })
    }

    /// Compares the data with the problem: what is there, of which type, how long.
    ///
    /// # Errors
    /// An [`InputError`] that names the tensor, what was found and what would do.
    pub fn check(&self, problem: &BackwardProblem) -> Result<(), InputError> {
        let (spec, forward) = (problem.spec(), problem.forward());
        self.attention.check(forward)?;
        for (name, data, of) in
            [("output", self.output, &spec.attention.output), ("d_output", self.d_output, &spec.d_output)]
        {
            check_tensor(name, (data.element().into(), data.len()), of)?;
        }
        let rows = forward.rows();
        let exactly = |name, given: Option<usize>, wanted: Option<usize>| match (given, wanted) {
            (None, Some(_)) => Err(InputError::Missing { name }),
            (Some(_), None) => Err(InputError::Unexpected { name }),
            (Some(found), Some(wanted)) if found != wanted => Err(InputError::Len { name, wanted, found }),
            _ => Ok(()),
        };
        exactly("row_max", Some(self.row_state.row_max.len()), Some(rows))?;
        exactly("row_sum", Some(self.row_state.row_sum.len()), Some(rows))?;
        exactly("d_lse", self.d_lse.map(<[f32]>::len), spec.d_lse.then_some(rows))?;
        let weights = problem.weights().map(crate::weights::WeightsProblem::elements);
        exactly("d_weights", self.d_weights.map(<[f32]>::len), weights)
    }
}

/// Gradients of one attention, in host memory: those that the [`BackwardSpec`](super::BackwardSpec) asks for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gradients {
    /// In the layout of the spec's `d_query`; gaps are zero.
    pub d_query: Option<TensorData>,
    /// In the layout of the spec's `d_key`.
    pub d_key: Option<TensorData>,
    /// In the layout of the spec's `d_value`.
    pub d_value: Option<TensorData>,
    /// In the layout of the spec's `d_bias`.
    pub d_bias: Option<TensorData>,
    /// As many as there are slopes.
    pub d_alibi_slopes: Option<Vec<f32>>,
    /// `[q_heads]`.
    pub d_sinks: Option<Vec<f32>>,
    /// One number.
    pub d_scale: Option<f32>,
}
