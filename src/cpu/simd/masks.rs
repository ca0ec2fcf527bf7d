//! What boolean masks, and values that must stay hidden, are asked.

use super::{Simd, Strided, dispatch};

dispatch! {
    /// How many keys a line of a mask allows.
    fn count(mask: &[bool]) -> usize = count_on
}

dispatch! {
    /// Makes every element negative infinity whose key is not allowed; `mask` and `line` have one length.
    fn forbid(mask: &[bool], line: &mut [f32]) = forbid_on
}

dispatch! {
    /// Makes every element 0 whose key is allowed, else negative infinity; `mask` and `line` have one length.
    fn permit(mask: &[bool], line: &mut [f32]) = permit_on
}

dispatch! {
    /// For each of `bits.len()` keys, which of up to 64 rows see it; a row's line of the mask begins at its start.
    fn row_bits(mask: &[bool], starts: &[usize], bits: &mut [u64]) = row_bits_on
}

dispatch! {
    /// Whether the first `n` rows have neither infinity nor NaN in their first `dim` elements.
    fn all_finite(rows: Strided<'_>, n: usize, dim: usize) -> bool = all_finite_on
}

dispatch! {
    /// Asks for a line of memory that will be read.
    fn ask_for(line: &[u8]) = ask_for_on
}

dispatch! {
    /// Asks for so many bytes from an address on, whatever it is.
    fn ask_for_at(from: *const u8, bytes: usize) = ask_for_at_on
}

// plain loops, compiled for each unit
#[inline(always)]
fn count_on<S: Simd>(_: S, mask: &[bool]) -> usize {
    // by no more than a byte can count
    mask.chunks(128).map(|part| usize::from(part.iter().fold(0, |n: u8, &m| n + u8::from(m)))).sum()
}

#[inline(always)]
fn forbid_on<S: Simd>(_: S, mask: &[bool], line: &mut [f32]) {
    for (x, &allowed) in line.iter_mut().zip(mask) {
        *x = if allowed { *x } else { f32::NEG_INFINITY };
    }
}

#[inline(always)]
fn permit_on<S: Simd>(_: S, mask: &[bool], line: &mut [f32]) {
    for (x, &allowed) in line.iter_mut().zip(mask) {
        *x = if allowed { 0.0 } else { f32::NEG_INFINITY };
    }
}

/// Keys that are taken at once: their bits of 16 rows are a vector or two.
const AT_ONCE: usize = 32;

#[inline(always)]
fn row_bits_on<S: Simd>(_: S, mask: &[bool], starts: &[usize], bits: &mut [u64]) {
    assert!(starts.len() <= 64);
    for (part, bits) in bits.chunks_mut(AT_ONCE).enumerate() {
        bits.fill(0);
        for (group, starts) in starts.chunks(16).enumerate() {
            let mut of_group = [0u16; AT_ONCE];
            for (r, &start) in starts.iter().enumerate() {
                let line = &mask[start + part * AT_ONCE..][..bits.len()];
                match line.first_chunk::<AT_ONCE>() {
                    Some(line) => {
                        for k in 0..AT_ONCE {
                            of_group[k] |= u16::from(line[k]) << r;
                        }
                    }
                    None => line.iter().zip(&mut of_group).for_each(|(&m, bits)| *bits |= u16::from(m) << r),
                }
            }
            for (bits, of_group) in bits.iter_mut().zip(of_group) {
                *bits |= u64::from(of_group) << (16 * group);
            }
        }
    }
}

#[inline(always)]
fn all_finite_on<S: Simd>(s: S, rows: Strided<'_>, n: usize, dim: usize) -> bool {
    rows.check(n, dim);
    // 0 * x is 0 but for infinity and NaN
    let zero = s.splat(0.0);
    let mut all = [zero; 4];
    let mut rest = 0.0;
    for j in 0..n {
        // SAFETY: row j < n has dim elements, as compared above
        unsafe {
            let row = rows.data.as_ptr().add(j * rows.stride);
            let mut d = 0;
            while dim - d >= 4 * S::LANES {
                for k in 0..4 {
                    all[k] = s.fma(s.load(row.add(d + k * S::LANES)), zero, all[k]);
                }
                d += 4 * S::LANES;
            }
            while dim - d >= S::LANES {
                all[0] = s.fma(s.load(row.add(d)), zero, all[0]);
                d += S::LANES;
            }
            for d in d..dim {
                rest += 0.0 * *row.add(d);
            }
        }
    }
    let mut lanes = [0.0; 16];
    // SAFETY: no vector has more than 16 lanes
    unsafe { s.store(lanes.as_mut_ptr(), s.add(s.add(all[0], all[1]), s.add(all[2], all[3]))) };
    rest == 0.0 && lanes.iter().all(|&x| x == 0.0)
}

#[inline(always)]
fn ask_for_on<S: Simd>(s: S, line: &[u8]) {
    ask_for_at_on(s, line.as_ptr(), line.len());
}

#[inline(always)]
fn ask_for_at_on<S: Simd>(s: S, from: *const u8, bytes: usize) {
    // 64 bytes is a line of every cache here
    (0..bytes).step_by(64).for_each(|at| s.prefetch(from.wrapping_add(at).cast()));
}
