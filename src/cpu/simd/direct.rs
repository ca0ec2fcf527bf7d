//! The two products of attention for rows as they are stored: columns along the lanes, and no row is turned.

use std::mem::MaybeUninit;

use super::shared::Fresh;
use super::{Lane, Rows, Simd, SimdLevel, Strided, array, dispatch};

dispatch! {
    /// `out[i][j] = scale * dot(a[i], b[j])` for `rows` rows of `a` and `n` of `b`; rows of `out` are `width` apart. The rows
    /// of `a` are few and read again and again. The next rows of `b`, and as many of `ahead`, are asked for on the way.
    fn products(a: Strided<'_>, rows: usize, b: Strided<'_>, n: usize, dim: usize, scale: f32, out: &mut [f32],
        width: usize, ahead: Strided<'_>) = products_on
}

dispatch! {
    /// [`products`] with rows of `b` as they are stored; nothing is asked for.
    fn products_stored(a: Strided<'_>, rows: usize, b: Rows<'_>, n: usize, dim: usize, scale: f32, out: &mut [f32],
        width: usize) = products_stored_on
}

/// `out[row] = by[row] * sum over keys of weights[key][row] * value` for `n` keys and `rows` rows, which are all of `out`; rows
/// of `weights` are `width` apart.
pub(in crate::cpu) fn weigh_rows<'a>(
    level: SimdLevel,
    weights: &[f32],
    width: usize,
    rows: usize,
    value: Strided<'_>,
    n: usize,
    dim: usize,
    by: &[f32],
    mut out: Fresh<'a>,
) -> &'a mut [f32] {
    assert_eq!(out.elements().len(), rows * dim);
    weigh_rows_of(level, weights, width, rows, value, n, dim, by, out.elements());
    // SAFETY: every column of every row was stored
    unsafe { out.written() }
}

dispatch! {
    fn weigh_rows_of(weights: &[f32], width: usize, rows: usize, value: Strided<'_>, n: usize, dim: usize, by: &[f32],
        out: &mut [MaybeUninit<f32>]) = weigh_rows_on
}

#[inline(always)]
fn products_stored_on<S: Simd>(
    s: S,
    a: Strided<'_>,
    rows: usize,
    b: Rows<'_>,
    n: usize,
    dim: usize,
    scale: f32,
    out: &mut [f32],
    width: usize,
) {
    let none = Strided { data: &[], stride: 0 };
    match b {
        Rows::F32(b) => products_on(s, a, rows, b, n, dim, scale, out, width, none),
        Rows::F16(b) => products_on(s, a, rows, b, n, dim, scale, out, width, none),
        Rows::Bf16(b) => products_on(s, a, rows, b, n, dim, scale, out, width, none),
        Rows::I8(b) => products_on(s, a, rows, b, n, dim, scale, out, width, none),
    }
}

#[inline(always)]
fn products_on<S: Simd, E: Lane>(
    s: S,
    a: Strided<'_>,
    rows: usize,
    b: Strided<'_, E>,
    n: usize,
    dim: usize,
    scale: f32,
    out: &mut [f32],
    width: usize,
    ahead: Strided<'_>,
) {
    assert!(n <= width && out.len() >= rows * width);
    a.check(rows, dim);
    b.check(n, dim);
    let (x, y, o) = (a.data.as_ptr(), b.data.as_ptr(), out.as_mut_ptr());
    // strides may be anything where there is one row, and any address will do
    let next = ahead.data.as_ptr();
    let (stride, dense) = (b.stride, b.stride == dim && ahead.stride == dim);
    // rows of a line or less that follow each other are seen coming by any processor
    let ask = !ahead.data.is_empty() && (dim > 16 || !dense);
    // SAFETY: the lengths were compared above; tiles stay within rows, n and dim
    unsafe {
        let mut j = 0;
        macro_rules! by {
            ($columns:literal: $($rows:literal)*) => {
                while n - j >= $columns {
                    if ask {
                        let b = y.wrapping_add((j + 2 * $columns).wrapping_mul(b.stride));
                        let next = next.wrapping_add(j.wrapping_mul(ahead.stride));
                        // rows that follow each other are one
                        let (runs, width): (usize, usize) = if dense { (1, $columns * dim) } else { ($columns, dim) };
                        for k in 0..runs {
                            let b = b.wrapping_add(k.wrapping_mul(stride));
                            let next = next.wrapping_add(k.wrapping_mul(ahead.stride));
                            for d in (0..width).step_by(16) {
                                s.prefetch(b.wrapping_add(d).cast());
                                s.prefetch(next.wrapping_add(d));
                            }
                        }
                    }
                    let mut i = 0;
                    $(
                        // not three of four: one row left would wait for its sums
                        while rows - i >= $rows && ($rows != 3 || rows - i != 4) {
                            let (x, y, o) = (x.add(i * a.stride), y.add(j * b.stride), o.add(i * width + j));
                            product_tile::<S, E, $rows, $columns>(s, x, a.stride, y, b.stride, dim, scale, o, width);
                            i += $rows;
                        }
                    )*
                    j += $columns;
                }
            };
        }
        if rows == 1 {
            by!(8: 1);
        }
        by!(4: 3 2 1);
        by!(1: 3 2 1);
    }
}

