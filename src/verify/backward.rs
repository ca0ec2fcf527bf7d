//! Gradients against their oracle, element by element; the bounds are the oracle's own, derived at
//! [`ReferenceGradients`](crate::cpu::reference::ReferenceGradients).

use crate::backward::{BackwardInputs, BackwardProblem, Gradients};
use crate::cpu::reference::{self, Gradient};
use crate::inputs::InputError;
use crate::tensor::{Layout, TensorRef, TensorSpec};

/// How gradients compare with the oracle. Printing it says everything.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct BackwardReport {
    /// Elements that were compared.
    pub elements: usize,
    /// Elements out of tolerance.
    pub failures: usize,
    /// Elements whose true value is finite, but of which f32 could not say anything: something on the way is beyond its range.
    pub beyond_f32: usize,
    /// The largest error of an element of a tensor whose true value is finite.
    pub max_abs_error: f64,
    /// The largest ratio of an error to what is allowed there; at most 1 if all is well.
    pub worst_ratio: f64,
    /// Where that is; `None` if everything is exact.
    pub worst: Option<GradientPlace>,
}

/// One compared element.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct GradientPlace {
    /// Which gradient.
    pub name: &'static str,
    /// Where in it; of those that are no tensors the first number is the position.
    pub index: [usize; 4],
    /// What the kernel gave.
    pub got: f64,
    /// What the oracle says.
    pub want: f64,
    /// The error that is allowed here.
    pub allowed: f64,
}

impl BackwardReport {
    /// Whether every element that was compared is within tolerance.
    #[must_use]
    pub const fn passed(&self) -> bool {
        self.failures == 0
    }

    fn add(&mut self, place: GradientPlace) {
        let GradientPlace { got, want, allowed, .. } = place;
        self.elements += 1;
        let error = (got - want).abs();
        let ratio = if want.is_nan() {
            if got.is_nan() { 0.0 } else { f64::INFINITY }
        } else if want.is_infinite() {
            // f32 may have lost an infinity against another on its way
            if got.to_bits() == want.to_bits() || got.is_nan() { 0.0 } else { f64::INFINITY }
        } else if !allowed.is_finite() || want.abs() + allowed > f64::from(f32::MAX) {
            self.beyond_f32 += 1;
            0.0
        } else if error > 0.0 || error.is_nan() {
            let ratio = error / allowed;
            if ratio.is_nan() { f64::INFINITY } else { ratio }
        } else {
            0.0
        };
        if want.is_finite() && allowed.is_finite() {
            self.max_abs_error = self.max_abs_error.max(error);
        }
        self.failures += usize::from(ratio > 1.0);
        if ratio > self.worst_ratio {
            (self.worst_ratio, self.worst) = (ratio, Some(place));
        }
    }
}

impl std::fmt::Display for BackwardReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let verdict = if self.passed() { "passed" } else { "failed" };
        write!(
            f,
            "{verdict}: {} elements of gradients compared, {} out of tolerance; at worst {:.3} of what is allowed",
            self.elements, self.failures, self.worst_ratio
        )?;
        if self.beyond_f32 > 0 {
            write!(f, "; {} out of reach of f32", self.beyond_f32)?;
        }
        if let Some(GradientPlace { name, index, got, want, allowed }) = self.worst {
            write!(f, "\nworst: {name} {index:?}: got {got:e}, want {want:e}, allowed {allowed:.3e}")?;
        }
        Ok(())
    }
}

/// Compares all gradients with the oracle.
///
/// # Errors
/// An [`InputError`] if the inputs or the gradients are not what the problem asks for.
pub fn verify_backward(
    problem: &BackwardProblem,
    inputs: &BackwardInputs<'_>,
    gradients: &Gradients,
) -> Result<BackwardReport, InputError> {
    compare(problem, inputs, gradients, None)
}

