//! What one operation in f32 may be off by.

/// Rounding error of one f32 operation, relative to its result.
pub(super) const U: f64 = 1.0 / (1u64 << 24) as f64;

/// The smallest normal f32: what is below may be flushed to zero.
pub(super) const TINY: f64 = f32::MIN_POSITIVE as f64;

/// Error of a division in WGSL: 2.5 ulp.
pub(super) const DIVISION: f64 = 5.0 * U;

/// Relative error of `exp(x)` in WGSL: `3 + 2 |x|` ulp.
pub(super) fn exp_error(x: f64) -> f64 {
    (3.0 + 2.0 * x.abs()) * 2.0 * U
}

/// Standard deviations of many roundings that are allowed.
pub(super) const SIGMAS: f64 = 4.0;

/// A weight below this, times infinity, may be NaN in f32: with some room, where it may be flushed to zero.
pub(super) const VANISHING: f64 = 1.0 / (1u128 << 100) as f64;

#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
pub(super) const fn round(x: f64) -> f32 {
    x as f32
}
