//! What is known of the rows of a chunk before their scores: queries, gradients of outputs, maxima, sums and deltas.

use super::task::{Backward, row_of, tile_rows};
use super::workspace::Workspace;
use crate::cpu::fused::plan::CpuStrategy;
use crate::cpu::fused::rows;
use crate::cpu::fused::task::NONE;
use crate::cpu::simd;

impl Backward<'_> {
    /// Puts everything in place that is known of the rows of a chunk before their scores.
    pub(super) fn load(&self, chunk: usize, work: &mut Workspace) {
        let (job, spec) = (self.job(), self.problem.spec());
        let (plan, forward, level) = (job.plan, self.problem.forward(), job.plan.level());
        let (dim, v_dim) = (forward.head_dim(), forward.v_head_dim());
        let of = plan.map.chunk(chunk);
        job.load(chunk, &mut work.scores);
        work.fresh.fill(true);
        let d_output = (&spec.d_output, self.inputs.d_output);
        let output = (&spec.attention.output, self.inputs.output);
        for tile in job.tiles(chunk) {
            let places = |r| plan.map.place_in(of, tile.first_row + r);
            let (lines, at) = (&mut work.scores.lines, tile.number * plan.tile_rows);
            if rows::rows_in_place(d_output.0, d_output.1, places, tile.rows).is_none() {
                let copied = &mut work.d_output_rows[tile.first_row * v_dim..];
                rows::copy_rows(d_output.0, d_output.1, places, tile.rows, copied);
            }
            let delta = &mut work.delta[at..];
            if self.few() {
                // in the order in which the products with the values are summed
                let of_d = tile_rows(d_output.0, d_output.1, places, tile, &work.d_output_rows);
                for r in 0..tile.rows {
                    let place = |_| places(r);
                    let of_o = rows::rows_of(output.0, output.1, place, 1, &mut work.output);
                    simd::products(level, of_d.from(r), 1, of_o, 1, v_dim, 1.0, &mut delta[r..], 1, NONE);
                }
            } else {
                if plan.strategy() != CpuStrategy::HandfulOfKeys {
                    job.load_tile(chunk, tile, &mut work.scores.query, lines);
                }
                let queries = &forward.spec().query;
                if rows::rows_in_place(queries, job.inputs.query, places, tile.rows).is_none() {
                    let copied = &mut work.query_rows[tile.first_row * dim..];
                    rows::copy_rows(queries, job.inputs.query, places, tile.rows, copied);
                }
                let turned = &mut work.d_output[at * v_dim..];
                rows::turn_rows(level, d_output.0, d_output.1, places, tile.rows, tile.width, turned, lines);
                rows::turn_rows(level, output.0, output.1, places, tile.rows, tile.width, &mut work.output, lines);
                simd::lane_dots(level, tile.vectors, turned, &work.output, v_dim, delta);
            }
            let row_state = self.inputs.row_state;
            for (r, delta) in delta.iter_mut().enumerate().take(tile.width) {
                if r >= tile.rows {
                    (*delta, work.shift[at + r], work.by[at + r]) = (0.0, 0.0, 0.0);
                    continue;
                }
                let place = places(r);
                let row = row_of(forward, place);
                let (max, sum) = (row_state.row_max[row], row_state.row_sum[row]);
                let no_mass = max == f32::NEG_INFINITY || sum == 0.0;
                (work.shift[at + r], work.by[at + r]) = if no_mass { (0.0, 0.0) } else { (max, 1.0 / sum) };
                if !delta.is_finite() {
                    *delta = self.careful_delta(place);
                }
                if let Some(d_lse) = self.inputs.d_lse {
                    *delta -= d_lse[row];
                }
            }
        }
    }

    /// The product of an output row with its gradient, without what an output of exactly 0 is multiplied by: a row that sees no key
    /// has such an output, and its gradient may be anything.
    fn careful_delta(&self, place: [usize; 3]) -> f32 {
        let (spec, [b, h, i]) = (self.problem.spec(), place);
        let (d, o) = (&spec.d_output.layout, &spec.attention.output.layout);
        let of = |at| [b, h, i, at];
        let columns = 0..self.problem.forward().v_head_dim();
        let pairs = columns.map(|c| (self.inputs.d_output.get(d.index(of(c))), self.inputs.output.get(o.index(of(c)))));
        pairs.filter(|(_, o)| *o != 0.0).map(|(d, o)| d * o).sum()
    }

    /// Whether nothing of a chunk's queries and gradients of outputs is infinite or NaN.
    pub(super) fn rows_are_finite(&self, chunk: usize, work: &Workspace) -> bool {
        let (job, forward) = (self.job(), self.problem.forward());
        let (level, of) = (job.plan.level(), job.plan.map.chunk(chunk));
        let (d_output, query) = (&self.problem.spec().d_output, &forward.spec().query);
        job.tiles(chunk).all(|tile| {
            let places = |r| job.plan.map.place_in(of, tile.first_row + r);
            let d_output = tile_rows(d_output, self.inputs.d_output, places, tile, &work.d_output_rows);
            let copied = if self.few() { &work.scores.query } else { &work.query_rows };
            let query = tile_rows(query, job.inputs.query, places, tile, copied);
            simd::all_finite(level, d_output, tile.rows, forward.v_head_dim())
                && simd::all_finite(level, query, tile.rows, forward.head_dim())
        })
    }
}
