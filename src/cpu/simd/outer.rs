//! The products of a backward that sum over rows: columns along the lanes, a sum for each key.

use super::{Simd, Strided, array, dispatch};

dispatch! {
    /// `out[key] (+)= sum over rows of weights[key, row] * x[row]` for `n` keys and `rows` rows of `dim` columns; weights are
    /// `strides` of keys and rows apart, rows of `out` are `dim` apart.
    fn outer(weights: &[f32], strides: [usize; 2], x: Strided<'_>, rows: usize, n: usize, dim: usize, out: &mut [f32],
        fresh: bool) = outer_on
}

#[inline(always)]
fn outer_on<S: Simd>(
    s: S,
    weights: &[f32],
    strides: [usize; 2],
    x: Strided<'_>,
    rows: usize,
    n: usize,
    dim: usize,
    out: &mut [f32],
    fresh: bool,
) {
    let [of_key, of_row] = strides;
    assert!(rows == 0 || n == 0 || weights.len() > (n - 1) * of_key + (rows - 1) * of_row);
    assert!(out.len() >= n * dim);
    x.check(rows, dim);
    let (w, x_at, o) = (weights.as_ptr(), x.data.as_ptr(), out.as_mut_ptr());
    // SAFETY: the lengths were compared above; tiles stay within n, rows and dim
    unsafe {
        let mut d = 0;
        macro_rules! by {
            ($vectors:literal: $($keys:literal)*) => {
                while dim - d >= $vectors * S::LANES {
                    let mut j = 0;
                    $(
                        while n - j >= $keys {
                            let (w, o) = (w.add(j * of_key), o.add(j * dim + d));
                            outer_tile::<S, $keys, $vectors>(s, w, strides, x_at.add(d), x.stride, rows, o, dim, fresh);
                            j += $keys;
                        }
                    )*
                    d += $vectors * S::LANES;
                }
            };
        }
        match S::LANES {
            8 => {
                by!(2: 6 3 2 1);
                by!(1: 8 4 2 1);
            }
            _ => {
                by!(4: 6 3 2 1);
                by!(3: 8 4 2 1);
                by!(2: 12 6 3 2 1);
                by!(1: 12 6 3 2 1);
            }
        }
        if d < dim {
            let mut j = 0;
            macro_rules! rest {
                ($($keys:literal)*) => {$(
                    while n - j >= $keys {
                        let (w, o) = (w.add(j * of_key), o.add(j * dim + d));
                        outer_rest::<S, $keys>(s, w, strides, x_at.add(d), x.stride, rows, dim - d, o, dim, fresh);
                        j += $keys;
                    }
                )*};
            }
            rest!(8 4 2 1);
        }
    }
}

#[inline(always)]
unsafe fn outer_tile<S: Simd, const KEYS: usize, const VECTORS: usize>(
    s: S,
    weights: *const f32,
    [of_key, of_row]: [usize; 2],
    x: *const f32,
    x_stride: usize,
    rows: usize,
    out: *mut f32,
    out_stride: usize,
    fresh: bool,
) {
    // SAFETY: the caller compared the lengths
    unsafe {
        let mut acc = [[s.splat(0.0); VECTORS]; KEYS];
        for r in 0..rows {
            let (w, x) = (weights.add(r * of_row), x.wrapping_add(r * x_stride));
            let x = array![VECTORS; v => s.load(x.add(v * S::LANES))];
            for k in 0..KEYS {
                let w = s.splat(*w.add(k * of_key));
                for v in 0..VECTORS {
                    acc[k][v] = s.fma(w, x[v], acc[k][v]);
                }
            }
        }
        for k in 0..KEYS {
            for v in 0..VECTORS {
                let at = out.add(k * out_stride + v * S::LANES);
                let sum = if fresh { acc[k][v] } else { s.add(s.load(at), acc[k][v]) };
                s.store(at, sum);
            }
        }
    }
}

/// The last columns, fewer than a vector.
#[inline(always)]
unsafe fn outer_rest<S: Simd, const KEYS: usize>(
    s: S,
    weights: *const f32,
    [of_key, of_row]: [usize; 2],
    x: *const f32,
    x_stride: usize,
    rows: usize,
    columns: usize,
    out: *mut f32,
    out_stride: usize,
    fresh: bool,
) {
    // SAFETY: the caller compared the lengths; no vector has more than 16 lanes
    unsafe {
        let mut acc = [s.splat(0.0); KEYS];
        for r in 0..rows {
            let w = weights.add(r * of_row);
            let x = s.load_first(x.wrapping_add(r * x_stride), columns);
            for k in 0..KEYS {
                acc[k] = s.fma(s.splat(*w.add(k * of_key)), x, acc[k]);
            }
        }
        for k in 0..KEYS {
            let mut lanes = [0.0f32; 16];
            s.store(lanes.as_mut_ptr(), acc[k]);
            for d in 0..columns {
                let at = out.add(k * out_stride + d);
                *at = if fresh { lanes[d] } else { *at + lanes[d] };
            }
        }
    }
}
