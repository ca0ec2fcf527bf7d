//! Output against oracle: the tolerance rule.
//!
//! For every row: `err(kernel) <= 2 * err(plain) + floor`, each against the oracle on the stored (rounded) inputs.
//! `plain` is the direct algorithm in f32 before its output is rounded, so it pays what f32 itself costs. `floor` is
//! what any sound kernel may differ by, derived below; nothing in it is chosen to make a test pass.
//!
//! The rule and its derivation stand in this one file and nowhere else, which makes it a long one.
//!
//! # The floor
//!
//! `u = 2^-24` is the rounding of one f32 operation. Let `s_j` be the scores, `m` their maximum (the sink's logit
//! included), `x_j = s_j - m`, `p_j` the probabilities, `n` the number of allowed keys, `o_d` the output.
//!
//! *Scores.* A dot product of length `k` that is added up in any order is off by about
//! `sqrt(k) * u * sum |q * k|` (Higham and Mary 2019, probabilistic rounding analysis). Scale, bias, ALiBi and softcap
//! each round once more: `u * |s|`. The softcap is `cap * (1 - t) / (1 + t)` with `t = exp(-2 |s| / cap)`, whose
//! derivative scales the error so far and which adds the errors of its exponential and its division. Together:
//! `e_j`. What the exponential is given has been rounded again, when the maximum is subtracted and when the score is
//! taken to base 2: `u * (|s_j| + |x_j|)`.
//!
//! *Exponentials.* WGSL allows `exp(x)` an error of `3 + 2 |x|` ulp, an ulp being at most `2 u` of the value.
//!
//! *Output.* To first order, an error of `e_j` in score `j` moves the output by `p_j * e_j * (v_jd - o_d)`: what
//! numerator and denominator have in common cancels. The exponential's error is not supposed to cancel, so it counts
//! with `|v_jd| + |o_d|`. Sums over `n` keys, each possibly rescaled to a new maximum, cost
//! `sqrt(2 n) * u * (sum p_j |v_jd| + |o_d|)`. The division may be off by 2.5 ulp in WGSL, and the stored element
//! rounds once: by `u * |o|` for f32; by `2^-11 |o|`, or `2^-25` among the subnormals, for f16.
//! Results below f32's normal range may be flushed to zero.
//!
//! *lse.* The errors of scores and exponentials weighted by `p_j`; the sum; the logarithm, which WGSL allows
//! `2^-21`, or 3 ulp outside of 0.5 to 2; the addition of the maximum, and a change of base.
//!
//! # Special values
//!
//! NaN must be where the oracle has NaN and nowhere else; infinities must match. A result that rounds to an infinite
//! element must be infinite; near that border it may be either. A row without mass gives exact zeros. Two things
//! cannot be asked of f32: a finite result where the direct algorithm in f32 itself overflows (such places are
//! counted, in [`Report::beyond_f32`]), and which of NaN and infinity an infinite value becomes whose weight is too
//! small for f32.

use crate::cpu::{self, reference};
use crate::inputs::{AttentionInputs, AttentionOutput, InputError};
use crate::problem::{AttentionProblem, ScoreStage};
use crate::tensor::{Element, TensorData};

/// How an output compares with the oracle. Printing it says everything.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Report {
    /// Rows that were compared.
    pub rows: usize,
    /// Rows that there are: `batch * q_heads * q_len`.
    pub all_rows: usize,
    /// The largest error of an output element; infinite where NaN or an infinity does not match.
    pub max_abs_error: f64,
    /// The largest error of a log-sum-exp; 0 if the spec does not ask for it.
    pub max_lse_error: f64,
    /// The largest error of a returned score or weight; 0 if the spec does not ask for them.
    pub max_score_error: f64,
    /// The largest ratio of an error to what is allowed there; at most 1 if all is well.
    pub worst_ratio: f64,
    /// Where that is; `None` if everything is exact.
    pub worst: Option<Place>,
    /// Number of elements out of tolerance.
    pub failures: usize,
    /// Number of elements whose true value is finite but out of reach of f32, so that they could not be judged.
    pub beyond_f32: usize,
}

