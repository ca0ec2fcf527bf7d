//! A handful of keys: the scores of a tile, its weights and its finished rows, from the queries where they lie to the output
//! where it lies.

use crate::cpu::simd::shared::{Fresh, TensorRows, Unit, writer};
use crate::cpu::simd::{self, RowState};

use super::Store;
use super::not_finite::{add_rest, clean};
use super::rows;
use super::score::scoring;
use super::scratch::Scratch;
use super::stages::RowEnd;
use super::task::{Job, NONE, union};

impl Job<'_> {
    /// Computes and stores the rows of a chunk. All keys are one block, so there is nothing to carry from one to the next.
    pub(super) fn handful<T: Store>(
        &self,
        chunk: usize,
        scratch: &mut Scratch,
        output: &mut Unit<'_, '_, T, TensorRows>,
        mut ends: Option<Unit<'_, '_, RowEnd, TensorRows>>,
    ) {
        let Self { plan, problem, inputs } = *self;
        let (level, v_dim) = (plan.level(), problem.v_head_dim());
        let (kv_head, rows) = (plan.map.kv_head(chunk), plan.map.rows(chunk));
        rows::fill_keys(problem, inputs, &plan.map, chunk, &mut scratch.keys[..rows]);
        let [start, end] = union(&scratch.keys[..rows]);
        let [mut key, mut value] = [NONE; 2];
        if start < end {
            key = rows::block(level, &inputs.keys(problem), kv_head, start..end, &mut scratch.key_block);
            value = rows::block(level, &inputs.values(problem), kv_head, start..end, &mut scratch.value_block);
        }
        let mut finite = None;
        for tile in self.tiles(chunk) {
            // no cache holds where the rows go
            output.ask_for(level, tile.first_row, tile.rows);
            let [first, last] = union(&scratch.keys[tile.first_row..][..tile.rows]);
            let (keys, n) = (first..last, last - first);
            let (key, value_of) = (key.from(first.saturating_sub(start)), value.from(first.saturating_sub(start)));
            let (max, sum) = (&mut scratch.row_max[..tile.width], &mut scratch.row_sum[..tile.width]);
            max.fill(f32::NEG_INFINITY);
            sum.fill(0.0);
            let mut scoring = scoring!(scratch, self.scale());
            let query = self.query(chunk, tile, &mut scratch.query);
            let full = match n {
                0 => None,
                _ => self.score(chunk, tile, &keys, query, key, NONE, &mut scoring),
            };
            if full.is_some() {
                let state = RowState { max: &mut *max, sum: &mut *sum, rescale: &mut scratch.rescale, fresh: true };
                simd::soften(level, tile.vectors, tile.rows, n, scoring.scores, state, plan.exponents);
            }
            let factors = &mut scratch.rescale[..tile.rows];
            self.factors(chunk, tile, max, sum, factors, &mut ends);
            let sums = &sum[..tile.rows];
            let weights: &[f32] = scoring.scores;
            // of the whole block, once for all tiles
            let hidden = full == Some(false)
                && !*finite.get_or_insert_with(|| simd::all_finite(level, value, end - start, v_dim));
            let of_keys = if full.is_some() { n } else { 0 };
            let weigh = writer(|out| {
                let rows =
                    simd::weigh_rows(level, weights, tile.width, tile.rows, value_of, of_keys, v_dim, factors, out);
                // a row that saw no mass; a NaN that it saw all the same has no weight
                for (line, _) in rows.chunks_exact_mut(v_dim).zip(sums).filter(|(_, sum)| **sum == 0.0) {
                    line.fill(0.0);
                }
                rows
            });
            if !hidden && T::fill(output, tile.first_row, tile.rows, weigh) {
                continue;
            }
            let acc = &mut scratch.acc[..tile.rows * v_dim];
            if hidden {
                let ones = &mut scoring.low[..tile.rows];
                ones.fill(1.0);
                let cleaned = clean(value_of, n, v_dim, &mut scratch.clean_block);
                simd::weigh_rows(level, weights, tile.width, tile.rows, cleaned, n, v_dim, ones, Fresh::of(acc));
                let seen = |r: usize, j: usize| {
                    let [start, end] = scoring.keys[tile.first_row + r];
                    let place = plan.map.place(chunk, tile.first_row + r);
                    (start..end).contains(&(first + j)) && self.allows(place, first + j)
                };
                let weights = (weights, [tile.width, 1]);
                add_rest(value_of, n, v_dim, weights, tile.rows, seen, acc, [v_dim, 1]);
                for ((line, &factor), &sum) in acc.chunks_exact_mut(v_dim).zip(&*factors).zip(sums) {
                    line.iter_mut().for_each(|x| *x = if sum == 0.0 { 0.0 } else { *x * factor });
                }
            } else {
                weigh(Fresh::of(acc));
            }
            for (r, line) in acc.chunks_exact(v_dim).take(tile.rows).enumerate() {
                T::store(line, output.row(tile.first_row + r));
            }
        }
    }
}
