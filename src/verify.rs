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
mod judge;
mod report;
mod rounding;
#[cfg(test)]
mod tests;
mod yardstick;

pub use self::backward::{BackwardReport, GradientPlace, verify_backward, verify_backward_head};
pub use self::report::{Compared, Place, Report};

use self::floor::{Bound, Bounds};
use self::judge::{Judged, worse};
use self::rounding::TINY;
use crate::cpu::{self, reference};
use crate::inputs::{AttentionInputs, AttentionOutput, InputError};
use crate::problem::{AttentionProblem, ScoreStage};
use crate::tensor::Element;

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
