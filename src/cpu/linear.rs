//! Linear maps on the CPU.

use ndarray::{ArrayView2, ArrayViewMut2, Axis, linalg::general_mat_mul};

/// Rows, or columns, that one task computes. Does not depend on the threads, so that results do not either.
const BLOCK: usize = 128;

/// `y[m, n] = sum over k of x[m, k] weight[n, k] + bias[n]` in f32; `x` is `[rows, in_features]`, `weight`
/// `[out_features, in_features]`, either transposed where `turned` says so. Lengths are checked by the caller.
pub(crate) fn linear(
    [x, weight]: [&[f32]; 2],
    turned: [bool; 2],
    bias: Option<&[f32]>,
    [rows, in_features, out_features]: [usize; 3],
) -> Vec<f32> {
    let mut y = vec![0.0; rows * out_features];
    if let Some(bias) = bias {
        y.chunks_exact_mut(out_features).for_each(|row| row.copy_from_slice(bias));
    }
    let view = |data, turned, rows| match turned {
        false => ArrayView2::from_shape((rows, in_features), data),
        true => ArrayView2::from_shape((in_features, rows), data).map(ArrayView2::reversed_axes),
    };
    let views = (
        view(x, turned[0], rows),
        view(weight, turned[1], out_features),
        ArrayViewMut2::from_shape((rows, out_features), &mut y),
    );
    if let (Ok(x), Ok(weight), Ok(mut y)) = views {
        let tasks: Vec<_> = if rows >= 2 * BLOCK {
            let blocks = x.axis_chunks_iter(Axis(0), BLOCK).zip(y.axis_chunks_iter_mut(Axis(0), BLOCK));
            blocks.map(|(x, y)| (x, weight, y)).collect()
        } else {
            let blocks = weight.axis_chunks_iter(Axis(0), BLOCK).zip(y.axis_chunks_iter_mut(Axis(1), BLOCK));
            blocks.map(|(weight, y)| (x, weight, y)).collect()
        };
        super::for_each(tasks, |(x, weight, mut y)| general_mat_mul(1.0, &x, &weight.t(), 1.0, &mut y));
    }
    y
}