/// One compared element.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Place {
    /// Which tensor.
    pub tensor: Compared,
    /// `[batch, head, row, column]`; column is 0 for `lse`. For a gap: its position in the buffer, then zeros.
    pub index: [usize; 4],
    /// What the kernel gave.
    pub got: f64,
    /// What the oracle says.
    pub want: f64,
    /// The kernel's error.
    pub error: f64,
    /// The error of the direct algorithm in f32; for output the largest of the row, for the magnitude of this column.
    pub plain_error: f64,
    /// The error that is allowed here.
    pub allowed: f64,
}

/// A part of the output that is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compared {
    /// The output tensor.
    Output,
    /// The log-sum-exp of the rows.
    Lse,
    /// The returned score matrix.
    Scores,
    /// An element of the output's buffer that its layout leaves out; must be zero.
    Gap,
}

impl Report {
    /// Whether every element that was compared is within tolerance.
    #[must_use]
    pub const fn passed(&self) -> bool {
        self.failures == 0
    }

    const fn new(rows: usize, all_rows: usize) -> Self {
        Self {
            rows,
            all_rows,
            max_abs_error: 0.0,
            max_lse_error: 0.0,
            max_score_error: 0.0,
            worst_ratio: 0.0,
            worst: None,
            failures: 0,
            beyond_f32: 0,
        }
    }

    fn add(&mut self, place: Place) {
        let ratio = if place.error > 0.0 { place.error / place.allowed } else { 0.0 };
        // infinite errors are never allowed
        let ratio = if ratio.is_nan() { f64::INFINITY } else { ratio };
        let max = match place.tensor {
            Compared::Output | Compared::Gap => &mut self.max_abs_error,
            Compared::Lse => &mut self.max_lse_error,
            Compared::Scores => &mut self.max_score_error,
        };
        *max = max.max(place.error);
        self.failures += usize::from(ratio > 1.0);
        if ratio > self.worst_ratio {
            self.worst_ratio = ratio;
            self.worst = Some(place);
        }
    }

    fn merge(&mut self, other: &Self) {
        self.max_abs_error = self.max_abs_error.max(other.max_abs_error);
        self.max_lse_error = self.max_lse_error.max(other.max_lse_error);
        self.max_score_error = self.max_score_error.max(other.max_score_error);
        if other.worst_ratio > self.worst_ratio {
            self.worst_ratio = other.worst_ratio;
            self.worst = other.worst;
        }
        self.failures += other.failures;
        self.beyond_f32 += other.beyond_f32;
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let verdict = if self.passed() { "passed" } else { "failed" };
        write!(
            f,
            "{verdict}: {} of {} rows compared, {} elements out of tolerance",
            self.rows, self.all_rows, self.failures
        )?;
        if self.beyond_f32 > 0 {
            write!(f, ", {} out of reach of f32", self.beyond_f32)?;
        }
        write!(
            f,
            "\nlargest errors: output {:.3e}, lse {:.3e}, scores {:.3e}; at worst {:.3} of what is allowed",
            self.max_abs_error, self.max_lse_error, self.max_score_error, self.worst_ratio
        )?;
        if let Some(Place { tensor, index, got, want, error, plain_error, allowed }) = self.worst {
            let tensor = match tensor {
                Compared::Output => "output",
                Compared::Lse => "lse",
                Compared::Scores => "scores",
                Compared::Gap => "gap in output",
            };
            write!(
                f,
                "\nworst: {tensor} {index:?}: got {got:e}, want {want:e}, error {error:.3e} \
                 (direct algorithm in f32: {plain_error:.3e}), allowed {allowed:.3e}"
            )?;
        }
        Ok(())
    }
}

