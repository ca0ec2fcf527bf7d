//! What leaves a task: finished rows, and scores at the stage that the spec asks for.

use crate::cpu::simd;
use crate::cpu::simd::shared::{Fresh, TensorRows, Unit, writer};
use crate::problem::ScoreStage;

use super::Store;
use super::plan::CpuStrategy;
use super::rows::block;
use super::score::scoring;
use super::scratch::Scratch;
use super::task::{Job, Tile, union};

impl Job<'_> {
    /// Normalises the rows of a chunk, and stores them with what else is asked of them.
    pub(super) fn finish<T: Store>(
        &self,
        chunk: usize,
        scratch: &mut Scratch,
        output: &mut Unit<'_, '_, T, TensorRows>,
        mut ends: Option<Unit<'_, '_, RowEnd, TensorRows>>,
    ) {
        let (plan, dim) = (self.plan, self.problem.v_head_dim());
        for tile in self.tiles(chunk) {
            let at = tile.number * plan.tile_rows;
            let acc = &mut scratch.acc[at * dim..];
            if scratch.fresh[tile.number] {
                acc[..dim * tile.width].fill(0.0);
            }
            let (max, sum) = (&scratch.row_max[at..], &scratch.row_sum[at..]);
            self.factors(chunk, tile, max, sum, &mut scratch.rescale, &mut ends);
            let lanes = plan.level().lanes();
            for first in (0..tile.rows).step_by(lanes) {
                let n = lanes.min(tile.rows - first);
                // where the rows after the next go: no cache holds that yet
                let ahead = tile.first_row + first + 2 * lanes;
                let end = (ahead + lanes).min(plan.map.rows(chunk));
                if ahead < end {
                    output.ask_for(plan.level(), ahead, end - ahead);
                }
                let sums = &scratch.row_sum[at + first..][..n];
                let rescale = &scratch.rescale;
                let turn = writer(|rows| {
                    let rows = simd::turn_out(plan.level(), acc, tile.width, first, dim, rescale, rows);
                    // a row that saw no mass; a NaN that it saw all the same has no weight
                    for (line, _) in rows.chunks_exact_mut(dim).zip(sums).filter(|(_, sum)| **sum == 0.0) {
                        line.fill(0.0);
                    }
                    rows
                });
                let row = tile.first_row + first;
                if n == lanes && T::fill(output, row, n, turn) {
                    continue;
                }
                turn(Fresh::of(&mut scratch.lines[..lanes * dim]));
                for (r, line) in scratch.lines.chunks_exact(dim).take(n).enumerate() {
                    T::store(line, output.row(row + r));
                }
            }
        }
    }

    /// What the sums of values of the rows of a tile are to be multiplied by, from their maxima and sums of weights; stores
    /// how they ended.
    pub(super) fn factors(
        &self,
        chunk: usize,
        tile: Tile,
        max: &[f32],
        sum: &[f32],
        factors: &mut [f32],
        ends: &mut Option<Unit<'_, '_, RowEnd, TensorRows>>,
    ) {
        let rows = max.iter().zip(sum).zip(factors).take(tile.rows);
        if self.inputs.terms.sinks.is_none() && ends.is_none() {
            rows.for_each(|((_, &sum), factor)| *factor = if sum == 0.0 { 0.0 } else { 1.0 / sum });
            return;
        }
        let (map, unit, to_natural) = (&self.plan.map, self.plan.exponents.unit, f64::from(self.natural()));
        let of = map.chunk(chunk);
        for (r, ((&max, &sum), factor)) in rows.enumerate() {
            let sink = self.inputs.sink(self.problem, map.place_in(of, tile.first_row + r));
            let end = RowEnd::new(max, to_natural, sum, unit, sink);
            *factor = end.factor;
            if let Some(ends) = ends {
                ends.row(tile.first_row + r)[0] = end;
            }
        }
    }

    /// Computes the scores of a chunk once more, and stores them.
    pub(super) fn stage(
        &self,
        stage: ScoreStage,
        chunk: usize,
        scratch: &mut Scratch,
        ends: &[RowEnd],
        mut out: Unit<'_, '_, f32, TensorRows>,
    ) {
        let (plan, problem, inputs) = (self.plan, self.problem, self.inputs);
        self.load(chunk, scratch);
        if matches!(plan.strategy(), CpuStrategy::ManyQueries | CpuStrategy::FewKeys) {
            for tile in self.tiles(chunk) {
                self.load_tile(chunk, tile, &mut scratch.query, &mut scratch.lines);
            }
        }
        let (level, kv_head) = (plan.level(), plan.map.kv_head(chunk));
        let all_keys = inputs.keys(problem);
        for start in (0..problem.kv_len()).step_by(plan.block_kv) {
            let keys = start..(start + plan.block_kv).min(problem.kv_len());
            let seen = union(&scratch.keys[..plan.map.rows(chunk)]);
            // scores before the masks are those of all keys; of others those that no row may see are not looked at
            let raw = matches!(stage, ScoreStage::Scaled | ScoreStage::Capped);
            if !raw && (seen[0].max(keys.start) >= seen[1].min(keys.end)) {
                let nothing = if stage == ScoreStage::Probs { 0.0 } else { f32::NEG_INFINITY };
                (0..plan.map.rows(chunk)).for_each(|row| out.row(row)[keys.clone()].fill(nothing));
                continue;
            }
            let key = block(level, &all_keys, kv_head, keys.clone(), &mut scratch.key_block);
            for tile in self.tiles(chunk) {
                let n = keys.len();
                let query = self.query(chunk, tile, &mut scratch.query);
                // probabilities are those of the output, from the same scores
                let mut scoring =
                    scoring!(scratch, if stage == ScoreStage::Probs { self.scale() } else { problem.scale() });
                match stage {
                    ScoreStage::Scaled | ScoreStage::Capped => {
                        self.dots(tile, query, key, n, key, &mut scoring);
                        if let (ScoreStage::Capped, Some(cap)) = (stage, problem.spec().softcap) {
                            simd::add_terms(level, tile.vectors, n, scoring.scores, cap, &[], false, &[], &[], &[]);
                        }
                    }
                    ScoreStage::Masked | ScoreStage::Probs => {
                        if self.score(chunk, tile, &keys, query, key, key, &mut scoring).is_none() {
                            scoring.scores[..n * tile.width].fill(f32::NEG_INFINITY);
                        }
                    }
                }
                if stage == ScoreStage::Probs {
                    let (shift, by) = (&mut scratch.low, &mut scratch.rescale);
                    for r in 0..tile.rows {
                        let [b, h, i] = plan.map.place(chunk, tile.first_row + r);
                        let end = &ends[(b * problem.q_heads() + h) * problem.q_len() + i];
                        (shift[r], by[r]) = (end.shift, end.factor * plan.exponents.unit);
                    }
                    simd::exp_all(level, tile.vectors, n, &mut scratch.scores, shift, by, plan.exponents);
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

/// How a row ended.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RowEnd {
    /// What its sums are to be multiplied by.
    pub(super) factor: f32,
    /// What was taken off its scores, in the units that they have in [`Job::attend`].
    pub(super) shift: f32,
    pub(super) lse: f32,
    /// As [`RowState`](crate::RowState) has them.
    pub(super) row_max: f32,
    pub(super) row_sum: f32,
}

impl RowEnd {
    /// The sink, a score without a value, comes in here and not before, so that a row without keys stays one that can be
    /// told: zeros, and the sink itself.
    #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
    fn new(max: f32, to_natural: f64, sum: f32, unit: f32, sink: f32) -> Self {
        if sum == 0.0 {
            let row_sum = if sink == f32::NEG_INFINITY { 0.0 } else { 1.0 };
            return Self { factor: 0.0, shift: 0.0, lse: sink, row_max: sink, row_sum };
        }
        // a product of two f32 is exact in f64
        let natural = f64::from(max) * to_natural;
        let (mut top, mut total, mut rescale) = (natural, sum, 1.0);
        if sink != f32::NEG_INFINITY {
            top = natural.max(f64::from(sink));
            rescale = ((natural - top) as f32).exp();
            total = sum * rescale + ((f64::from(sink) - top) as f32).exp() * unit;
        }
        let row_sum = total / unit;
        let row_max = if row_sum.is_nan() { f32::NAN } else { top as f32 };
        // what the maximum lost when it was rounded is in the sum: they are one number
        let lost = (top - f64::from(row_max)) as f32;
        Self {
            factor: rescale / total,
            shift: if max == f32::NEG_INFINITY { 0.0 } else { max },
            lse: (top + f64::from(row_sum.ln())) as f32,
            row_max,
            row_sum: if lost == 0.0 || row_max.is_infinite() { row_sum } else { row_sum * lost.exp() },
        }
    }
}
