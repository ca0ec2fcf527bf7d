//! The oracle of the gradients: the formulas of [`backward`](crate::backward) in f64, pair by pair, with the weights of the oracle's
//! own rows and nothing that a kernel saved; and beside each element how far a sound kernel in f32 may be off.
//!
//! # The bounds
//!
//! `u = 2^-24` is the rounding of one f32 operation. A sum of `n` products with absolute sum `A` may be off by
//! `gamma(n) * A` with `gamma(n) = u * (1 + 4/3 * sqrt(n))`: roundings are taken for independent and even over `-u|y| .. u|y|`
//! (probabilistic rounding analysis, Higham and Mary 2019), which for one long chain of terms of one sign and size is a standard
//! deviation of `u * A * sqrt(n) / 3`, and 4 of these are allowed. From that, to first order and by the formulas:
//!
//! - a score: `gamma` of its dot product, one rounding for each term, and for the softcap twelve of its cap (an exponential and a
//!   division, by WGSL's accuracy);
//! - a weight: in its exponent its score's error, and that of the scores that the row's maximum and sum were made of, of which the
//!   mean over the row counts, the exponential (WGSL: `3 + 2 |x|` ulp), the sum, and a division; but no weight leaves 0 to 1;
//! - `delta`: `gamma` of its dot product, and what the saved output is off by, its rounding to the element it is stored in included;
//! - `ds`: the weight's relative error of it, the errors of the product with the value and of `delta`, and a rounding of each;
//! - what may be beyond the range of f32 on the way, or of an element that it is stored in, may become anything;
//! - each gradient: the errors of what it sums up, those of different rows as independent as roundings are, `gamma` of the sum, and the rounding of the element that it is stored in.

use super::{Stored, load, row, stored};
use crate::backward::{BackwardInputs, BackwardProblem, Gradients};
use crate::inputs::InputError;
use crate::problem::AttentionProblem;
use crate::tensor::{Element, Layout, TensorSpec};
use crate::weights::{HeadReduce, Keys, Select, WeightsSpec};

/// One gradient in f64: right values, without gaps in the shape of the spec's tensor, and how far f32 may be off each.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gradient {
    /// The right values.
    pub values: Vec<f64>,
    /// How far a sound kernel may be off, the rounding of the stored element included.
    pub bounds: Vec<f64>,
    /// Absolute sums of what was added up.
    sizes: Vec<f64>,
    /// Sums of the squares of errors that are independent.
    squares: Vec<f64>,
}

/// The right gradients; empty where they are not asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReferenceGradients {
    /// In the shape of the spec's `d_query`.
    pub d_query: Gradient,
    /// In the shape of the spec's `d_key`.
    pub d_key: Gradient,
    /// In the shape of the spec's `d_value`.
    pub d_value: Gradient,
    /// In the shape of the spec's `d_bias`.
    pub d_bias: Gradient,
    /// As many as there are slopes.
    pub d_alibi_slopes: Gradient,
    /// `[q_heads]`.
    pub d_sinks: Gradient,
    /// One number.
    pub d_scale: Gradient,
}

const U: f64 = 1.0 / (1u32 << 24) as f64;

fn gamma(n: usize) -> f64 {
    U * (1.0 + 4.0 / 3.0 * (n as f64).sqrt())
}

impl Gradient {
    fn zeros(len: usize) -> Self {
        let zeros = || vec![0.0; len];
        Self { values: zeros(), bounds: zeros(), sizes: zeros(), squares: zeros() }
    }

    /// Adds a term that is off by `error`, one of about `n` terms.
    fn add(&mut self, at: usize, term: f64, error: f64, n: usize) {
        self.values[at] += term;
        self.bounds[at] += error + gamma(n) * term.abs();
        self.sizes[at] += term.abs() + error;
    }

    /// The same of a term whose error is independent of those of all others.
    fn add_row(&mut self, at: usize, term: f64, error: f64, n: usize) {
        /// More than this of a term is not what roundings of its own make of it.
        const LARGE: f64 = 1e-3;
        if error > LARGE * term.abs() {
            return self.add(at, term, error, n);
        }
        self.values[at] += term;
        self.bounds[at] += gamma(n) * term.abs();
        self.sizes[at] += term.abs() + error;
        self.squares[at] += error * error;
    }

