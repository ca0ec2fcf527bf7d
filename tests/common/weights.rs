//! Selected attention weights: what is asked for, written out by a number, and what f64 says they are.

use cross_attention::cpu::reference;
use cross_attention::weights::{HeadReduce, Keys, Select, WeightsSpec};
use cross_attention::{AttentionData, AttentionInputs, AttentionProblem};

use super::case::Case;
use super::check::is_near;
use super::recipe::stored_key;

/// Rounding of one f32 operation.
const U: f64 = 1.0 / (1 << 24) as f64;
/// Results below f32's normal range may be flushed to zero.
const TINY: f64 = f32::MIN_POSITIVE as f64;

/// The log-sum-exp of the oracle, rounded once.
#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
pub(crate) fn lse(problem: &AttentionProblem, data: &AttentionData) -> Vec<f32> {
    let reference = reference::attention(problem, &data.as_inputs()).expect("the data fits");
    reference.lse.into_iter().map(|lse| lse as f32).collect()
}

/// A selection that a number stands for; 0 is everything.
pub(crate) fn selection(problem: &AttentionProblem, number: u64) -> WeightsSpec {
    if number == 0 {
        return WeightsSpec::default();
    }
    let mut random = fastrand::Rng::with_seed(number);
    let mut draw = |below: usize| random.usize(..below.max(1));
    let [_, heads, rows, keys] = problem.score_shape();
    let mut select = |len: usize| match draw(3) {
        _ if len == 0 => Select::All,
        0 => Select::All,
        1 => {
            let start = draw(len);
            Select::Range(start..start + 1 + draw(len - start))
        }
        // in any order, some of them twice
        _ => Select::List((0..1 + draw(2 * len.min(40))).map(|_| draw(len)).collect()),
    };
    let (heads, rows, each) = (select(heads), select(rows), select(keys));
    let reduce = [HeadReduce::Each, HeadReduce::Mean, HeadReduce::Sum][draw(3)];
    let keys = match draw(2) {
        0 => Keys::Each(each),
        // side by side, overlapping, empty
        _ => Keys::Segments(
            (0..1 + draw(9))
                .map(|_| {
                    let start = draw(keys + 1);
                    start..start + draw(keys - start + 1)
                })
                .collect(),
        ),
    };
    WeightsSpec { heads, reduce, rows, keys }
}

fn positions(select: &Select, len: usize) -> Vec<usize> {
    match select {
        Select::All => (0..len).collect(),
        Select::Range(range) => range.clone().collect(),
        Select::List(list) => list.clone(),
    }
}

/// A weight in f64 and how far an f32 computation may be off; `None` where f32 cannot be judged.
#[derive(Clone, Copy, Debug)]
struct Weight {
    want: f64,
    error: f64,
    judged: bool,
}