/// Compares every row of an output with the oracle, and the gaps of its layout with zero.
///
/// # Errors
/// An [`InputError`] if the inputs or the output are not what the problem asks for.
pub fn verify(
    problem: &AttentionProblem,
    inputs: &AttentionInputs<'_>,
    output: &AttentionOutput,
) -> Result<Report, InputError> {
    let mut report = verify_sample(problem, inputs, output, problem.rows())?;
    let layout = &problem.spec().output.layout;
    if layout.elements() != layout.extent() {
        let mut gap = vec![true; output.output.as_ref().len()];
        for n in 0..problem.rows() {
            let (b, h, i) = cpu::row_place(problem, n);
            (0..problem.v_head_dim()).for_each(|d| gap[layout.index([b, h, i, d])] = false);
        }
        for (position, _) in gap.iter().enumerate().filter(|&(_, &gap)| gap) {
            let got = f64::from(output.output.as_ref().get(position));
            let error = if got.is_nan() { f64::INFINITY } else { got.abs() };
            let index = [position, 0, 0, 0];
            report.add(Place { tensor: Compared::Gap, index, got, want: 0.0, error, plain_error: 0.0, allowed: 0.0 });
        }
    }
    Ok(report)
}

/// Compares `max_rows` rows (at least 2) spread evenly over an output, first and last among them, with the oracle.
///
/// # Errors
/// An [`InputError`] if the inputs or the output are not what the problem asks for.
pub fn verify_sample(
    problem: &AttentionProblem,
    inputs: &AttentionInputs<'_>,
    output: &AttentionOutput,
    max_rows: usize,
) -> Result<Report, InputError> {
    let rows = problem.rows().min(max_rows.max(2));
    let last = problem.rows().saturating_sub(1);
    let steps = rows.saturating_sub(1).max(1) as u128;
    let row = |n: usize| (n as u128 * last as u128 / steps).try_into().unwrap_or(last);
    verify_rows(problem, inputs, output, &(0..rows).map(row).collect::<Vec<_>>())
}

/// Compares these rows of an output with the oracle.
pub(crate) fn verify_rows(
    problem: &AttentionProblem,
    inputs: &AttentionInputs<'_>,
    output: &AttentionOutput,
    rows: &[usize],
) -> Result<Report, InputError> {
    inputs.check(problem)?;
    check_output(problem, output)?;
    let reports = cpu::map(rows.len(), |n| compare_row(problem, inputs, output, rows[n]));
    let mut report = Report::new(rows.len(), problem.rows());
    reports.iter().for_each(|row| report.merge(row));
    Ok(report)
}

fn check_output(problem: &AttentionProblem, output: &AttentionOutput) -> Result<(), InputError> {
    let spec = problem.spec();
    let (element, layout) = (spec.output.element, &spec.output.layout);
    if output.output.as_ref().element() != element {
        let found = output.output.as_ref().element();
        return Err(InputError::Element { name: "output", wanted: element, found });
    }
    let (needed, found) = (layout.extent().unwrap_or(usize::MAX), output.output.as_ref().len());
    if found < needed {
        return Err(InputError::TooShort { name: "output", needed, found });
    }
    let optional = |name, data: Option<&Vec<f32>>, asked: bool, wanted: usize| match (data, asked) {
        (None, true) => Err(InputError::Missing { name }),
        (Some(_), false) => Err(InputError::Unexpected { name }),
        (Some(data), true) if data.len() != wanted => Err(InputError::Len { name, wanted, found: data.len() }),
        _ => Ok(()),
    };
    optional("lse", output.lse.as_ref(), spec.lse, problem.rows())?;
    optional("scores", output.scores.as_ref(), spec.scores.is_some(), problem.rows() * problem.kv_len())
}