    fn merge(&mut self, other: &Self) {
        let own = [&mut self.values, &mut self.bounds, &mut self.sizes, &mut self.squares];
        let others = [&other.values, &other.bounds, &other.sizes, &other.squares];
        for (to, from) in own.into_iter().zip(others) {
            if to.is_empty() {
                to.clone_from(from);
            } else {
                to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
            }
        }
    }

    /// Adds what storing costs.
    fn store(&mut self, element: Element) {
        let sums = self.sizes.iter().zip(&self.squares);
        for ((value, bound), (size, squares)) in self.values.iter().zip(&mut self.bounds).zip(sums) {
            *bound += squares.sqrt();
            if in_range(*size).is_infinite() {
                *bound = f64::INFINITY;
            }
            *bound += rounding(element, value.abs() + *bound);
        }
    }
}

/// What storing a number in an element may change it by: anything, where it is out of the element's range.
fn rounding(element: Element, value: f64) -> f64 {
    let most = match element {
        Element::F16 => 65_519.0,
        Element::Bf16 | Element::F32 | Element::I8 => f64::from(f32::MAX),
    };
    if value.abs() > most {
        return f64::INFINITY;
    }
    let (relative, least): (f64, f64) = match element {
        Element::F16 => (2f64.powi(-11), 2f64.powi(-25)),
        Element::Bf16 => (2f64.powi(-8), f64::from(f32::MIN_POSITIVE)),
        // what is below the normal range may be flushed
        Element::F32 | Element::I8 => (U, f64::from(f32::MIN_POSITIVE)),
    };
    (relative * value.abs()).max(least)
}

/// The absolute sum of a dot product, infinite where a partial sum may be out of the range of f32: then anything may come of it.
fn in_range(size: f64) -> f64 {
    if size > f64::from(f32::MAX) { f64::INFINITY } else { size }
}

/// Position in a tensor without gaps, where axes of length 1 stand for all.
fn at(shape: [usize; 4], index: [usize; 4]) -> usize {
    (0..4).fold(0, |at, axis| at * shape[axis] + if shape[axis] == 1 { 0 } else { index[axis] })
}

/// Computes the right gradients.
///
/// # Errors
/// An [`InputError`] if the data is not what the problem asks for.
pub fn backward(problem: &BackwardProblem, inputs: &BackwardInputs<'_>) -> Result<ReferenceGradients, InputError> {
    backward_of(problem, inputs, None)
}

/// The same of one head of keys and values and of the query heads that share it; of other heads there are zeros.
pub(crate) fn backward_of(
    problem: &BackwardProblem,
    inputs: &BackwardInputs<'_>,
    kv_head: Option<usize>,
) -> Result<ReferenceGradients, InputError> {
    inputs.check(problem)?;
    let heads: Vec<usize> = kv_head.map_or_else(|| (0..problem.forward().kv_heads()).collect(), |head| vec![head]);
    let parts = super::super::map(heads.len(), |n| of_head(problem, inputs, heads[n]));
    let spec = problem.spec();
    let mut all = ReferenceGradients::default();
    for part in &parts {
        for (to, from) in all.list_mut().into_iter().zip(part.list()) {
            to.merge(from);
        }
    }
    for (gradient, tensor) in all.list_mut().into_iter().zip([&spec.d_query, &spec.d_key, &spec.d_value, &spec.d_bias])
    {
        gradient.store(tensor.as_ref().map_or(Element::F32, |tensor| tensor.element));
    }
    for gradient in [&mut all.d_alibi_slopes, &mut all.d_sinks, &mut all.d_scale] {
        gradient.store(Element::F32);
    }
    Ok(all)
}

