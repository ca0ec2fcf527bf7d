//! Vectors of f32 on whatever the machine has, and the kernels over them: the only module with unsafe code.
//!
//! What makes it sound:
//! - A [`SimdLevel`] is made by [`SimdLevel::available`] alone, which asks the processor. Code that needs AVX-512,
//!   AVX2 or NEON is reached only through a level that names it.
//! - Each kernel first compares the lengths of its slices with what its loops will touch, and panics if they do not
//!   fit; behind that it reads and writes by pointer.
//! - [`shared`] hands out each part of a buffer at most once.

#![allow(clippy::too_many_arguments, reason = "the sizes of a kernel")]
#![allow(clippy::needless_range_loop, reason = "what is indexed are registers, by a number that the compiler knows")]
#![allow(clippy::inline_always, reason = "instructions are switched on in the caller")]

use half::{bf16, f16};

mod backward;
mod direct;
mod exp;
mod few;
mod masks;
#[cfg(target_arch = "aarch64")]
mod neon;
mod outer;
#[cfg(feature = "threads")]
mod peak;
mod portable;
pub(super) mod shared;
mod softmax;
mod tiles;
mod turn;
mod widen;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(super) use backward::{RowsBefore, differentiate, differentiate_lines, lane_dots, uncap};
pub(super) use direct::{products, products_stored, weigh_rows};
pub(super) use exp::Exponents;
pub(super) use few::{dots, rescale_rows, weigh, weigh_stored};
pub(super) use masks::{all_finite, ask_for, count, forbid, permit, row_bits};
pub(super) use outer::outer;
#[cfg(feature = "threads")]
pub(super) use peak::{flops_per_round, fma_chains, read_all};
pub(super) use softmax::{
    RowState, add_terms, exp_all, keep_by_bits, keep_in_range, merge_into, scale_lanes, soften, soften_lines,
};
pub(super) use tiles::{accumulate, scores};
pub(super) use turn::{turn_in, turn_out};
pub(super) use widen::{widen_bf16, widen_f16, widen_i8};

/// Rows of a matrix, each a run of elements, `stride` apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Strided<'a, E = f32> {
    pub(super) data: &'a [E],
    pub(super) stride: usize,
}

/// Rows of a matrix in any element.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rows<'a> {
    F32(Strided<'a>),
    F16(Strided<'a, f16>),
    Bf16(Strided<'a, bf16>),
    I8(Strided<'a, i8>),
}

impl<'a, E> Strided<'a, E> {
    /// The same without the first `row` rows; without any, if they are not all there.
    pub(super) fn from(self, row: usize) -> Self {
        let rest: Option<&'a [E]> = row.checked_mul(self.stride).and_then(|start| self.data.get(start..));
        Self { data: rest.unwrap_or_default(), stride: self.stride }
    }

    /// Panics unless `rows` rows of `width` lie in the data.
    fn check(&self, rows: usize, width: usize) {
        let needed = rows.saturating_sub(1).checked_mul(self.stride).and_then(|start| start.checked_add(width));
        assert!(rows == 0 || width == 0 || needed.is_some_and(|needed| needed <= self.data.len()));
    }
}

/// Which instructions the CPU path uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SimdLevel(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "aarch64")]
    Neon,
    Scalar,
}

impl SimdLevel {
    /// Plain Rust, on every machine. It rounds products before it adds them, which the others do not.
    pub const SCALAR: Self = Self(Kind::Scalar);

    /// What this machine has, best first.
    pub fn available() -> impl Iterator<Item = Self> {
        [
            #[cfg(target_arch = "x86_64")]
            (std::arch::is_x86_feature_detected!("avx512f") && std::arch::is_x86_feature_detected!("avx512dq"))
                .then_some(Self(Kind::Avx512)),
            #[cfg(target_arch = "x86_64")]
            (std::arch::is_x86_feature_detected!("avx2")
                && std::arch::is_x86_feature_detected!("fma")
                && std::arch::is_x86_feature_detected!("f16c"))
            .then_some(Self(Kind::Avx2)),
            #[cfg(target_arch = "aarch64")]
            std::arch::is_aarch64_feature_detected!("neon").then_some(Self(Kind::Neon)),
            Some(Self::SCALAR),
        ]
        .into_iter()
        .flatten()
    }

    /// The best that this machine has.
    #[must_use]
    pub fn best() -> Self {
        Self::available().next().unwrap_or(Self::SCALAR)
    }

    /// `avx512`, `avx2`, `neon` or `scalar`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => "neon",
            Kind::Scalar => "scalar",
        }
    }

    /// f32 in a vector.
    #[must_use]
    pub const fn lanes(self) -> usize {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => 16,
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => 8,
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => 4,
            Kind::Scalar => 4,
        }
    }

    /// Most vectors of rows in a tile: what the registers hold beside the broadcast elements.
    pub(super) const fn tile_vectors(self) -> usize {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => 4,
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => 2,
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => 4,
            Kind::Scalar => 2,
        }
    }
}

