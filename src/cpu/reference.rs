//! The oracle: the formula of [`AttentionSpec`](crate::AttentionSpec) in f64, all scores of a row, no tricks.
//!
//! It takes the stored (rounded) inputs as exact, and shares no code with the kernels that it judges.

mod backward;

use half::{bf16, f16};

pub(crate) use backward::backward_of;
pub use backward::{Gradient, ReferenceGradients, backward};

use crate::inputs::{AttentionInputs, AttentionOutput, InputError, RowState};
use crate::problem::{AlibiSlopes, AttentionProblem, Diagonal, ScoreStage};
use crate::tensor::{Layout, TensorRef};

/// The right answer, in f64.
#[derive(Clone, Debug, PartialEq)]
pub struct Reference {
    /// `[batch, q_heads, q_len, v_head_dim]`, without gaps.
    pub output: Vec<f64>,
    /// `[batch, q_heads, q_len]`, natural logarithm.
    pub lse: Vec<f64>,
    /// `[batch, q_heads, q_len]`: the largest allowed score, or the sink; negative infinity for a row that has neither.
    pub row_max: Vec<f64>,
    /// `[batch, q_heads, q_len]`: the sum of `exp(score - row_max)` over the allowed scores and the sink.
    pub row_sum: Vec<f64>,
    /// `[batch, q_heads, q_len, kv_len]`, if the spec asks for it.
    pub scores: Option<Vec<f64>>,
}

/// The right answer for one row, with the steps to it.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// `[v_head_dim]`.
    pub output: Vec<f64>,
    /// Log-sum-exp of the allowed scores and the sink.
    pub lse: f64,
    /// The largest allowed score, or the sink; negative infinity where there is neither.
    pub row_max: f64,
    /// The sum of `exp(score - row_max)` over the allowed scores and the sink.
    pub row_sum: f64,
    /// `[kv_len]`: whether the row sees the key.
    pub allowed: Vec<bool>,
    /// `[kv_len]`: the score with all its terms, negative infinity where not allowed.
    pub scores: Vec<f64>,
    /// `[kv_len]`: `exp(score - lse)`, zero where not allowed.
    pub probs: Vec<f64>,
}

/// Computes the right answer.
///
/// # Errors
/// An [`InputError`] if the data is not what the problem asks for.
pub fn attention(problem: &AttentionProblem, inputs: &AttentionInputs<'_>) -> Result<Reference, InputError> {
    inputs.check(problem)?;
    // each row comes in vectors of its own, and is then gathered
    super::check_memory(problem, 3 * size_of::<f64>())?;
    let rows = super::map(problem.rows(), |n| {
        let (b, h, i) = super::row_place(problem, n);
        let row = row(problem, inputs, b, h, i);
        let scores = stage(problem, inputs, b, h, i, &row);
        (row.output, [row.lse, row.row_max, row.row_sum], scores)
    });
    let mut reference =
        Reference { output: Vec::new(), lse: Vec::new(), row_max: Vec::new(), row_sum: Vec::new(), scores: None };
    let mut scores = Vec::new();
    for (row_output, [lse, row_max, row_sum], row_scores) in rows {
        reference.output.extend(row_output);
        reference.lse.push(lse);
        reference.row_max.push(row_max);
        reference.row_sum.push(row_sum);
        scores.extend(row_scores);
    }
    reference.scores = problem.spec().scores.map(|_| scores);
    Ok(reference)
}

impl Reference {
    /// Rounds once to the elements and the layout that the spec asks for.
    #[must_use]
    pub fn to_output(&self, problem: &AttentionProblem) -> AttentionOutput {
        let to_f32 = |values: &[f64]| values.iter().map(|&x| f32_from(x)).collect::<Vec<_>>();
        AttentionOutput {
            output: super::stored(problem, self.output.clone(), f32_from, f16_from, bf16_from),
            lse: problem.spec().lse.then(|| to_f32(&self.lse)),
            row_state: problem
                .spec()
                .row_state
                .then(|| RowState { row_max: to_f32(&self.row_max), row_sum: self.sums_beside_rounded_maxima() }),
            scores: self.scores.as_deref().map(to_f32),
        }
    }
}

impl Reference {
    /// The sums that go with maxima in f32: what a maximum loses when it is rounded is in its sum.
    fn sums_beside_rounded_maxima(&self) -> Vec<f32> {
        let rows = self.row_max.iter().zip(&self.row_sum);
        rows.map(|(&max, &sum)| {
            let lost = max - f64::from(f32_from(max));
            f32_from(if lost.is_finite() { sum * lost.exp() } else { sum })
        })
        .collect()
    }
}

