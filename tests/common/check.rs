//! What an implementation must do with a case. The same checks for the oracle, the CPU kernels and every GPU.

use cross_attention::cpu::reference;
use cross_attention::verify::{verify, verify_sample};
use cross_attention::{AttentionData, AttentionInputs, AttentionOutput, AttentionProblem};

use super::case::Case;
use super::onnx::OnnxCase;
use super::real::Capture;
use super::recipe::{allowed, places};

/// An implementation: a problem and its inputs, to an output or a message.
pub(crate) type Run<'a> = dyn Fn(&AttentionProblem, &AttentionInputs<'_>) -> Result<AttentionOutput, String> + 'a;

/// A case of the table: within tolerance, exact where a row sees nothing, and blind to what is not allowed.
pub(crate) fn case_with(case: &Case, run: &Run<'_>) -> Result<(), String> {
    let (problem, data) = (case.problem(), case.data());
    let named = |error: String| format!("{case}\n{error}");
    let output = run(&problem, &data.as_inputs()).map_err(named)?;
    within_tolerance(&problem, &data, &output).map_err(named)?;
    empty_rows(&problem, &data.as_inputs(), &output).map_err(named)?;
    if case.recipe.poison {
        let clean = run(&problem, &case.clean().data().as_inputs()).map_err(named)?;
        same_bits(&output, &clean)
            .map_err(|error| named(format!("what is not allowed changes the result: {error}")))?;
    }
    Ok(())
}

pub(crate) fn within_tolerance(
    problem: &AttentionProblem,
    data: &AttentionData,
    output: &AttentionOutput,
) -> Result<(), String> {
    let report = verify(problem, &data.as_inputs(), output).map_err(|error| error.to_string())?;
    if report.passed() { Ok(()) } else { Err(report.to_string()) }
}

/// Rows without an allowed key: zeros, and lse is negative infinity or the sink. Not left to the tolerance.
pub(crate) fn empty_rows(
    problem: &AttentionProblem,
    inputs: &AttentionInputs<'_>,
    output: &AttentionOutput,
) -> Result<(), String> {
    let layout = &problem.spec().output.layout;
    let [batch, heads, q_len, kv_len] = problem.score_shape();
    for (row, [b, h, i, _]) in places([batch, heads, q_len, 1]).enumerate() {
        if (0..kv_len).any(|j| allowed(problem, inputs, [b, h, i, j]) == (true, true)) {
            continue;
        }
        for d in 0..problem.v_head_dim() {
            let x = output.output.as_ref().get(layout.index([b, h, i, d]));
            if x.to_bits() != 0 {
                return Err(format!("row [{b}, {h}, {i}] sees no key, yet output[{d}] is {x}, should be zero"));
            }
        }
        if let Some(lse) = &output.lse {
            let behind = inputs.terms.q_lens.is_some_and(|lens| i >= lens[b] as usize);
            let want = inputs.terms.sinks.filter(|_| !behind).map_or(f32::NEG_INFINITY, |sinks| sinks[h]);
            // a sink comes back through exp and ln
            let near = (lse[row] - want).abs() <= 4.0 * f32::EPSILON * want.abs().max(1.0);
            let both_nan = lse[row].is_nan() && want.is_nan();
            if !near && !both_nan && lse[row].to_bits() != want.to_bits() {
                return Err(format!("row [{b}, {h}, {i}] sees no key, yet lse is {}, should be {want}", lse[row]));
            }
        }
    }
    Ok(())
}

/// Every number of an output as bits; f16 widened.
pub(crate) fn bits(output: &AttentionOutput) -> Vec<u32> {
    let rest = output.lse.iter().chain(&output.scores).flatten().copied();
    output.output.to_f32().into_iter().chain(rest).map(f32::to_bits).collect()
}

pub(crate) fn same_bits(a: &AttentionOutput, b: &AttentionOutput) -> Result<(), String> {
    let (a, b) = (bits(a), bits(b));
    if a.len() != b.len() {
        return Err(format!("{} numbers and {}", a.len(), b.len()));
    }
    match a.iter().zip(&b).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(n) => {
            let (a, b) = (f32::from_bits(a[n]), f32::from_bits(b[n]));
            Err(format!("number {n} of output, lse and scores is {a:e} and {b:e}"))
        }
    }
}