fn compare_row(problem: &AttentionProblem, inputs: &AttentionInputs<'_>, output: &AttentionOutput, n: usize) -> Report {
    let spec = problem.spec();
    let (b, h, i) = cpu::row_place(problem, n);
    let oracle = reference::row(problem, inputs, b, h, i);
    let plain = cpu::plain_row(problem, inputs, [b, h, i]);
    let bounds = Bounds::new(problem, inputs, [b, h, i], &oracle);
    let mut report = Report::new(1, 1);

    let plain_errors = plain.output.iter().zip(&oracle.output).zip(&bounds.columns);
    let plain_relative = plain_errors
        .map(|((&plain, want), column)| (f64::from(plain) - want).abs() / column.magnitude.max(TINY))
        .filter(|error| error.is_finite())
        .fold(0.0, f64::max);
    for (d, column) in bounds.columns.iter().enumerate() {
        let at = spec.output.layout.index([b, h, i, d]);
        let plain_error = plain_relative * column.magnitude;
        report.judge(&Judged {
            tensor: Compared::Output,
            index: [b, h, i, d],
            element: spec.output.element,
            got: match &output.output {
                TensorData::F32(data) => f64::from(data[at]),
                TensorData::F16(data) => f64::from(data[at]),
            },
            want: oracle.output[d],
            plain: plain.output[d],
            plain_error,
            floor: column.floor,
            exact: bounds.empty,
            nan_or_infinite: column.vanishing_infinity,
        });
    }
    let pointwise = |tensor, index, got: f32, want: f64, plain: f32, floor: f64, exact: bool| Judged {
        tensor,
        index,
        element: Element::F32,
        got: f64::from(got),
        want,
        plain,
        plain_error: (f64::from(plain) - want).abs(),
        floor,
        exact,
        nan_or_infinite: false,
    };
    if let Some(lse) = &output.lse {
        let index = [b, h, i, 0];
        report.judge(&pointwise(Compared::Lse, index, lse[n], oracle.lse, plain.lse, bounds.lse, false));
    }
    if let Some(scores) = &output.scores {
        let want = reference::stage(problem, inputs, b, h, i, &oracle);
        for (j, &got) in scores[n * problem.kv_len()..][..problem.kv_len()].iter().enumerate() {
            let (floor, exact) = bounds.score(problem, inputs, [b, h, i], j, &oracle);
            report.judge(&pointwise(Compared::Scores, [b, h, i, j], got, want[j], plain.scores[j], floor, exact));
        }
    }
    report
}

/// One element and all that decides whether it is right.
struct Judged {
    tensor: Compared,
    index: [usize; 4],
    element: Element,
    got: f64,
    want: f64,
    plain: f32,
    plain_error: f64,
    /// without the rounding of the element
    floor: f64,
    /// no error at all is allowed
    exact: bool,
    /// NaN and infinity are as good as each other here
    nan_or_infinite: bool,
}

impl Report {
    fn judge(&mut self, judged: &Judged) {
        let &Judged { tensor, index, element, got, want, plain, plain_error, floor, exact, nan_or_infinite } = judged;
        let place = |error, allowed| Place { tensor, index, got, want, error, plain_error, allowed };
        if !want.is_finite() {
            let same = if want.is_nan() { got.is_nan() } else { got.is_infinite() && got.signum() == want.signum() };
            let right = same || (nan_or_infinite && !got.is_finite());
            self.add(place(if right { 0.0 } else { f64::INFINITY }, 0.0));
            return;
        }
        if !plain.is_finite() {
            self.beyond_f32 += 1;
            return;
        }
        let before_rounding = if exact { 0.0 } else { 2.0 * plain_error + floor };
        // half the distance of neighbours, and the least magnitude that rounds to infinity
        let (relative, absolute, overflow) = match element {
            Element::F32 => (U, TINY, 2f64.powi(128) - 2f64.powi(103)),
            Element::F16 => (2f64.powi(-11), 2f64.powi(-25), 65520.0),
        };
        let allowed = before_rounding + if exact { 0.0 } else { relative * (want.abs() + before_rounding) + absolute };
        let must_overflow = want.abs() - before_rounding >= overflow;
        let may_overflow = want.abs() + before_rounding >= overflow;
        let error = if got.is_infinite() && may_overflow && got.signum() == want.signum() {
            0.0
        } else if !got.is_finite() || must_overflow {
            f64::INFINITY
        } else {
            (got - want).abs()
        };
        self.add(place(error, allowed));
    }
}

