//! Stored elements in f32.

use super::{Simd, dispatch};

dispatch! {
    /// The f32s whose upper halves these are; both have one length.
    fn widen_bf16(bits: &[u16], out: &mut [f32]) = widen_bf16_on
}

dispatch! {
    /// Bytes times their scale, each rounded once; both have one length.
    fn widen_i8(bytes: &[i8], scale: f32, out: &mut [f32]) = widen_i8_on
}

// plain loops, compiled for each unit
#[inline(always)]
fn widen_bf16_on<S: Simd>(_: S, bits: &[u16], out: &mut [f32]) {
    for (x, &bits) in out.iter_mut().zip(bits) {
        *x = f32::from_bits(u32::from(bits) << 16);
    }
}

#[inline(always)]
fn widen_i8_on<S: Simd>(_: S, bytes: &[i8], scale: f32, out: &mut [f32]) {
    for (x, &byte) in out.iter_mut().zip(bytes) {
        *x = f32::from(byte) * scale;
    }
}
