//! The products of a backward that sum over rows: columns along the lanes, a sum for each key.

use super::{Simd, Strided, dispatch};

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
    let (w, o) = (weights.as_ptr(), out.as_mut_ptr());
    // as many vectors of columns at once as leave registers for sums of several keys
    let most = if S::LANES == 8 { 2 } else { 4 };
    // SAFETY: the lengths were compared above; tiles stay within n, rows and dim
    unsafe {
        let mut d = 0;
        while d < dim {
            let vectors = (dim - d).div_ceil(S::LANES).min(most);
            // the last vector may have fewer columns than lanes
            let last = (dim - d - (vectors - 1) * S::LANES).min(S::LANES);
            let mut j = 0;
            macro_rules! by {
                ($vectors:literal: $($keys:literal)*) => {{$(
                    while n - j >= $keys {
                        let (w, x, o) = (w.add(j * of_key), Strided { data: x.data.get(d..).unwrap_or_default(), ..x }, o.add(j * dim + d));
                        if last == S::LANES {
                            outer_tile::<S, $keys, $vectors, true>(s, w, strides, x, rows, last, o, dim, fresh);
                        } else {
                            outer_tile::<S, $keys, $vectors, false>(s, w, strides, x, rows, last, o, dim, fresh);
                        }
                        j += $keys;
                    }
                )*}};
            }
            match (vectors, S::LANES) {
                (4, _) => by!(4: 6 3 2 1),
                (3, _) => by!(3: 8 4 2 1),
                (2, 8) => by!(2: 6 3 2 1),
                (2, _) => by!(2: 12 6 3 2 1),
                (_, 8) => by!(1: 8 4 2 1),
                _ => by!(1: 12 6 3 2 1),
            }
            d += (vectors - 1) * S::LANES + last;
        }
    }
}

/// All vectors are `WHOLE`, or the last has `last` columns.
#[inline(always)]
unsafe fn outer_tile<S: Simd, const KEYS: usize, const VECTORS: usize, const WHOLE: bool>(
    s: S,
    weights: *const f32,
    [of_key, of_row]: [usize; 2],
    x: Strided<'_>,
    rows: usize,
    last: usize,
    out: *mut f32,
    out_stride: usize,
    fresh: bool,
) {
    // SAFETY: the caller compared the lengths; no vector has more than 16 lanes
    unsafe {
        let mut acc = [[s.splat(0.0); VECTORS]; KEYS];
        for r in 0..rows {
            let (w, x) = (weights.add(r * of_row), x.data.as_ptr().add(r * x.stride));
            let mut vectors = [s.splat(0.0); VECTORS];
            for v in 0..VECTORS {
                let at = x.add(v * S::LANES);
                vectors[v] = if WHOLE || v + 1 < VECTORS { s.load(at) } else { s.load_first(at, last) };
            }
            for k in 0..KEYS {
                let w = s.splat(*w.add(k * of_key));
                for v in 0..VECTORS {
                    acc[k][v] = s.fma(w, vectors[v], acc[k][v]);
                }
            }
        }
        for k in 0..KEYS {
            for v in 0..VECTORS {
                let at = out.add(k * out_stride + v * S::LANES);
                if WHOLE || v + 1 < VECTORS {
                    let sum = if fresh { acc[k][v] } else { s.add(s.load(at), acc[k][v]) };
                    s.store(at, sum);
                    continue;
                }
                let mut lanes = [0.0f32; 16];
                let before = if fresh { s.splat(0.0) } else { s.load_first(at, last) };
                s.store(lanes.as_mut_ptr(), s.add(before, acc[k][v]));
                std::ptr::copy_nonoverlapping(lanes.as_ptr(), at, last);
            }
        }
    }
}