impl ReferenceGradients {
    /// Rounds once to the elements and the layouts that the spec asks for.
    #[must_use]
    pub fn to_gradients(&self, problem: &BackwardProblem) -> Gradients {
        let spec = problem.spec();
        let tensor = |of: &Option<TensorSpec>, gradient: &Gradient| {
            of.map(|of| {
                super::super::scattered(
                    &of,
                    gradient.values.clone(),
                    super::f32_from,
                    super::f16_from,
                    super::bf16_from,
                )
            })
        };
        let numbers = |of: &Gradient| of.values.iter().map(|&x| super::f32_from(x)).collect::<Vec<_>>();
        Gradients {
            d_query: tensor(&spec.d_query, &self.d_query),
            d_key: tensor(&spec.d_key, &self.d_key),
            d_value: tensor(&spec.d_value, &self.d_value),
            d_bias: tensor(&spec.d_bias, &self.d_bias),
            d_alibi_slopes: spec.d_alibi_slopes.then(|| numbers(&self.d_alibi_slopes)),
            d_sinks: spec.d_sinks.then(|| numbers(&self.d_sinks)),
            d_scale: numbers(&self.d_scale).first().copied(),
        }
    }

    /// Those of tensors first.
    pub(crate) fn list(&self) -> [&Gradient; 7] {
        let Self { d_query, d_key, d_value, d_bias, d_alibi_slopes, d_sinks, d_scale } = self;
        [d_query, d_key, d_value, d_bias, d_alibi_slopes, d_sinks, d_scale]
    }

    /// Takes note of a pair with a score of negative infinity, which comes of infinite numbers: it adds nothing, or what 0 times
    /// these is.
    fn unknown(&mut self, problem: &BackwardProblem, [b, h, i, j]: [usize; 4], shapes: [[usize; 4]; 4]) {
        let mark = |gradient: &mut Gradient, at: usize| {
            if let Some(bound) = gradient.bounds.get_mut(at) {
                *bound = f64::INFINITY;
            }
        };
        let forward = problem.forward();
        let kv_head = h / forward.group_size();
        let [of_query, of_key, of_value, of_bias] = shapes;
        for d in 0..forward.head_dim() {
            mark(&mut self.d_query, at(of_query, [b, h, i, d]));
            mark(&mut self.d_key, at(of_key, [b, kv_head, j, d]));
        }
        (0..forward.v_head_dim()).for_each(|d| mark(&mut self.d_value, at(of_value, [b, kv_head, j, d])));
        mark(&mut self.d_bias, at(of_bias, [b, h, i, j]));
        mark(&mut self.d_scale, 0);
        let slope = if self.d_alibi_slopes.bounds.len() > forward.q_heads() { b * forward.q_heads() + h } else { h };
        mark(&mut self.d_alibi_slopes, slope);
    }

    fn list_mut(&mut self) -> [&mut Gradient; 7] {
        let Self { d_query, d_key, d_value, d_bias, d_alibi_slopes, d_sinks, d_scale } = self;
        [d_query, d_key, d_value, d_bias, d_alibi_slopes, d_sinks, d_scale]
    }
}

