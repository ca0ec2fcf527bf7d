//! What happens to a block of scores between the products of a backward.

use super::exp::{exp, tanh};
use super::{Simd, dispatch};

/// What is known of the rows of a tile before their scores are.
#[derive(Clone, Copy, Debug)]
pub(in crate::cpu) struct RowsBefore<'a> {
    /// What is taken off a score in natural units: the row's maximum.
    pub(in crate::cpu) shift: &'a [f32],
    /// What a weight is multiplied by: the inverse of the row's sum.
    pub(in crate::cpu) by: &'a [f32],
    pub(in crate::cpu) delta: &'a [f32],
}

dispatch! {
    /// `scores[key][row]`, times `factor`, become weights, and `products[key][row]`, the values times the gradient of the output,
    /// the gradient of the scores, times `scale`: `weight * (product - delta)`. Both are 0 for a score of -inf.
    fn differentiate(vectors: usize, n: usize, scores: &mut [f32], products: &mut [f32], rows: RowsBefore<'_>,
        factor: f32, scale: f32) = differentiate_on
}

dispatch! {
    /// [`differentiate`] for `[row][key]`, lines `width` apart, and few rows.
    fn differentiate_lines(rows: usize, n: usize, scores: &mut [f32], products: &mut [f32], width: usize,
        of: RowsBefore<'_>, factor: f32, scale: f32) = differentiate_lines_on
}

dispatch! {
    /// `gradients *= 1 - tanh(scale * dot / softcap)^2`.
    fn uncap(gradients: &mut [f32], dots: &[f32], scale: f32, softcap: f32) = uncap_on
}

dispatch! {
    /// `out[row] = sum over columns of a[column][row] * b[column][row]`, in the order in which [`scores`](super::scores) adds up.
    fn lane_dots(vectors: usize, a: &[f32], b: &[f32], dim: usize, out: &mut [f32]) = lane_dots_on
}

/// Up to here `1 + x` is `exp(x)` within a rounding.
const FIRST_ORDER: f32 = 1.0 / 4096.0;

/// The weight of a score, and the gradient of the score.
#[inline(always)]
fn both<S: Simd>(
    s: S,
    score: S::V,
    product: S::V,
    [shift, by, delta]: [S::V; 3],
    factor: S::V,
    scale: S::V,
) -> [S::V; 2] {
    // rounded once, however large the score is
    let x = s.fma(score, factor, s.sub(s.splat(0.0), shift));
    let zero = s.splat(0.0);
    // a maximum that was rounded down leaves scores above it, of which its sum knows
    let (below, above) = (s.lt(zero, x, zero, x), s.lt(zero, x, x, zero));
    let mut power = s.mul(exp(s, below, 1.0), s.add(s.splat(1.0), above));
    let much = s.splat(FIRST_ORDER);
    if s.any_lt(much, x) {
        let inverse = s.div(s.splat(1.0), exp(s, s.sub(zero, above), 1.0));
        power = s.lt(much, x, inverse, power);
    }
    let weight = s.mul(power, by);
    let gradient = s.mul(s.mul(weight, s.sub(product, delta)), scale);
    let hidden = s.splat(f32::MIN);
    [s.lt(score, hidden, s.splat(0.0), weight), s.lt(score, hidden, s.splat(0.0), gradient)]
}

#[inline(always)]
fn differentiate_on<S: Simd>(
    s: S,
    vectors: usize,
    n: usize,
    scores: &mut [f32],
    products: &mut [f32],
    rows: RowsBefore<'_>,
    factor: f32,
    scale: f32,
) {
    let width = vectors * S::LANES;
    let RowsBefore { shift, by, delta } = rows;
    assert!(scores.len() >= n * width && products.len() >= n * width);
    assert!(shift.len() >= width && by.len() >= width && delta.len() >= width);
    let (factor, scale) = (s.splat(factor), s.splat(scale));
    for v in (0..width).step_by(S::LANES) {
        // SAFETY: v + LANES <= width and j < n, within the lengths compared above
        unsafe {
            let rows = [shift, by, delta].map(|of| of.as_ptr().add(v));
            let rows = [s.load(rows[0]), s.load(rows[1]), s.load(rows[2])];
            for j in 0..n {
                let (score, product) =
                    (scores.as_mut_ptr().add(j * width + v), products.as_mut_ptr().add(j * width + v));
                let [weight, gradient] = both(s, s.load(score), s.load(product), rows, factor, scale);
                s.store(score, weight);
                s.store(product, gradient);
            }
        }
    }
}

#[inline(always)]
fn differentiate_lines_on<S: Simd>(
    s: S,
    rows: usize,
    n: usize,
    scores: &mut [f32],
    products: &mut [f32],
    width: usize,
    of: RowsBefore<'_>,
    factor: f32,
    scale: f32,
) {
    let padded = n.next_multiple_of(S::LANES);
    assert!(padded <= width && scores.len() >= rows * width && products.len() >= rows * width);
    let (factor, scale) = (s.splat(factor), s.splat(scale));
    for r in 0..rows {
        let of = [s.splat(of.shift[r]), s.splat(of.by[r]), s.splat(of.delta[r])];
        for j in (0..padded).step_by(S::LANES) {
            // SAFETY: j + LANES <= width and r < rows, within the lengths compared above
            unsafe {
                let (score, product) =
                    (scores.as_mut_ptr().add(r * width + j), products.as_mut_ptr().add(r * width + j));
                let [weight, gradient] = both(s, s.load(score), s.load(product), of, factor, scale);
                s.store(score, weight);
                s.store(product, gradient);
            }
        }
    }
}

#[inline(always)]
fn uncap_on<S: Simd>(s: S, gradients: &mut [f32], dots: &[f32], scale: f32, softcap: f32) {
    assert!(gradients.len() == dots.len() && dots.len().is_multiple_of(S::LANES));
    let (factor, one) = (scale / softcap, s.splat(1.0));
    for at in (0..dots.len()).step_by(S::LANES) {
        // SAFETY: at + LANES <= len, compared above
        unsafe {
            let to = gradients.as_mut_ptr().add(at);
            let dot = s.load(dots.as_ptr().add(at));
            // an infinite factor would make NaN of a dot product of 0
            let ratio = if factor.is_finite() {
                s.mul(dot, s.splat(factor))
            } else {
                s.div(s.mul(dot, s.splat(scale)), s.splat(softcap))
            };
            let t = tanh(s, ratio);
            // (1 - t)(1 + t) loses nothing where t is close to 1
            let slope = s.mul(s.sub(one, t), s.add(one, t));
            let gradient = s.load(to);
            let sloped = s.mul(gradient, slope);
            // of a gradient of 0 the score may be anything, for what is hidden has one; a NaN stays
            let other = s.lt(gradient, s.splat(0.0), sloped, s.mul(gradient, s.splat(0.0)));
            s.store(to, s.lt(s.splat(0.0), gradient, sloped, other));
        }
    }
}

/// As long as [`scores`](super::scores) sums in one go.
#[inline(always)]
fn lane_dots_on<S: Simd>(s: S, vectors: usize, a: &[f32], b: &[f32], dim: usize, out: &mut [f32]) {
    let width = vectors * S::LANES;
    assert!(a.len() >= dim * width && b.len() >= dim * width && out.len() >= width);
    let block = super::tiles::sum_block(dim);
    for v in (0..width).step_by(S::LANES) {
        // SAFETY: v + LANES <= width and d < dim, within the lengths compared above
        unsafe {
            let mut total = s.splat(0.0);
            for first in (0..dim).step_by(block) {
                let mut acc = s.splat(0.0);
                for d in first..(first + block).min(dim) {
                    let (a, b) = (s.load(a.as_ptr().add(d * width + v)), s.load(b.as_ptr().add(d * width + v)));
                    acc = s.fma(a, b, acc);
                }
                total = if first == 0 { acc } else { s.add(total, acc) };
            }
            s.store(out.as_mut_ptr().add(v), total);
        }
    }
}
