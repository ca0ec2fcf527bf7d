//! Rows of stored elements in f32, as vectors.

use super::{Simd, dispatch};

dispatch! {
    /// `n` rows of f16, `stride` apart, as f32 side by side.
    fn widen_f16(bits: &[u16], stride: usize, n: usize, width: usize, out: &mut [f32]) = widen_f16_on
}

dispatch! {
    /// `n` rows of bf16, `stride` apart, as f32 side by side.
    fn widen_bf16(bits: &[u16], stride: usize, n: usize, width: usize, out: &mut [f32]) = widen_bf16_on
}

dispatch! {
    /// `n` rows of signed bytes, `stride` apart, times a scale for each `block` of columns, each product rounded once, as f32 side
    /// by side. Scales of all rows stand side by side.
    fn widen_i8(bytes: &[i8], stride: usize, n: usize, width: usize, scales: &[f32], block: usize, out: &mut [f32])
        = widen_i8_on
}

/// Loads vector by vector, by a formula that reads as many elements as a vector has. A macro for what is said of `array`.
macro_rules! each {
    ($s:ident: $unit:ident, $from:expr, $to:expr, $at:ident => $load:expr) => {{
        let (from, to) = ($from, $to);
        assert_eq!(from.len(), to.len());
        let whole = from.len() / $unit::LANES * $unit::LANES;
        let mut d = 0;
        while d < whole {
            // SAFETY: a vector from `d` on ends at `whole` at the latest, in both
            unsafe {
                let $at = from.as_ptr().add(d);
                $s.store(to.as_mut_ptr().add(d), $load);
            }
            d += $unit::LANES;
        }
        if whole < from.len() {
            let (mut last, mut wide) = ([from[whole]; 16], [0.0; 16]);
            let rest = from.len() - whole;
            last[..rest].copy_from_slice(&from[whole..]);
            // SAFETY: no vector has more than 16 lanes
            unsafe {
                let $at = last.as_ptr();
                $s.store(wide.as_mut_ptr(), $load);
            }
            to[whole..].copy_from_slice(&wide[..rest]);
        }
    }};
}

#[inline(always)]
fn widen_f16_on<S: Simd>(s: S, bits: &[u16], stride: usize, n: usize, width: usize, out: &mut [f32]) {
    for r in 0..n {
        each!(s: S, &bits[r * stride..][..width], &mut out[r * width..][..width], at => s.load_f16(at));
    }
}

#[inline(always)]
fn widen_bf16_on<S: Simd>(s: S, bits: &[u16], stride: usize, n: usize, width: usize, out: &mut [f32]) {
    for r in 0..n {
        each!(s: S, &bits[r * stride..][..width], &mut out[r * width..][..width], at => s.load_bf16(at));
    }
}

#[inline(always)]
fn widen_i8_on<S: Simd>(
    s: S,
    bytes: &[i8],
    stride: usize,
    n: usize,
    width: usize,
    scales: &[f32],
    block: usize,
    out: &mut [f32],
) {
    assert!(block > 0 && width.is_multiple_of(block) && scales.len() == n * (width / block));
    let mut of_blocks = scales.iter();
    if block.is_multiple_of(S::LANES) {
        assert!(n == 0 || (n - 1) * stride + width <= bytes.len() && n * width <= out.len());
        for r in 0..n {
            for first in (0..width).step_by(block) {
                let Some(&scale) = of_blocks.next() else { return };
                let scale = s.splat(scale);
                for d in (first..first + block).step_by(S::LANES) {
                    // SAFETY: the lengths were compared above; blocks are whole vectors and end within their row
                    unsafe {
                        let x = s.mul(s.load_i8(bytes.as_ptr().add(r * stride + d)), scale);
                        s.store(out.as_mut_ptr().add(r * width + d), x);
                    }
                }
            }
        }
        return;
    }
    for r in 0..n {
        let (from, to) = (&bytes[r * stride..][..width], &mut out[r * width..][..width]);
        for (from, to) in from.chunks_exact(block).zip(to.chunks_exact_mut(block)) {
            let Some(&scale) = of_blocks.next() else { return };
            let scale = s.splat(scale);
            each!(s: S, from, to, at => s.mul(s.load_i8(at), scale));
        }
    }
}
