//! The yardsticks of the tolerance rule: the direct algorithm in f32, once added up in order and once with exact sums.
//!
//! Neither shares code with a kernel; which keys a row sees they take from the oracle.

use super::floor::{self, Off};
use super::rounding::round;
use crate::cpu::reference::{self, Stored};
use crate::inputs::AttentionInputs;
use crate::problem::{AttentionProblem, ScoreStage};
use crate::tensor::{Layout, TensorRef};

/// One row of the direct algorithm, before the output is rounded to its element.
pub(super) struct Plain {
    /// `[v_head_dim]`
    pub(super) output: Vec<f32>,
    pub(super) lse: f32,
    pub(super) row_max: f32,
    pub(super) row_sum: f32,
    /// `[kv_len]`, empty if the spec does not ask for it
    pub(super) scores: Vec<f32>,
}

/// Computes row `[b, h, i]` in f32, every sum in order.
pub(super) fn plain(
    problem: &AttentionProblem,
    inputs: &AttentionInputs<'_>,
    [b, h, i]: [usize; 3],
    oracle: &reference::Row,
) -> Plain {
    let spec = problem.spec();
    let kv_head = h / problem.group_size();
    let query: Vec<f32> = load(inputs.query, &spec.query.layout, [b, h, i]).collect();
    let scaled = |j: usize| {
        let key = inputs.keys(problem).row([b, kv_head, j]);
        problem.scale() * query.iter().zip(key).fold(0.0f32, |sum, (q, k)| sum + q * k)
    };
    let capped = |j: usize| spec.softcap.map_or_else(|| scaled(j), |cap| cap * (scaled(j) / cap).tanh());
    let masked = |j: usize| {
        let mut score = capped(j);
        if let Some((bias, of)) = inputs.terms.bias.zip(spec.bias.as_ref()) {
            score += bias.get(of.layout.index([b, h, i, j]));
        }
        if let Some(slope) = inputs.slope(problem, b, h) {
            let distance = (inputs.diagonal(problem, b, i) - j as i64).unsigned_abs();
            score -= slope * distance as f32;
        }
        score
    };
    let keys: Vec<usize> = (0..problem.kv_len()).filter(|&j| oracle.allowed[j]).collect();
    let scores: Vec<f32> = keys.iter().map(|&j| masked(j)).collect();
    let sink = inputs.sink(problem, [b, h, i]);
    let row_max = scores.iter().copied().fold(sink, f32::max);
    let shift = if row_max == f32::NEG_INFINITY { 0.0 } else { row_max };
    let weights: Vec<f32> = scores.iter().map(|score| (score - shift).exp()).collect();
    let row_sum = weights.iter().fold((sink - shift).exp(), |sum, weight| sum + weight);
    let mut output = vec![0.0f32; problem.v_head_dim()];
    let mut lse = if keys.is_empty() { sink } else { f32::NEG_INFINITY };
    if !keys.is_empty() && row_sum != 0.0 {
        lse = row_max + row_sum.ln();
        for (&j, weight) in keys.iter().zip(&weights) {
            let prob = weight / row_sum;
            for (x, v) in output.iter_mut().zip(inputs.values(problem).row([b, kv_head, j])) {
                *x += prob * v;
            }
        }
    }
    let of_keys = |fill: f32, of: &[f32]| {
        let mut row = vec![fill; problem.kv_len()];
        keys.iter().zip(of).for_each(|(&j, &x)| row[j] = x);
        row
    };
    let scores = match spec.scores {
        None => Vec::new(),
        Some(ScoreStage::Scaled) => (0..problem.kv_len()).map(scaled).collect(),
        Some(ScoreStage::Capped) => (0..problem.kv_len()).map(capped).collect(),
        Some(ScoreStage::Masked) => of_keys(f32::NEG_INFINITY, &scores),
        Some(ScoreStage::Probs) => {
            let probs: Vec<f32> =
                weights.iter().map(|weight| if row_sum == 0.0 { 0.0 } else { weight / row_sum }).collect();
            of_keys(0.0, &probs)
        }
    };
    Plain { output, lse, row_max, row_sum, scores }
}

fn load<'a>(data: TensorRef<'a>, layout: &Layout, [b, h, i]: [usize; 3]) -> impl Iterator<Item = f32> + use<'a> {
    let (start, stride) = (layout.index([b, h, i, 0]), layout.strides[3]);
    (0..layout.shape[3]).map(move |d| data.get(start + d * stride))
}

/// One row with every step of a score rounded to f32 once, and all after it in f64: what any kernel in f32 comes near to.
pub(super) struct Twin {
    /// `[head_dim]`
    pub(super) query: Vec<f64>,
    /// `[v_head_dim]`
    pub(super) output: Vec<f64>,
    pub(super) lse: f64,
    pub(super) max: f64,
    /// of `exp(score - max)`
    pub(super) sum: f64,
    pub(super) of_max: Off,
    pub(super) sink: f32,
    pub(super) sink_prob: f64,
    /// `[kv_len]`, what other sound kernels may be off by from here, and the weights; of allowed keys.
    pub(super) scores: Vec<f32>,
    pub(super) offs: Vec<Off>,
    pub(super) probs: Vec<f64>,
}

pub(super) fn twin(
    problem: &AttentionProblem,
    inputs: &AttentionInputs<'_>,
    [b, h, i]: [usize; 3],
    oracle: &reference::Row,
) -> Twin {
    let kv_len = problem.kv_len();
    let (mut scores, mut offs) = (vec![f32::NEG_INFINITY; kv_len], vec![Off::default(); kv_len]);
    let live = || (0..kv_len).filter(|&j| oracle.allowed[j]);
    let query: Vec<f64> = reference::load(inputs.query, &problem.spec().query.layout, [b, h, i]).collect();
    for j in live() {
        (scores[j], offs[j]) = floor::score(problem, inputs, &query, [b, h, i], j).masked;
    }
    let sink = inputs.sink(problem, [b, h, i]);
    let mut max = f64::from(sink);
    let mut of_max = Off::default();
    for j in live() {
        if f64::from(scores[j]) > max {
            (max, of_max) = (f64::from(scores[j]), offs[j]);
        }
    }
    let power = |score: f32| if max == f64::NEG_INFINITY { 0.0 } else { (f64::from(score) - max).exp() };
    let sink_power = power(sink);
    let sum = live().map(|j| power(scores[j])).sum::<f64>() + sink_power;
    let mut output = vec![0.0; problem.v_head_dim()];
    let mut probs = vec![0.0; kv_len];
    for j in live() {
        probs[j] = if max == f64::NEG_INFINITY { 0.0 } else { power(scores[j]) / sum };
        let value = reference::stored(problem, inputs, Stored::Value, [b, h / problem.group_size(), j]);
        output.iter_mut().zip(value).for_each(|(x, v)| *x += probs[j] * v);
    }
    Twin {
        query,
        output,
        lse: max + sum.ln(),
        max,
        sum,
        of_max,
        sink,
        sink_prob: sink_power / sum,
        scores,
        offs,
        probs,
    }
}

impl Twin {
    /// Whether a finite result lies within f32 when nothing but the steps of a score and the result is rounded.
    pub(super) fn reaches(&self, want: f64) -> bool {
        self.lse.is_finite() && round(want).is_finite()
    }
}
