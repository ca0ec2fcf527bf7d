//! Output against oracle: the tolerance rule.
//!
//! For every row: `err(kernel) <= 2 * err(plain) + floor`, each against the oracle on the stored (rounded) inputs.
//! `plain` is the direct algorithm in f32, every sum in order, before its output is rounded, so it pays what f32 itself
//! costs. It is a yardstick of this module's own, so that no kernel sets the tolerance that it is judged by, and it may not
//! be further off than its own rounding errors add up to at worst. What one order of summation is spared by chance, another
//! is not: the same algorithm with exact sums, the *twin*, is a second yardstick, and the worse of the two counts.
//! `floor` is what sound kernels may differ by, derived below; nothing in it is chosen to make a test pass.
//!
//! The rule and its derivation stand in this file and in `src/verify/floor.rs`, and nowhere else.
//!
//! # The floor
//!
//! `u = 2^-24` is the rounding of one f32 operation. Let `s_j` be the scores of the twin, `m` their maximum (the sink's
//! logit included), `x_j = s_j - m`, `p_j` the probabilities, `o_d` the output.
//!
//! *Roundings.* They are taken for independent and even over `-u|y| .. u|y|`, `y` being what is rounded: a variance of
//! `(u y)^2 / 3` (probabilistic rounding analysis, Higham and Mary 2019). Variances add up, and 4 standard deviations are
//! allowed; a sum of up to 5 roundings of one size cannot be off by more. Numbers that are f32 are not rounded. Where all
//! numbers that a step may have round to one f32, all kernels have that f32, and nothing that went before counts any longer:
//! a bias of -10^9 is no licence, for it leaves all sound kernels with the same scores.
//!
//! *Sums* round each product and each partial sum. Partial sums are those of the numbers at hand in 16 chains side by side,
//! which are then added up; those of a dot product also in chains of 16 one after the other, if these are off by more, for
//! kernels do both, and there is one score to judge by and no row of them. What one long chain costs beyond that, `plain`
//! pays. A kernel may round each once more when it moves to a new maximum.
//!
//! *Scores.* A dot product, then one rounding each for scale, bias and ALiBi. The softcap is
//! `cap * (1 - t) / (1 + t)` with `t = exp(-2 |s| / cap)`. It makes of the error so far what it makes of both ends of the
//! range that the error leaves, which for a large error is not what its slope would, and adds the errors of its exponential
//! and its division. An infinite score comes of an infinite number, not of rounding: it has no error. Together: `e_j`. A
//! kernel carries maximum and sum, so the exponential is given `s_j - m`, rounded once more where that is no f32, and no
//! error is in proportion to the log-sum-exp.
//!
//! *Exponentials.* WGSL allows `exp(x)` an error of `3 + 2 |x|` ulp, an ulp being at most `2 u` of the value. It is a
//! driver's function, and may be off everywhere in one direction: such errors add up as they are.
//!
//! *Output.* To first order, an error of `e_j` in an exponent moves the output by `p_j * e_j * (v_jd - o_d)`: what
//! numerator and denominator have in common cancels, that of the exponential too, for there is one for both. In full it is
//! `exp(e_j) - 1` in place of `e_j`, and all of it times what the mass may have shrunk by; and however large errors are, the
//! output stays a mean of the values and of the sink's 0, so it is no further off than the furthest of them. To that come the
//! roundings of both sums, the division, which may be off by 2.5 ulp in WGSL, and the rounding of the stored element: by
//! `u * |o|` for f32; by `2^-11 |o|`, or `2^-25` among the subnormals, for f16; by `2^-8 |o|` for bf16. Results below f32's normal range may be
//! flushed to zero.
//!
//! *Weights.* The error of the own exponent, that of the sum, the division; but no weight leaves 0 to 1. Those of a row must
//! also add up to 1, less the sink's, within what two passes over the scores may differ by in their sums.
//!
//! *Maximum and sum.* `row_sum * exp(row_max - m)` is the mass of the row: the errors of exponents weighted by `p_j`, and
//! the sum. The maximum may be any number that leaves the sum finite and above 0.
//!
//! *lse.* The error of the mass, or the largest `e_j` if that is less; the logarithm, which WGSL allows `2^-21`, or 3 ulp
//! outside of 0.5 to 2; the addition of the maximum, and a change of base.
//!
//! # Special values
//!
//! NaN must be where the oracle has NaN and nowhere else; infinities must match. A result that rounds to an infinite
//! element must be infinite; near that border it may be either, and where its sign is not certain either infinity. A row
//! without mass gives exact zeros. Beside a sink it may also give what 0 times its values is, if they are not finite. Two things
//! cannot be asked of f32: a finite result where a step of a score itself is beyond f32, so that the twin overflows too (such
//! places are counted, in [`Report::beyond_f32`]), and which of NaN and infinity an infinite value becomes whose weight is
//! too small for f32.