/// `B` is 1 or a multiple of four.
#[inline(always)]
unsafe fn product_tile<S: Simd, E: Lane, const A: usize, const B: usize>(
    s: S,
    a: *const f32,
    a_stride: usize,
    b: *const E,
    b_stride: usize,
    dim: usize,
    scale: f32,
    out: *mut f32,
    width: usize,
) {
    let mut acc = [[s.splat(0.0); B]; A];
    unsafe {
        let a = array![A; i => a.add(i * a_stride)];
        let b = array![B; j => b.add(j * b_stride)];
        let mut d = 0;
        while dim - d >= S::LANES {
            let x = array![A; i => s.load(a[i].add(d))];
            for j in 0..B {
                let y = E::load(s, b[j].add(d));
                for i in 0..A {
                    acc[i][j] = s.fma(x[i], y, acc[i][j]);
                }
            }
            d += S::LANES;
        }
        if d < dim {
            let x = array![A; i => s.load_first(a[i].add(d), dim - d)];
            for j in 0..B {
                let y = E::load_first(s, b[j].add(d), dim - d);
                for i in 0..A {
                    acc[i][j] = s.fma(x[i], y, acc[i][j]);
                }
            }
        }
        for i in 0..A {
            for j in (0..B).step_by(4) {
                let four = array![4; k => acc[i][(j + k) % B]];
                let sums = s.sums(four).map(|sum| scale * sum);
                let to = out.add(i * width + j);
                if B == 1 {
                    *to = sums[0];
                } else {
                    to.cast::<[f32; 4]>().write_unaligned(sums);
                }
            }
        }
    }
}

#[inline(always)]
fn weigh_rows_on<S: Simd>(
    s: S,
    weights: &[f32],
    width: usize,
    rows: usize,
    value: Strided<'_>,
    n: usize,
    dim: usize,
    by: &[f32],
    out: &mut [MaybeUninit<f32>],
) {
    assert!(rows <= width && weights.len() >= n * width && by.len() >= rows && out.len() >= rows * dim);
    value.check(n, dim);
    let (w, x, o, f) = (weights.as_ptr(), value.data.as_ptr(), out.as_mut_ptr().cast::<f32>(), by.as_ptr());
    // SAFETY: the lengths were compared above; tiles stay within rows, n and dim
    unsafe {
        let mut r = 0;
        macro_rules! by {
            ($($rows:literal)*) => {$(
                while rows - r >= $rows {
                    let (w, o, f) = (w.add(r), o.add(r * dim), f.add(r));
                    if dim < S::LANES {
                        weigh_narrow::<S, $rows>(s, w, width, x, value.stride, n, dim, f, o);
                    } else {
                        let mut d = 0;
                        while dim - d >= 3 * S::LANES {
                            weigh_tile::<S, $rows, 3>(s, w, width, x.add(d), value.stride, n, f, o.add(d), dim);
                            d += 3 * S::LANES;
                        }
                        if dim - d >= 2 * S::LANES {
                            weigh_tile::<S, $rows, 2>(s, w, width, x.add(d), value.stride, n, f, o.add(d), dim);
                            d += 2 * S::LANES;
                        }
                        // the last vector may overlap the one before: the same sums once more
                        while d < dim {
                            let at = d.min(dim - S::LANES);
                            weigh_tile::<S, $rows, 1>(s, w, width, x.add(at), value.stride, n, f, o.add(at), dim);
                            d += S::LANES;
                        }
                    }
                    r += $rows;
                }
            )*};
        }
        by!(4 2 1);
    }
}

#[inline(always)]
unsafe fn weigh_tile<S: Simd, const ROWS: usize, const VECTORS: usize>(
    s: S,
    weights: *const f32,
    width: usize,
    value: *const f32,
    value_stride: usize,
    n: usize,
    by: *const f32,
    out: *mut f32,
    out_stride: usize,
) {
    let mut acc = [[s.splat(0.0); VECTORS]; ROWS];
    unsafe {
        let (mut weights, mut value) = (weights, value);
        for _ in 0..n {
            let x = array![VECTORS; v => s.load(value.add(v * S::LANES))];
            for m in 0..ROWS {
                let w = s.splat(*weights.add(m));
                for v in 0..VECTORS {
                    acc[m][v] = s.fma(w, x[v], acc[m][v]);
                }
            }
            // the last step may leave the buffer, where a pointer is not used any more
            (weights, value) = (weights.wrapping_add(width), value.wrapping_add(value_stride));
        }
        for m in 0..ROWS {
            let by = s.splat(*by.add(m));
            for v in 0..VECTORS {
                s.store(out.add(m * out_stride + v * S::LANES), s.mul(acc[m][v], by));
            }
        }
    }
}

/// Rows of fewer columns than a vector has lanes.
#[inline(always)]
unsafe fn weigh_narrow<S: Simd, const ROWS: usize>(
    s: S,
    weights: *const f32,
    width: usize,
    value: *const f32,
    value_stride: usize,
    n: usize,
    columns: usize,
    by: *const f32,
    out: *mut f32,
) {
    let mut acc = [s.splat(0.0); ROWS];
    unsafe {
        for j in 0..n {
            let x = s.load_first(value.add(j * value_stride), columns);
            for m in 0..ROWS {
                acc[m] = s.fma(s.splat(*weights.add(j * width + m)), x, acc[m]);
            }
        }
        for m in 0..ROWS {
            let mut lanes = [0.0f32; 16];
            s.store(lanes.as_mut_ptr(), s.mul(acc[m], s.splat(*by.add(m))));
            for d in 0..columns {
                *out.add(m * columns + d) = lanes[d];
            }
        }
    }
}