/// Rounding error of one f32 operation, relative to its result.
const U: f64 = 1.0 / (1u64 << 24) as f64;
/// The smallest normal f32: what is below may be flushed to zero.
const TINY: f64 = f32::MIN_POSITIVE as f64;
/// Error of a division in WGSL: 2.5 ulp.
const DIVISION: f64 = 5.0 * U;

/// Relative error of `exp(x)` in WGSL: `3 + 2 |x|` ulp.
fn exp_error(x: f64) -> f64 {
    (3.0 + 2.0 * x.abs()) * 2.0 * U
}

/// The floors of one row: what a sound kernel may be off by, before the result is rounded to its element.
struct Bounds {
    /// `[v_head_dim]`
    columns: Vec<Column>,
    lse: f64,
    /// error of probabilities that all keys have in common, relative
    common: f64,
    /// no key has any weight, so the output is exactly zero
    empty: bool,
}

#[derive(Clone, Default)]
struct Column {
    floor: f64,
    /// `sum p_j |v_j|`
    magnitude: f64,
    /// an infinite value has a weight too small for f32
    vanishing_infinity: bool,
}

impl Bounds {
    fn new(
        problem: &AttentionProblem,
        inputs: &AttentionInputs<'_>,
        [b, h, i]: [usize; 3],
        oracle: &reference::Row,
    ) -> Self {
        let spec = problem.spec();
        let live = || (0..problem.kv_len()).filter(|&j| oracle.allowed[j]);
        let n = live().count() as f64;
        let sink = inputs.sinks.map_or(f64::NEG_INFINITY, |sinks| f64::from(sinks[h]));
        let max = live().map(|j| oracle.scores[j]).fold(sink, f64::max);
        let mut columns = vec![Column::default(); problem.v_head_dim()];

        // errors of scores and exponentials, weighted: over the row, and over a column without and with cancelling
        let mut weighted = 0.0;
        let sink_prob = if sink == f64::NEG_INFINITY { 0.0 } else { (sink - oracle.lse).exp() };
        let input_error = |score: f64| U * (score.abs() + (score - max).abs());
        if sink_prob > 0.0 {
            weighted += sink_prob * (input_error(sink) + exp_error(sink - max));
            for (column, output) in columns.iter_mut().zip(&oracle.output) {
                column.floor += weighted * output.abs();
            }
        }
        for j in live() {
            let (prob, score) = (oracle.probs[j], oracle.scores[j]);
            let score_error = score_errors(problem, inputs, [b, h, i], j).last() + input_error(score);
            let exp_error = exp_error(score - max);
            if prob > 0.0 {
                weighted += prob * (score_error + exp_error);
            }
            let value = reference::load(inputs.value, &spec.value.layout, [b, h / problem.group_size(), j]);
            for ((column, v), output) in columns.iter_mut().zip(value).zip(&oracle.output) {
                column.floor += TINY * v.abs();
                column.vanishing_infinity |= v.is_infinite() && prob < VANISHING;
                if prob > 0.0 {
                    column.magnitude += prob * v.abs();
                    column.floor += prob * (score_error * (v - output).abs() + exp_error * (v.abs() + output.abs()));
                }
            }
        }
        for (column, output) in columns.iter_mut().zip(&oracle.output) {
            let sums = (2.0 * n).sqrt() * U * (column.magnitude + output.abs());
            column.floor += sums + DIVISION * output.abs() + TINY;
        }
        let sum = (2.0 * n).sqrt() * U;
        let logarithm = f64::max(2f64.powi(-21), 6.0 * U * (n + 1.0).ln());
        let lse = weighted + sum + n * TINY + logarithm + U * (oracle.lse.abs() + 2.0 * max.abs());
        let empty = n == 0.0 || oracle.lse == f64::NEG_INFINITY;
        Self { columns, lse, common: weighted + sum + DIVISION + lse, empty }
    }

