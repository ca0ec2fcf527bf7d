//! One task: rows of one or more groups against keys, chunk by chunk and block by block.

use std::ops::Range;

use super::chosen::{Chosen, Line};
use super::narrow;
use super::plan::BackwardPlan;
use crate::backward::{BackwardInputs, BackwardProblem};
use crate::cpu::fused::plan::CpuStrategy;
use crate::cpu::fused::rows;
use crate::cpu::fused::scratch::{Buffer, Scratch};
use crate::cpu::fused::task::{Job, NONE, Scoring, Tile, clean, scoring, union};
use crate::cpu::simd::shared::Fresh;
use crate::cpu::simd::{self, RowsBefore, Strided};
use crate::problem::AttentionProblem;
use crate::tensor::{TensorRef, TensorSpec};

/// What is computed, by which plan, from what.
#[derive(Clone, Copy)]
pub(super) struct Backward<'a> {
    pub(super) plan: &'a BackwardPlan,
    pub(super) problem: &'a BackwardProblem,
    pub(super) inputs: &'a BackwardInputs<'a>,
    pub(super) chosen: Option<&'a Chosen>,
}

/// What a task adds up of its keys: rows of `keys`, side by side.
pub(super) struct KeySums<'a> {
    pub(super) d_key: Option<&'a mut [f32]>,
    pub(super) d_value: Option<&'a mut [f32]>,
}

/// What else a task adds up.
pub(super) struct OtherSums<'a> {
    /// `[heads, q_len, keys]`, see [`BiasSlab`](super::plan::BiasSlab); for all of the task's groups.
    pub(super) d_bias: Option<&'a mut [f32]>,
    /// Of each head of the group.
    pub(super) d_slopes: Option<&'a mut [f64]>,
    /// The same.
    pub(super) d_sinks: Option<&'a mut [f64]>,
    /// One number, for all of the task's groups.
    pub(super) d_scale: Option<&'a mut [f64]>,
}

/// Which rows and keys a call is about.
#[derive(Clone, Copy)]
pub(super) struct Share {
    pub(super) chunk: usize,
    /// First and one past the last of the task's keys.
    pub(super) keys: [usize; 2],
    /// Whether the sums of keys hold nothing yet.
    pub(super) first: bool,
    /// Whether other tasks have the same rows, and take care of what is a row's alone.
    pub(super) first_keys: bool,
}

/// Workspace of a task.
#[derive(Debug)]
pub(super) struct Workspace {
    pub(super) scores: Scratch,
    /// `[tile][head_dim][row]`; with few queries `[row][head_dim, padded]`.
    pub(super) d_query: Buffer,
    /// `[tile][v_head_dim][row]`.
    d_output: Buffer,
    /// Rows of query and of the gradient of the output that are not read where they lie, `[chunk row][columns]`.
    query_rows: Buffer,
    d_output_rows: Buffer,
    /// One tile of the output, as `d_output`.
    output: Buffer,
    /// `[key][row]`: products of values and the gradient of the output, then the gradient of the scores.
    products: Buffer,
    /// The same of dot products, before the softcap.
    dots: Buffer,
    /// The same of the gradient of chosen weights.
    chosen: Buffer,
    /// `[tile][row]`.
    delta: Buffer,
    shift: Buffer,
    by: Buffer,
    /// One for each row of a tile.
    ones: Buffer,
    /// A vector of rows of the gradient of the queries.
    lines: Buffer,
    /// A block of keys, and the rows of a tile, without what is not finite.
    clean_key: Buffer,
    clean_query: Buffer,
    clean_d_output: Buffer,
    /// `[tile]`: whether anything was added to the gradient of its queries.
    fresh: Vec<bool>,
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

/// Rows of a tile where they lie, or as they were copied.
fn tile_rows<'a>(
    tensor: &TensorSpec,
    data: TensorRef<'a>,
    places: impl Fn(usize) -> [usize; 3],
    tile: Tile,
    copied: &'a [f32],
) -> Strided<'a> {
    let width = tensor.layout.shape[3];
    rows::rows_in_place(tensor, data, places, tile.rows)
        .unwrap_or_else(|| Strided { data: &copied[tile.first_row * width..], stride: width })
}

