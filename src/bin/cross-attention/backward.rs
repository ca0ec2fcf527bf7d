//! `run --backward`: the gradients of a file's attention.

use cross_attention::backward::{BackwardInputs, BackwardProblem, BackwardSpec, Gradients};
use cross_attention::verify::{self, BackwardReport};
use cross_attention::{AttentionInputs, AttentionOutput, Layout, TensorData, TensorRef, TensorSpec};

use crate::error::Error;
use crate::file::{Form, Opened};
use crate::output::Stored;

/// What a file holds for the backward alone.
pub(crate) const GIVEN: [&str; 2] = ["d_output", "d_lse"];

/// The backward that a file asks for, and what it gives for it.
#[derive(Debug)]
pub(crate) struct Backward {
    pub(crate) problem: BackwardProblem,
    d_output: TensorData,
    d_lse: Option<Vec<f32>>,
    /// Inputs that have no gradient, and why, where that is so.
    pub(crate) left_out: Option<String>,
    /// Shapes of the gradients as the file has those of their inputs.
    shapes: Vec<(&'static str, Vec<usize>)>,
}

impl Backward {
    /// Every gradient of a file's inputs, in F32 and in the shapes of these.
    ///
    /// # Errors
    /// [`Error::NoGradient`], [`Error::Rank`], [`Error::ElementType`], [`Error::Backward`].
    pub(crate) fn new(opened: &Opened) -> Result<Self, Error> {
        let request = &opened.request;
        let forward = &request.problem;
        for (found, is) in [
            ("a qkv or kv", request.placed.iter().any(|placed| !placed.is_apart())),
            ("a past (past_key, past_value)", request.past.is_some()),
            ("a bias or mask that is shorter than the keys", request.padded),
        ] {
            if is {
                return Err(Error::BackwardInput { found });
            }
        }
        let mut spec = BackwardSpec::all(forward.spec().clone());
        let (d_output, shape) = opened.floats("d_output")?.ok_or(Error::NoGradient)?;
        let [query, key, value] = request.placed;
        let layout = |name, form: Form, shape: &[usize], heads| {
            let wanted = || {
                let wanted = match form {
                    Form::Four(order) => format!("4 axes, {}", order.axes()),
                    Form::Joined => format!("{}, q_heads {heads}", form.words()),
                };
                Error::Rank { name, found: shape.to_vec(), wanted }
            };
            form.axes(shape, heads).map(|axes| form.layout(axes)).ok_or_else(wanted)
        };
        let element = d_output.as_ref().element();
        spec.d_output = TensorSpec { element, layout: layout("d_output", query.form, &shape, forward.q_heads())? };
        let output = forward.spec().output.layout.shape;
        if spec.d_output.layout.shape != output {
            // the axes as the file has them
            let wanted = format!("{:?}, the shape of the output", query.form.shape(output));
            return Err(Error::Rank { name: "d_output", found: shape, wanted });
        }
        let d_lse = match opened.floats("d_lse")? {
            None => None,
            Some((data, found)) => {
                let wanted = [forward.batch(), forward.q_heads(), forward.q_len()];
                if found != wanted {
                    let wanted = format!("[batch, q_heads, q_len] = {wanted:?}");
                    return Err(Error::Rank { name: "d_lse", found, wanted });
                }
                Some(data.to_f32())
            }
        };
        spec.d_lse = d_lse.is_some();
        let mut shapes = vec![];
        // what the batch shares has one gradient, as the file has one of it
        for (name, input, gradient) in [
            ("d_query", query, &mut spec.d_query),
            ("d_key", key, &mut spec.d_key),
            ("d_value", value, &mut spec.d_value),
        ] {
            if let (Some(gradient), Some(shape)) = (gradient, opened.shape(input.tensor)) {
                *gradient = TensorSpec::f32(input.spec.layout);
                shapes.push((name, shape));
            }
        }
        if let (Some(gradient), Some(shape)) = (&mut spec.d_bias, opened.shape("bias")) {
            let mut axes = [1; 4];
            let missing = axes.len().saturating_sub(shape.len());
            axes[missing..].copy_from_slice(&shape);
            *gradient = TensorSpec::f32(Layout::bhld(axes));
            shapes.push(("d_bias", shape));
        }
        for (name, input) in [("d_alibi_slopes", "alibi_slopes"), ("d_sinks", "sinks")] {
            shapes.extend(opened.shape(input).map(|shape| (name, shape)));
        }
        let left_out = left_out(&spec);
        Ok(Self { problem: BackwardProblem::new(spec)?, d_output, d_lse, left_out, shapes })
    }

    /// All that a backward reads.
    ///
    /// # Errors
    /// [`Error::Attention`], if the forward did not return what it needs.
    pub(crate) fn inputs<'a>(
        &'a self,
        attention: AttentionInputs<'a>,
        forward: &'a AttentionOutput,
    ) -> Result<BackwardInputs<'a>, Error> {
        let new = BackwardInputs::new(attention, forward, &self.d_output).map_err(cross_attention::Error::from)?;
        Ok(BackwardInputs { d_lse: self.d_lse.as_deref(), ..new })
    }

    /// The gradients as a file holds them.
    pub(crate) fn stored<'a>(&self, gradients: &'a Gradients) -> Vec<Stored<'a>> {
        let tensor = |data: &'a Option<TensorData>| data.as_ref().map(TensorRef::from);
        let numbers = |data: &'a Option<Vec<f32>>| data.as_deref().map(TensorRef::F32);
        let all = [
            ("d_query", tensor(&gradients.d_query)),
            ("d_key", tensor(&gradients.d_key)),
            ("d_value", tensor(&gradients.d_value)),
            ("d_bias", tensor(&gradients.d_bias)),
            ("d_alibi_slopes", numbers(&gradients.d_alibi_slopes)),
            ("d_sinks", numbers(&gradients.d_sinks)),
        ];
        let shape = |name| self.shapes.iter().find(|(of, _)| *of == name).map(|(_, shape)| shape.clone());
        all.into_iter().filter_map(|(name, data)| Some(Stored::of(name, data?, shape(name)?))).collect()
    }
}

/// Which of key and value have no gradient, for how they are stored.
pub(crate) fn left_out(spec: &BackwardSpec) -> Option<String> {
    let asked = [("d_key", spec.d_key), ("d_value", spec.d_value)];
    let missing: Vec<_> = asked.into_iter().filter(|(_, gradient)| gradient.is_none()).map(|(name, _)| name).collect();
    let stored = if spec.attention.paged.is_some() { "in pages" } else { "as signed bytes" };
    (!missing.is_empty()).then(|| format!("no {}: what is stored {stored} has no gradient", missing.join(", ")))
}

/// Compares gradients with the oracle.
///
/// # Errors
/// [`Error::Verify`].
pub(crate) fn verified(
    problem: &BackwardProblem,
    inputs: &BackwardInputs<'_>,
    gradients: &Gradients,
) -> Result<BackwardReport, Error> {
    let report = verify::verify_backward(problem, inputs, gradients).map_err(cross_attention::Error::from)?;
    if report.passed() { Ok(report) } else { Err(Error::Verify { report: report.to_string() }) }
}
