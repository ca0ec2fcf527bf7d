//! Projections and norms of a layer on the CPU.

use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayView2, ArrayViewMut2, ShapeError};

/// Rows, or outputs where rows are few, that a task computes.
const TASK: usize = 64;
/// Columns of a sum: what is added up at once. Partial sums of blocks round less than one long sum.
const BLOCK: usize = 256;

/// `y = x W^T + b`: `x [rows, inputs]`, `weight [outputs, inputs]`, `y [rows, outputs]`.
pub(crate) fn linear(
    [inputs, outputs]: [usize; 2],
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
) -> Result<Vec<f32>, ShapeError> {
    let rows = if inputs == 0 { 0 } else { x.len() / inputs };
    let x = ArrayView2::from_shape((rows, inputs), x)?;
    let weight = ArrayView2::from_shape((outputs, inputs), weight)?;
    // tasks of whole rows, or for few rows whole outputs, which then lie `[outputs, rows]`
    let turned = rows < TASK;
    let (left, right) = if turned { (weight, x) } else { (x, weight) };
    let (m, n) = (left.nrows(), right.nrows());
    let mut y = vec![0.0f32; m * n];
    let tasks: Vec<_> = y.chunks_mut((TASK * n).max(1)).enumerate().collect();
    super::for_each(tasks, |(task, y)| {
        let first = task * TASK;
        let count = TASK.min(m - first);
        // the lengths fit, so this is never left out
        let Ok(mut y) = ArrayViewMut2::from_shape((count, n), y) else { return };
        for k in (0..inputs).step_by(BLOCK) {
            let columns = k..(k + BLOCK).min(inputs);
            let left = left.slice(ndarray::s![first..first + count, columns.clone()]);
            general_mat_mul(1.0, &left, &right.slice(ndarray::s![.., columns]).t(), 1.0, &mut y);
        }
    });
    if turned {
        y = (0..rows * outputs).map(|at| y[at % outputs * rows + at / outputs]).collect();
    }
    if let Some(bias) = bias {
        for row in y.chunks_exact_mut(outputs.max(1)) {
            row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
    }
    Ok(y)
}

/// Normalises each run of `gain.len()` elements, in place; `centered` takes off the mean first.
pub(crate) fn head_norm(x: &mut [f32], gain: &[f32], shift: Option<&[f32]>, centered: bool, epsilon: f32) {
    let width = gain.len() as f64;
    for head in x.chunks_exact_mut(gain.len().max(1)) {
        let mean = if centered { head.iter().map(|&x| f64::from(x)).sum::<f64>() / width } else { 0.0 };
        let squares: f64 = head.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum();
        let by = 1.0 / (squares / width + f64::from(epsilon)).sqrt();
        for (d, x) in head.iter_mut().enumerate() {
            #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
            let normal = ((f64::from(*x) - mean) * by) as f32;
            *x = normal * gain[d] + shift.map_or(0.0, |shift| shift[d]);
        }
    }
}
