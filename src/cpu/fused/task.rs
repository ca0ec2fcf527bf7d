//! One task: the rows of a chunk over one part of the keys, block by block.

use crate::cpu::simd::{self, RowState, Strided};
use crate::inputs::AttentionInputs;
use crate::problem::AttentionProblem;
use crate::tensor::TensorRef;

use super::not_finite::{add_rest, clean};
use super::plan::{CpuPlan, CpuStrategy};
use super::rows;
use super::score::scoring;
use super::scratch::{Scratch, borrowed};

/// No rows.
pub(super) const NONE: Strided<'static> = Strided { data: &[], stride: 0 };

/// What is computed, by which plan, from what.
#[derive(Clone, Copy)]
pub(super) struct Job<'a> {
    pub(super) plan: &'a CpuPlan,
    pub(super) problem: &'a AttentionProblem,
    pub(super) inputs: &'a AttentionInputs<'a>,
}

/// A tile of a chunk: where its rows are, and how many lanes they take.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub(super) number: usize,
    pub(super) first_row: usize,
    pub(super) rows: usize,
    pub(super) vectors: usize,
    pub(super) width: usize,
}

impl Job<'_> {
    pub(super) fn tiles(&self, chunk: usize) -> impl Iterator<Item = Tile> + use<> {
        let (rows, tile_rows, lanes) = (self.plan.map.rows(chunk), self.plan.tile_rows, self.plan.level().lanes());
        (0..rows.div_ceil(tile_rows)).map(move |number| {
            let first_row = number * tile_rows;
            let rows = tile_rows.min(rows - first_row);
            let vectors = rows.div_ceil(lanes);
            Tile { number, first_row, rows, vectors, width: vectors * lanes }
        })
    }

    pub(super) fn few(&self) -> bool {
        self.plan.strategy() == CpuStrategy::FewQueries
    }

    /// What a score or maximum of [`attend`](Self::attend) is to be multiplied by: where nothing but the scale goes into a
    /// score, it is the dot product itself.
    pub(super) fn natural(&self) -> f32 {
        if self.plan.exponents.factor.is_some() { self.problem.scale() } else { 1.0 }
    }

    /// What [`attend`](Self::attend) multiplies dot products by.
    pub(super) fn scale(&self) -> f32 {
        if self.plan.exponents.factor.is_some() { 1.0 } else { self.problem.scale() }
    }

    /// Puts the keys of every row in place, and the queries if they are few: others are put in place by
    /// [`load_tile`](Self::load_tile).
    pub(super) fn load(&self, chunk: usize, scratch: &mut Scratch) {
        let Self { plan, problem, inputs } = *self;
        let rows = plan.map.rows(chunk);
        rows::fill_keys(problem, inputs, &plan.map, chunk, &mut scratch.keys[..rows]);
        if self.few() {
            rows::copy_rows(
                &problem.spec().query,
                inputs.query,
                |r| plan.map.place(chunk, r),
                rows,
                &mut scratch.query,
            );
        }
    }

    /// Puts the queries of a tile in place.
    pub(super) fn load_tile(&self, chunk: usize, tile: Tile, query: &mut [f32], lines: &mut [f32]) {
        let Self { plan, problem, inputs } = *self;
        let of = plan.map.chunk(chunk);
        let places = |r| plan.map.place_in(of, tile.first_row + r);
        let out = &mut query[tile.number * plan.tile_rows * problem.head_dim()..];
        rows::turn_rows(plan.level(), &problem.spec().query, inputs.query, places, tile.rows, tile.width, out, lines);
    }

    /// The queries of a tile as [`dots`](Self::dots) takes them: rows if they are few or keys are, else `[column][row]`.
    /// Other rows than those of a handful of keys must be in place.
    pub(super) fn query<'b>(&'b self, chunk: usize, tile: Tile, buffer: &'b mut [f32]) -> Strided<'b> {
        let (plan, dim) = (self.plan, self.problem.head_dim());
        match plan.strategy() {
            CpuStrategy::FewQueries => Strided { data: buffer, stride: dim },
            CpuStrategy::HandfulOfKeys => {
                let of = plan.map.chunk(chunk);
                let places = |r| plan.map.place_in(of, tile.first_row + r);
                rows::rows_of(&self.problem.spec().query, self.inputs.query, places, tile.rows, buffer)
            }
            CpuStrategy::ManyQueries | CpuStrategy::FewKeys => {
                Strided { data: &buffer[tile.number * plan.tile_rows * dim..], stride: 0 }
            }
        }
    }

    /// Asks for the queries of the next tile while this one is computed: rows are read once, so no cache holds them yet.
    fn ask_for_next(&self, chunk: usize, tile: Tile, parts: [usize; 2]) {
        let Self { plan, problem, inputs } = *self;
        let tensor = &problem.spec().query;
        let TensorRef::F32(data) = inputs.query else { return };
        if self.few() || !borrowed(tensor) {
            return;
        }
        let [part, parts] = parts;
        let of = plan.map.chunk(chunk);
        let next = tile.first_row + plan.tile_rows;
        let rows = plan.tile_rows.min(plan.map.rows(chunk).saturating_sub(next));
        let rows = next + rows * part / parts..next + rows * (part + 1) / parts;
        if rows.is_empty() {
            return;
        }
        if let Some(run) = plan.map.run(of, rows.start, rows.len(), &tensor.layout) {
            simd::ask_for(plan.level(), bytemuck::cast_slice(&data[run]));
            return;
        }
        for r in rows {
            let [b, h, i] = plan.map.place_in(of, r);
            let row = &data[tensor.layout.index([b, h, i, 0])..][..problem.head_dim()];
            simd::ask_for(plan.level(), bytemuck::cast_slice(row));
        }
    }

    /// Computes the rows of a chunk over part `split` of the keys. Leaves sums, maxima and masses in the scratch.
    pub(super) fn attend(&self, chunk: usize, split: usize, scratch: &mut Scratch) {
        let Self { plan, problem, inputs } = *self;
        self.load(chunk, scratch);
        self.start(scratch);
        let (all_keys, all_values) = (inputs.keys(problem), inputs.values(problem));
        let kv_head = plan.map.kv_head(chunk);
        let (v_dim, level) = (problem.v_head_dim(), plan.level());
        let padded = v_dim.next_multiple_of(level.lanes());
        let scale = self.scale();
        let part = split * plan.split_kv..((split + 1) * plan.split_kv).min(problem.kv_len());
        let seen = union(&scratch.keys[..plan.map.rows(chunk)]);
        let (first_key, end) = (seen[0].max(part.start), seen[1].min(part.end));

        let in_place = [all_keys.data, all_values.data].iter().all(|data| matches!(data, TensorRef::F32(_)));
        let mut loaded = 0u64;
        let as_stored = !in_place && self.reads_as_stored(chunk, &scratch.keys);
        for start in (first_key / plan.block_kv * plan.block_kv..end).step_by(plan.block_kv) {
            let block = start.max(first_key)..(start + plan.block_kv).min(end);
            if as_stored && self.attend_as_stored(chunk, block.clone(), scratch) {
                continue;
            }
            let key = rows::block(level, &all_keys, kv_head, block.clone(), &mut scratch.key_block);
            let value = rows::block(level, &all_values, kv_head, block.clone(), &mut scratch.value_block);
            let mut finite = None;
            let mut scoring = scoring!(scratch, scale);
            for tile in self.tiles(chunk) {
                let seen = union(&scoring.keys[tile.first_row..][..tile.rows]);
                let keys = seen[0].max(block.start)..seen[1].min(block.end);
                if keys.is_empty() {
                    continue;
                }
                let fetch = !self.few() && loaded >> tile.number & 1 == 0;
                if fetch {
                    self.load_tile(chunk, tile, &mut scratch.query, scoring.lines);
                    loaded |= 1 << tile.number;
                }
                // what comes next is asked for by the first tile, on behalf of all; what is converted is in the cache
                let first = |of| if tile.number == 0 && in_place { of } else { NONE };
                let skip = keys.start - block.start;
                let original = value.from(skip);
                let key = key.from(skip);
                let query = self.query(chunk, tile, &mut scratch.query);
                let row_keys = &scoring.keys[tile.first_row..][..tile.rows];
                let lines = self.in_lines(tile) && row_keys.iter().all(|seen| *seen == row_keys[0]);
                let full = if lines {
                    self.score_lines(chunk, tile, &keys, query, key, first(original), &mut scoring)
                } else {
                    self.score(chunk, tile, &keys, query, key, first(original), &mut scoring)
                };
                let Some(full) = full else {
                    continue;
                };
                let at = tile.number * plan.tile_rows;
                let state = RowState {
                    max: &mut scratch.row_max[at..],
                    sum: &mut scratch.row_sum[at..],
                    rescale: &mut scratch.rescale,
                    fresh: scratch.fresh[tile.number],
                };
                if fetch {
                    self.ask_for_next(chunk, tile, [0, 2]);
                }
                let n = keys.len();
                let next = first(key.from(n));
                let grew = if lines {
                    simd::soften_lines(level, tile.rows, n, scoring.scores, plan.block_kv, state, plan.exponents)
                } else {
                    simd::soften(level, tile.vectors, tile.rows, n, scoring.scores, state, plan.exponents)
                };
                // of weights, from key to key and from row to row
                let steps = if lines { [1, plan.block_kv] } else { [tile.width, 1] };
                if fetch {
                    self.ask_for_next(chunk, tile, [1, 2]);
                }
                // of the whole block, once for all tiles
                let hidden =
                    !full && !*finite.get_or_insert_with(|| simd::all_finite(level, value, block.len(), v_dim));
                let weighed = if hidden { clean(original, n, v_dim, &mut scratch.clean_block) } else { original };
                let fresh = std::mem::replace(&mut scratch.fresh[tile.number], false);
                let weights: &[f32] = scoring.scores;
                if self.few() {
                    if grew && !fresh {
                        simd::rescale_rows(&mut scratch.acc, padded, &scratch.rescale[..tile.rows]);
                    }
                    let acc = &mut scratch.acc;
                    simd::weigh(level, weights, steps, tile.rows, weighed, n, v_dim, acc, padded);
                } else {
                    let acc = &mut scratch.acc[at * v_dim..];
                    if grew && !fresh {
                        simd::scale_lanes(level, tile.vectors, v_dim, acc, &scratch.rescale);
                    }
                    simd::accumulate(level, tile.vectors, weights, weighed, n, v_dim, acc, fresh, next);
                }
                if hidden {
                    let acc = if self.few() { &mut scratch.acc[..] } else { &mut scratch.acc[at * v_dim..] };
                    let strides = if self.few() { [padded, 1] } else { [1, tile.width] };
                    let seen = |r: usize, j: usize| {
                        let [start, end] = scoring.keys[tile.first_row + r];
                        let place = plan.map.place(chunk, tile.first_row + r);
                        (start..end).contains(&(keys.start + j)) && self.allows(place, keys.start + j)
                    };
                    add_rest(original, n, v_dim, (weights, steps), tile.rows, seen, acc, strides);
                }
            }
        }
        if self.few() {
            self.turn(chunk, scratch);
        }
    }

    /// Every row as it is before the first key.
    fn start(&self, scratch: &mut Scratch) {
        scratch.row_max.fill(f32::NEG_INFINITY);
        scratch.row_sum.fill(0.0);
        scratch.fresh.fill(true);
        if self.few() {
            scratch.acc.fill(0.0);
        }
    }

    /// Turns the sums of few queries into `[column][row]`, as other tiles have them.
    fn turn(&self, chunk: usize, scratch: &mut Scratch) {
        let (v_dim, lanes) = (self.problem.v_head_dim(), self.plan.level().lanes());
        let padded = v_dim.next_multiple_of(lanes);
        for r in 0..self.plan.map.rows(chunk) {
            for d in 0..v_dim {
                scratch.turned[d * lanes + r] = scratch.acc[r * padded + d];
            }
        }
        scratch.fresh[0] = false;
        std::mem::swap(&mut scratch.acc, &mut scratch.turned);
    }

    /// Whether boolean mask and bias let a row see a key.
    pub(super) fn allows(&self, [b, h, i]: [usize; 3], j: usize) -> bool {
        let (inputs, spec) = (self.inputs, self.problem.spec());
        let at = [b, h, i, j];
        inputs.terms.mask.zip(spec.mask.as_ref()).is_none_or(|(mask, layout)| mask[layout.index(at)])
            && inputs
                .terms
                .bias
                .zip(spec.bias.as_ref())
                .is_none_or(|(data, bias)| data.get(bias.layout.index(at)) != f32::NEG_INFINITY)
    }
}

/// From the first key that any of the rows sees to the end of the last.
pub(super) fn union(keys: &[[usize; 2]]) -> [usize; 2] {
    let some = keys.iter().filter(|[start, end]| start < end);
    let [start, end] = some.fold([usize::MAX, 0], |[first, last], &[start, end]| [first.min(start), last.max(end)]);
    [start.min(end), end]
}