/// One of ONNX's cases. Where ONNX stored 16 bits, its result is good to `exact_distance` only, and a kernel that
/// accumulates in f32 may be the better one: then the oracle is held to the stored result, the kernel to the oracle.
pub(crate) fn onnx(case: &OnnxCase, run: &Run<'_>) -> Result<(), String> {
    let named = |error: String| format!("{}: {error}\n  {:?}", case.name, case.spec);
    let problem = AttentionProblem::new(case.spec.clone()).map_err(|error| named(error.to_string()))?;
    let output = run(&problem, &case.data.as_inputs()).map_err(named)?;
    within_tolerance(&problem, &case.data, &output).map_err(named)?;

    let exact = reference::attention(&problem, &case.data.as_inputs()).map_err(|error| named(error.to_string()))?;
    let layout = &problem.spec().output.layout;
    let dense = |numbers: &[f32]| places(layout.shape).map(|at| numbers[layout.index(at)]).collect::<Vec<_>>();
    let stored = dense(&case.output);
    // the stored distance is of another recomputation, with its own rounding of the scale
    let slack = 1e-6;
    for (n, (&stored, &exact)) in stored.iter().zip(&exact.output).enumerate() {
        if !is_near(f64::from(stored), exact, case.exact_distance + slack) {
            return Err(named(format!("the oracle says {exact} for element {n}, ONNX stored {stored}")));
        }
    }
    if !case.rounded {
        near(&dense(&output.output.to_f32()), &stored, case.rtol, case.atol)
            .map_err(|error| named(format!("Y: {error}")))?;
    }
    if let Some(stored) = &case.scores {
        let got = output.scores.as_ref().ok_or_else(|| named("scores were asked for".to_string()))?;
        // half a unit in the last place of an f16 below 1, where that is what is stored
        let atol = if case.rounded { 2.5e-4 } else { case.atol };
        near(got, stored, case.rtol, atol).map_err(|error| named(format!("qk_matmul_output: {error}")))?;
    }
    Ok(())
}

/// NaN is near nothing.
pub(crate) fn is_near(got: f64, want: f64, tolerance: f64) -> bool {
    (got - want).abs() <= tolerance
}

/// ONNX's own comparison: `|got - want| <= atol + rtol * |want|`.
fn near(got: &[f32], want: &[f32], rtol: f32, atol: f32) -> Result<(), String> {
    if got.len() != want.len() {
        return Err(format!("{} numbers, should be {}", got.len(), want.len()));
    }
    let over = |(&got, &want): (&f32, &f32)| {
        let same = got.to_bits() == want.to_bits();
        let tolerance = atol + rtol * want.abs();
        if same { 0.0 } else { (got - want).abs() / tolerance }
    };
    // NaN, too, is the worst
    let ratios = got.iter().zip(want).map(over).enumerate();
    let worst = ratios.max_by(|(_, a), (_, b)| a.total_cmp(b));
    if let Some((n, ratio)) = worst.filter(|(_, ratio)| ratio.is_nan() || *ratio > 1.0) {
        return Err(format!(
            "worst: element {n} is {}, should be {}, {ratio} times what it may be off",
            got[n], want[n]
        ));
    }
    Ok(())
}

/// How much of a result is compared with the oracle, which takes far longer than what it judges.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Extent {
    /// Every row, and the oracle with the stored result.
    Whole,
    /// Rows spread over all of them.
    Sample,
}

/// An attention of a trained model. The oracle must give the stored result, which was rounded once to f32; an
/// implementation must be within tolerance of the oracle. Torch on a CPU has a better exponential than WGSL promises,
/// so that its error is met up to a factor only.
pub(crate) fn capture(capture: &Capture, run: &Run<'_>, extent: Extent) -> Result<(), String> {
    let named = |error: String| format!("{}: {error}", capture.name);
    let problem = AttentionProblem::new(capture.spec.clone()).map_err(|error| named(error.to_string()))?;
    let inputs = capture.data.as_inputs();
    let output = run(&problem, &inputs).map_err(named)?;
    let rows = if extent == Extent::Whole { problem.rows() } else { 101 };
    let report = verify_sample(&problem, &inputs, &output, rows).map_err(|error| named(error.to_string()))?;
    if !report.passed() {
        return Err(named(report.to_string()));
    }
    if let Some(error) = capture.error_of_others {
        near(&output.output.to_f32(), &capture.output, 0.0, 2.0 * error)
            .map_err(|error| named(format!("output: {error}")))?;
    }
    if extent == Extent::Sample {
        return Ok(());
    }
    let exact = reference::attention(&problem, &inputs).map_err(|error| named(error.to_string()))?;
    // 1 / sqrt(32) is not an f32: rounding the scale moves a logit of 132 by 2.3e-6
    let slack = if problem.head_dim() == 64 { 1e-9 } else { 3e-6 };
    let stored = capture.output.iter().chain(&capture.lse).map(|&x| f64::from(x));
    for (n, (stored, exact)) in stored.zip(exact.output.iter().chain(&exact.lse)).enumerate() {
        if !is_near(stored, *exact, f64::from(f32::EPSILON) / 2.0 * exact.abs() + slack) {
            return Err(named(format!("the oracle says {exact} for number {n}, stored is {stored}")));
        }
    }
    Ok(())
}
