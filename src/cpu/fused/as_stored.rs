//! Keys and values that a few rows read as they are stored, without a block of them made into numbers first.

use super::rows;
use super::scratch::Scratch;
use super::task::Job;
use crate::cpu::simd::{self, RowState, Strided};

impl Job<'_> {
    /// Whether a chunk's keys and values are read as they are stored: a few rows, all of which see the same keys by position
    /// alone, so that what is widened is used at once and but once or twice.
    pub(super) fn reads_as_stored(&self, chunk: usize, keys: &[[usize; 2]]) -> bool {
        /// Rows that share what is widened in a register.
        const MOST: usize = 4;
        // there elements are widened one by one either way, and a package for browsers is to be small
        if cfg!(target_arch = "wasm32") {
            return false;
        }
        let (rows, spec) = (self.plan.map.rows(chunk), self.problem.spec());
        let bare = spec.mask.is_none() && spec.bias.is_none() && spec.alibi_slopes.is_none();
        self.few() && bare && rows <= MOST && keys[..rows].iter().all(|seen| *seen == keys[0])
    }

    /// One block of keys of [`attend`](Self::attend), where [`reads_as_stored`](Self::reads_as_stored); `false`, and nothing done, if
    /// keys or values do not lie as that needs. Scales of rows go into scores and weights, rather than into each element.
    pub(super) fn attend_as_stored(&self, chunk: usize, block: std::ops::Range<usize>, scratch: &mut Scratch) -> bool {
        let Self { plan, problem, inputs } = *self;
        let (kv_head, level, n) = (plan.map.kv_head(chunk), plan.level(), block.len());
        let (all_keys, all_values) = (inputs.keys(problem), inputs.values(problem));
        let Some(key) = rows::in_place(level, &all_keys, kv_head, block.clone(), &mut scratch.key_block) else {
            return false;
        };
        let Some(value) = rows::in_place(level, &all_values, kv_head, block, &mut scratch.value_block) else {
            return false;
        };
        let (rows, dim, v_dim) = (plan.map.rows(chunk), problem.head_dim(), problem.v_head_dim());
        let query = Strided { data: &scratch.query, stride: dim };
        let scores = &mut scratch.scores;
        simd::products_stored(level, query, rows, key.rows, n, dim, self.scale(), scores, plan.block_kv);
        let (softcap, padded) = (problem.spec().softcap.unwrap_or(0.0), n.next_multiple_of(level.lanes()));
        for line in scores.chunks_exact_mut(plan.block_kv).take(rows) {
            line.iter_mut().zip(key.scales).for_each(|(score, scale)| *score *= scale);
            if softcap > 0.0 {
                simd::add_terms(level, padded / level.lanes(), 1, line, softcap, &[], false, &[], &[], &[]);
            }
            line[n..padded].fill(f32::NEG_INFINITY);
        }
        let (max, sum, rescale) = (&mut scratch.row_max[..], &mut scratch.row_sum[..], &mut scratch.rescale[..]);
        let fresh = std::mem::replace(&mut scratch.fresh[0], false);
        let state = RowState { max, sum, rescale, fresh };
        let grew = simd::soften_lines(level, rows, n, scores, plan.block_kv, state, plan.exponents);
        for line in scores.chunks_exact_mut(plan.block_kv).take(rows) {
            line.iter_mut().zip(value.scales).for_each(|(weight, scale)| *weight *= scale);
        }
        let acc_stride = v_dim.next_multiple_of(level.lanes());
        if grew && !fresh {
            simd::rescale_rows(&mut scratch.acc, acc_stride, &scratch.rescale[..rows]);
        }
        let steps = [1, plan.block_kv];
        simd::weigh_stored(level, scores, steps, rows, value.rows, n, v_dim, &mut scratch.acc, acc_stride);
        true
    }
}
