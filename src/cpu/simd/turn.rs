//! Rows into lanes, and lanes into rows.

use std::mem::MaybeUninit;

use super::shared::Fresh;
use super::{Simd, SimdLevel, array, dispatch};

dispatch! {
    /// Puts four rows of one length into lanes `lane..lane + 4` of `out[column][width]`.
    fn turn_in(rows: [&[f32]; 4], width: usize, lane: usize, out: &mut [f32]) = turn_in_on
}

/// Puts a vector of lanes, from `lane` on, of `acc[column][width]`, times `by[lane]`, into rows of `columns` elements.
pub(in crate::cpu) fn turn_out<'a>(
    level: SimdLevel,
    acc: &[f32],
    width: usize,
    lane: usize,
    columns: usize,
    by: &[f32],
    mut rows: Fresh<'a>,
) -> &'a mut [f32] {
    assert_eq!(rows.elements().len(), level.lanes() * columns);
    turn_out_of(level, acc, width, lane, columns, by, rows.elements());
    // SAFETY: every column of every row was stored
    unsafe { rows.written() }
}

dispatch! {
    fn turn_out_of(acc: &[f32], width: usize, lane: usize, columns: usize, by: &[f32], rows: &mut [MaybeUninit<f32>])
        = turn_out_on
}

#[inline(always)]
fn turn_in_on<S: Simd>(s: S, rows: [&[f32]; 4], width: usize, lane: usize, out: &mut [f32]) {
    let len = rows[0].len();
    assert!(rows[1].len() == len && rows[2].len() == len && rows[3].len() == len);
    assert!(lane + 4 <= width && out.len() >= len * width);
    let mut d = 0;
    while len - d >= S::LANES {
        // SAFETY: d + LANES <= len and lane + 4 <= width, within the lengths compared above
        unsafe {
            let x = array![4; r => s.load(rows[r].as_ptr().add(d))];
            s.store_turned(x, out.as_mut_ptr().add(d * width + lane), width);
        }
        d += S::LANES;
    }
    for d in d..len {
        for (r, row) in rows.iter().enumerate() {
            out[d * width + lane + r] = row[d];
        }
    }
}

#[inline(always)]
fn turn_out_on<S: Simd>(
    s: S,
    acc: &[f32],
    width: usize,
    lane: usize,
    columns: usize,
    by: &[f32],
    rows: &mut [MaybeUninit<f32>],
) {
    assert!(lane + S::LANES <= width && acc.len() >= columns * width);
    assert!(by.len() >= lane + S::LANES && rows.len() >= S::LANES * columns);
    let mut d = 0;
    while columns - d >= 4 {
        // SAFETY: d + 4 <= columns and lane + LANES <= width, within the lengths compared above
        unsafe {
            let factor = s.load(by.as_ptr().add(lane));
            let x = array![4; k => s.mul(s.load(acc.as_ptr().add((d + k) * width + lane)), factor)];
            s.store_turned(x, rows.as_mut_ptr().cast::<f32>().add(d), columns);
        }
        d += 4;
    }
    for d in d..columns {
        for r in 0..S::LANES {
            rows[r * columns + d].write(acc[d * width + lane + r] * by[lane + r]);
        }
    }
}