/// Everything that one head of keys and values gives.
fn of_head(problem: &BackwardProblem, inputs: &BackwardInputs<'_>, kv_head: usize) -> ReferenceGradients {
    let (spec, forward, given) = (problem.spec(), problem.forward(), &inputs.attention);
    let attention = &spec.attention;
    let [batch, q_heads, q_len, kv_len] = forward.score_shape();
    let (group, scale) = (forward.group_size(), f64::from(forward.scale()));
    let shape = |tensor: &Option<TensorSpec>| tensor.map_or([0; 4], |tensor| tensor.layout.shape);
    let shapes = [&spec.d_query, &spec.d_key, &spec.d_value, &spec.d_bias].map(shape);
    let mut all = ReferenceGradients::default();
    for (gradient, shape) in all.list_mut().into_iter().zip(shapes) {
        *gradient = Gradient::zeros(shape.iter().product());
    }
    let [of_query, of_key, of_value, of_bias] = shapes;
    let slopes = given.terms.alibi_slopes.filter(|_| spec.d_alibi_slopes).map_or(0, <[f32]>::len);
    all.d_alibi_slopes = Gradient::zeros(slopes);
    all.d_sinks = Gradient::zeros(if spec.d_sinks { q_heads } else { 0 });
    all.d_scale = Gradient::zeros(usize::from(spec.d_scale));
    // what a term may lose below the normal range, before its scale or behind it
    let flushed = (1.0 + scale.abs()) * f64::from(f32::MIN_POSITIVE);
    // terms of a sum over rows, and over everything
    let (of_rows, of_all) = (group * q_len * batch, batch * group * q_len * kv_len);
    for b in 0..batch {
        let token = |which, j| stored(forward, given, which, [b, kv_head, j]).collect::<Vec<f64>>();
        // those that some row sees: of others nothing may be looked at
        let mut keys = vec![vec![]; kv_len];
        let mut values = vec![vec![]; kv_len];
        for (h, i) in (kv_head * group..(kv_head + 1) * group).flat_map(|h| (0..q_len).map(move |i| (h, i))) {
            let forward_row = row(forward, given, b, h, i);
            let (allowed, p) = (&forward_row.allowed, &forward_row.probs);
            let keys_seen: Vec<usize> = (0..kv_len).filter(|&j| allowed[j]).collect();
            for &j in &keys_seen {
                if keys[j].is_empty() {
                    (keys[j], values[j]) = (token(Stored::Key, j), token(Stored::Value, j));
                }
            }
            let query: Vec<f64> = load(given.query, &attention.query.layout, [b, h, i]).collect();
            let d_output: Vec<f64> = load(inputs.d_output, &spec.d_output.layout, [b, h, i]).collect();
            let d_lse = inputs.d_lse.map_or(0.0, |d_lse| f64::from(d_lse[(b * q_heads + h) * q_len + i]));
            let behind = given.terms.q_lens.is_some_and(|lens| i >= lens[b] as usize);
            let sink = given.terms.sinks.filter(|_| !behind).map(|sinks| f64::from(sinks[h]));
            if keys_seen.is_empty() || forward_row.row_sum == 0.0 {
                keys_seen.iter().for_each(|&j| all.unknown(problem, [b, h, i, j], shapes));
                // the output does not move, and the log-sum-exp is the sink
                if spec.d_sinks && sink.is_some_and(|sink| sink.is_nan() || sink > f64::NEG_INFINITY) {
                    all.d_sinks.add(h, d_lse, U * d_lse.abs(), q_len * batch);
                }
                continue;
            }
            // scores, and what f32 may make of them
            let of_score = |j: usize| {
                let dot = scale.abs() * query.iter().zip(&keys[j]).map(|(q, k)| (q * k).abs()).sum::<f64>();
                let cap = attention.softcap.map_or(0.0, f64::from);
                let capped = super::capped(forward, given, b, h, i, j);
                // what bias and slope add may be larger than what comes of it
                let added = (forward_row.scores[j] - capped).abs() + bias_at(forward, given, [b, h, i, j]);
                let size = capped.abs() + 2.0 * added + forward_row.scores[j].abs();
                gamma(query.len()) * dot + U * size + 12.0 * U * cap
            };
            let e_score: Vec<f64> = (0..kv_len).map(|j| if allowed[j] { of_score(j) } else { 0.0 }).collect();
            let mean = keys_seen.iter().map(|&j| p[j] * e_score[j]).sum::<f64>();
            let size_of_max = forward_row.row_max.abs();
            // by how much a weight may be off: in full, for where scores are large their errors are, up to all that a row has
            let of_weight = |j: usize| {
                let x = forward_row.scores[j] - forward_row.row_max;
                if x == f64::NEG_INFINITY {
                    return 0.0;
                }
                let exponential = 2.0 * U * (3.0 + 2.0 * x.abs().min(200.0));
                let subtracted = U * (x.abs() + size_of_max).min(200.0);
                let relative = e_score[j] + mean + exponential + subtracted + gamma(kv_len) + 6.0 * U;
                let most = (x + relative).exp() / forward_row.row_sum;
                // a small difference of two numbers that are alike is told by its slope
                let off = if relative < 1e-3 { p[j] * relative * (1.0 + relative) } else { most - p[j] };
                // what is below the normal range may be flushed
                off.min(1.0) + f64::from(f32::MIN_POSITIVE)
            };
            let dots: Vec<f64> = (0..kv_len)
                .map(|j| if allowed[j] { d_output.iter().zip(&values[j]).map(|(g, v)| g * v).sum() } else { 0.0 })
                .collect();
            let sizes: Vec<f64> =
                (0..kv_len)
                    .map(|j| {
                        if allowed[j] { d_output.iter().zip(&values[j]).map(|(g, v)| (g * v).abs()).sum() } else { 0.0 }
                    })
                    .collect();
            let d_weights = chosen(problem, inputs, [b, h, i], kv_len);
            let d_weight = |j: usize| d_weights.as_ref().map_or(0.0, |d| d[j]);
            let of_weights: f64 = keys_seen.iter().map(|&j| p[j] * d_weight(j)).sum();
            let d_dot_o = d_output.iter().zip(&forward_row.output).map(|(g, o)| g * o).sum::<f64>();
            let delta = d_dot_o - d_lse + of_weights;
            // the saved output, by its own roundings and by that of its element
            let e_delta = {
                let width = d_output.len();
                let size: f64 = d_output.iter().zip(&forward_row.output).map(|(g, o)| (g * o).abs()).sum();
                let of_key = |j: usize| (of_weight(j) + p[j] * gamma(kv_len)) * (sizes[j] + d_weight(j).abs());
                let own: f64 = keys_seen.iter().map(|&j| of_key(j)).sum();
                let kept: f64 = d_output
                    .iter()
                    .zip(&forward_row.output)
                    .map(|(g, o)| g.abs() * rounding(attention.output.element, *o))
                    .sum();
                gamma(width) * in_range(size) + own + kept + 2.0 * U * (d_lse.abs() + delta.abs() + of_weights.abs())
            };
            if spec.d_sinks
                && let Some(sink) = sink
            {
                let weight = (sink - forward_row.row_max).exp() / forward_row.row_sum;
                let x = (sink - forward_row.row_max).abs();
                let relative = mean + 2.0 * U * (4.0 + 3.0 * x.min(200.0)) + gamma(kv_len) + 6.0 * U;
                let e_weight = (weight * relative.min(700.0).exp_m1()).min(1.0);
                let error = weight * e_delta + e_weight * (delta.abs() + e_delta);
                all.d_sinks.add(h, -weight * delta, error, q_len * batch);
            }
            for &j in &keys_seen {
                if forward_row.scores[j] == f64::NEG_INFINITY {
                    all.unknown(problem, [b, h, i, j], shapes);
                    continue;
                }
                let (p, e_weight) = (p[j], of_weight(j));
                let inner = dots[j] + d_weight(j) - delta;
                let ds2 = p * inner;
                let e_inner = gamma(d_output.len()) * in_range(sizes[j])
                    + e_delta
                    + 3.0 * U * in_range(sizes[j] + delta.abs() + e_delta + d_weight(j).abs());
                let e_ds2 = p * e_inner + e_weight * (inner.abs() + e_inner) + f64::from(f32::MIN_POSITIVE);
                for (d, g) in d_output.iter().enumerate().filter(|_| spec.d_value.is_some()) {
                    let error = e_weight * g.abs() + f64::from(f32::MIN_POSITIVE);
                    all.d_value.add_row(at(of_value, [b, kv_head, j, d]), p * g, error, of_rows);
                }
                if spec.d_bias.is_some() {
                    all.d_bias.add(at(of_bias, [b, h, i, j]), ds2, e_ds2, of_all);
                }
                if slopes > 0 {
                    let diagonal = i as i64 + super::offset(forward, given, b);
                    let distance = (diagonal - j as i64).abs() as f64;
                    let slope = if slopes > q_heads { b * q_heads + h } else { h };
                    all.d_alibi_slopes.add(slope, -ds2 * distance, e_ds2 * distance, batch * q_len * kv_len);
                }
                let (factor, e_factor) = match attention.softcap.map(f64::from) {
                    Some(cap) => {
                        let t = (super::scaled(forward, given, b, h, i, j) / cap).tanh();
                        // the slope of t^2 by the score, and roundings of t and of its square
                        let dot = scale.abs() * query.iter().zip(&keys[j]).map(|(q, k)| (q * k).abs()).sum::<f64>();
                        (
                            1.0 - t * t,
                            2.0 * t.abs() * (1.0 - t * t) * gamma(query.len()) * in_range(dot) / cap + 16.0 * U,
                        )
                    }
                    None => (1.0, 0.0),
                };
                let (ds, e_ds) = (ds2 * factor, e_ds2 * factor + ds2.abs() * e_factor);
                for d in (0..query.len()).filter(|_| problem.has_dots()) {
                    let (q, k) = (query[d], keys[j][d]);
                    if spec.d_query.is_some() {
                        all.d_query.add(
                            at(of_query, [b, h, i, d]),
                            scale * ds * k,
                            (scale * e_ds * k).abs() + flushed,
                            kv_len,
                        );
                    }
                    if spec.d_key.is_some() {
                        all.d_key.add_row(
                            at(of_key, [b, kv_head, j, d]),
                            scale * ds * q,
                            (scale * e_ds * q).abs() + flushed,
                            of_rows,
                        );
                    }
                }
                if spec.d_scale {
                    let dot: f64 = query.iter().zip(&keys[j]).map(|(q, k)| q * k).sum();
                    let size: f64 = query.iter().zip(&keys[j]).map(|(q, k)| (q * k).abs()).sum();
                    if ds.abs() == 0.0 && !dot.is_finite() {
                        // nothing, or what 0 times infinity is
                        all.d_scale.bounds[0] = f64::INFINITY;
                        continue;
                    }
                    let error = e_ds * dot.abs() + ds.abs() * gamma(query.len()) * in_range(size) + flushed;
                    all.d_scale.add(0, ds * dot, error, of_all);
                }
            }
        }
    }
    all
}

