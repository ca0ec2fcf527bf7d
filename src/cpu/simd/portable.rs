//! Plain Rust, for machines without a vector unit that is known here.

use super::{HALF_WAY, Simd};

/// Four f32 side by side, which compilers turn into whatever vectors are there.
#[derive(Clone, Copy)]
pub(super) struct Portable;

impl Simd for Portable {
    type V = [f32; 4];
    const LANES: usize = 4;
    const AHEAD: f32 = HALF_WAY;

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 4] {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> [f32; 4] {
        // SAFETY: the caller says so
        unsafe { from.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: [f32; 4]) {
        // SAFETY: the caller says so
        unsafe { to.cast::<[f32; 4]>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn load_first(self, from: *const f32, n: usize) -> [f32; 4] {
        // SAFETY: the caller says so
        std::array::from_fn(|i| if i < n { unsafe { *from.add(i) } } else { 0.0 })
    }
    #[inline(always)]
    fn add(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn fma(self, a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn round(self, x: [f32; 4]) -> [f32; 4] {
        const ROUND: f32 = 12_582_912.0;
        x.map(|x| (x + ROUND) - ROUND)
    }
    #[inline(always)]
    fn max(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn lt(self, a: [f32; 4], b: [f32; 4], x: [f32; 4], y: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| if a[i] < b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn any_lt(self, a: [f32; 4], b: [f32; 4]) -> bool {
        (0..4).any(|i| a[i] < b[i])
    }
    #[inline(always)]
    fn keep(self, bits: u32, x: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| if bits >> i & 1 == 1 { x[i] } else { f32::NEG_INFINITY })
    }
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "a whole number from -152 to 0")]
    fn ldexp(self, x: [f32; 4], n: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| {
            let n = (n[i] as i32).cast_unsigned() << 23;
            f32::from_bits(x[i].to_bits().wrapping_add(n)) * (1.0 / HALF_WAY)
        })
    }
    #[inline(always)]
    fn sums(self, x: [[f32; 4]; 4]) -> [f32; 4] {
        x.map(|x| (x[0] + x[2]) + (x[1] + x[3]))
    }
}
