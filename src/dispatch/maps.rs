//! Where things lie that share a buffer: row data, what is known of rows, partial states.

use super::Part;
use crate::problem::AttentionProblem;
use crate::tensor::Layout;
use crate::terms::Terms;

/// Where partial states lie: outputs `[count, rows, v_head_dim]`, then maxima and sums `[count, rows, 2]`, in words of 4
/// bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct StateMap {
    pub(super) rows: usize,
    v_head_dim: usize,
    /// Where maxima and sums begin: a binding may, and none of them and of outputs overlap.
    pub(super) row_states_at: usize,
    pub(super) words: usize,
}

impl StateMap {
    /// Counts that do not fit are beyond every limit; they saturate, and the part is cut.
    pub(super) fn new(problem: &AttentionProblem, part: &Part, count: usize, alignment: usize) -> Self {
        let (rows, v_head_dim) = (part.row_count(), problem.v_head_dim());
        let all = rows.saturating_mul(count);
        let row_states_at = all.saturating_mul(v_head_dim).checked_next_multiple_of(alignment).unwrap_or(usize::MAX);
        Self { rows, v_head_dim, row_states_at, words: row_states_at.saturating_add(all.saturating_mul(2)) }
    }

    pub(super) fn output(&self, part: &Part, state: usize) -> Layout {
        let shape = [part.batch.len(), part.heads.len(), part.rows.len(), self.v_head_dim];
        Layout::bhld(shape).with_offset(state.saturating_mul(self.rows).saturating_mul(self.v_head_dim))
    }

    pub(super) fn row_states(&self, part: &Part, state: usize) -> Layout {
        let shape = [part.batch.len(), part.heads.len(), part.rows.len(), 2];
        let before = state.saturating_mul(self.rows).saturating_mul(2);
        Layout::bhld(shape).with_offset(self.row_states_at.saturating_add(before))
    }
}

/// Where each kind of row data lies in its buffer, in words of 4 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct RowDataMap {
    /// Of what the problem has.
    pub(crate) at: Terms<u32>,
    /// All words; 0 where the problem has no row data.
    pub(crate) words: u32,
}

impl RowDataMap {
    pub(crate) fn new(problem: &AttentionProblem) -> Self {
        // more words than a u32 counts are beyond every binding limit, and refused for that
        let narrow = |words: usize| u32::try_from(words).unwrap_or(u32::MAX);
        let mut words = 0usize;
        let strided = Terms { bias: None, mask: None, key_scale: None, value_scale: None, ..problem.terms() };
        let at = strided.map(|term| {
            let at = narrow(words);
            words = words.saturating_add(term.elements);
            at
        });
        Self { at, words: narrow(words) }
    }
}

/// Where four numbers of each row lie, behind the row data, and then what is known of chosen weights, in words of 4 bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct RowStatsMap {
    /// `[batch, q_heads, q_len, 4]`.
    layout: Layout,
    pub(crate) chosen_at: usize,
    /// All words, those of the row data too.
    pub(crate) words: usize,
}

impl RowStatsMap {
    pub(crate) fn new(problem: &AttentionProblem, chosen_words: usize) -> Self {
        let [batch, q_heads, q_len, _] = problem.score_shape();
        // a vec4 each
        let at = (RowDataMap::new(problem).words as usize).next_multiple_of(4);
        let layout = Layout::bhld([batch, q_heads, q_len, 4]).with_offset(at);
        let chosen_at = at.saturating_add(problem.rows().saturating_mul(4));
        Self { layout, chosen_at, words: chosen_at.saturating_add(chosen_words) }
    }

    /// Those of a part.
    pub(crate) fn of(&self, part: &Part) -> Layout {
        let at = self.layout.index([part.batch.start, part.heads.start, part.rows.start, 0]);
        Layout { offset: at, ..self.layout }
    }
}