fn bias_at(problem: &AttentionProblem, inputs: &crate::inputs::AttentionInputs<'_>, [b, h, i, j]: [usize; 4]) -> f64 {
    super::bias(problem, inputs, b, h, i, j).map_or(0.0, f64::abs)
}

/// The gradient of the weights of a row, summed over everything that was chosen of it; `None`: nothing was.
fn chosen(
    problem: &BackwardProblem,
    inputs: &BackwardInputs<'_>,
    [b, h, i]: [usize; 3],
    kv_len: usize,
) -> Option<Vec<f64>> {
    let (given, spec, of) = (inputs.d_weights?, problem.spec().d_weights.as_ref()?, problem.weights()?);
    let WeightsSpec { heads, reduce, rows, keys } = spec;
    let places = |select: &Select, len: usize, wanted: usize| -> Vec<usize> {
        let all: Vec<usize> = match select {
            Select::All => (0..len).collect(),
            Select::Range(range) => range.clone().collect(),
            Select::List(list) => list.clone(),
        };
        all.iter().enumerate().filter(|(_, position)| **position == wanted).map(|(place, _)| place).collect()
    };
    let forward = problem.forward();
    let layout = Layout::bhld(of.shape());
    let listed = match heads {
        Select::All => forward.q_heads(),
        Select::Range(range) => range.len(),
        Select::List(list) => list.len(),
    };
    let mut d = vec![0.0; kv_len];
    for head in places(heads, forward.q_heads(), h) {
        let (head, share) = match reduce {
            HeadReduce::Each => (head, 1.0),
            HeadReduce::Sum => (0, 1.0),
            HeadReduce::Mean => (0, 1.0 / listed as f64),
        };
        for row in places(rows, forward.q_len(), i) {
            for column in 0..of.shape()[3] {
                let of_column = share * f64::from(given[layout.index([b, head, row, column])]);
                match keys {
                    Keys::Each(Select::All) => d[column] += of_column,
                    Keys::Each(Select::Range(range)) => d[range.start + column] += of_column,
                    Keys::Each(Select::List(list)) => d[list[column]] += of_column,
                    Keys::Segments(segments) => {
                        segments[column].clone().for_each(|j| d[j] += of_column);
                    }
                }
            }
        }
    }
    Some(d)
}