mod backward;
mod floor;
mod yardstick;

pub use self::backward::{BackwardReport, GradientPlace, verify_backward, verify_backward_head};

use self::floor::{Bound, Bounds};
use self::yardstick::{Plain, Twin};
use crate::cpu::{self, reference};
use crate::inputs::{AttentionInputs, AttentionOutput, InputError};
use crate::problem::{AttentionProblem, ScoreStage};
use crate::tensor::Element;

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
    /// The largest error of what a returned maximum and sum stand for, relative; 0 if the spec does not ask for them.
    pub max_state_error: f64,
    /// The largest ratio of an error to what is allowed there; at most 1 if all is well.
    pub worst_ratio: f64,
    /// Where that is; `None` if everything is exact.
    pub worst: Option<Place>,
    /// Number of elements out of tolerance.
    pub failures: usize,
    /// Number of elements whose true value is finite but out of reach of f32, so that they could not be judged: a score, or a
    /// step on the way to it, is beyond f32's range.
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
    /// The error of the direct algorithm in f32; for output the largest of the row, for the magnitude of this column. At
    /// most what its roundings add up to.
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
    /// Maximum and sum of a row, shown as the log-sum-exp that they stand for; the errors are relative to the row's mass.
    State,
    /// The sum of a row's returned weights.
    Mass,
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
            max_state_error: 0.0,
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
            Compared::Scores | Compared::Mass => &mut self.max_score_error,
            Compared::State => &mut self.max_state_error,
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
        self.max_state_error = self.max_state_error.max(other.max_state_error);
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
                Compared::State => "maximum and sum",
                Compared::Mass => "sum of the weights",
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
        return Err(InputError::Element { name: "output", wanted: element.into(), found: found.into() });
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
    let state = output.row_state.as_ref();
    optional("row_max", state.map(|state| &state.row_max), spec.row_state, problem.rows())?;
    optional("row_sum", state.map(|state| &state.row_sum), spec.row_state, problem.rows())?;
    optional("scores", output.scores.as_ref(), spec.scores.is_some(), problem.rows() * problem.kv_len())
}

