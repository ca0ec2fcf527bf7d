//! The gradients of what goes into scores beside dot products: bias, slopes, sinks.

use std::ops::Range;

use super::narrow;
use super::task::{Backward, OtherSums, row_of};
use super::workspace::Workspace;
use crate::cpu::fused::task::Tile;

impl Backward<'_> {
    /// Adds the gradients of the scores, softcap not taken back, to those of bias and slopes.
    pub(super) fn add_terms(
        &self,
        tile: Tile,
        places: impl Fn(usize) -> [usize; 3],
        keys: &Range<usize>,
        first_key: usize,
        gradients: &[f32],
        others: &mut OtherSums<'_>,
    ) {
        let (forward, inputs) = (self.problem.forward(), &self.inputs.attention);
        let of_row = |r: usize| gradients.iter().skip(r).step_by(tile.width).take(keys.len());
        if let (Some(d_bias), Some(slab)) = (others.d_bias.as_deref_mut(), self.plan.bias) {
            let [heads, rows, columns] = slab.shape;
            for r in 0..tile.rows {
                let [_, h, i] = places(r);
                let (head, row) = (if heads == 1 { 0 } else { h % heads }, if rows == 1 { 0 } else { i });
                let line = &mut d_bias[(head * rows + row) * columns..][..columns];
                if columns == 1 && forward.kv_len() > 1 {
                    line[0] += narrow(of_row(r).map(|&d| f64::from(d)).sum());
                } else {
                    let line = &mut line[keys.start - first_key..];
                    line.iter_mut().zip(of_row(r)).for_each(|(x, d)| *x += d);
                }
            }
        }
        if let Some(d_slopes) = others.d_slopes.as_deref_mut() {
            for r in 0..tile.rows {
                let [b, h, i] = places(r);
                let diagonal = inputs.diagonal(forward, b, i) - keys.start as i64;
                let of_key = |(j, &d): (usize, &f32)| f64::from(d) * (diagonal - j as i64).abs() as f64;
                d_slopes[self.head_of_group([b, h])] -= of_row(r).enumerate().map(of_key).sum::<f64>();
            }
        }
    }

    /// Which of its group's heads a head is.
    fn head_of_group(&self, [b, h]: [usize; 2]) -> usize {
        let group_size = self.problem.forward().group_size();
        let entry = if self.plan.scores.map.is_one_context() { b } else { 0 };
        entry * group_size + h % group_size
    }

    /// Adds what the rows of a chunk give to the sinks.
    pub(super) fn add_sinks(&self, chunk: usize, work: &Workspace, d_sinks: &mut [f64]) {
        let job = self.job();
        let forward = self.problem.forward();
        for tile in job.tiles(chunk) {
            for r in 0..tile.rows {
                let place = job.plan.map.place(chunk, tile.first_row + r);
                let sink = job.inputs.sink(forward, place);
                let row = row_of(forward, place);
                let (max, sum) = (self.inputs.row_state.row_max[row], self.inputs.row_state.row_sum[row]);
                if sink == f32::NEG_INFINITY || sum == 0.0 {
                    continue;
                }
                // a row that sees no key has its sink for a maximum, whatever that is
                let alone = sum.to_bits() == 1f32.to_bits() && sink.to_bits() == max.to_bits();
                let weight = if alone { 1.0 } else { (f64::from(sink) - f64::from(max)).exp() / f64::from(sum) };
                let delta = work.delta[tile.number * job.plan.tile_rows + r];
                d_sinks[self.head_of_group([place[0], place[1]])] -= weight * f64::from(delta);
            }
        }
    }
}
