//! NEON of 64-bit ARM.

use std::arch::aarch64::*;

use super::{HALF_WAY, Simd};

/// Advanced SIMD with fused multiply-add.
#[derive(Clone, Copy)]
pub(super) struct Neon;

// SAFETY of all of the below: a value of this type exists only where the feature is there, see the module's head; loads
// and stores are as sound as their pointers
impl Simd for Neon {
    type V = float32x4_t;
    const LANES: usize = 4;
    const AHEAD: f32 = HALF_WAY;

    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        unsafe { vdupq_n_f32(x) }
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> float32x4_t {
        unsafe { vld1q_f32(from) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: float32x4_t) {
        unsafe { vst1q_f32(to, x) }
    }
    #[inline(always)]
    unsafe fn load_first(self, from: *const f32, n: usize) -> float32x4_t {
        // SAFETY: the caller says so
        let first: [f32; 4] = std::array::from_fn(|i| if i < n { unsafe { *from.add(i) } } else { 0.0 });
        unsafe { vld1q_f32(first.as_ptr()) }
    }
    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vsubq_f32(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    fn div(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vdivq_f32(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    fn round(self, x: float32x4_t) -> float32x4_t {
        unsafe { vrndnq_f32(x) }
    }
    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // its own maximum is NaN where either is
        unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
    }
    #[inline(always)]
    fn lt(self, a: float32x4_t, b: float32x4_t, x: float32x4_t, y: float32x4_t) -> float32x4_t {
        unsafe { vbslq_f32(vcltq_f32(a, b), x, y) }
    }
    #[inline(always)]
    fn any_lt(self, a: float32x4_t, b: float32x4_t) -> bool {
        unsafe { vmaxvq_u32(vcltq_f32(a, b)) != 0 }
    }
    #[inline(always)]
    fn keep(self, bits: u32, x: float32x4_t) -> float32x4_t {
        const OF_LANE: [u32; 4] = [1, 2, 4, 8];
        unsafe {
            let kept = vtstq_u32(vdupq_n_u32(bits), vld1q_u32(OF_LANE.as_ptr()));
            vbslq_f32(kept, x, vdupq_n_f32(f32::NEG_INFINITY))
        }
    }
    #[inline(always)]
    fn ldexp(self, x: float32x4_t, n: float32x4_t) -> float32x4_t {
        unsafe {
            let n = vshlq_n_s32::<23>(vcvtq_s32_f32(n));
            let x = vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(x), n));
            vmulq_f32(x, vdupq_n_f32(1.0 / HALF_WAY))
        }
    }
    #[inline(always)]
    fn prefetch(self, at: *const f32) {
        // SAFETY: a hint, for which any address will do
        unsafe { std::arch::asm!("prfm pldl1keep, [{}]", in(reg) at, options(nostack, readonly, preserves_flags)) }
    }
    #[inline(always)]
    unsafe fn store_turned(self, x: [float32x4_t; 4], to: *mut f32, stride: usize) {
        unsafe {
            let pairs = |a, b| (vreinterpretq_f64_f32(vtrn1q_f32(a, b)), vreinterpretq_f64_f32(vtrn2q_f32(a, b)));
            let ((a, b), (c, d)) = (pairs(x[0], x[1]), pairs(x[2], x[3]));
            let rows = [vzip1q_f64(a, c), vzip1q_f64(b, d), vzip2q_f64(a, c), vzip2q_f64(b, d)];
            for k in 0..4 {
                vst1q_f32(to.add(k * stride), vreinterpretq_f32_f64(rows[k]));
            }
        }
    }
    #[inline(always)]
    fn sums(self, x: [float32x4_t; 4]) -> [f32; 4] {
        unsafe {
            let sums = vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3]));
            std::mem::transmute::<float32x4_t, [f32; 4]>(sums)
        }
    }
}