fn compare_row(problem: &AttentionProblem, inputs: &AttentionInputs<'_>, output: &AttentionOutput, n: usize) -> Report {
    let spec = problem.spec();
    let (b, h, i) = cpu::row_place(problem, n);
    let oracle = reference::row(problem, inputs, b, h, i);
    let plain = yardstick::plain(problem, inputs, [b, h, i], &oracle);
    let twin = yardstick::twin(problem, inputs, [b, h, i], &oracle);
    let bounds = Bounds::new(problem, inputs, [b, h, i], &oracle, &twin);
    let mut report = Report::new(1, 1);
    let no_mass = (0..problem.kv_len()).all(|j| !oracle.allowed[j] || oracle.scores[j] == f64::NEG_INFINITY);

    // the largest of the row, for the magnitude of a column
    let relative = |yardstick: &dyn Fn(usize) -> f64| {
        let of_column =
            |(d, column): (usize, &floor::Column)| (yardstick(d) - oracle.output[d]).abs() / column.magnitude.max(TINY);
        bounds.columns.iter().enumerate().map(of_column).filter(|error| error.is_finite()).fold(0.0, f64::max)
    };
    let plain_relative = relative(&|d| f64::from(plain.output[d])).max(relative(&|d| twin.output[d]));
    for (d, column) in bounds.columns.iter().enumerate() {
        let at = spec.output.layout.index([b, h, i, d]);
        let want = oracle.output[d];
        report.judge(&Judged {
            tensor: Compared::Output,
            index: [b, h, i, d],
            element: spec.output.element,
            got: f64::from(output.output.as_ref().get(at)),
            want,
            in_reach: plain.output[d].is_finite() || (twin.output[d].is_finite() && twin.reaches(want)),
            plain_error: (plain_relative * column.magnitude).min(column.bound.plain),
            floor: column.bound.floor,
            exact: bounds.empty,
            nan_or_infinite: column.vanishing_infinity,
            nan_or_zero: no_mass,
        });
    }
    let pointwise =
        |tensor, index, got: f32, want: f64, [plain, twin_has]: [f64; 2], bound: Bound, exact: bool| Judged {
            tensor,
            index,
            element: Element::F32,
            got: f64::from(got),
            want,
            in_reach: plain.is_finite() || (twin_has.is_finite() && twin.reaches(want)),
            plain_error: worse([plain, twin_has], want).min(bound.plain),
            floor: bound.floor,
            exact,
            nan_or_infinite: false,
            nan_or_zero: false,
        };
    if let Some(lse) = &output.lse {
        let yardsticks = [f64::from(plain.lse), twin.lse];
        report.judge(&pointwise(Compared::Lse, [b, h, i, 0], lse[n], oracle.lse, yardsticks, bounds.lse, false));
    }
    if let Some(state) = &output.row_state {
        report.judge_state([b, h, i], [state.row_max[n], state.row_sum[n]], (&oracle, &plain, &twin), &bounds);
    }
    if let Some(scores) = &output.scores {
        let want = reference::stage(problem, inputs, b, h, i, &oracle);
        let row = &scores[n * problem.kv_len()..][..problem.kv_len()];
        for (j, &got) in row.iter().enumerate() {
            let (of_twin, bound, exact) = bounds.score(problem, inputs, [b, h, i], j, (&oracle, &twin));
            let yardsticks = [f64::from(plain.scores[j]), of_twin];
            report.judge(&pointwise(Compared::Scores, [b, h, i, j], got, want[j], yardsticks, bound, exact));
        }
        if spec.scores == Some(ScoreStage::Probs) && !bounds.empty && oracle.lse.is_finite() && twin.lse.is_finite() {
            let (got, want) = (row.iter().copied().map(f64::from).sum::<f64>(), want.iter().sum::<f64>());
            let plain: f64 = plain.scores.iter().copied().map(f64::from).sum();
            let plain_error = worse([plain, twin.probs.iter().sum()], want).min(bounds.mass);
            let error = if got.is_finite() { (got - want).abs() } else { f64::INFINITY };
            let allowed = 2.0 * plain_error + bounds.mass;
            let index = [b, h, i, 0];
            report.add(Place { tensor: Compared::Mass, index, got, want, error, plain_error, allowed });
        }
    }
    report
}

/// The larger error of two yardsticks, of those that are numbers.
fn worse(yardsticks: [f64; 2], want: f64) -> f64 {
    yardsticks.into_iter().map(|x| (x - want).abs()).filter(|error| error.is_finite()).fold(0.0, f64::max)
}

/// One element and all that decides whether it is right.
struct Judged {
    tensor: Compared,
    index: [usize; 4],
    element: Element,
    got: f64,
    want: f64,
    /// a yardstick has a finite number here, or the result lies within f32
    in_reach: bool,
    plain_error: f64,
    /// without the rounding of the element
    floor: f64,
    /// no error at all is allowed
    exact: bool,
    /// NaN and infinity are as good as each other here
    nan_or_infinite: bool,
    /// NaN and zero are
    nan_or_zero: bool,
}