/// The weight of one key by the formula, from a log-sum-exp that was rounded to f32.
///
/// Worst cases, not likely ones: a dot product of `k` products in any order is off by `(k + 1) u` of the sum of their
/// magnitudes; each later term rounds once. A softcap does not enlarge errors, and its own is below `12 u` of the cap: at
/// most, `tanh` as `1 - 2 / (exp(2 x) + 1)` loses `3.8 u` to WGSL's `exp`, `2.2 u` to its division, `2.3 u` to the
/// division by the cap, and three roundings. `exp(x)` may be off by `3 + 2 |x|` ulp, an ulp being at most `2 u`.
fn weight(
    problem: &AttentionProblem,
    inputs: &AttentionInputs<'_>,
    row: &reference::Row,
    [b, h, i, j]: [usize; 4],
    lse: f32,
) -> Weight {
    if !row.allowed[j] || lse == f32::NEG_INFINITY {
        return Weight { want: 0.0, error: 0.0, judged: true };
    }
    let spec = problem.spec();
    let kv_head = h / problem.group_size();
    let product = |d: usize| {
        let q = inputs.query.get(spec.query.layout.index([b, h, i, d]));
        let k = stored_key(problem, inputs, [b, kv_head, j, d]);
        f64::from(q) * f64::from(k)
    };
    let magnitude: f64 = (0..problem.head_dim()).map(|d| product(d).abs()).sum();
    let scale = f64::from(problem.scale()).abs();
    let score = row.scores[j];
    let x = score - f64::from(lse);
    let mut error = (problem.head_dim() as f64 + 2.0) * U * scale * magnitude + TINY;
    let mut largest = magnitude.max(scale * magnitude);
    if let Some(cap) = spec.softcap {
        error += 12.0 * U * f64::from(cap);
    }
    if let Some((bias, of)) = inputs.terms.bias.zip(spec.bias.as_ref()) {
        let bias = f64::from(bias.get(of.layout.index([b, h, i, j])));
        error += U * (scale * magnitude + bias.abs());
        largest = largest.max(bias.abs());
    }
    if let Some(slopes) = inputs.terms.alibi_slopes {
        let distance = inputs.diagonal(problem, b, i) - j as i64;
        let term = (f64::from(slopes[h]) * distance as f64).abs();
        // the distance, the product, the difference
        error += U * (3.0 * term + score.abs() + term);
        largest = largest.max(term);
    }
    // the difference to lse, then the exponential
    error += U * x.abs() + 2.0 * U * (3.0 + 2.0 * x.abs());
    let want = x.exp();
    Weight { want, error: want * error.exp_m1() + TINY, judged: largest < f64::from(f32::MAX) / 4.0 }
}

/// Compares weights with f64.
pub(crate) fn compare(
    case: &Case,
    data: &AttentionData,
    lse: &[f32],
    spec: &WeightsSpec,
    got: &[f32],
) -> Result<(), String> {
    let problem = case.problem();
    let inputs = data.as_inputs();
    let [batch, q_heads, q_len, kv_len] = problem.score_shape();
    let (heads, rows) = (positions(&spec.heads, q_heads), positions(&spec.rows, q_len));
    let columns: Vec<Vec<usize>> = match &spec.keys {
        Keys::Each(keys) => positions(keys, kv_len).into_iter().map(|j| vec![j]).collect(),
        Keys::Segments(segments) => segments.iter().map(|segment| segment.clone().collect()).collect(),
    };
    let (shown, divisor): (Vec<Vec<usize>>, usize) = match spec.reduce {
        HeadReduce::Each => (heads.into_iter().map(|h| vec![h]).collect(), 1),
        HeadReduce::Mean => (vec![heads.clone()], heads.len()),
        HeadReduce::Sum => (vec![heads], 1),
    };
    let wanted = batch * shown.len() * rows.len() * columns.len();
    if got.len() != wanted {
        return Err(format!("{case}\n{spec:?}: {} weights, should be {wanted}", got.len()));
    }
    let mut got = got.iter();
    for b in 0..batch {
        for heads in &shown {
            for &i in &rows {
                let oracle: Vec<_> = heads.iter().map(|&h| reference::row(&problem, &inputs, b, h, i)).collect();
                for (n, keys) in columns.iter().enumerate() {
                    let mut sum = Weight { want: 0.0, error: 0.0, judged: true };
                    let mut terms = 0.0;
                    for (row, &h) in oracle.iter().zip(heads) {
                        let lse = lse[(b * q_heads + h) * q_len + i];
                        for &j in keys {
                            let one = weight(&problem, &inputs, row, [b, h, i, j], lse);
                            sum.want += one.want;
                            sum.error += one.error;
                            sum.judged &= one.judged;
                            terms += 1.0;
                        }
                    }
                    // added up in any order, divided or multiplied by a rounded factor, rounded
                    let want = sum.want / divisor as f64;
                    let error = sum.error / divisor as f64 + (terms + 3.0) * U * (want + sum.error);
                    let &got = got.next().expect("counted");
                    let both_nan = got.is_nan() && want.is_nan();
                    if sum.judged && !both_nan && !is_near(f64::from(got), want, error) {
                        let place = format!("batch {b}, heads {heads:?}, row {i}, column {n}");
                        return Err(format!(
                            "{case}\n{spec:?}\n{place}: {got}, should be {want}, may be off by {error:e}"
                        ));
                    }
                }
            }
        }
    }
    Ok(())
}
