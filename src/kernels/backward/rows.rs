//! The dispatches that go over rows, not over pairs: delta, the sums of what rows share, the gradients of sinks.

use std::ops::Range;

use super::{CHUNK, WIDTH, row_stats};
use crate::backward::BackwardProblem;
use crate::caps::DeviceCaps;
use crate::dispatch::{Bindings, D_OUTPUT, Needs, OUTPUT, Params, Part, Shader, Slot, Step, Variant, flat_grid};
use crate::problem::AttentionProblem;
use crate::tensor::{Layout, TensorSpec};

/// Invocations that add the shares of rows.
const SUMS_WIDTH: usize = 256;

/// The dispatch that adds one number of each row of a part: over the batch or not, over heads or not. Of the numbers it is
/// said where they lie, which of a split it is, how many a split has, and how many splits.
pub(super) fn row_sums(
    problem: &BackwardProblem,
    caps: &DeviceCaps,
    part: &Part,
    slot: Slot,
    [over_batch, over_heads]: [bool; 2],
    (region, column, width, splits): (Layout, usize, usize, usize),
) -> Step {
    let forward = problem.forward();
    let mut bindings = Bindings::new(forward, part, caps);
    let mut numbers = Layout { offset: region.offset + column, ..region };
    numbers.shape[3] -= column;
    bindings.push(Slot::Gradients, false, numbers);
    let kept = |summed: bool, range: &Range<usize>| if summed { 0..1 } else { range.clone() };
    let (batch, heads) = (kept(over_batch, &part.batch), kept(over_heads, &part.heads));
    let all_heads = if over_heads { 1 } else { forward.q_heads() };
    let sums = Layout::bhld([batch.len(), heads.len(), 1, 1]).with_strides([all_heads, 1, 1, 1]);
    let sums = sums.with_offset(batch.start * all_heads + heads.start);
    bindings.write_tensor(slot, &TensorSpec::f32(sums), sums);
    let mut variant = Variant::new(Shader::BackwardSums);
    variant.size("HEADS", part.heads.len()).switch("SUM_BATCH", over_batch).switch("SUM_HEADS", over_heads);
    variant.size("SPLIT_WIDTH", width);
    let begun = over_batch && part.batch.start > 0 || over_heads && part.heads.start > 0 || part.rows.start > 0;
    let params = Params::new(forward, part, &bindings).with_splits(splits);
    let params = params.for_gradients(&row_stats(problem), part, begun);
    let count = |summed: bool, n: usize| if summed { n } else { 1 };
    let summed = count(over_batch, part.batch.len()).saturating_mul(count(over_heads, part.heads.len()));
    let summed = summed.saturating_mul(part.rows.len()).saturating_mul(splits);
    let needs = Needs::new(256, summed.div_ceil(SUMS_WIDTH).saturating_add(10));
    let grid = [(batch.len() * heads.len()) as u64, 1, 1];
    Step::new(variant, bindings, params, grid, 4 * SUMS_WIDTH as u64, needs)
}

/// A workgroup for so many rows of a part.
pub(super) fn row_grid(part: &Part, caps: &DeviceCaps) -> [u64; 3] {
    flat_grid((part.row_count() as u64).div_ceil(WIDTH as u64), caps)
}

pub(super) fn blocks_per_row(grid: [u64; 3]) -> usize {
    usize::try_from(grid[0]).unwrap_or(usize::MAX)
}

/// The dispatch that finds maximum, sum and delta of a part's rows.
pub(crate) fn delta(problem: &BackwardProblem, caps: &DeviceCaps, part: &Part) -> Step {
    let (spec, forward) = (problem.spec(), problem.forward());
    let width = forward.v_head_dim();
    let mut bindings = Bindings::new(forward, part, caps);
    bindings.read(&[Slot::Output, Slot::Lse]).read_rows(Slot::DOutput, &spec.d_output);
    if spec.d_lse {
        bindings.read(&[Slot::DLse]);
    }
    bindings.row_stats(&row_stats(problem), true);
    let mut variant = Variant::new(Shader::BackwardDelta);
    variant.row_vec(&OUTPUT, &forward.spec().output).row_vec(&D_OUTPUT, &spec.d_output);
    variant.snippets(&[if spec.d_lse { "d_lse_buffer" } else { "d_lse_none" }]);
    let grid = row_grid(part, caps);
    variant.size("V_HEAD_DIM", width).switch("VALUE_RAGGED", !width.is_multiple_of(4 * CHUNK));
    variant.size("HEADS", part.heads.len()).size("BLOCKS_PER_ROW", blocks_per_row(grid));
    let params = Params::new(forward, part, &bindings).for_gradients(&row_stats(problem), part, false);
    let vecs = width.div_ceil(4 * CHUNK) * CHUNK;
    // two tensors, either of which may be read one by one
    Step::new(variant, bindings, params, grid, 0, Needs::new(64, vecs + vecs / CHUNK + 2 * 4 * vecs))
}

/// Where the shares of rows in the gradients of sinks lie.
fn sink_shares(forward: &AttentionProblem, part: &Part) -> Layout {
    let [batch, heads, rows, _] = forward.score_shape();
    let whole = Layout::bhld([batch, heads, rows, 1]);
    let offset = whole.index([part.batch.start, part.heads.start, part.rows.start, 0]);
    Layout { shape: [part.batch.len(), part.heads.len(), part.rows.len(), 1], offset, ..whole }
}

/// Bytes of them in the workspace.
pub(crate) fn sink_bytes(problem: &BackwardProblem) -> u64 {
    if problem.spec().d_sinks { problem.forward().rows() as u64 * 4 } else { 0 }
}

/// The dispatches that make the gradients of sinks out of a part's rows.
pub(crate) fn sinks(problem: &BackwardProblem, caps: &DeviceCaps, part: &Part) -> Vec<Step> {
    let forward = problem.forward();
    let attention = forward.spec();
    let mut bindings = Bindings::new(forward, part, caps);
    bindings.read_pairs().row_stats(&row_stats(problem), false).push(Slot::Gradients, true, sink_shares(forward, part));
    let mut variant = Variant::new(Shader::BackwardSinks);
    variant.terms(attention).row_data(true).snippets(&["q_lens", "keys", "row_stats", "gradient_workspace"]);
    variant.snippets.retain(|name| *name != "row_data_none");
    let grid = row_grid(part, caps);
    variant.key_overrides(forward).size("HEADS", part.heads.len()).size("BLOCKS_PER_ROW", blocks_per_row(grid));
    let params = Params::new(forward, part, &bindings).for_gradients(&row_stats(problem), part, false);
    // a row that sees no key of its interval asks all of them
    let asks = attention.mask.is_some() || attention.bias.is_some();
    let needs = Needs::new(64, if asks { forward.kv_len() } else { 1 });
    let shares = Step::new(variant, bindings, params, grid, 0, needs);
    let sums = row_sums(problem, caps, part, Slot::DSinks, [true, false], (sink_shares(forward, part), 0, 1, 1));
    vec![shares, sums]
}
