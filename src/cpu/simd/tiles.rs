//! The two products of attention for many rows: rows along the lanes, keys and values broadcast element by element.
//!
//! A dot product is summed in blocks of columns, as output is in blocks of keys: the rounding of one long sum grows with its
//! length.
//!
//! Scores are kept as `[key][row]` and the output as `[column][row]`, both `vectors * LANES` rows wide. So keys and values
//! are read where they lie, without packing, whatever their width is; maxima and sums need no step across lanes.

use super::{Simd, Strided, array, dispatch};

/// Columns of a dot product that are summed before they are added to the rest, where there are more than [`ONE_BLOCK`]: up to
/// there one sum rounds no more than the peers' do.
const DOT_BLOCK: usize = 64;
const ONE_BLOCK: usize = 128;

/// Columns of a dot product of `dim` columns that are summed at once.
pub(super) const fn sum_block(dim: usize) -> usize {
    match dim {
        0 => 1,
        1..=ONE_BLOCK => dim,
        _ => DOT_BLOCK,
    }
}

dispatch! {
    /// `out[key][row] = scale * sum over d of query[d][row] * key[d]` for `n` keys. The next keys and the rows of
    /// `value`, if there are any, are asked for on the way.
    fn scores(vectors: usize, query: &[f32], key: Strided<'_>, n: usize, dim: usize, scale: f32, out: &mut [f32],
        value: Strided<'_>)
        = scores_on
}

dispatch! {
    /// `acc[column][row] (+)= sum over keys of weights[key][row] * value[column]` for `n` keys. As many rows of
    /// `next`, if it is not empty, are asked for on the way.
    fn accumulate(vectors: usize, weights: &[f32], value: Strided<'_>, n: usize, dim: usize, acc: &mut [f32], fresh: bool,
        next: Strided<'_>) = accumulate_on
}

#[inline(always)]
fn scores_on<S: Simd>(
    s: S,
    vectors: usize,
    query: &[f32],
    key: Strided<'_>,
    n: usize,
    dim: usize,
    scale: f32,
    out: &mut [f32],
    value: Strided<'_>,
) {
    let rows = vectors * S::LANES;
    assert!(query.len() >= dim * rows && out.len() >= n * rows);
    key.check(n, dim);
    let (q, k, o) = (query.as_ptr(), key.data.as_ptr(), out.as_mut_ptr());
    // SAFETY: the lengths were compared above, and the tiles stay within n, dim and rows
    unsafe {
        let mut j = 0;
        macro_rules! by {
            ($vectors:literal: $($keys:literal)*) => {{$(
                while n - j >= $keys {
                    let (k, o) = (k.add(j * key.stride), o.add(j * rows));
                    // rows of a line or less that follow each other are seen coming by any processor
                    let x = if dim <= 16 { Strided { data: &[], stride: 0 } } else { value.from(j) };
                    score_tile::<S, $keys, $vectors>(s, q, k, key.stride, dim, scale, o, x);
                    j += $keys;
                }
            )*}};
        }
        match (vectors, S::LANES) {
            (4, 4 | 16) => by!(4: 6 3 2 1),
            (3, 4 | 16) => by!(3: 8 4 2 1),
            (2, 16) => by!(2: 12 6 3 2 1),
            (2, _) => by!(2: 6 3 2 1),
            (1, 16) => by!(1: 12 6 3 2 1),
            (1, _) => by!(1: 8 4 2 1),
            _ => unreachable!("a tile has 1 to 4 vectors"),
        }
    }
}

#[inline(always)]
unsafe fn score_tile<S: Simd, const KEYS: usize, const VECTORS: usize>(
    s: S,
    query: *const f32,
    key: *const f32,
    key_stride: usize,
    dim: usize,
    scale: f32,
    out: *mut f32,
    value: Strided<'_>,
) {
    let rows = VECTORS * S::LANES;
    let block = sum_block(dim);
    unsafe {
        let keys = array![KEYS; m => key.add(m * key_stride)];
        let mut acc = dot_block::<S, KEYS, VECTORS>(s, query, keys, key_stride, 0, block, value);
        let mut from = block;
        while from < dim {
            let to = dim.min(from + block);
            for m in 0..KEYS {
                for v in 0..VECTORS {
                    s.store(out.add(m * rows + v * S::LANES), acc[m][v]);
                }
            }
            acc = dot_block::<S, KEYS, VECTORS>(s, query, keys, key_stride, from, to, value);
            for m in 0..KEYS {
                for v in 0..VECTORS {
                    acc[m][v] = s.add(s.load(out.add(m * rows + v * S::LANES)), acc[m][v]);
                }
            }
            from = to;
        }
        if scale.to_bits() != 1f32.to_bits() {
            let scale = s.splat(scale);
            for m in 0..KEYS {
                for v in 0..VECTORS {
                    acc[m][v] = s.mul(acc[m][v], scale);
                }
            }
        }
        for m in 0..KEYS {
            for v in 0..VECTORS {
                s.store(out.add(m * rows + v * S::LANES), acc[m][v]);
            }
        }
    }
}

/// The sums over columns `from..to`.
#[inline(always)]
unsafe fn dot_block<S: Simd, const KEYS: usize, const VECTORS: usize>(
    s: S,
    query: *const f32,
    keys: [*const f32; KEYS],
    key_stride: usize,
    from: usize,
    to: usize,
    value: Strided<'_>,
) -> [[S::V; VECTORS]; KEYS] {
    let rows = VECTORS * S::LANES;
    // strides may be anything where there is one row, and any address will do
    let ahead = (2 * KEYS).wrapping_mul(key_stride);
    let mut acc = [[s.splat(0.0); VECTORS]; KEYS];
    unsafe {
        let mut d = from;
        while d < to {
            // a line for each 16 columns
            let end = to.min((d / 16 + 1) * 16);
            if !value.data.is_empty() {
                // by two tiles of keys ahead: a tile takes about as long as memory does
                for m in 0..KEYS {
                    s.prefetch(keys[m].wrapping_add(ahead.wrapping_add(d)));
                    s.prefetch(value.data.as_ptr().wrapping_add(m.wrapping_mul(value.stride).wrapping_add(d)));
                }
            }
            while d < end {
                let q = array![VECTORS; v => s.load(query.add(d * rows + v * S::LANES))];
                for m in 0..KEYS {
                    let k = s.splat(*keys[m].add(d));
                    for v in 0..VECTORS {
                        acc[m][v] = s.fma(q[v], k, acc[m][v]);
                    }
                }
                d += 1;
            }
        }
    }
    acc
}

#[inline(always)]
fn accumulate_on<S: Simd>(
    s: S,
    vectors: usize,
    weights: &[f32],
    value: Strided<'_>,
    n: usize,
    dim: usize,
    acc: &mut [f32],
    fresh: bool,
    next: Strided<'_>,
) {
    let rows = vectors * S::LANES;
    assert!(weights.len() >= n * rows && acc.len() >= dim * rows);
    value.check(n, dim);
    let (w, x, a) = (weights.as_ptr(), value.data.as_ptr(), acc.as_mut_ptr());
    // SAFETY: the lengths were compared above, and the tiles stay within n, dim and rows
    unsafe {
        let mut d = 0;
        macro_rules! by {
            ($vectors:literal: $($columns:literal)*) => {{$(
                while dim - d >= $columns {
                    let (x, a) = (x.add(d), a.add(d * rows));
                    // a line for each 16 columns
                    let lines = if d % 16 < $columns && !next.data.is_empty() { n } else { 0 };
                    let ahead = Strided { data: next.data.get(d..).unwrap_or_default(), stride: next.stride };
                    accumulate_tile::<S, $columns, $vectors>(s, w, x, value.stride, n, a, fresh, ahead, lines);
                    d += $columns;
                }
            )*}};
        }
        match (vectors, S::LANES) {
            (4, 4 | 16) => by!(4: 6 4 2 1),
            (3, 4 | 16) => by!(3: 8 4 2 1),
            (2, 16) => by!(2: 12 8 4 2 1),
            (2, _) => by!(2: 6 4 2 1),
            (1, 16) => by!(1: 16 8 4 2 1),
            (1, _) => by!(1: 8 4 2 1),
            _ => unreachable!("a tile has 1 to 4 vectors"),
        }
    }
}

#[inline(always)]
unsafe fn accumulate_tile<S: Simd, const COLUMNS: usize, const VECTORS: usize>(
    s: S,
    weights: *const f32,
    value: *const f32,
    value_stride: usize,
    n: usize,
    out: *mut f32,
    fresh: bool,
    next: Strided<'_>,
    lines: usize,
) {
    let rows = VECTORS * S::LANES;
    let mut acc = [[s.splat(0.0); VECTORS]; COLUMNS];
    unsafe {
        let mut value = value;
        for j in 0..n {
            if j < lines {
                s.prefetch(next.data.as_ptr().wrapping_add(j.wrapping_mul(next.stride)));
            }
            let w = array![VECTORS; v => s.load(weights.add(j * rows + v * S::LANES))];
            for m in 0..COLUMNS {
                let x = s.splat(*value.add(m));
                for v in 0..VECTORS {
                    acc[m][v] = s.fma(w[v], x, acc[m][v]);
                }
            }
            // the last step may leave the buffer, where a pointer is not used any more
            value = value.wrapping_add(value_stride);
        }
        for m in 0..COLUMNS {
            for v in 0..VECTORS {
                let at = out.add(m * rows + v * S::LANES);
                let sum = if fresh { acc[m][v] } else { s.add(s.load(at), acc[m][v]) };
                s.store(at, sum);
            }
        }
    }
}
