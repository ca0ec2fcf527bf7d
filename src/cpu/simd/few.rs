//! The two products of attention for a few rows: columns along the lanes, each row of keys and values read once for all
//! query rows.

use super::{Lane, Rows, Simd, Strided, array, dispatch};

dispatch! {
    /// `out[key][row] = scale * dot(query[row], key)` for `n` keys; rows of `out` are `width` apart. The next
    /// keys and the rows of `value` are asked for on the way.
    fn dots(query: Strided<'_>, rows: usize, key: Strided<'_>, n: usize, dim: usize, scale: f32, out: &mut [f32],
        width: usize, value: Strided<'_>) = dots_on
}

dispatch! {
    /// `acc[row] += sum over keys of weight * value` for `n` keys; weights are `strides` of keys and rows apart, rows of `acc`
    /// `acc_stride`, and these are padded with anything to whole vectors.
    fn weigh(weights: &[f32], strides: [usize; 2], rows: usize, value: Strided<'_>, n: usize, dim: usize, acc: &mut [f32],
        acc_stride: usize) = weigh_on
}

dispatch! {
    /// [`weigh`] with values as they are stored.
    fn weigh_stored(weights: &[f32], strides: [usize; 2], rows: usize, value: Rows<'_>, n: usize, dim: usize,
        acc: &mut [f32], acc_stride: usize) = weigh_stored_on
}

/// `acc[row] *= by[row]`.
pub(in crate::cpu) fn rescale_rows(acc: &mut [f32], acc_stride: usize, by: &[f32]) {
    for (acc, &by) in acc.chunks_exact_mut(acc_stride).zip(by) {
        acc.iter_mut().for_each(|x| *x *= by);
    }
}

#[inline(always)]
fn dots_on<S: Simd>(
    s: S,
    query: Strided<'_>,
    rows: usize,
    key: Strided<'_>,
    n: usize,
    dim: usize,
    scale: f32,
    out: &mut [f32],
    width: usize,
    value: Strided<'_>,
) {
    assert!(rows <= width && out.len() >= n * width);
    query.check(rows, dim);
    key.check(n, dim);
    // SAFETY: the lengths were compared above; tiles stay within rows, n and dim
    unsafe {
        let mut j = 0;
        while n - j >= 4 {
            dots_of::<S, 4>(s, query, rows, key, j, dim, scale, out, width, value);
            j += 4;
        }
        while n - j >= 1 {
            dots_of::<S, 1>(s, query, rows, key, j, dim, scale, out, width, value);
            j += 1;
        }
    }
}

#[inline(always)]
unsafe fn dots_of<S: Simd, const KEYS: usize>(
    s: S,
    query: Strided<'_>,
    rows: usize,
    key: Strided<'_>,
    j: usize,
    dim: usize,
    scale: f32,
    out: &mut [f32],
    width: usize,
    value: Strided<'_>,
) {
    let (query_at, key_at, out_at) = (query.data.as_ptr(), key.data.as_ptr(), out.as_mut_ptr());
    // SAFETY: the caller compared the lengths
    unsafe {
        let keys = array![KEYS; k => key_at.add((j + k) * key.stride)];
        let mut r = 0;
        // strides may be anything where there is one row, and any address will do
        let ahead = value.data.as_ptr().wrapping_add(j.wrapping_mul(value.stride));
        let ahead_by = (2 * KEYS).wrapping_mul(key.stride);
        for d in (0..dim).step_by(16) {
            for k in 0..KEYS {
                s.prefetch(keys[k].wrapping_add(ahead_by.wrapping_add(d)));
                s.prefetch(ahead.wrapping_add(k.wrapping_mul(value.stride).wrapping_add(d)));
            }
        }
        macro_rules! by {
            ($($rows:literal)*) => {{$(
                while rows - r >= $rows {
                    let q = array![$rows; m => query_at.add((r + m) * query.stride)];
                    let sums = dot_tile::<S, $rows, KEYS>(s, q, keys, dim);
                    for (m, sums) in sums.into_iter().enumerate() {
                        for (k, sum) in sums.into_iter().enumerate().take(KEYS) {
                            *out_at.add((j + k) * width + r + m) = scale * sum;
                        }
                    }
                    r += $rows;
                }
            )*}};
        }
        by!(4 2 1);
    }
}

#[inline(always)]
unsafe fn dot_tile<S: Simd, const ROWS: usize, const KEYS: usize>(
    s: S,
    query: [*const f32; ROWS],
    keys: [*const f32; KEYS],
    dim: usize,
) -> [[f32; 4]; ROWS] {
    let mut acc = [[s.splat(0.0); 4]; ROWS];
    unsafe {
        let mut d = 0;
        while dim - d >= S::LANES {
            let k = array![KEYS; k => s.load(keys[k].add(d))];
            for m in 0..ROWS {
                let q = s.load(query[m].add(d));
                for n in 0..KEYS {
                    acc[m][n] = s.fma(q, k[n], acc[m][n]);
                }
            }
            d += S::LANES;
        }
        if d < dim {
            let k = array![KEYS; k => s.load_first(keys[k].add(d), dim - d)];
            for m in 0..ROWS {
                let q = s.load_first(query[m].add(d), dim - d);
                for n in 0..KEYS {
                    acc[m][n] = s.fma(q, k[n], acc[m][n]);
                }
            }
        }
    }
    array![ROWS; m => s.sums(acc[m])]
}

#[inline(always)]
fn weigh_stored_on<S: Simd>(
    s: S,
    weights: &[f32],
    strides: [usize; 2],
    rows: usize,
    value: Rows<'_>,
    n: usize,
    dim: usize,
    acc: &mut [f32],
    acc_stride: usize,
) {
    match value {
        Rows::F32(value) => weigh_on(s, weights, strides, rows, value, n, dim, acc, acc_stride),
        Rows::F16(value) => weigh_on(s, weights, strides, rows, value, n, dim, acc, acc_stride),
        Rows::Bf16(value) => weigh_on(s, weights, strides, rows, value, n, dim, acc, acc_stride),
        Rows::I8(value) => weigh_on(s, weights, strides, rows, value, n, dim, acc, acc_stride),
    }
}

#[inline(always)]
fn weigh_on<S: Simd, E: Lane>(
    s: S,
    weights: &[f32],
    strides: [usize; 2],
    rows: usize,
    value: Strided<'_, E>,
    n: usize,
    dim: usize,
    acc: &mut [f32],
    acc_stride: usize,
) {
    let padded = dim.next_multiple_of(S::LANES);
    let [of_key, of_row] = strides;
    assert!(rows == 0 || n == 0 || weights.len() > (n - 1) * of_key + (rows - 1) * of_row);
    assert!(padded <= acc_stride && acc.len() >= rows * acc_stride);
    value.check(n, dim);
    let (w, x, a) = (weights.as_ptr(), value.data.as_ptr(), acc.as_mut_ptr());
    // SAFETY: the lengths were compared above; tiles stay within rows, n and the padded dim
    unsafe {
        let mut r = 0;
        macro_rules! by {
            ($($rows:literal: $($vectors:literal in $chains:literal),*;)*) => {{$(
                while rows - r >= $rows {
                    let (w, a) = (w.add(r * of_row), a.add(r * acc_stride));
                    let mut d = 0;
                    $(
                        while dim - d >= $vectors * S::LANES {
                            let (x, a) = (x.add(d), a.add(d));
                            weigh_tile::<S, E, $rows, $vectors, $chains>(s, w, strides, x, value.stride, n, a, acc_stride);
                            d += $vectors * S::LANES;
                        }
                    )*
                    if d < dim {
                        weigh_rest::<S, E, $rows>(s, w, strides, x.add(d), value.stride, n, dim - d, a.add(d), acc_stride);
                    }
                    r += $rows;
                }
            )*}};
        }
        // as many sums at once as a processor has additions on the way
        by! {
            4: 2 in 1, 1 in 2;
            2: 2 in 2, 1 in 4;
            1: 4 in 2, 2 in 4, 1 in 8;
        }
    }
}

/// Keys go to `CHAINS` sums in turn: one chain of additions would be waited for.
#[inline(always)]
unsafe fn weigh_tile<S: Simd, E: Lane, const ROWS: usize, const VECTORS: usize, const CHAINS: usize>(
    s: S,
    weights: *const f32,
    [of_key, of_row]: [usize; 2],
    value: *const E,
    value_stride: usize,
    n: usize,
    out: *mut f32,
    out_stride: usize,
) {
    unsafe {
        // a sum of its own for each block: short sums round far less than one over all keys
        let mut acc = [[[s.splat(0.0); VECTORS]; ROWS]; CHAINS];
        let mut j = 0;
        macro_rules! take {
            ($chain:expr, $key:expr) => {
                let x = array![VECTORS; v => E::load(s, value.add($key * value_stride + v * S::LANES))];
                for m in 0..ROWS {
                    let w = s.splat(*weights.add($key * of_key + m * of_row));
                    for v in 0..VECTORS {
                        acc[$chain][m][v] = s.fma(w, x[v], acc[$chain][m][v]);
                    }
                }
            };
        }
        while n - j >= CHAINS {
            for c in 0..CHAINS {
                take!(c, j + c);
            }
            j += CHAINS;
        }
        while j < n {
            take!(0, j);
            j += 1;
        }
        for m in 0..ROWS {
            for v in 0..VECTORS {
                let mut left = CHAINS;
                while left > 1 {
                    left /= 2;
                    for c in 0..left {
                        acc[c][m][v] = s.add(acc[c][m][v], acc[c + left][m][v]);
                    }
                }
                let at = out.add(m * out_stride + v * S::LANES);
                s.store(at, s.add(s.load(at), acc[0][m][v]));
            }
        }
    }
}

/// The last columns, fewer than a vector.
#[inline(always)]
unsafe fn weigh_rest<S: Simd, E: Lane, const ROWS: usize>(
    s: S,
    weights: *const f32,
    [of_key, of_row]: [usize; 2],
    value: *const E,
    value_stride: usize,
    n: usize,
    columns: usize,
    out: *mut f32,
    out_stride: usize,
) {
    unsafe {
        let mut acc = [s.splat(0.0); ROWS];
        for j in 0..n {
            let x = E::load_first(s, value.add(j * value_stride), columns);
            for m in 0..ROWS {
                acc[m] = s.fma(s.splat(*weights.add(j * of_key + m * of_row)), x, acc[m]);
            }
        }
        for m in 0..ROWS {
            let at = out.add(m * out_stride);
            s.store(at, s.add(s.load(at), acc[m]));
        }
    }
}
