//! What happens to a block of scores `[key][row]` between the two products, rows along the lanes.

use super::exp::{Exponents, power, tanh};
use super::{Simd, dispatch};

/// Running maximum and sum of the rows of a tile, and the factor that brings older sums to the new maximum.
#[derive(Debug)]
pub(in crate::cpu) struct RowState<'a> {
    pub(in crate::cpu) max: &'a mut [f32],
    pub(in crate::cpu) sum: &'a mut [f32],
    pub(in crate::cpu) rescale: &'a mut [f32],
    /// No key was taken in before, and there is nothing to rescale.
    pub(in crate::cpu) fresh: bool,
}

dispatch! {
    /// Takes in the scores of `n` keys and turns them into weights, in the first `used` lanes at least. Whether what was
    /// accumulated must be rescaled.
    fn soften(vectors: usize, used: usize, n: usize, scores: &mut [f32], state: RowState<'_>, to: Exponents) -> bool
        = soften_on
}

dispatch! {
    /// [`soften`] for scores `[row][key]`, lines `width` apart, each filled up to whole vectors with negative infinity.
    fn soften_lines(rows: usize, n: usize, scores: &mut [f32], width: usize, state: RowState<'_>, to: Exponents) -> bool
        = soften_lines_on
}

dispatch! {
    /// Softcap (0: none), then `extra[key][row]`, or `extra[key]` if `alike` (empty: none; -inf forbids), then ALiBi (empty:
    /// none) for the key's distance from `far[row] + near[row]`. With `far` a multiple of 256 and `near` from 0 to 255, the
    /// distance is rounded once however large it is.
    fn add_terms(vectors: usize, n: usize, scores: &mut [f32], softcap: f32, extra: &[f32], alike: bool, slope: &[f32],
        far: &[f32], near: &[f32]) = add_terms_on
}

dispatch! {
    /// Makes the score of a key and row -inf unless `bits[key]` has the row's bit.
    fn keep_by_bits(vectors: usize, scores: &mut [f32], bits: &[u64]) = keep_by_bits_on
}

dispatch! {
    /// Makes every score -inf whose key is not in `low[row]..high[row]`.
    fn keep_in_range(vectors: usize, n: usize, scores: &mut [f32], low: &[f32], high: &[f32]) = keep_in_range_on
}

dispatch! {
    /// `acc[column][row] *= by[row]`.
    fn scale_lanes(vectors: usize, columns: usize, acc: &mut [f32], by: &[f32]) = scale_lanes_on
}

dispatch! {
    /// `scores[key][row]` becomes a weight by `shift[row]`, the row's maximum, times `by[row]`; 0 for a score of -inf.
    fn exp_all(vectors: usize, n: usize, scores: &mut [f32], shift: &[f32], by: &[f32], to: Exponents) = exp_all_on
}

dispatch! {
    /// Merges the state of later keys into that of earlier ones.
    fn merge_into(vectors: usize, columns: usize, acc: &mut [f32], max: &mut [f32], sum: &mut [f32], other_acc: &[f32],
        other_max: &[f32], other_sum: &[f32], to: Exponents) = merge_into_on
}

/// What to subtract: the maximum, or 0 while there is none, as -inf - -inf would be NaN.
#[inline(always)]
fn shift_of<S: Simd>(s: S, max: S::V) -> S::V {
    s.lt(max, s.splat(f32::MIN), s.splat(0.0), max)
}

#[inline(always)]
fn soften_on<S: Simd>(
    s: S,
    vectors: usize,
    used: usize,
    n: usize,
    scores: &mut [f32],
    state: RowState<'_>,
    to: Exponents,
) -> bool {
    let Exponents { factor, unit } = to;
    match factor {
        Some(factor) => soften_by::<S, true>(s, vectors, used, n, scores, state, factor, unit),
        None => soften_by::<S, false>(s, vectors, used, n, scores, state, 1.0, unit),
    }
}

#[inline(always)]
fn soften_by<S: Simd, const BINARY: bool>(
    s: S,
    vectors: usize,
    used: usize,
    n: usize,
    scores: &mut [f32],
    state: RowState<'_>,
    factor: f32,
    unit: f32,
) -> bool {
    let rows = vectors * S::LANES;
    assert!(scores.len() >= n * rows);
    assert!(state.max.len() >= rows && state.sum.len() >= rows && state.rescale.len() >= rows);
    if used == 1 && n <= ONE_ROW {
        return soften_one::<S, BINARY>(s, rows, n, scores, state, factor, unit);
    }
    let mut grew = false;
    for v in (0..rows).step_by(S::LANES) {
        let p = scores.as_mut_ptr();
        // SAFETY: v + LANES <= rows and j < n, within the lengths compared above
        unsafe {
            macro_rules! at {
                ($j:expr) => {
                    p.add(($j) * rows + v)
                };
            }
            let old = s.load(state.max.as_ptr().add(v));
            let mut max = [old; 4];
            let mut j = 0;
            while n - j >= 4 {
                for (k, max) in max.iter_mut().enumerate() {
                    *max = s.max(s.load(at!(j + k)), *max);
                }
                j += 4;
            }
            while j < n {
                max[0] = s.max(s.load(at!(j)), max[0]);
                j += 1;
            }
            let max = s.max(s.max(max[0], max[1]), s.max(max[2], max[3]));
            let shift = shift_of(s, max);
            let rescale =
                if state.fresh { s.splat(0.0) } else { power::<S, BINARY>(s, s.sub(old, shift), factor, 1.0) };
            grew |= s.any_lt(old, max);
            let before = s.mul(s.load(state.sum.as_ptr().add(v)), rescale);
            let mut sum = [s.splat(0.0); 4];
            let mut j = 0;
            while n - j >= 4 {
                for (k, sum) in sum.iter_mut().enumerate() {
                    let weight = power::<S, BINARY>(s, s.sub(s.load(at!(j + k)), shift), factor, unit);
                    s.store(at!(j + k), weight);
                    *sum = s.add(*sum, weight);
                }
                j += 4;
            }
            while j < n {
                let weight = power::<S, BINARY>(s, s.sub(s.load(at!(j)), shift), factor, unit);
                s.store(at!(j), weight);
                sum[0] = s.add(sum[0], weight);
                j += 1;
            }
            s.store(state.max.as_mut_ptr().add(v), max);
            s.store(state.rescale.as_mut_ptr().add(v), rescale);
            let block = s.add(s.add(sum[0], sum[1]), s.add(sum[2], sum[3]));
            s.store(state.sum.as_mut_ptr().add(v), s.add(before, block));
        }
    }
    grew
}

/// Most keys of a block for [`soften_one`].
const ONE_ROW: usize = 128;

/// The same for a row alone, with keys along the lanes.
#[inline(always)]
fn soften_one<S: Simd, const BINARY: bool>(
    s: S,
    rows: usize,
    n: usize,
    scores: &mut [f32],
    state: RowState<'_>,
    factor: f32,
    unit: f32,
) -> bool {
    let mut line = [f32::NEG_INFINITY; ONE_ROW];
    for (x, key) in line.iter_mut().zip(scores.chunks_exact(rows)).take(n) {
        *x = key[0];
    }
    let grew = soften_line::<S, BINARY>(s, n, &mut line, 0, state, factor, unit);
    for (&weight, key) in line.iter().zip(scores.chunks_exact_mut(rows)).take(n) {
        key[0] = weight;
    }
    grew
}

#[inline(always)]
fn soften_lines_on<S: Simd>(
    s: S,
    rows: usize,
    n: usize,
    scores: &mut [f32],
    width: usize,
    mut state: RowState<'_>,
    to: Exponents,
) -> bool {
    let mut grew = false;
    for (r, line) in scores.chunks_exact_mut(width).take(rows).enumerate() {
        let RowState { max, sum, rescale, fresh } = &mut state;
        let state = RowState { max, sum, rescale, fresh: *fresh };
        grew |= match to.factor {
            Some(factor) => soften_line::<S, true>(s, n, line, r, state, factor, to.unit),
            None => soften_line::<S, false>(s, n, line, r, state, 1.0, to.unit),
        };
    }
    grew
}

/// Takes in the `n` scores of row `r`, and negative infinities up to a whole vector.
#[inline(always)]
fn soften_line<S: Simd, const BINARY: bool>(
    s: S,
    n: usize,
    line: &mut [f32],
    r: usize,
    state: RowState<'_>,
    factor: f32,
    unit: f32,
) -> bool {
    let padded = n.next_multiple_of(S::LANES);
    assert!(padded <= line.len());
    let old = state.max[r];
    let at = line.as_mut_ptr();
    // SAFETY: vectors stay within the padded line, whose length was compared above
    unsafe {
        let mut max = [s.splat(old); 4];
        let mut j = 0;
        while padded - j >= 4 * S::LANES {
            for (k, max) in max.iter_mut().enumerate() {
                *max = s.max(s.load(at.add(j + k * S::LANES)), *max);
            }
            j += 4 * S::LANES;
        }
        while j < padded {
            max[0] = s.max(s.load(at.add(j)), max[0]);
            j += S::LANES;
        }
        let max = s.max(s.max(max[0], max[1]), s.max(max[2], max[3]));
        let mut lanes = [f32::NEG_INFINITY; 16];
        s.store(lanes.as_mut_ptr(), max);
        let highest = lanes.iter().take(S::LANES).fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        let shift = shift_of(s, s.splat(highest));
        let mut sum = [s.splat(0.0); 4];
        let mut j = 0;
        macro_rules! take {
            ($k:expr) => {
                let to = at.add(j + $k * S::LANES);
                let weight = power::<S, BINARY>(s, s.sub(s.load(to), shift), factor, unit);
                s.store(to, weight);
                sum[$k] = s.add(sum[$k], weight);
            };
        }
        while padded - j >= 4 * S::LANES {
            take!(0);
            take!(1);
            take!(2);
            take!(3);
            j += 4 * S::LANES;
        }
        while j < padded {
            take!(0);
            j += S::LANES;
        }
        let sum = s.add(s.add(sum[0], sum[1]), s.add(sum[2], sum[3]));
        let mut rescale = [0.0; 16];
        s.store(rescale.as_mut_ptr(), power::<S, BINARY>(s, s.sub(s.splat(old), shift), factor, 1.0));
        state.rescale[r] = rescale[0];
        state.sum[r] = state.sum[r] * rescale[0] + s.sums([sum; 4])[0];
        state.max[r] = highest;
        old < highest
    }
}

#[inline(always)]
fn add_terms_on<S: Simd>(
    s: S,
    vectors: usize,
    n: usize,
    scores: &mut [f32],
    softcap: f32,
    extra: &[f32],
    alike: bool,
    slope: &[f32],
    far: &[f32],
    near: &[f32],
) {
    let rows = vectors * S::LANES;
    assert!(scores.len() >= n * rows && (extra.is_empty() || extra.len() >= if alike { n } else { n * rows }));
    assert!(slope.is_empty() || slope.len() >= rows && far.len() >= rows && near.len() >= rows);
    let (lowest, forbidden) = (s.splat(f32::MIN), s.splat(f32::NEG_INFINITY));
    for j in 0..n {
        #[expect(clippy::cast_precision_loss, reason = "a place within a block")]
        let key = s.splat(j as f32);
        for v in (0..rows).step_by(S::LANES) {
            // SAFETY: v + LANES <= rows and j < n, within the lengths compared above
            unsafe {
                let at = scores.as_mut_ptr().add(j * rows + v);
                let mut x = s.load(at);
                if softcap > 0.0 {
                    // a division is as dear as ten products; the inverse of the least of floats is infinite
                    let inverse = 1.0 / softcap;
                    let ratio =
                        if inverse.is_finite() { s.mul(x, s.splat(inverse)) } else { s.div(x, s.splat(softcap)) };
                    x = s.mul(s.splat(softcap), tanh(s, ratio));
                }
                let extra_at = match extra {
                    [] => s.splat(0.0),
                    extra if alike => s.splat(*extra.as_ptr().add(j)),
                    extra => s.load(extra.as_ptr().add(j * rows + v)),
                };
                x = s.add(x, extra_at);
                if !slope.is_empty() {
                    let distance = s.sub(s.load(near.as_ptr().add(v)), key);
                    let distance = s.add(s.load(far.as_ptr().add(v)), distance);
                    let distance = s.max(distance, s.sub(s.splat(0.0), distance));
                    x = s.sub(x, s.mul(s.load(slope.as_ptr().add(v)), distance));
                }
                s.store(at, s.lt(extra_at, lowest, forbidden, x));
            }
        }
    }
}

#[inline(always)]
fn keep_in_range_on<S: Simd>(s: S, vectors: usize, n: usize, scores: &mut [f32], low: &[f32], high: &[f32]) {
    let rows = vectors * S::LANES;
    assert!(scores.len() >= n * rows && low.len() >= rows && high.len() >= rows);
    let forbidden = s.splat(f32::NEG_INFINITY);
    for v in (0..rows).step_by(S::LANES) {
        // SAFETY: v + LANES <= rows and j < n, within the lengths compared above
        unsafe {
            let (low, high) = (s.load(low.as_ptr().add(v)), s.load(high.as_ptr().add(v)));
            for j in 0..n {
                #[expect(clippy::cast_precision_loss, reason = "a place within a block")]
                let key = s.splat(j as f32);
                let at = scores.as_mut_ptr().add(j * rows + v);
                s.store(at, s.lt(key, low, forbidden, s.lt(key, high, s.load(at), forbidden)));
            }
        }
    }
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the lowest bits are meant")]
fn keep_by_bits_on<S: Simd>(s: S, vectors: usize, scores: &mut [f32], bits: &[u64]) {
    let rows = vectors * S::LANES;
    assert!(scores.len() >= bits.len() * rows && rows <= 64);
    for (j, &bits) in bits.iter().enumerate() {
        for v in (0..rows).step_by(S::LANES) {
            // SAFETY: v + LANES <= rows and j < n, within the length compared above
            unsafe {
                let at = scores.as_mut_ptr().add(j * rows + v);
                s.store(at, s.keep((bits >> v) as u32, s.load(at)));
            }
        }
    }
}

#[inline(always)]
fn scale_lanes_on<S: Simd>(s: S, vectors: usize, columns: usize, acc: &mut [f32], by: &[f32]) {
    let rows = vectors * S::LANES;
    assert!(acc.len() >= columns * rows && by.len() >= rows);
    for d in 0..columns {
        for v in (0..rows).step_by(S::LANES) {
            // SAFETY: v + LANES <= rows and d < columns, within the lengths compared above
            unsafe {
                let at = acc.as_mut_ptr().add(d * rows + v);
                s.store(at, s.mul(s.load(at), s.load(by.as_ptr().add(v))));
            }
        }
    }
}

#[inline(always)]
fn exp_all_on<S: Simd>(s: S, vectors: usize, n: usize, scores: &mut [f32], shift: &[f32], by: &[f32], to: Exponents) {
    let rows = vectors * S::LANES;
    assert!(scores.len() >= n * rows && shift.len() >= rows && by.len() >= rows);
    for j in 0..n {
        for v in (0..rows).step_by(S::LANES) {
            // SAFETY: v + LANES <= rows and j < n, within the lengths compared above
            unsafe {
                let (at, shift) = (scores.as_mut_ptr().add(j * rows + v), s.load(shift.as_ptr().add(v)));
                let (score, by) = (s.load(at), s.load(by.as_ptr().add(v)));
                let x = s.sub(score, shift);
                let weight = match to.factor {
                    Some(factor) => power::<S, true>(s, x, factor, 1.0),
                    None => power::<S, false>(s, x, 1.0, 1.0),
                };
                // of what is not allowed nothing must show, also in a row of NaN
                s.store(at, s.lt(score, s.splat(f32::MIN), s.splat(0.0), s.mul(weight, by)));
            }
        }
    }
}

#[inline(always)]
fn merge_into_on<S: Simd>(
    s: S,
    vectors: usize,
    columns: usize,
    acc: &mut [f32],
    max: &mut [f32],
    sum: &mut [f32],
    other_acc: &[f32],
    other_max: &[f32],
    other_sum: &[f32],
    to: Exponents,
) {
    let rows = vectors * S::LANES;
    assert!(acc.len() >= columns * rows && max.len() >= rows && sum.len() >= rows);
    assert!(other_acc.len() >= columns * rows && other_max.len() >= rows && other_sum.len() >= rows);
    for v in (0..rows).step_by(S::LANES) {
        // SAFETY: v + LANES <= rows and d < columns, within the lengths compared above
        unsafe {
            let (mine, theirs) = (s.load(max.as_ptr().add(v)), s.load(other_max.as_ptr().add(v)));
            let both = s.max(mine, theirs);
            let shift = shift_of(s, both);
            let (mine, theirs) = (s.sub(mine, shift), s.sub(theirs, shift));
            let (mine, theirs) = match to.factor {
                Some(factor) => (power::<S, true>(s, mine, factor, 1.0), power::<S, true>(s, theirs, factor, 1.0)),
                None => (power::<S, false>(s, mine, 1.0, 1.0), power::<S, false>(s, theirs, 1.0, 1.0)),
            };
            let total = s.mul(s.load(other_sum.as_ptr().add(v)), theirs);
            s.store(sum.as_mut_ptr().add(v), s.fma(s.load(sum.as_ptr().add(v)), mine, total));
            s.store(max.as_mut_ptr().add(v), both);
            for d in 0..columns {
                let at = acc.as_mut_ptr().add(d * rows + v);
                let other = s.mul(s.load(other_acc.as_ptr().add(d * rows + v)), theirs);
                s.store(at, s.fma(s.load(at), mine, other));
            }
        }
    }
}
