//! Problems that are made of another: the same attention, asked in another way.

use super::AttentionProblem;
use crate::tensor::{Layout, TensorSpec};

impl AttentionProblem {
    /// The same attention as its caller sees it where scales of keys and values are not the caller's to give.
    #[must_use]
    pub(crate) fn with_own_scales(&self) -> Self {
        let mut own = self.clone();
        (own.spec.key_scale, own.spec.value_scale) = (None, None);
        own
    }

    /// The same attention as one of several states to be merged: an f32 output without gaps, maximum and sum of
    /// each row; a sink comes in when all are merged, and scores are returned apart.
    #[must_use]
    pub(crate) fn partial(&self) -> Self {
        let mut partial = self.clone();
        let [batch, heads, len, _] = self.spec.query.layout.shape;
        partial.spec.output = TensorSpec::f32(Layout::bhld([batch, heads, len, self.v_head_dim()]));
        partial.spec.lse = false;
        partial.spec.row_state = true;
        partial.spec.sinks = false;
        partial.spec.scores = None;
        partial
    }

    /// The scores alone, to be turned into probabilities by maxima and sums that are known: no value, no sink, no output of
    /// its own.
    #[must_use]
    pub(crate) fn scores_alone(&self) -> Self {
        let mut alone = self.clone();
        (alone.spec.value, alone.spec.value_scale) = (alone.spec.key, alone.spec.key_scale);
        alone.spec.output = TensorSpec::f32(Layout::bhld(self.spec.query.layout.shape));
        alone.spec.lse = false;
        alone.spec.row_state = true;
        alone.spec.sinks = false;
        alone.spec.scores = None;
        alone
    }

    /// The same attention, which returns log-sum-exp, and maximum and sum, of each row.
    #[must_use]
    pub(crate) fn with_row_state(&self) -> Self {
        let mut with_row_state = self.clone();
        (with_row_state.spec.lse, with_row_state.spec.row_state) = (true, true);
        with_row_state
    }
}