/// Compares the gradients of one head of keys and values, and of the query heads that share it, with the oracle; of a bias and a scale,
/// to which all heads add, nothing.
///
/// # Errors
/// An [`InputError`] if the inputs or the gradients are not what the problem asks for.
///
/// # Panics
/// If there is no such head.
pub fn verify_backward_head(
    problem: &BackwardProblem,
    inputs: &BackwardInputs<'_>,
    gradients: &Gradients,
    kv_head: usize,
) -> Result<BackwardReport, InputError> {
    assert!(kv_head < problem.forward().kv_heads(), "one of the heads of the keys");
    compare(problem, inputs, gradients, Some(kv_head))
}

fn compare(
    problem: &BackwardProblem,
    inputs: &BackwardInputs<'_>,
    gradients: &Gradients,
    only: Option<usize>,
) -> Result<BackwardReport, InputError> {
    let oracle = match only {
        None => reference::backward(problem, inputs)?,
        Some(head) => reference::backward_of(problem, inputs, Some(head))?,
    };
    let (spec, forward) = (problem.spec(), problem.forward());
    let mut report =
        BackwardReport { elements: 0, failures: 0, beyond_f32: 0, max_abs_error: 0.0, worst_ratio: 0.0, worst: None };
    let group = forward.group_size();
    type Tensor<'a> = (&'static str, &'a Option<TensorSpec>, Option<TensorRef<'a>>, &'a Gradient, usize);
    let tensors: [Tensor<'_>; 4] = [
        ("d_query", &spec.d_query, gradients.d_query.as_ref().map(Into::into), &oracle.d_query, group),
        ("d_key", &spec.d_key, gradients.d_key.as_ref().map(Into::into), &oracle.d_key, 1),
        ("d_value", &spec.d_value, gradients.d_value.as_ref().map(Into::into), &oracle.d_value, 1),
        ("d_bias", &spec.d_bias, gradients.d_bias.as_ref().map(Into::into), &oracle.d_bias, group),
    ];
    for (name, tensor, got, want, heads_of_one) in tensors {
        let Some(tensor) = tensor else { continue };
        let got = got.ok_or(InputError::Missing { name })?;
        crate::inputs::check_tensor(name, (got.element().into(), got.len()), tensor)?;
        let dense = Layout::bhld(tensor.layout.shape);
        let [batch, heads, rows, width] = dense.shape;
        let of_head =
            |h: usize| only.is_none_or(|head| heads > 1 && h / heads_of_one == head || heads == 1 && name != "d_bias");
        for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))).filter(|(_, h)| of_head(*h)) {
            for (i, d) in (0..rows).flat_map(|i| (0..width).map(move |d| (i, d))) {
                let index = [b, h, i, d];
                let (at, got) = (dense.index(index), f64::from(got.get(tensor.layout.index(index))));
                report.add(GradientPlace { name, index, got, want: want.values[at], allowed: want.bounds[at] });
            }
        }
    }
    let numbers: [(&'static str, bool, Option<&[f32]>, &Gradient); 3] = [
        ("d_alibi_slopes", spec.d_alibi_slopes, gradients.d_alibi_slopes.as_deref(), &oracle.d_alibi_slopes),
        ("d_sinks", spec.d_sinks, gradients.d_sinks.as_deref(), &oracle.d_sinks),
        ("d_scale", spec.d_scale && only.is_none(), gradients.d_scale.as_slice().into(), &oracle.d_scale),
    ];
    for (name, asked, got, want) in numbers {
        if !asked {
            continue;
        }
        let got = got.ok_or(InputError::Missing { name })?;
        if got.len() != want.values.len() {
            return Err(InputError::Len { name, wanted: want.values.len(), found: got.len() });
        }
        for (n, &got) in got.iter().enumerate() {
            if only.is_some_and(|head| n % forward.q_heads() / group != head) {
                continue;
            }
            let (want, allowed) = (want.values[n], want.bounds[n]);
            report.add(GradientPlace { name, index: [n, 0, 0, 0], got: f64::from(got), want, allowed });
        }
    }
    Ok(report)
}