impl Report {
    fn judge(&mut self, judged: &Judged) {
        let &Judged { tensor, index, element, got, want, in_reach, plain_error, floor, exact, .. } = judged;
        let place = |error, allowed| Place { tensor, index, got, want, error, plain_error, allowed };
        if !want.is_finite() {
            let same = if want.is_nan() { got.is_nan() } else { got.is_infinite() && got.signum() == want.signum() };
            let zero = judged.nan_or_zero && want.is_nan() && got.abs() == 0.0;
            let right = same || zero || (judged.nan_or_infinite && !got.is_finite());
            self.add(place(if right { 0.0 } else { f64::INFINITY }, 0.0));
            return;
        }
        if !in_reach {
            self.beyond_f32 += 1;
            return;
        }
        let before_rounding = if exact { 0.0 } else { 2.0 * plain_error + floor };
        // half the distance of neighbours, and the least magnitude that rounds to infinity
        let (relative, absolute, overflow) = match element {
            Element::F32 => (U, TINY, 2f64.powi(128) - 2f64.powi(103)),
            Element::F16 => (2f64.powi(-11), 2f64.powi(-25), 65520.0),
            // those below f32's normal numbers are below bf16's
            Element::Bf16 | Element::I8 => (2f64.powi(-8), TINY, 2f64.powi(128) - 2f64.powi(119)),
        };
        let allowed = before_rounding + if exact { 0.0 } else { relative * (want.abs() + before_rounding) + absolute };
        let must_overflow = want.abs() - before_rounding >= overflow;
        // to the side that it did overflow to: where the sign is not certain, that may be the other one
        let may_overflow = want * got.signum() + before_rounding >= overflow;
        let error = if got.is_infinite() && may_overflow {
            0.0
        } else if !got.is_finite() || must_overflow {
            f64::INFINITY
        } else {
            (got - want).abs()
        };
        self.add(place(error, allowed));
    }

    /// Maximum and sum of a row, by the mass that they stand for.
    fn judge_state(
        &mut self,
        [b, h, i]: [usize; 3],
        [row_max, row_sum]: [f32; 2],
        (oracle, plain, twin): (&reference::Row, &Plain, &Twin),
        bounds: &Bounds,
    ) {
        let mut place = Place {
            tensor: Compared::State,
            index: [b, h, i, 0],
            got: f64::from(row_max) + f64::from(row_sum).ln(),
            want: oracle.lse,
            error: f64::INFINITY,
            plain_error: 0.0,
            allowed: 0.0,
        };
        if !oracle.lse.is_finite() || bounds.empty {
            let seen = oracle.allowed.contains(&true);
            let right = if seen {
                // NaN, an infinite score, or no score but -inf
                if oracle.lse.is_nan() { place.got.is_nan() } else { row_sum == 0.0 || place.got.is_nan() }
            } else if oracle.lse == f64::NEG_INFINITY {
                row_max == f32::NEG_INFINITY && row_sum == 0.0
            } else {
                (row_max.total_cmp(&twin.sink).is_eq() && row_sum.to_bits() == 1.0f32.to_bits())
                    || (row_max.is_nan() && twin.sink.is_nan())
            };
            place.error = if right { 0.0 } else { f64::INFINITY };
            self.add(place);
            return;
        }
        if !plain.row_sum.is_finite() && !twin.reaches(oracle.lse) {
            self.beyond_f32 += 1;
            return;
        }
        // relative to the mass of the row
        let off = |max: f32, sum: f32| f64::from(sum) * (f64::from(max) - oracle.lse).exp() - 1.0;
        place.plain_error = worse([off(plain.row_max, plain.row_sum), (twin.lse - oracle.lse).exp_m1()], 0.0);
        place.plain_error = place.plain_error.min(bounds.state.plain);
        place.allowed = 2.0 * place.plain_error + bounds.state.floor + U;
        let sound = row_max.is_finite() && row_sum.is_finite() && row_sum > 0.0;
        place.error = if sound { off(row_max, row_sum).abs() } else { f64::INFINITY };
        self.add(place);
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

/// Standard deviations of many roundings that are allowed.
const SIGMAS: f64 = 4.0;

/// A weight below this, times infinity, may be NaN in f32: with some room, where it may be flushed to zero.
const VANISHING: f64 = 1.0 / (1u128 << 100) as f64;

#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
const fn round(x: f64) -> f32 {
    x as f32
}

#[cfg(test)]
mod tests;
