//! One task: the rows of a chunk over one part of the keys, block by block.

use crate::cpu::simd::{self, RowState, Strided};
use crate::inputs::AttentionInputs;
use crate::problem::AttentionProblem;
use crate::tensor::TensorRef;

use super::plan::{CpuPlan, CpuStrategy};
use super::rows::{self, Seen};
use super::scratch::{Buffer, Scratch, borrowed};

/// What of a workspace scoring reads and writes, the rest of it left free.
macro_rules! scoring {
    ($scratch:ident, $scale:expr) => {
        $crate::cpu::fused::task::Scoring {
            scale: $scale,
            scores: &mut $scratch.scores,
            extra: &mut $scratch.extra,
            bits: &mut $scratch.bits,
            keys: &$scratch.keys,
            low: &mut $scratch.low,
            high: &mut $scratch.high,
            slope: &mut $scratch.slope,
            far: &mut $scratch.far,
            near: &mut $scratch.near,
            lines: &mut $scratch.lines,
        }
    };
}
pub(super) use scoring;

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

    /// Scores of keys `keys` for the rows of a tile, all terms and masks applied; `key` and `value` start at the
    /// first of them. Whether all rows see all keys; `None`, and no scores, if no row sees any.
    #[expect(clippy::too_many_arguments, reason = "what is scored, and by what")]
    pub(super) fn score(
        &self,
        chunk: usize,
        tile: Tile,
        keys: &std::ops::Range<usize>,
        query: Strided<'_>,
        key: Strided<'_>,
        value: Strided<'_>,
        scratch: &mut Scoring<'_>,
    ) -> Option<bool> {
        let Self { plan, problem, inputs } = *self;
        let (level, n) = (plan.level(), keys.len());
        let of = plan.map.chunk(chunk);
        let places = |r| plan.map.place_in(of, tile.first_row + r);
        let range = keys.clone();
        let seen = rows::fill_extra(
            level,
            problem,
            inputs,
            places,
            tile.rows,
            range,
            tile.width,
            scratch.extra,
            scratch.bits,
            scratch.lines,
        );
        if seen == Seen::Nothing {
            return None;
        }
        self.dots(tile, query, key, n, value, scratch);
        let softcap = problem.spec().softcap.unwrap_or(0.0);
        let extra: &[f32] = match seen {
            Seen::Some => scratch.extra,
            Seen::Alike => &scratch.extra[..n],
            Seen::Everything | Seen::Bits | Seen::Nothing => &[],
        };
        if inputs.terms.alibi_slopes.is_some() {
            for r in 0..tile.rows {
                let [b, h, i] = places(r);
                let slope = inputs.slope(problem, b, h).unwrap_or(0.0);
                let diagonal = inputs.diagonal(problem, b, i) - keys.start as i64;
                // both are exact: a position has 31 bits at most
                let near = diagonal & 0xff;
                (scratch.slope[r], scratch.far[r], scratch.near[r]) = (slope, (diagonal - near) as f32, near as f32);
            }
        }
        if softcap > 0.0 || !extra.is_empty() || inputs.terms.alibi_slopes.is_some() {
            let alike = seen == Seen::Alike;
            let (scores, slope) = (&mut *scratch.scores, &*scratch.slope);
            simd::add_terms(level, tile.vectors, n, scores, softcap, extra, alike, slope, scratch.far, scratch.near);
        }
        if seen == Seen::Bits {
            simd::keep_by_bits(level, tile.vectors, scratch.scores, &scratch.bits[..n]);
        }
        let row_keys = &scratch.keys[tile.first_row..][..tile.rows];
        let full = row_keys.iter().all(|&[start, end]| start <= keys.start && keys.end <= end);
        if !full {
            for (r, &[start, end]) in row_keys.iter().enumerate() {
                let within = |key: usize| key.clamp(keys.start, keys.end) - keys.start;
                (scratch.low[r], scratch.high[r]) = (within(start) as f32, within(end) as f32);
            }
            simd::keep_in_range(level, tile.vectors, n, scratch.scores, scratch.low, scratch.high);
        }
        Some(full && seen == Seen::Everything)
    }

    /// Whether scores of few queries may stand as `[row][key]`: nothing that differs from row to row goes into them.
    fn in_lines(&self, tile: Tile) -> bool {
        let spec = self.problem.spec();
        let alike = spec.mask.is_none() && spec.bias.is_none();
        self.few() && spec.alibi_slopes.is_none() && (alike || tile.rows == 1)
    }

    /// [`score`](Self::score) for few queries [in lines](Self::in_lines) of one block, all of which see all of `keys`.
    #[expect(clippy::too_many_arguments, reason = "what is scored, and by what")]
    fn score_lines(
        &self,
        chunk: usize,
        tile: Tile,
        keys: &std::ops::Range<usize>,
        query: Strided<'_>,
        key: Strided<'_>,
        value: Strided<'_>,
        scratch: &mut Scoring<'_>,
    ) -> Option<bool> {
        let Self { plan, problem, inputs } = *self;
        let (level, n, lanes) = (plan.level(), keys.len(), plan.level().lanes());
        let places = |r| plan.map.place(chunk, tile.first_row + r);
        let Scoring { scale, scores, extra, bits, lines, .. } = scratch;
        let (rows, width) = (tile.rows, tile.width);
        let seen = rows::fill_extra(level, problem, inputs, places, rows, keys.clone(), width, extra, bits, lines);
        if seen == Seen::Nothing {
            return None;
        }
        simd::products(level, query, rows, key, n, problem.head_dim(), *scale, scores, plan.block_kv, value);
        let softcap = problem.spec().softcap.unwrap_or(0.0);
        let padded = n.next_multiple_of(lanes);
        extra.iter_mut().take(padded).skip(n).for_each(|x| *x = 0.0);
        let extra: &[f32] = if seen == Seen::Alike { extra } else { &[] };
        for line in scores.chunks_exact_mut(plan.block_kv).take(rows) {
            if softcap > 0.0 || !extra.is_empty() {
                simd::add_terms(level, padded / lanes, 1, line, softcap, extra, false, &[], &[], &[]);
            }
            line[n..padded].fill(f32::NEG_INFINITY);
        }
        Some(seen == Seen::Everything)
    }

    /// `scale * dot(query, key)` for the rows of a tile, given by [`query`](Self::query); the rows of `value` are needed
    /// next.
    pub(super) fn dots(
        &self,
        tile: Tile,
        query: Strided<'_>,
        key: Strided<'_>,
        n: usize,
        value: Strided<'_>,
        scratch: &mut Scoring<'_>,
    ) {
        let (level, dim, scale) = (self.plan.level(), self.problem.head_dim(), scratch.scale);
        match self.plan.strategy() {
            CpuStrategy::FewQueries => {
                simd::dots(level, query, tile.rows, key, n, dim, scale, scratch.scores, tile.width, value);
            }
            CpuStrategy::HandfulOfKeys => {
                simd::products(level, key, n, query, tile.rows, dim, scale, scratch.scores, tile.width, NONE);
            }
            CpuStrategy::ManyQueries | CpuStrategy::FewKeys => {
                simd::scores(level, tile.vectors, query.data, key, n, dim, scale, scratch.scores, value);
            }
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

    /// Whether a chunk's keys and values are read as they are stored: a few rows, all of which see the same keys by position
    /// alone, so that what is widened is used at once and but once or twice.
    fn reads_as_stored(&self, chunk: usize, keys: &[[usize; 2]]) -> bool {
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
    fn attend_as_stored(&self, chunk: usize, block: std::ops::Range<usize>, scratch: &mut Scratch) -> bool {
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

/// What scoring a tile reads and writes.
pub(super) struct Scoring<'a> {
    /// That of the problem, or 1.
    pub(super) scale: f32,
    pub(super) scores: &'a mut [f32],
    pub(super) extra: &'a mut [f32],
    pub(super) bits: &'a mut [u64],
    pub(super) keys: &'a [[usize; 2]],
    pub(super) low: &'a mut [f32],
    pub(super) high: &'a mut [f32],
    pub(super) slope: &'a mut [f32],
    pub(super) far: &'a mut [f32],
    pub(super) near: &'a mut [f32],
    pub(super) lines: &'a mut Buffer,
}

impl Scoring<'_> {
    /// The same places once more, for as long as the copy is used.
    pub(super) fn again(&mut self) -> Scoring<'_> {
        let Self { scale, scores, extra, bits, keys, low, high, slope, far, near, lines } = self;
        Scoring { scale: *scale, scores, extra, bits, keys, low, high, slope, far, near, lines }
    }
}

/// From the first key that any of the rows sees to the end of the last.
pub(super) fn union(keys: &[[usize; 2]]) -> [usize; 2] {
    let some = keys.iter().filter(|[start, end]| start < end);
    let [start, end] = some.fold([usize::MAX, 0], |[first, last], &[start, end]| [first.min(start), last.max(end)]);
    [start.min(end), end]
}

/// The block with zeros in the places of what is not finite: 0 * NaN would carry it to rows that must not see it.
pub(super) fn clean<'a>(value: Strided<'_>, n: usize, dim: usize, buffer: &'a mut [f32]) -> Strided<'a> {
    for (j, row) in buffer.chunks_exact_mut(dim).take(n).enumerate() {
        for (x, &v) in row.iter_mut().zip(&value.data[j * value.stride..]) {
            *x = if v.is_finite() { v } else { 0.0 };
        }
    }
    Strided { data: buffer, stride: dim }
}

/// Adds what [`clean`] left out to the rows that see it. Slow, and rare.
#[expect(clippy::too_many_arguments, reason = "sizes and strides")]
pub(super) fn add_rest(
    value: Strided<'_>,
    n: usize,
    dim: usize,
    (weights, [of_key, of_row]): (&[f32], [usize; 2]),
    rows: usize,
    seen: impl Fn(usize, usize) -> bool,
    acc: &mut [f32],
    [row_stride, column_stride]: [usize; 2],
) {
    for j in 0..n {
        for (d, &v) in value.data[j * value.stride..][..dim].iter().enumerate().filter(|(_, v)| !v.is_finite()) {
            for r in (0..rows).filter(|&r| seen(r, j)) {
                acc[r * row_stride + d * column_stride] += weights[j * of_key + r * of_row] * v;
            }
        }
    }
}