    /// Floor of the returned score of key `j`, and whether it must be exact.
    fn score(
        &self,
        problem: &AttentionProblem,
        inputs: &AttentionInputs<'_>,
        row: [usize; 3],
        j: usize,
        oracle: &reference::Row,
    ) -> (f64, bool) {
        let errors = score_errors(problem, inputs, row, j);
        match problem.spec().scores {
            Some(ScoreStage::Scaled) => (errors.scaled, false),
            Some(ScoreStage::Capped) => (errors.capped, false),
            Some(ScoreStage::Masked) => (errors.masked, !oracle.allowed[j]),
            Some(ScoreStage::Probs) if oracle.probs[j] > 0.0 => {
                let (score, x) = (oracle.scores[j], oracle.scores[j] - oracle.lse);
                let own = errors.masked + U * (score.abs() + x.abs()) + exp_error(x);
                (oracle.probs[j] * (own + self.common) + TINY, false)
            }
            Some(ScoreStage::Probs) | None => (TINY, !oracle.allowed[j] || self.empty),
        }
    }
}

/// A weight below this, times infinity, may be NaN in f32: with some room, where it may be flushed to zero.
const VANISHING: f64 = 1.0 / (1u128 << 100) as f64;

/// Errors of one score after each stage.
struct ScoreErrors {
    scaled: f64,
    capped: f64,
    masked: f64,
}

impl ScoreErrors {
    const fn last(&self) -> f64 {
        self.masked
    }
}

fn score_errors(
    problem: &AttentionProblem,
    inputs: &AttentionInputs<'_>,
    [b, h, i]: [usize; 3],
    j: usize,
) -> ScoreErrors {
    let spec = problem.spec();
    let query = reference::load(inputs.query, &spec.query.layout, [b, h, i]);
    let key = reference::load(inputs.key, &spec.key.layout, [b, h / problem.group_size(), j]);
    let (dot, magnitude) = query.zip(key).fold((0.0, 0.0), |(dot, magnitude), (q, k)| {
        let product: f64 = q * k;
        (dot + product, magnitude + product.abs())
    });
    let scale = f64::from(problem.scale());
    let mut score = scale * dot;
    let scaled = U * ((problem.head_dim() as f64).sqrt() * scale.abs() * magnitude + score.abs()) + TINY;
    let mut error = scaled;
    if let Some(cap) = spec.softcap.map(f64::from) {
        let x = 2.0 * score.abs() / cap;
        let t = (-x).exp();
        let slope = 4.0 * t / ((1.0 + t) * (1.0 + t));
        let exponential = cap * slope / 2.0 * (exp_error(x) + U * x);
        score = cap * (score / cap).tanh();
        error = slope * error + exponential + (DIVISION + 2.0 * U) * score.abs();
    }
    let capped = error;
    if let Some((bias, of)) = inputs.bias.zip(spec.bias.as_ref()) {
        score += f64::from(bias.get(of.layout.index([b, h, i, j])));
        error += U * score.abs();
    }
    if let Some(slopes) = inputs.alibi_slopes {
        let distance = i as i64 + problem.offset(inputs.kv_len(problem, b)) - j as i64;
        let term = f64::from(slopes[h]) * distance as f64;
        score -= term.abs().copysign(f64::from(slopes[h]));
        // the distance, if it has more than 24 bits, and the product
        error += U * (2.0 * term.abs() + score.abs());
    }
    ScoreErrors { scaled, capped, masked: error }
}

#[cfg(test)]
mod tests;
