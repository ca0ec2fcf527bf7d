//! Selected attention weights from query, key, and what a row is divided by: each row's dot products with the chosen keys, no others.

use std::ops::Range;

use super::reference;
use super::terms::RowTerms;
use crate::inputs::{AttentionInputs, InputError};
use crate::problem::AttentionProblem;
use crate::stored::StoredRows;
use crate::tensor::TensorRef;
use crate::weights::{KeyList, RowNorm, WeightsProblem};

/// Partial sums of a dot product.
const LANES: usize = 8;

/// Computes the weights that are asked for, `[batch, heads or 1, rows, keys or segments]`, on all cores (feature
/// `native`) or on one. `norm` is the attention's `row_state`, or its `lse` where [`RowNorm::Lse`]'s error will do.
///
/// Value and sinks of the inputs are not looked at. Sums over heads and over the keys of a segment are taken in f64.
///
/// ```
/// use cross_attention::weights::{Keys, WeightsProblem, WeightsSpec};
/// use cross_attention::{AttentionInputs, AttentionProblem, AttentionSpec, cpu};
/// let mut spec = AttentionSpec::new([1, 1, 1, 2], [1, 1, 4, 2]);
/// spec.row_state = true;
/// let problem = AttentionProblem::new(spec)?;
/// let (query, key, value) = (vec![1.0f32, 0.0], vec![0.0f32; 8], vec![1.0f32; 8]);
/// let inputs = AttentionInputs::new(&query, &key, &value);
/// let state = cpu::attention(&problem, &inputs)?.row_state.unwrap_or_default();
/// // four equal keys: three of them have 3/4 of the mass
/// let segments = WeightsSpec { keys: Keys::Segments(vec![0..3, 3..4]), ..WeightsSpec::default() };
/// let mass = cpu::weights(&WeightsProblem::new(&problem, &segments)?, &inputs, &state)?;
/// assert!((mass[0] - 0.75).abs() < 1e-6 && (mass[1] - 0.25).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// An [`InputError`] if the data is not what the problem asks for.
pub fn weights<'a>(
    problem: &WeightsProblem,
    inputs: &AttentionInputs<'_>,
    norm: impl Into<RowNorm<'a>>,
) -> Result<Vec<f32>, InputError> {
    let norm = norm.into();
    let inputs = problem.inputs(inputs, norm)?;
    let [_, _, rows, columns] = problem.shape();
    super::check_bytes(problem.elements().checked_mul(size_of::<f32>()))?;
    let mut result = vec![0.0f32; problem.elements()];
    if result.is_empty() {
        return Ok(result);
    }
    let tasks: Vec<_> = result.chunks_mut(columns).enumerate().collect();
    super::for_each(tasks, |(n, out)| row(problem, &inputs, norm, place(problem, rows, n), out));
    Ok(result)
}

/// The same by the formula in f64, from the probabilities of whole rows and not from a log-sum-exp; `attention` is what
/// the weights are of. The inputs must have passed [`check`](AttentionInputs::check).
pub(crate) fn reference_weights(
    problem: &WeightsProblem,
    attention: &AttentionProblem,
    inputs: &AttentionInputs<'_>,
) -> Vec<f32> {
    let [_, _, rows, columns] = problem.shape();
    if problem.elements() == 0 {
        return vec![];
    }
    let result = super::map(problem.elements() / columns, |n| {
        let Place { b, shown, i } = place(problem, rows, n);
        let (heads, divisor) = problem.heads_of(shown);
        let mut sums = vec![0.0f64; columns];
        for &h in heads {
            let probs = reference::row(attention, inputs, b, h as usize, i).probs;
            match problem.keys() {
                KeyList::Each(keys) => sums.iter_mut().zip(keys).for_each(|(sum, &j)| *sum += probs[j as usize]),
                KeyList::Segments(segments) => {
                    for (sum, &[from, to]) in sums.iter_mut().zip(segments) {
                        *sum += probs[from as usize..to as usize].iter().sum::<f64>();
                    }
                }
            }
        }
        sums.into_iter().map(|sum| rounded(sum, divisor)).collect::<Vec<_>>()
    });
    result.concat()
}

/// What one row is divided by.
#[derive(Clone, Copy)]
struct Norm {
    shift: f32,
    sum: f64,
}