/// Computes row `i` of head `h` of batch entry `b`. The inputs must have passed
/// [`check`](AttentionInputs::check).
///
/// # Panics
/// If the indices or the inputs do not fit the problem.
#[must_use]
pub fn row(problem: &AttentionProblem, inputs: &AttentionInputs<'_>, b: usize, h: usize, i: usize) -> Row {
    let keys = 0..problem.kv_len();
    let allowed: Vec<bool> = keys.clone().map(|j| allowed(problem, inputs, b, h, i, j)).collect();
    let scores: Vec<f64> =
        keys.clone().map(|j| if allowed[j] { score(problem, inputs, b, h, i, j) } else { f64::NEG_INFINITY }).collect();
    let behind = inputs.terms.q_lens.is_some_and(|lens| i >= lens[b] as usize);
    let sink = inputs.terms.sinks.filter(|_| !behind).map(|sinks| f64::from(sinks[h]));

    if !keys.clone().any(|j| allowed[j]) {
        // no key: zeros, and nothing but the sink, whatever it is
        let lse = sink.unwrap_or(f64::NEG_INFINITY);
        let output = vec![0.0; problem.v_head_dim()];
        let row_sum = if lse == f64::NEG_INFINITY { 0.0 } else { 1.0 };
        return Row { output, lse, row_max: lse, row_sum, allowed, scores, probs: vec![0.0; problem.kv_len()] };
    }
    let mut max = f64::NEG_INFINITY;
    for score in keys.clone().filter(|&j| allowed[j]).map(|j| scores[j]).chain(sink) {
        if score.is_nan() || score > max {
            max = score;
        }
        if max.is_nan() {
            break;
        }
    }
    let mut output = vec![0.0; problem.v_head_dim()];
    let mut probs = vec![0.0; problem.kv_len()];
    if max == f64::NEG_INFINITY {
        // no key with any mass
        return Row { output, lse: max, row_max: max, row_sum: 0.0, allowed, scores, probs };
    }
    let mut sum = 0.0;
    for score in keys.clone().filter(|&j| allowed[j]).map(|j| scores[j]).chain(sink) {
        sum += (score - max).exp();
    }
    let lse = max + sum.ln();
    for j in keys.filter(|&j| allowed[j]) {
        // exp(score - lse), without the rounding of lse
        probs[j] = (scores[j] - max).exp() / sum;
        let value = stored(problem, inputs, Stored::Value, [b, h / problem.group_size(), j]);
        for (x, v) in output.iter_mut().zip(value) {
            *x += probs[j] * v;
        }
    }
    Row { output, lse, row_max: if sum.is_nan() { sum } else { max }, row_sum: sum, allowed, scores, probs }
}

/// The scores of a row at the stage that the spec asks for, `[kv_len]`; empty if it asks for none.
pub(crate) fn stage(
    problem: &AttentionProblem,
    inputs: &AttentionInputs<'_>,
    b: usize,
    h: usize,
    i: usize,
    row: &Row,
) -> Vec<f64> {
    let keys = 0..problem.kv_len();
    match problem.spec().scores {
        None => Vec::new(),
        Some(ScoreStage::Scaled) => keys.map(|j| scaled(problem, inputs, b, h, i, j)).collect(),
        Some(ScoreStage::Capped) => keys.map(|j| capped(problem, inputs, b, h, i, j)).collect(),
        Some(ScoreStage::Masked) => row.scores.clone(),
        Some(ScoreStage::Probs) => row.probs.clone(),
    }
}

/// `scale * dot(query, key)` of one pair, whether allowed or not.
pub(crate) fn scaled(
    problem: &AttentionProblem,
    inputs: &AttentionInputs<'_>,
    b: usize,
    h: usize,
    i: usize,
    j: usize,
) -> f64 {
    let spec = problem.spec();
    let query = load(inputs.query, &spec.query.layout, [b, h, i]);
    let key = stored(problem, inputs, Stored::Key, [b, h / problem.group_size(), j]);
    f64::from(problem.scale()) * query.zip(key).map(|(q, k)| q * k).sum::<f64>()
}

/// The same after the softcap.
pub(crate) fn capped(
    problem: &AttentionProblem,
    inputs: &AttentionInputs<'_>,
    b: usize,
    h: usize,
    i: usize,
    j: usize,
) -> f64 {
    let score = scaled(problem, inputs, b, h, i, j);
    match problem.spec().softcap.map(f64::from) {
        Some(softcap) => softcap * (score / softcap).tanh(),
        None => score,
    }
}

/// The score of an allowed pair, with all its terms.
fn score(problem: &AttentionProblem, inputs: &AttentionInputs<'_>, b: usize, h: usize, i: usize, j: usize) -> f64 {
    let mut score = capped(problem, inputs, b, h, i, j);
    if let Some(bias) = bias(problem, inputs, b, h, i, j) {
        score += bias;
    }
    if let Some(slopes) = inputs.terms.alibi_slopes {
        let distance = (i as i64 + offset(problem, inputs, b) - j as i64).abs();
        let slope = match problem.spec().alibi_slopes {
            Some(AlibiSlopes::PerBatchAndHead) => slopes[b * problem.q_heads() + h],
            _ => slopes[h],
        };
        score -= f64::from(slope) * distance as f64;
    }
    score
}

