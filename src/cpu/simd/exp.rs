//! `exp`, `exp2` and `tanh` of a vector.

use super::Simd;

/// `unit * exp(x)` for `x <= 0`: within 2 ulp over [-104, 0] (subnormal results: 2 units of the smallest one), 0 from -105
/// down and at negative infinity; NaN stays NaN. `unit` is 1 or a smaller power of two, down to 2^-24, and costs nothing.
///
/// `exp(x) = 2^n exp(r)` with whole `n` and `|r| <= ln(2) / 2`; the polynomial is that of Cephes' `expf`.
#[inline(always)]
#[expect(clippy::excessive_precision, reason = "as published")]
pub(super) fn exp<S: Simd>(s: S, x: S::V, unit: f32) -> S::V {
    // adding and taking off 1.5 * 2^23 rounds to a whole number
    const ROUND: f32 = 12_582_912.0;
    // the bound keeps n in reach; `max` keeps its second argument where a comparison with NaN fails
    let low = s.splat(-105.0);
    let x = s.lt(x, low, low, x);
    let n = s.sub(s.fma(x, s.splat(std::f32::consts::LOG2_E), s.splat(ROUND)), s.splat(ROUND));
    let r = s.fma(n, s.splat(-0.693_359_375), x);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_15e-4);
    for c in [1.398_199_95e-3, 8.333_451_9e-3, 4.166_579_6e-2, 1.666_666_55e-1, 5.000_000_1e-1] {
        p = s.fma(p, r, s.splat(c));
    }
    let p = s.fma(s.mul(r, r), p, r);
    let unit = s.splat(unit * S::AHEAD);
    s.ldexp(s.fma(p, unit, unit), n)
}

/// `unit * 2^x` for `x <= 0`: within 2 ulp over [-150, 0] (subnormal results: 2 units of the smallest one), 0 from -152
/// down and at negative infinity; NaN stays NaN. A third shorter than [`exp`]; `unit` as there.
///
/// `2^x = 2^n 2^f` with whole `n` and `|f| <= 1/2`; the polynomial is that of Cephes' `exp2f`.
#[inline(always)]
#[expect(clippy::excessive_precision, reason = "as published")]
pub(super) fn exp2<S: Simd>(s: S, x: S::V, unit: f32) -> S::V {
    // `max` gives its second argument where one is NaN
    let x = s.max(s.splat(-152.0), x);
    let n = s.round(x);
    let f = s.sub(x, n);
    let unit = unit * S::AHEAD;
    let mut p = s.splat(unit * 1.535_336_188_3e-4);
    for c in [1.339_887_440_3e-3, 9.618_437_357_7e-3, 5.550_332_471_2e-2, 2.402_264_791_4e-1, 6.931_472_028_6e-1, 1.0] {
        p = s.fma(p, f, s.splat(unit * c));
    }
    s.ldexp(p, n)
}

/// How scores become weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::cpu) struct Exponents {
    /// With `Some`, scores are dot products, and a weight is `2^(factor * (score - maximum))`: the maximum is taken off
    /// before anything rounds. With `None` scores are in natural units, a weight is `exp(score - maximum)`.
    pub(in crate::cpu) factor: Option<f32>,
    /// A power of two that every weight is multiplied by, so that sums of weighted values stay in f32's range.
    pub(in crate::cpu) unit: f32,
}

/// The weight of a score that lies `x` above the maximum, times `unit`. `BINARY` says whether `factor` counts.
#[inline(always)]
pub(super) fn power<S: Simd, const BINARY: bool>(s: S, x: S::V, factor: f32, unit: f32) -> S::V {
    if BINARY { exp2(s, s.mul(x, s.splat(factor)), unit) } else { exp(s, x, unit) }
}

/// `tanh(x)`, within 4 ulp; Cephes' `tanhf`.
#[inline(always)]
#[expect(clippy::excessive_precision, reason = "as published")]
pub(super) fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    let negated = s.sub(s.splat(0.0), x);
    let size = s.lt(x, s.splat(0.0), negated, x);
    // 1 - 2 / (exp(2|x|) + 1), with both halves multiplied by exp(-2|x|), which cannot overflow
    let e = exp(s, s.mul(s.splat(-2.0), size), 1.0);
    let far = s.div(s.sub(s.splat(1.0), e), s.add(s.splat(1.0), e));
    let far = s.lt(x, s.splat(0.0), s.sub(s.splat(0.0), far), far);
    let xx = s.mul(x, x);
    let mut p = s.splat(-5.704_988_73e-3);
    for c in [2.063_908_88e-2, -5.373_971_55e-2, 1.333_144_22e-1, -3.333_328_27e-1] {
        p = s.fma(p, xx, s.splat(c));
    }
    let near = s.fma(s.mul(xx, p), x, x);
    s.lt(size, s.splat(0.625), near, far)
}