impl Norm {
    fn of(norm: RowNorm<'_>, row: usize) -> Self {
        match norm {
            RowNorm::Lse(lse) => Self { shift: lse[row], sum: if lse[row] == f32::NEG_INFINITY { 0.0 } else { 1.0 } },
            RowNorm::State(state) => Self { shift: state.row_max[row], sum: f64::from(state.row_sum[row]) },
        }
    }

    /// The weight of a score; zero in a row without mass.
    fn weight(self, score: f32) -> f64 {
        if self.sum == 0.0 { 0.0 } else { f64::from(score - self.shift).exp() / self.sum }
    }
}

/// One row of the result.
struct Place {
    b: usize,
    shown: usize,
    i: usize,
}

fn place(problem: &WeightsProblem, rows: usize, n: usize) -> Place {
    let heads = problem.shape()[1];
    Place { b: n / (rows * heads), shown: n / rows % heads, i: problem.rows()[n % rows] as usize }
}

fn row(
    problem: &WeightsProblem,
    inputs: &AttentionInputs<'_>,
    norm: RowNorm<'_>,
    Place { b, shown, i }: Place,
    out: &mut [f32],
) {
    let scores = problem.scores();
    let spec = scores.spec();
    let (heads, divisor) = problem.heads_of(shown);
    let keys = inputs.keys(scores);
    let mut sums = vec![0.0f64; out.len()];
    for &h in heads {
        let h = h as usize;
        let norm = Norm::of(norm, (b * scores.q_heads() + h) * scores.q_len() + i);
        let terms = RowTerms::new(scores, inputs, [b, h, i]);
        let start = spec.query.layout.index([b, h, i, 0]);
        let stride = spec.query.layout.strides[3];
        let query: Vec<f32> = (0..scores.head_dim()).map(|d| inputs.query.get(start + d * stride)).collect();
        let weight = |j: usize| {
            // a key that is not allowed never enters arithmetic
            if !terms.keys.contains(&j) || !terms.allows(j) {
                return 0.0;
            }
            let key = dot(&query, &keys, [b, h / scores.group_size(), j]);
            norm.weight(terms.score(j, key))
        };
        match problem.keys() {
            KeyList::Each(keys) => sums.iter_mut().zip(keys).for_each(|(sum, &j)| *sum += weight(j as usize)),
            KeyList::Segments(segments) => {
                for (sum, &segment) in sums.iter_mut().zip(segments) {
                    *sum += within(segment, &terms.keys).map(weight).sum::<f64>();
                }
            }
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = rounded(sum, divisor);
    }
}

/// The keys of a segment that a row may see.
fn within([from, to]: [u32; 2], keys: &Range<usize>) -> Range<usize> {
    let from = keys.start.max(from as usize);
    from..keys.end.min(to as usize).max(from)
}

/// A sum over heads, or their mean, rounded once.
#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
fn rounded(sum: f64, divisor: usize) -> f32 {
    (sum / divisor as f64) as f32
}

/// A dot product in f32, in as many partial sums as a vector register has lanes; the same bits for every layout.
fn dot(query: &[f32], keys: &StoredRows<'_, '_>, at: [usize; 3]) -> f32 {
    let place = keys.place(at);
    let mut sums = [0.0f32; LANES];
    match keys.data {
        TensorRef::F32(key) if keys.layout.strides[3] == 1 => {
            let key = &key[place.start..place.start + query.len()];
            let (q, q_rest) = query.as_chunks::<LANES>();
            let (k, k_rest) = key.as_chunks::<LANES>();
            for (q, k) in q.iter().zip(k) {
                for (sum, (q, k)) in sums.iter_mut().zip(q.iter().zip(k)) {
                    *sum += q * k;
                }
            }
            for (sum, (q, k)) in sums.iter_mut().zip(q_rest.iter().zip(k_rest)) {
                *sum += q * k;
            }
        }
        TensorRef::F32(_) | TensorRef::F16(_) | TensorRef::Bf16(_) | TensorRef::I8(_) => {
            for (d, q) in query.iter().enumerate() {
                sums[d % LANES] += q * keys.get(place, d);
            }
        }
    }
    let [a, b, c, d, e, f, g, h] = sums;
    ((a + b) + (c + d)) + ((e + f) + (g + h))
}
