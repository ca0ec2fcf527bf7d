//! The workspace of a task.

use super::plan::BackwardPlan;
use crate::backward::BackwardProblem;
use crate::cpu::fused::rows;
use crate::cpu::fused::scratch::{Buffer, Scratch};

/// Workspace of a task.
#[derive(Debug)]
pub(super) struct Workspace {
    pub(super) scores: Scratch,
    /// `[tile][head_dim][row]`; with few queries `[row][head_dim, padded]`.
    pub(super) d_query: Buffer,
    /// `[tile][v_head_dim][row]`.
    pub(super) d_output: Buffer,
    /// Rows of query and of the gradient of the output that are not read where they lie, `[chunk row][columns]`.
    pub(super) query_rows: Buffer,
    pub(super) d_output_rows: Buffer,
    /// One tile of the output, as `d_output`.
    pub(super) output: Buffer,
    /// `[key][row]`: products of values and the gradient of the output, then the gradient of the scores.
    pub(super) products: Buffer,
    /// The same of dot products, before the softcap.
    pub(super) dots: Buffer,
    /// The same of the gradient of chosen weights.
    pub(super) chosen: Buffer,
    /// `[tile][row]`.
    pub(super) delta: Buffer,
    pub(super) shift: Buffer,
    pub(super) by: Buffer,
    /// One for each row of a tile.
    pub(super) ones: Buffer,
    /// A vector of rows of the gradient of the queries.
    pub(super) lines: Buffer,
    /// A block of keys, and the rows of a tile, without what is not finite.
    pub(super) clean_key: Buffer,
    pub(super) clean_query: Buffer,
    pub(super) clean_d_output: Buffer,
    /// `[tile]`: whether anything was added to the gradient of its queries.
    pub(super) fresh: Vec<bool>,
}

impl Workspace {
    fn sizes(plan: &BackwardPlan, problem: &BackwardProblem) -> [usize; 16] {
        let (scores, forward, spec) = (&plan.scores, problem.forward(), problem.spec());
        let (rows, tile, block) = (scores.chunk_rows(), scores.tile_rows, scores.block_kv);
        let (dim, v_dim) = (forward.head_dim(), forward.v_head_dim());
        let lanes = scores.level().lanes();
        let hides = rows::may_hide(forward);
        let has_raw = spec.attention.softcap.is_some() || spec.d_scale;
        [
            rows * dim.next_multiple_of(lanes),
            rows * v_dim,
            rows * dim,
            rows * v_dim,
            tile * v_dim,
            block * tile,
            if has_raw { block * tile } else { 0 },
            if problem.weights().is_some() { block * tile } else { 0 },
            rows,
            rows,
            rows,
            tile,
            lanes * dim,
            if hides { block * dim } else { 0 },
            if hides { tile * dim } else { 0 },
            if hides { tile * v_dim } else { 0 },
        ]
    }

    pub(super) fn new(plan: &BackwardPlan, problem: &BackwardProblem) -> Self {
        let [d_query, d_output, query_rows, d_output_rows, output, products, dots, chosen, delta, shift, by, rest @ ..] =
            Self::sizes(plan, problem).map(Buffer::new);
        let [ones, lines, clean_key, clean_query, clean_d_output] = rest;
        let mut all = Self {
            scores: Scratch::new(&plan.scores, problem.forward()),
            d_query,
            d_output,
            query_rows,
            d_output_rows,
            output,
            products,
            dots,
            chosen,
            delta,
            shift,
            by,
            ones,
            lines,
            clean_key,
            clean_query,
            clean_d_output,
            fresh: vec![true; plan.scores.tiles],
        };
        all.ones.fill(1.0);
        all
    }

    /// Bytes of a workspace.
    pub(super) fn bytes(plan: &BackwardPlan, problem: &BackwardProblem) -> usize {
        let own: usize = Self::sizes(plan, problem).into_iter().map(|n| n.div_ceil(16) * 64).sum();
        own + Scratch::bytes(&plan.scores, problem.forward()) + plan.scores.tiles
    }
}