impl std::fmt::Display for SimdLevel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// One vector unit. The methods are always inlined, into functions that have its instructions switched on.
///
/// A value of an implementing type may exist only on a machine that has the instructions.
trait Simd: Copy {
    type V: Copy;
    const LANES: usize;

    fn splat(self, x: f32) -> Self::V;
    /// `LANES` elements at `from`, which must be readable.
    unsafe fn load(self, from: *const f32) -> Self::V;
    /// `LANES` f16 at `from`, which must be readable.
    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> Self::V {
        let mut lanes = [0.0; 16];
        // SAFETY: no vector has more than 16 lanes; the caller speaks for `from`
        unsafe {
            for l in 0..Self::LANES {
                lanes[l] = f16::from_bits(*from.add(l)).to_f32();
            }
            self.load(lanes.as_ptr())
        }
    }
    /// `LANES` bf16 at `from`, which must be readable.
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> Self::V {
        let mut lanes = [0.0; 16];
        // SAFETY: as above
        unsafe {
            for l in 0..Self::LANES {
                lanes[l] = f32::from_bits(u32::from(*from.add(l)) << 16);
            }
            self.load(lanes.as_ptr())
        }
    }
    /// `LANES` signed bytes at `from`, which must be readable.
    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> Self::V {
        let mut lanes = [0.0; 16];
        // SAFETY: as above
        unsafe {
            for l in 0..Self::LANES {
                lanes[l] = f32::from(*from.add(l));
            }
            self.load(lanes.as_ptr())
        }
    }
    /// `LANES` elements at `to`, which must be writable.
    unsafe fn store(self, to: *mut f32, x: Self::V);
    /// The first `n < LANES` elements at `from`, which must be readable, then zeros.
    unsafe fn load_first(self, from: *const f32, n: usize) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once where the machine can.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `x` rounded to a whole number, for `|x| < 2^22`.
    fn round(self, x: Self::V) -> Self::V;
    /// The larger; `b` where one of the two is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `x` where `a < b`, else `y`.
    fn lt(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// Whether `a < b` anywhere.
    fn any_lt(self, a: Self::V, b: Self::V) -> bool;
    /// `x` in the lanes whose bit is set, counted from the lowest, else negative infinity.
    fn keep(self, bits: u32, x: Self::V) -> Self::V;
    /// A power of two by which the `x` of [`ldexp`](Self::ldexp) comes too large.
    const AHEAD: f32;
    /// `x * 2^n / AHEAD`, rounded once, for whole `n` from -152 to 0 and `x / AHEAD` from 2^-25 to 2; NaN for a NaN. With
    /// `x` so large, `n` can be added to its exponent, and the last product is the one that rounds.
    fn ldexp(self, x: Self::V, n: Self::V) -> Self::V;
    /// Asks for the line of the cache that `at` is in; any address will do.
    #[inline(always)]
    fn prefetch(self, _at: *const f32) {}
    /// Element `k` of a row is lane `row` of `x[k]`: stores `LANES` rows of four, `stride` apart, which must be writable.
    #[inline(always)]
    unsafe fn store_turned(self, x: [Self::V; 4], to: *mut f32, stride: usize) {
        let mut lanes = [[0.0f32; 16]; 4];
        // SAFETY: no vector has more than 16 lanes; the caller speaks for `to`
        unsafe {
            for k in 0..4 {
                self.store(lanes[k].as_mut_ptr(), x[k]);
            }
            for row in 0..Self::LANES {
                for k in 0..4 {
                    *to.add(row * stride + k) = lanes[k][row];
                }
            }
        }
    }
    /// The sum of the lanes of each.
    fn sums(self, x: [Self::V; 4]) -> [f32; 4];
}

/// An element of which a vector unit makes f32.
trait Lane: Copy {
    /// `LANES` elements at `from`, which must be readable.
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::V;
    /// The first `n < LANES` elements at `from`, which must be readable, then zeros.
    unsafe fn load_first<S: Simd>(s: S, from: *const Self, n: usize) -> S::V;
}

impl Lane for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::V {
        // SAFETY: the caller speaks for `from`
        unsafe { s.load(from) }
    }
    #[inline(always)]
    unsafe fn load_first<S: Simd>(s: S, from: *const Self, n: usize) -> S::V {
        // SAFETY: as above
        unsafe { s.load_first(from, n) }
    }
}

