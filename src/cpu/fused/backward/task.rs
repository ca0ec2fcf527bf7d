//! One task: rows of one or more groups against keys, chunk by chunk and block by block.

use super::chosen::Chosen;
use super::plan::BackwardPlan;
use super::workspace::Workspace;
use crate::backward::{BackwardInputs, BackwardProblem};
use crate::cpu::fused::not_finite::{add_not_finite, clean};
use crate::cpu::fused::plan::CpuStrategy;
use crate::cpu::fused::rows;
use crate::cpu::fused::score::{Scoring, scoring};
use crate::cpu::fused::task::{Job, NONE, Tile, union};
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

/// Rows of a tile where they lie, or as they were copied.
pub(super) fn tile_rows<'a>(
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

    pub(super) fn few(&self) -> bool {
        self.plan.scores.strategy() == CpuStrategy::FewQueries
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
                            simd::uncap(level, gradients, &dots[..len], forward.scale(), cap);
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
}

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

pub(super) fn row_of(problem: &AttentionProblem, [b, h, i]: [usize; 3]) -> usize {
    (b * problem.q_heads() + h) * problem.q_len() + i
}
