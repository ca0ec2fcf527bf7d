//! Linear maps on the CPU.

use ndarray::{ArrayView2, ArrayViewMut2, Axis, linalg::general_mat_mul};

/// Rows, or columns, that one task computes. Does not depend on the threads, so that results do not either.
const BLOCK: usize = 128;

/// `y[m, n] = sum over k of x[m, k] weight[n, k] + bias[n]` in f32; `weight` is `[out_features, in_features]`. Lengths are
/// checked by the caller.
pub(crate) fn linear(
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    [out_features, in_features]: [usize; 2],
) -> Vec<f32> {
    let rows = x.len().checked_div(in_features).unwrap_or(0);
    let mut y = vec![0.0; rows * out_features];
    if let Some(bias) = bias {
        y.chunks_exact_mut(out_features).for_each(|row| row.copy_from_slice(bias));
    }
    let views = (
        ArrayView2::from_shape((rows, in_features), x),
        ArrayView2::from_shape((out_features, in_features), weight),
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