impl<'a> Backward<'a> {
    pub(super) fn job(&self) -> Job<'a> {
        Job { plan: &self.plan.scores, problem: self.problem.forward(), inputs: &self.inputs.attention }
    }

    fn few(&self) -> bool {
        self.plan.scores.strategy() == CpuStrategy::FewQueries
    }

    /// Puts everything in place that is known of the rows of a chunk before their scores.
    fn load(&self, chunk: usize, work: &mut Workspace) {
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
                job.load_tile(chunk, tile, &mut work.scores.query, lines);
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
    fn rows_are_finite(&self, chunk: usize, work: &Workspace) -> bool {
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

    /// Computes a share of rows and keys: adds to the sums of the keys and to all others, and leaves the gradient of the queries
    /// in the workspace.
    pub(super) fn compute(
        &self,
        share: Share,
        sums: &mut KeySums<'_>,
        others: &mut OtherSums<'_>,
        work: &mut Workspace,
    ) {
        let (job, forward) = (self.job(), self.problem.forward());
        let (plan, level, chunk) = (job.plan, job.plan.level(), share.chunk);
        let (dim, v_dim) = (forward.head_dim(), forward.v_head_dim());
        let padded = dim.next_multiple_of(level.lanes());
        self.load(chunk, work);
        if self.few() {
            work.d_query.fill(0.0);
        }
        let careful = rows::may_hide(forward) && !self.rows_are_finite(chunk, work);
        if let Some(chosen) = self.chosen {
            self.add_chosen(chosen, chunk, work);
        }
        if let Some(d_sinks) = others.d_sinks.as_deref_mut().filter(|_| share.first_keys) {
            self.add_sinks(chunk, work, d_sinks);
        }
        let (all_keys, all_values) = (job.inputs.keys(forward), job.inputs.values(forward));
        let in_place = [all_keys.data, all_values.data].iter().all(|data| matches!(data, TensorRef::F32(_)));
        let kv_head = plan.map.kv_head(chunk);
        let of = plan.map.chunk(chunk);
        let [start, end] = share.keys;
        let spec = self.problem.spec();
        let asked = Asked::new(self.problem);
        let Workspace { scores: scratch, d_query, d_output, query_rows, d_output_rows, products, fresh, .. } = work;
        let Workspace { dots, chosen: weights, delta, shift, by, clean_key, clean_query, clean_d_output, .. } = work;
        for at in (start..end).step_by(plan.block_kv) {
            let block = at..(at + plan.block_kv).min(end);
            let key = rows::block(level, &all_keys, kv_head, block.clone(), &mut scratch.key_block);
            let value = rows::block(level, &all_values, kv_head, block.clone(), &mut scratch.value_block);
            let part = |width: usize| (at - start) * width..(block.end - start) * width;
            let mut d_key = sums.d_key.as_deref_mut().map(|d_key| &mut d_key[part(dim)]);
            let mut d_value = sums.d_value.as_deref_mut().map(|d_value| &mut d_value[part(v_dim)]);
            let mut empty = share.first;
            let mut finite = None;
            for tile in job.tiles(chunk) {
                let row_keys = &scratch.keys[tile.first_row..][..tile.rows];
                let seen = union(row_keys);
                let keys = seen[0].max(block.start)..seen[1].min(block.end);
                if keys.is_empty() {
                    continue;
                }
                let (n, skip) = (keys.len(), keys.start - block.start);
                let (of_block, key, value) = (key, key.from(skip), value.from(skip));
                let places = |r| plan.map.place_in(of, tile.first_row + r);
                let d_rows = tile_rows(&spec.d_output, self.inputs.d_output, places, tile, d_output_rows);
                let lines = asked.in_lines && self.few() && row_keys.iter().all(|seen| *seen == row_keys[0]);
                let of_tile = tile.number * plan.tile_rows;
                let rows_before = RowsBefore { shift: &shift[of_tile..], by: &by[of_tile..], delta: &delta[of_tile..] };
                let query = job.query(chunk, tile, &mut scratch.query);
                // what comes next is asked for by the first tile, on behalf of all
                let ask_for = |rows| if tile.number == 0 && in_place { rows } else { NONE };
                let mut scoring = scoring!(scratch, job.scale());
                let factor = if plan.exponents.factor.is_some() { forward.scale() } else { 1.0 };
                let steps = if lines { [1, plan.block_kv] } else { [tile.width, 1] };
                let full = if lines {
                    let (scores, width) = (&mut *scoring.scores, plan.block_kv);
                    simd::products(level, query, tile.rows, key, n, dim, job.scale(), scores, width, NONE);
                    simd::products(level, d_rows, tile.rows, value, n, v_dim, 1.0, products, width, NONE);
                    simd::differentiate_lines(
                        level,
                        tile.rows,
                        n,
                        scores,
                        products,
                        width,
                        rows_before,
                        factor,
                        forward.scale(),
                    );
                    true
                } else {
                    if asked.dots {
                        let mut raw = Scoring { scores: dots, scale: 1.0, ..scoring.again() };
                        job.dots(tile, query, key, n, NONE, &mut raw);
                    }
                    let next = ask_for(key.from(n));
                    let seen = job.score(chunk, tile, &keys, query, key, ask_for(value), &mut scoring);
                    let Some(full) = seen else { continue };
                    if self.few() {
                        simd::dots(level, d_rows, tile.rows, value, n, v_dim, 1.0, products, tile.width, NONE);
                    } else {
                        let d_output = &d_output[of_tile * v_dim..];
                        simd::scores(level, tile.vectors, d_output, value, n, v_dim, 1.0, products, next);
                    }
                    let len = n * tile.width;
                    if let Some(chosen) = self.chosen
                        && self.fill_chosen(chosen, tile, places, &keys, weights)
                    {
                        products[..len].iter_mut().zip(&weights[..len]).for_each(|(x, d)| *x += d);
                    }
                    let scale = if asked.at_once { forward.scale() } else { 1.0 };
                    let scores = &mut *scoring.scores;
                    simd::differentiate(level, tile.vectors, n, scores, products, rows_before, factor, scale);
                    if !asked.at_once {
                        self.add_terms(tile, places, &keys, start, products, others);
                        let gradients = &mut products[..len];
                        if let Some(cap) = spec.attention.softcap {
                            simd::uncap(level, gradients, &dots[..len], forward.scale() / cap, 1.0);
                        }
                        if let Some(d_scale) = others.d_scale.as_deref_mut() {
                            let rows = gradients.chunks_exact(tile.width).zip(dots.chunks_exact(tile.width));
                            let pairs = rows.flat_map(|(d, dot)| d.iter().zip(dot).take(tile.rows));
                            let seen = pairs.filter(|(d, _)| **d != 0.0);
                            d_scale[0] += seen.map(|(&d, &dot)| f64::from(d) * f64::from(dot)).sum::<f64>();
                        }
                        gradients.iter_mut().for_each(|x| *x *= forward.scale());
                    }
                    full
                };
                // of the whole block, once for all tiles
                let of_keys = || simd::all_finite(level, of_block, block.len(), dim);
                let hidden = !full && (careful || !*finite.get_or_insert_with(of_keys));
                let queries = if self.few() {
                    query
                } else {
                    tile_rows(&forward.spec().query, job.inputs.query, places, tile, query_rows)
                };
                let whole = n == block.len();
                if empty && !whole {
                    d_key.iter_mut().chain(&mut d_value).for_each(|sums| sums.fill(0.0));
                }
                let first = empty && whole;
                empty = false;
                let (weights, gradients): (&[f32], &[f32]) = (scoring.scores, products);
                // zeros in the places of what is not finite: 0 * NaN would carry it to what must not see it
                let [mut key_of, mut queries_of, mut d_rows_of] = [key, queries, d_rows];
                if hidden {
                    key_of = clean(key, n, dim, clean_key);
                    queries_of = clean(queries, tile.rows, dim, clean_query);
                    d_rows_of = clean(d_rows, tile.rows, v_dim, clean_d_output);
                }
                if let Some(d_value) = &mut d_value {
                    let to = &mut d_value[skip * v_dim..];
                    simd::outer(level, weights, steps, d_rows_of, tile.rows, n, v_dim, to, first);
                }
                if let Some(d_key) = &mut d_key {
                    let to = &mut d_key[skip * dim..];
                    simd::outer(level, gradients, steps, queries_of, tile.rows, n, dim, to, first);
                }
                if asked.d_query && self.few() {
                    simd::weigh(level, gradients, steps, tile.rows, key_of, n, dim, d_query, padded);
                } else if asked.d_query {
                    let fresh = std::mem::replace(&mut fresh[tile.number], false);
                    let to = &mut d_query[of_tile * dim..];
                    simd::accumulate(level, tile.vectors, gradients, key_of, n, dim, to, fresh, NONE);
                }
                if !hidden {
                    continue;
                }
                // what was left out, to those that see it; slow, and rare
                let seen = |r: usize, j: usize| {
                    let [start, end] = scoring.keys[tile.first_row + r];
                    (start..end).contains(&(keys.start + j)) && job.allows(places(r), keys.start + j)
                };
                let not_finite = |row: &[f32]| row.iter().any(|x| !x.is_finite());
                for (r, j) in (0..tile.rows).flat_map(|r| (0..n).map(move |j| (r, j))) {
                    let key = &key.data[j * key.stride..][..dim];
                    let query = &queries.data[r * queries.stride..][..dim];
                    let d_row = &d_rows.data[r * d_rows.stride..][..v_dim];
                    if ![key, query, d_row].into_iter().any(not_finite) || !seen(r, j) {
                        continue;
                    }
                    let at = j * steps[0] + r * steps[1];
                    let (weight, gradient) = (weights[at], gradients[at]);
                    if let Some(d_value) = &mut d_value {
                        add_not_finite(&mut d_value[(skip + j) * v_dim..][..v_dim], weight, d_row);
                    }
                    if let Some(d_key) = &mut d_key {
                        add_not_finite(&mut d_key[(skip + j) * dim..][..dim], gradient, query);
                    }
                    for (d, &k) in key.iter().enumerate().filter(|(_, k)| asked.d_query && !k.is_finite()) {
                        let to = if self.few() { r * padded + d } else { of_tile * dim + d * tile.width + r };
                        d_query[to] += gradient * k;
                    }
                }
            }
            if empty {
                d_key.iter_mut().chain(&mut d_value).for_each(|sums| sums.fill(0.0));
            }
        }
    }

    /// Gives the rows of a chunk's gradient of queries, one after another.
    pub(super) fn finish_query(&self, chunk: usize, work: &mut Workspace, mut put: impl FnMut(usize, &[f32])) {
        let job = self.job();
        let (plan, dim, lanes) = (job.plan, self.problem.forward().head_dim(), job.plan.level().lanes());
        let Workspace { d_query, lines, ones, fresh, .. } = work;
        if self.few() {
            let padded = dim.next_multiple_of(lanes);
            (0..plan.map.rows(chunk)).for_each(|row| put(row, &d_query[row * padded..][..dim]));
            return;
        }
        for tile in job.tiles(chunk) {
            let acc = &d_query[tile.number * plan.tile_rows * dim..];
            for first in (0..tile.rows).step_by(lanes) {
                let lines = &mut lines[..lanes * dim];
                if fresh[tile.number] {
                    lines.fill(0.0);
                } else {
                    simd::turn_out(plan.level(), acc, tile.width, first, dim, ones, Fresh::of(lines));
                }
                for (r, line) in lines.chunks_exact(dim).take(lanes.min(tile.rows - first)).enumerate() {
                    put(tile.first_row + first + r, line);
                }
            }
        }
    }

    /// Adds the gradients of the scores, softcap not taken back, to those of bias and slopes.
    fn add_terms(
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
    fn add_sinks(&self, chunk: usize, work: &Workspace, d_sinks: &mut [f64]) {
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

    /// The gradient of chosen weights of a tile and some keys, `[key][row]`. Whether there is any.
    fn fill_chosen(
        &self,
        chosen: &Chosen,
        tile: Tile,
        places: impl Fn(usize) -> [usize; 3],
        keys: &Range<usize>,
        out: &mut [f32],
    ) -> bool {
        let given = self.inputs.d_weights.unwrap_or_default();
        if !chosen.has_keys(keys) || !(0..tile.rows).any(|r| chosen.has(places(r))) {
            return false;
        }
        out[..keys.len() * tile.width].fill(0.0);
        for r in 0..tile.rows {
            chosen.add(given, places(r), keys, &mut Line { out: &mut out[r..], stride: tile.width });
        }
        true
    }

    /// Adds to the delta of each row what its chosen weights are times their gradients: a pass over their keys before all others.
    fn add_chosen(&self, chosen: &Chosen, chunk: usize, work: &mut Workspace) {
        let (job, forward) = (self.job(), self.problem.forward());
        let (plan, level) = (job.plan, job.plan.level());
        let (all_keys, kv_head) = (job.inputs.keys(forward), plan.map.kv_head(chunk));
        let of = plan.map.chunk(chunk);
        let Workspace { scores: scratch, products, delta, shift, by, .. } = work;
        for start in (0..forward.kv_len()).step_by(plan.block_kv) {
            let block = start..(start + plan.block_kv).min(forward.kv_len());
            if !chosen.has_keys(&block) {
                continue;
            }
            let key = rows::block(level, &all_keys, kv_head, block.clone(), &mut scratch.key_block);
            for tile in job.tiles(chunk) {
                let places = |r| plan.map.place_in(of, tile.first_row + r);
                let seen = union(&scratch.keys[tile.first_row..][..tile.rows]);
                let keys = seen[0].max(block.start)..seen[1].min(block.end);
                if keys.is_empty() || !self.fill_chosen(chosen, tile, places, &keys, products) {
                    continue;
                }
                let query = job.query(chunk, tile, &mut scratch.query);
                let mut scoring = scoring!(scratch, job.scale());
                let key = key.from(keys.start - block.start);
                if job.score(chunk, tile, &keys, query, key, NONE, &mut scoring).is_none() {
                    continue;
                }
                let at = tile.number * plan.tile_rows;
                let factor = if plan.exponents.factor.is_some() { forward.scale() } else { 1.0 };
                let zeros = [0.0; MAX_WIDTH];
                let before = RowsBefore { shift: &shift[at..], by: &by[at..], delta: &zeros };
                let n = keys.len();
                simd::differentiate(level, tile.vectors, n, scoring.scores, products, before, factor, 1.0);
                for (r, delta) in delta[at..].iter_mut().take(tile.rows).enumerate() {
                    *delta += products.iter().skip(r).step_by(tile.width).take(n).sum::<f32>();
                }
            }
        }
    }
}

/// Rows of a tile at most: four vectors of 16 lanes.
const MAX_WIDTH: usize = 64;

/// What the gradients that are asked for need of a block.
struct Asked {
    d_query: bool,
    /// The products of queries and keys themselves.
    dots: bool,
    /// Whether the gradient of a score is only used times the scale.
    at_once: bool,
    /// Whether scores of few queries may stand as `[row][key]`.
    in_lines: bool,
}

impl Asked {
    fn new(problem: &BackwardProblem) -> Self {
        let spec = problem.spec();
        let attention = &spec.attention;
        let dots = attention.softcap.is_some() || spec.d_scale;
        let at_once = !dots && spec.d_bias.is_none() && !spec.d_alibi_slopes;
        let bare = attention.mask.is_none() && attention.bias.is_none() && attention.alibi_slopes.is_none();
        Self {
            d_query: spec.d_query.is_some(),
            dots,
            at_once,
            in_lines: at_once && bare && problem.weights().is_none(),
        }
    }
}

/// Adds the elements of a row that [`clean`] left out.
fn add_not_finite(to: &mut [f32], by: f32, row: &[f32]) {
    to.iter_mut().zip(row).filter(|(_, x)| !x.is_finite()).for_each(|(to, x)| *to += by * x);
}

fn row_of(problem: &AttentionProblem, [b, h, i]: [usize; 3]) -> usize {
    (b * problem.q_heads() + h) * problem.q_len() + i
}
