//! What one attention costs at least: operations and bytes.

use crate::inputs::AttentionInputs;
use crate::problem::AttentionProblem;
use crate::tensor::{Layout, TensorSpec};

/// Floating point operations of one attention: `2 * pairs * (head_dim + v_head_dim)`, where `pairs` counts the pairs
/// of query row and key that key lengths, causal mask, window, row ranges and mask leave. The inputs must have passed
/// [`check`](AttentionInputs::check).
#[must_use]
pub fn flops(problem: &AttentionProblem, inputs: &AttentionInputs<'_>) -> f64 {
    let mut pairs = 0.0;
    for b in 0..problem.batch() {
        for i in 0..problem.q_len() {
            let keys = inputs.row_keys(problem, b, i);
            let Some((mask, layout)) = inputs.terms.mask.zip(problem.spec().mask.as_ref()) else {
                pairs += (problem.q_heads() * keys.len()) as f64;
                continue;
            };
            let seen = |h: usize| keys.clone().filter(|&j| mask[layout.index([b, h, i, j])]).count();
            pairs += if layout.strides[1] == 0 {
                (problem.q_heads() * seen(0)) as f64
            } else {
                (0..problem.q_heads()).map(seen).sum::<usize>() as f64
            };
        }
    }
    2.0 * pairs * (problem.head_dim() + problem.v_head_dim()) as f64
}

/// The least traffic of one attention: bytes of query, key, value, output, bias and mask, each moved once; what is
/// broadcast counts once. Keys and values count as in [`kv_bytes`].
#[must_use]
pub fn bytes(problem: &AttentionProblem) -> f64 {
    let spec = problem.spec();
    kv_bytes(problem)
        + tensor_bytes(&spec.query)
        + tensor_bytes(&spec.output)
        + spec.bias.as_ref().map_or(0.0, tensor_bytes)
        + spec.mask.as_ref().map_or(0.0, elements)
}

/// Bytes of keys and values of one attention as they are stored, with their scales and the table of their pages, each read
/// once; what all entries of a batch share counts once. Key lengths are not looked at.
#[must_use]
pub fn kv_bytes(problem: &AttentionProblem) -> f64 {
    let spec = problem.spec();
    let tensors = [Some(&spec.key), Some(&spec.value), spec.key_scale.as_ref(), spec.value_scale.as_ref()];
    let Some(paged) = spec.paged else { return tensors.into_iter().flatten().map(tensor_bytes).sum() };
    let rows = (problem.batch() * problem.kv_heads() * problem.kv_len()) as f64;
    let of_row = |tensor: &TensorSpec| (tensor.layout.shape[3] * tensor.element.size_bytes()) as f64;
    let table = (problem.batch() * paged.table_len * size_of::<i32>()) as f64;
    rows * tensors.into_iter().flatten().map(of_row).sum::<f64>() + table
}

/// Elements of a layout, those that repeat counted once.
fn elements(layout: &Layout) -> f64 {
    let axes = layout.shape.iter().zip(layout.strides);
    axes.map(|(&n, stride)| if stride == 0 { n.min(1) } else { n } as f64).product()
}

fn tensor_bytes(tensor: &TensorSpec) -> f64 {
    elements(&tensor.layout) * tensor.element.size_bytes() as f64
}
