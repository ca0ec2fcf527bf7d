//! The vector functions, on every unit of this machine.

use super::*;

dispatch! {
    fn exp_of(x: &mut [f32], unit: f32) = exp_on
}

#[inline(always)]
fn exp_on<S: Simd>(s: S, x: &mut [f32], unit: f32) {
    for x in x.chunks_exact_mut(S::LANES) {
        // SAFETY: a chunk has LANES elements
        unsafe { s.store(x.as_mut_ptr(), exp::exp(s, s.load(x.as_ptr()), unit)) }
    }
}

dispatch! {
    fn exp2_of(x: &mut [f32], unit: f32) = exp2_on
}

#[inline(always)]
fn exp2_on<S: Simd>(s: S, x: &mut [f32], unit: f32) {
    for x in x.chunks_exact_mut(S::LANES) {
        // SAFETY: a chunk has LANES elements
        unsafe { s.store(x.as_mut_ptr(), exp::exp2(s, s.load(x.as_ptr()), unit)) }
    }
}

dispatch! {
    fn tanh_of(x: &mut [f32]) = tanh_on
}

#[inline(always)]
fn tanh_on<S: Simd>(s: S, x: &mut [f32]) {
    for x in x.chunks_exact_mut(S::LANES) {
        // SAFETY: a chunk has LANES elements
        unsafe { s.store(x.as_mut_ptr(), exp::tanh(s, s.load(x.as_ptr()))) }
    }
}

/// The smallest that is used.
const UNIT: f32 = 1.0 / (1 << 24) as f32;

/// The distance of a result in units of its last place, or of the smallest subnormal.
fn ulps(got: f32, want: f64) -> f64 {
    #[expect(clippy::cast_possible_truncation, reason = "an exponent")]
    let unit = 2f64.powi(((want.abs().log2().floor() as i32) - 23).max(-149));
    (f64::from(got) - want).abs() / unit
}

#[test]
fn exp_is_within_two_ulp() {
    let inputs: Vec<f32> = (0..1 << 20).map(|n| -104.0 * n as f32 / (1 << 20) as f32).collect();
    for level in SimdLevel::available() {
        let mut outputs = inputs.clone();
        exp_of(level, &mut outputs, 1.0);
        let worst = inputs.iter().zip(&outputs).map(|(&x, &y)| ulps(y, f64::from(x).exp())).fold(0.0, f64::max);
        assert!(worst <= 2.0, "{level}: {worst} ulp");
        // a power of two changes no digit of a result that is not subnormal
        let mut scaled = inputs.clone();
        exp_of(level, &mut scaled, UNIT);
        for (&y, &scaled) in outputs.iter().zip(&scaled).filter(|(_, scaled)| **scaled >= f32::MIN_POSITIVE) {
            assert_eq!(scaled.to_bits(), (y * UNIT).to_bits(), "{level}: {y:e}");
        }
        let mut special = [0.0; 16];
        special[..5].copy_from_slice(&[f32::NEG_INFINITY, -105.0, -1e30, f32::NAN, f32::MIN]);
        exp_of(level, &mut special, 1.0);
        assert!(special[3].is_nan(), "{level}");
        assert_eq!((special[0], special[1], special[2], special[4], special[5]), (0.0, 0.0, 0.0, 0.0, 1.0), "{level}");
    }
}

#[test]
fn exp2_is_within_two_ulp() {
    let inputs: Vec<f32> = (0..1 << 20).map(|n| -150.0 * n as f32 / (1 << 20) as f32).collect();
    for level in SimdLevel::available() {
        let mut outputs = inputs.clone();
        exp2_of(level, &mut outputs, 1.0);
        let worst = inputs.iter().zip(&outputs).map(|(&x, &y)| ulps(y, f64::from(x).exp2())).fold(0.0, f64::max);
        assert!(worst <= 2.0, "{level}: {worst} ulp");
        // a power of two changes no digit of a result that is not subnormal
        let mut scaled = inputs.clone();
        exp2_of(level, &mut scaled, UNIT);
        for (&y, &scaled) in outputs.iter().zip(&scaled).filter(|(_, scaled)| **scaled >= f32::MIN_POSITIVE) {
            assert_eq!(scaled.to_bits(), (y * UNIT).to_bits(), "{level}: {y:e}");
        }
        let mut special = [0.0; 16];
        special[..5].copy_from_slice(&[f32::NEG_INFINITY, -152.0, -1e30, f32::NAN, f32::MIN]);
        exp2_of(level, &mut special, 1.0);
        assert!(special[3].is_nan(), "{level}");
        assert_eq!((special[0], special[1], special[2], special[4], special[5]), (0.0, 0.0, 0.0, 0.0, 1.0), "{level}");
    }
}

#[test]
fn tanh_is_within_four_ulp() {
    let inputs: Vec<f32> = (0..1 << 18).map(|n| 24.0 * (n as f32 / (1 << 17) as f32 - 1.0)).collect();
    for level in SimdLevel::available() {
        let mut outputs = inputs.clone();
        tanh_of(level, &mut outputs);
        let worst = inputs
            .iter()
            .zip(&outputs)
            .filter(|(x, _)| **x != 0.0)
            .map(|(&x, &y)| ulps(y, f64::from(x).tanh()))
            .fold(0.0, f64::max);
        assert!(worst <= 4.0, "{level}: {worst} ulp");
    }
}