macro_rules! lanes {
    ($($element:ty: $zero:expr, $load:ident as $stored:ty;)*) => {$(
        impl Lane for $element {
            #[inline(always)]
            unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::V {
                // SAFETY: the caller speaks for `from`; the element is a number of its bits
                unsafe { s.$load(from.cast::<$stored>()) }
            }
            #[inline(always)]
            unsafe fn load_first<S: Simd>(s: S, from: *const Self, n: usize) -> S::V {
                let mut first = [$zero; 16];
                // SAFETY: as above; no vector has more than 16 lanes
                unsafe {
                    for l in 0..n {
                        first[l] = *from.add(l);
                    }
                    s.$load(first.as_ptr().cast::<$stored>())
                }
            }
        }
    )*};
}
lanes! {
    f16: f16::ZERO, load_f16 as u16;
    bf16: bf16::ZERO, load_bf16 as u16;
    i8: 0, load_i8 as i8;
}

/// [`Simd::AHEAD`] where no instruction adds to an exponent: half of the way down to 2^-152.
const HALF_WAY: f32 = (1u128 << 76) as f32;

/// Defines a function that takes a level and calls `$generic` with the vector unit of that level.
macro_rules! dispatch {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $generic:path) => {
        $(#[$doc])*
        pub(in crate::cpu) fn $name(level: $crate::cpu::simd::SimdLevel, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512dq,avx2,fma")]
            fn avx512($($arg: $ty),*) $(-> $ret)? {
                $generic($crate::cpu::simd::x86::Avx512, $($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $ty),*) $(-> $ret)? {
                $generic($crate::cpu::simd::x86::Avx2, $($arg),*)
            }
            #[cfg(target_arch = "aarch64")]
            #[target_feature(enable = "neon")]
            fn neon($($arg: $ty),*) $(-> $ret)? {
                $generic($crate::cpu::simd::neon::Neon, $($arg),*)
            }
            match level.0 {
                // SAFETY: a level exists only where the processor was asked for these features
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::simd::Kind::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::simd::Kind::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: as above
                #[cfg(target_arch = "aarch64")]
                $crate::cpu::simd::Kind::Neon => unsafe { neon($($arg),*) },
                $crate::cpu::simd::Kind::Scalar => $generic($crate::cpu::simd::portable::Portable, $($arg),*),
            }
        }
    };
}
use dispatch;

/// An array from a formula for its elements. A closure would do, but closures do not inherit the instructions that are
/// switched on around them, and are then not inlined.
macro_rules! array {
    ($n:expr; $i:ident => $of:expr) => {{
        let mut all = [{
            let $i = 0;
            $of
        }; $n];
        let mut at = 1;
        while at < $n {
            let $i = at;
            all[at] = $of;
            at += 1;
        }
        all
    }};
}
use array;

#[cfg(test)]
mod tests;
