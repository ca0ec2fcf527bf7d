//! What leaves a task: finished rows, and scores at the stage that the spec asks for.

use crate::cpu::simd;
use crate::cpu::simd::shared::{TensorRows, Unit};
use crate::problem::ScoreStage;

use super::Store;
use super::rows::block;
use super::scratch::Scratch;
use super::task::{Job, Scoring};

impl Job<'_> {
    /// Normalises the rows of a chunk, and stores them with their log-sum-exp.
    pub(super) fn finish<T: Store>(
        &self,
        chunk: usize,
        scratch: &mut Scratch,
        output: &mut Unit<'_, '_, T, TensorRows>,
        mut lse: Option<Unit<'_, '_, f32, TensorRows>>,
    ) {
        let (plan, dim) = (self.plan, self.problem.v_head_dim());
        let of = plan.map.chunk(chunk);
        let to_natural = if self.binary() { std::f32::consts::LN_2 } else { 1.0 };
        for tile in self.tiles(chunk) {
            let at = tile.number * plan.tile_rows;
            let acc = &mut scratch.acc[at * dim..];
            if scratch.fresh[tile.number] {
                acc[..dim * tile.width].fill(0.0);
            }
            let end = |r: usize, max: &[f32], sum: &[f32]| {
                let sink = self.inputs.sinks.map_or(f32::NEG_INFINITY, |sinks| {
                    let [_, h, _] = plan.map.place_in(of, tile.first_row + r);
                    sinks[h]
                });
                row_end(max[at + r] * to_natural, sum[at + r], sink)
            };
            for r in 0..tile.rows {
                (scratch.rescale[r], _) = end(r, &scratch.row_max, &scratch.row_sum);
            }
            let lanes = plan.level().lanes();
            for first in (0..tile.rows).step_by(lanes) {
                let n = lanes.min(tile.rows - first);
                // where the rows after the next go: no cache holds that yet
                let ahead = tile.first_row + first + 2 * lanes;
                for row in ahead..(ahead + lanes).min(plan.map.rows(chunk)) {
                    simd::ask_for(plan.level(), bytemuck::cast_slice(output.row(row)));
                }
                simd::turn_out(plan.level(), acc, tile.width, first, dim, &scratch.rescale, &mut scratch.lines);
                for (r, line) in scratch.lines.chunks_exact_mut(dim).take(n).enumerate() {
                    let (row, sum) = (tile.first_row + first + r, scratch.row_sum[at + first + r]);
                    // a row that saw no mass; a NaN that it saw all the same has no weight
                    if sum == 0.0 {
                        line.fill(0.0);
                    }
                    T::store(line, output.row(row));
                    if let Some(lse) = &mut lse {
                        (_, lse.row(row)[0]) = end(first + r, &scratch.row_max, &scratch.row_sum);
                    }
                }
            }
        }
    }

    /// Computes the scores of a chunk once more, and stores them.
    pub(super) fn stage(
        &self,
        stage: ScoreStage,
        chunk: usize,
        scratch: &mut Scratch,
        lse: &[f32],
        mut out: Unit<'_, '_, f32, TensorRows>,
    ) {
        let (plan, problem, inputs) = (self.plan, self.problem, self.inputs);
        self.load(chunk, scratch);
        if !self.few() {
            for tile in self.tiles(chunk) {
                self.load_tile(chunk, tile, &mut scratch.query, &mut scratch.lines);
            }
        }
        let (level, kv_head) = (plan.level(), plan.map.kv_head(chunk));
        for start in (0..problem.kv_len()).step_by(plan.block_kv) {
            let keys = start..(start + plan.block_kv).min(problem.kv_len());
            let key = block(inputs.key, &problem.spec().key, kv_head, keys.clone(), &mut scratch.key_block);
            for tile in self.tiles(chunk) {
                let n = keys.len();
                let mut scoring = Scoring {
                    scale: problem.scale(),
                    scores: &mut scratch.scores,
                    extra: &mut scratch.extra,
                    bits: &mut scratch.bits,
                    keys: &scratch.keys,
                    low: &mut scratch.low,
                    high: &mut scratch.high,
                    slope: &mut scratch.slope,
                    diagonal: &mut scratch.diagonal,
                    lines: &mut scratch.lines,
                };
                match stage {
                    ScoreStage::Scaled | ScoreStage::Capped => {
                        self.dots(tile, &scratch.query, key, n, key, &mut scoring);
                        if let (ScoreStage::Capped, Some(cap)) = (stage, problem.spec().softcap) {
                            simd::add_terms(level, tile.vectors, n, scoring.scores, cap, &[], false, &[], &[]);
                        }
                    }
                    ScoreStage::Masked | ScoreStage::Probs => {
                        if self.score(chunk, tile, &keys, &scratch.query, key, key, &mut scoring).is_none() {
                            scoring.scores[..n * tile.width].fill(f32::NEG_INFINITY);
                        }
                    }
                }
                if stage == ScoreStage::Probs {
                    let of_row = &mut scratch.rescale;
                    for r in 0..tile.rows {
                        let [b, h, i] = plan.map.place(chunk, tile.first_row + r);
                        of_row[r] = lse[(b * problem.q_heads() + h) * problem.q_len() + i];
                    }
                    simd::exp_all(level, tile.vectors, n, &mut scratch.scores, of_row);
                }
                for r in 0..tile.rows {
                    let row = &mut out.row(tile.first_row + r)[keys.clone()];
                    for (j, x) in row.iter_mut().enumerate() {
                        *x = scratch.scores[j * tile.width + r];
                    }
                }
            }
        }
    }
}

/// What a row's sums are to be multiplied by, and its log-sum-exp. The sink, a score without a value, comes in here and
/// not before, so that a row without keys stays one that can be told: zeros, and the sink itself.
fn row_end(row_max: f32, row_sum: f32, sink: f32) -> (f32, f32) {
    if row_sum == 0.0 {
        return (0.0, sink);
    }
    if sink == f32::NEG_INFINITY {
        return (1.0 / row_sum, row_max + row_sum.ln());
    }
    let top = row_max.max(sink);
    let rescale = (row_max - top).exp();
    let total = row_sum * rescale + (sink - top).exp();
    (rescale / total, top + total.ln())
}
