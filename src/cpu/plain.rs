//! The direct algorithm in f32: all scores of a row, a softmax in two passes, a weighted sum.
//!
//! Sums over keys go tile by tile, each tile with a sum of its own, as `shaders/weighted_sum.wgsl` does it: over 1500 keys
//! that rounds 15 times less than one long sum. Sums over columns of a dot product likewise.
//!
//! It is the twin of the plain kernels, and the yardstick of the tolerance rule in [`verify`](crate::verify).

use crate::inputs::AttentionInputs;
use crate::problem::{AttentionProblem, ScoreStage};
use crate::tensor::{Layout, TensorRef};

use super::Task;
use super::terms::RowTerms;

/// Keys of a tile, and columns of one.
const TILE: usize = 16;

/// One row in f32, before the output is rounded to its element.
pub(crate) struct Row {
    /// `[v_head_dim]`
    pub(crate) output: Vec<f32>,
    pub(crate) lse: f32,
    pub(crate) row_max: f32,
    pub(crate) row_sum: f32,
    /// `[kv_len]`, empty if the spec does not ask for it
    pub(crate) scores: Vec<f32>,
}

pub(super) fn compute(problem: &AttentionProblem, inputs: &AttentionInputs<'_>, task: Task<'_>) {
    let row = row(problem, inputs, [task.b, task.h, task.first_row]);
    task.output.copy_from_slice(&row.output);
    task.lse.fill(row.lse);
    task.row_max.fill(row.row_max);
    task.row_sum.fill(row.row_sum);
    task.scores.copy_from_slice(&row.scores);
}

/// Computes row `[b, h, i]`.
pub(crate) fn row(problem: &AttentionProblem, inputs: &AttentionInputs<'_>, [b, h, i]: [usize; 3]) -> Row {
    let spec = problem.spec();
    let kv_head = h / problem.group_size();
    let terms = RowTerms::new(problem, inputs, [b, h, i]);
    let query = load(inputs.query, &spec.query.layout, [b, h, i]);
    let dot = |j| {
        let key: Vec<f32> = inputs.keys(problem).row([b, kv_head, j]).collect();
        let tiles = query.chunks(TILE).zip(key.chunks(TILE));
        tiles.map(|(query, key)| query.iter().zip(key).fold(0.0f32, |sum, (q, k)| sum + q * k)).sum::<f32>()
    };

    let keys: Vec<usize> = terms.keys.clone().filter(|&j| terms.allows(j)).collect();
    let scores: Vec<f32> = keys.iter().map(|&j| terms.score(j, dot(j))).collect();
    let sink = inputs.sink(problem, [b, h, i]);
    let row_max = scores.iter().copied().fold(sink, f32::max);
    // while all scores are -inf there is no maximum to subtract, and -inf - -inf would be NaN
    let shift = if row_max == f32::NEG_INFINITY { 0.0 } else { row_max };
    let weights: Vec<f32> = scores.iter().map(|score| (score - shift).exp()).collect();
    let row_sum = weights.chunks(TILE).fold((sink - shift).exp(), |sum, tile| sum + tile.iter().sum::<f32>());

    let mut output = vec![0.0f32; problem.v_head_dim()];
    // without keys nothing but the sink, whatever it is
    let lse = match (keys.is_empty(), row_sum == 0.0) {
        (true, _) => sink,
        (false, true) => f32::NEG_INFINITY,
        (false, false) => row_max + row_sum.ln(),
    };
    if !keys.is_empty() && row_sum != 0.0 {
        let mut tile_sum = vec![0.0f32; problem.v_head_dim()];
        for (keys, weights) in keys.chunks(TILE).zip(weights.chunks(TILE)) {
            tile_sum.fill(0.0);
            for (&j, weight) in keys.iter().zip(weights) {
                let prob = weight / row_sum;
                for (x, v) in tile_sum.iter_mut().zip(inputs.values(problem).row([b, kv_head, j])) {
                    *x += prob * v;
                }
            }
            output.iter_mut().zip(&tile_sum).for_each(|(x, tile)| *x += tile);
        }
    }
    let stage = |fill: f32, of: &dyn Fn(f32) -> f32| {
        let mut row = vec![fill; problem.kv_len()];
        for (&j, &score) in keys.iter().zip(&scores) {
            row[j] = of(score);
        }
        row
    };
    let scores = match spec.scores {
        None => Vec::new(),
        Some(ScoreStage::Scaled) => (0..problem.kv_len()).map(|j| terms.scaled(dot(j))).collect(),
        Some(ScoreStage::Capped) => (0..problem.kv_len()).map(|j| terms.capped(dot(j))).collect(),
        Some(ScoreStage::Masked) => stage(f32::NEG_INFINITY, &|score| score),
        // not by way of lse, which is rounded
        Some(ScoreStage::Probs) if row_sum == 0.0 => vec![0.0; problem.kv_len()],
        Some(ScoreStage::Probs) => stage(0.0, &|score| (score - shift).exp() / row_sum),
    };
    // the comparisons above pass NaN by
    let row_max = if row_sum.is_nan() { f32::NAN } else { row_max };
    Row { output, lse, row_max, row_sum, scores }
}

fn load(data: TensorRef<'_>, layout: &Layout, [b, h, i]: [usize; 3]) -> Vec<f32> {
    let start = layout.index([b, h, i, 0]);
    (0..layout.shape[3]).map(|d| data.get(start + d * layout.strides[3])).collect()
}
