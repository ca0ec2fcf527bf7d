//! Problems that are made of another: the same attention, asked in another way.

use super::AttentionProblem;
use crate::tensor::{Layout, TensorSpec};

impl AttentionProblem {
    /// The same attention as one of several states to be merged: an f32 output without gaps and its lse; a sink comes in
    /// when all are merged, and scores are returned apart.
    #[must_use]
    pub(crate) fn partial(&self) -> Self {
        let mut partial = self.clone();
        let [batch, heads, len, _] = self.spec.query.layout.shape;
        partial.spec.output = TensorSpec::f32(Layout::bhld([batch, heads, len, self.v_head_dim()]));
        partial.spec.lse = true;
        partial.spec.row_state = false;
        partial.spec.sinks = false;
        partial.spec.scores = None;
        partial
    }

    /// The scores alone, to be turned into probabilities by a log-sum-exp that is known: no value, no sink, no output of
    /// its own.
    #[must_use]
    pub(crate) fn scores_alone(&self) -> Self {
        let mut alone = self.clone();
        alone.spec.value = alone.spec.key;
        alone.spec.output = TensorSpec::f32(Layout::bhld(self.spec.query.layout.shape));
        alone.spec.lse = true;
        alone.spec.row_state = false;
        alone.spec.sinks = false;
        alone.spec.scores = None;
        alone
    }

    /// The same attention, which returns its log-sum-exp.
    #[must_use]
    pub(crate) fn with_lse(&self) -> Self {
        let mut with_lse = self.clone();
        with_lse.spec.lse = true;
        with_lse
    }
}
