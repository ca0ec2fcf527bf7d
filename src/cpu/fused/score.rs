//! The scores of a tile, all terms and masks applied.

use super::plan::CpuStrategy;
use super::rows::{self, Seen};
use super::scratch::Buffer;
use super::task::{Job, NONE, Tile};
use crate::cpu::simd::{self, Strided};

/// What of a workspace scoring reads and writes, the rest of it left free.
macro_rules! scoring {
    ($scratch:ident, $scale:expr) => {
        $crate::cpu::fused::score::Scoring {
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

impl Job<'_> {
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
    pub(super) fn in_lines(&self, tile: Tile) -> bool {
        let spec = self.problem.spec();
        let alike = spec.mask.is_none() && spec.bias.is_none();
        self.few() && spec.alibi_slopes.is_none() && (alike || tile.rows == 1)
    }

    /// [`score`](Self::score) for few queries [in lines](Self::in_lines) of one block, all of which see all of `keys`.
    #[expect(clippy::too_many_arguments, reason = "what is scored, and by what")]
    pub(super) fn score_lines(
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
}