/// Whether row `i` sees key `j`.
fn allowed(problem: &AttentionProblem, inputs: &AttentionInputs<'_>, b: usize, h: usize, i: usize, j: usize) -> bool {
    let spec = problem.spec();
    let row = b * problem.q_len() + i;
    let diagonal = i as i64 + offset(problem, inputs, b);
    let key = j as i64;
    inputs.terms.q_lens.is_none_or(|lens| i < lens[b] as usize)
        && inputs.terms.kv_lens.is_none_or(|lens| key < i64::from(lens[b]))
        && inputs.terms.mask.zip(spec.mask.as_ref()).is_none_or(|(mask, layout)| mask[layout.index([b, h, i, j])])
        && inputs.terms.row_start.is_none_or(|start| i64::from(start[row]) <= key)
        && inputs.terms.row_end.is_none_or(|end| key < i64::from(end[row]))
        && (spec.causal.is_none() || key <= diagonal)
        && spec.window_left.is_none_or(|left| diagonal - i64::from(left) <= key)
        && spec.window_right.is_none_or(|right| key <= diagonal + i64::from(right))
        && bias(problem, inputs, b, h, i, j) != Some(f64::NEG_INFINITY)
}

fn offset(problem: &AttentionProblem, inputs: &AttentionInputs<'_>, b: usize) -> i64 {
    let (q_len, kv_len) = (problem.q_len() as i64, problem.kv_len() as i64);
    match problem.diagonal() {
        Diagonal::TopLeft => 0,
        Diagonal::BottomRight => kv_len - q_len,
        Diagonal::EndOfKeys => {
            let length = |lens: Option<&[u32]>, all| lens.map_or(all, |lens| i64::from(lens[b]));
            length(inputs.terms.kv_lens, kv_len) - length(inputs.terms.q_lens, q_len)
        }
        Diagonal::Fixed(offset) => i64::from(offset),
    }
}

fn bias(
    problem: &AttentionProblem,
    inputs: &AttentionInputs<'_>,
    b: usize,
    h: usize,
    i: usize,
    j: usize,
) -> Option<f64> {
    let (data, bias) = inputs.terms.bias.zip(problem.spec().bias.as_ref())?;
    Some(f64::from(data.get(bias.layout.index([b, h, i, j]))))
}

/// Row `[b, h, i]` of a tensor.
pub(crate) fn load<'a>(
    data: TensorRef<'a>,
    layout: &Layout,
    [b, h, i]: [usize; 3],
) -> impl Iterator<Item = f64> + use<'a> {
    let (start, stride) = (layout.index([b, h, i, 0]), layout.strides[3]);
    (0..layout.shape[3]).map(move |d| f64::from(data.get(start + d * stride)))
}

/// Keys or values.
#[derive(Clone, Copy)]
pub(crate) enum Stored {
    Key,
    Value,
}

/// The row of token `j`: of the page that the table names, and times its scales.
pub(crate) fn stored<'a>(
    problem: &AttentionProblem,
    inputs: &AttentionInputs<'a>,
    which: Stored,
    [b, h, j]: [usize; 3],
) -> impl Iterator<Item = f64> + use<'a> {
    let (spec, terms) = (problem.spec(), &inputs.terms);
    let (data, tensor, scale_data, scale) = match which {
        Stored::Key => (inputs.key, &spec.key, terms.key_scale, &spec.key_scale),
        Stored::Value => (inputs.value, &spec.value, terms.value_scale, &spec.value_scale),
    };
    let mut at = [b, h, j];
    if let (Some(paged), Some(table)) = (spec.paged, terms.block_table) {
        let page_len = spec.key.layout.shape[2];
        let page = table[b * paged.table_len + j / page_len];
        at = [page.unsigned_abs() as usize, h, j % page_len];
    }
    let width = tensor.layout.shape[3];
    let scales: Option<Vec<f64>> =
        scale_data.zip(scale.as_ref()).map(|(data, scale)| load(data, &scale.layout, at).collect());
    load(data, &tensor.layout, at).enumerate().map(move |(d, element)| match &scales {
        // a product of f32s, rounded once, is what such an element is
        Some(scales) => f64::from(f32_from(element * scales[d * scales.len() / width])),
        None => element,
    })
}

#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
const fn f32_from(x: f64) -> f32 {
    x as f32
}

/// Rounds once: by way of f32 a value may fall on a tie of f16 that it was not on. Rounding to odd on the way
/// (Boldo and Melquiond 2008) keeps it off.
pub(crate) fn f16_from(x: f64) -> f16 {
    f16::from_f32(rounded_to_odd(x))
}

/// The same for bf16.
pub(crate) fn bf16_from(x: f64) -> bf16 {
    bf16::from_f32(rounded_to_odd(x))
}

fn rounded_to_odd(x: f64) -> f32 {
    let nearest = f32_from(x);
    let exact = f64::from(nearest);
    if exact.is_nan() || (exact - x).abs() == 0.0 || nearest.to_bits() & 1 == 1 || nearest.is_infinite() {
        return nearest;
    }
    let towards_zero = exact.abs() > x.abs();
    let bits = nearest.to_bits();
    f32::from_bits(if towards_zero { bits - 1 } else { bits + 1 })
}
