//! What is not finite, and hidden from some rows: left out of products, then added to the rows that see it.

use crate::cpu::simd::Strided;

/// The block with zeros in the places of what is not finite: 0 * NaN would carry it to rows that must not see it.
pub(super) fn clean<'a>(value: Strided<'_>, n: usize, dim: usize, buffer: &'a mut [f32]) -> Strided<'a> {
    for (j, row) in buffer.chunks_exact_mut(dim).take(n).enumerate() {
        for (x, &v) in row.iter_mut().zip(&value.data[j * value.stride..]) {
            *x = if v.is_finite() { v } else { 0.0 };
        }
    }
    Strided { data: buffer, stride: dim }
}

/// Adds what [`clean`] left out to the rows that see it. Slow, and rare.
#[expect(clippy::too_many_arguments, reason = "sizes and strides")]
pub(super) fn add_rest(
    value: Strided<'_>,
    n: usize,
    dim: usize,
    (weights, [of_key, of_row]): (&[f32], [usize; 2]),
    rows: usize,
    seen: impl Fn(usize, usize) -> bool,
    acc: &mut [f32],
    [row_stride, column_stride]: [usize; 2],
) {
    for j in 0..n {
        for (d, &v) in value.data[j * value.stride..][..dim].iter().enumerate().filter(|(_, v)| !v.is_finite()) {
            for r in (0..rows).filter(|&r| seen(r, j)) {
                acc[r * row_stride + d * column_stride] += weights[j * of_key + r * of_row] * v;
            }
        }
    }
}

/// Adds the elements of a row that [`clean`] left out.
pub(super) fn add_not_finite(to: &mut [f32], by: f32, row: &[f32]) {
    to.iter_mut().zip(row).filter(|(_, x)| !x.is_finite()).for_each(|(to, x)| *to += by * x);
}
