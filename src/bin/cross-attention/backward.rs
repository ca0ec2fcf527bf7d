//! `run --backward`: the gradients of a file's attention.

use cross_attention::backward::{BackwardInputs, BackwardProblem, BackwardSpec, Gradients};
use cross_attention::{AttentionInputs, AttentionOutput, Layout, TensorData, TensorRef, TensorSpec, verify};

use crate::error::Error;
use crate::file::Opened;
use crate::results::Stored;

/// What a file holds for the backward alone.
pub(crate) const GIVEN: [&str; 2] = ["d_output", "d_lse"];

/// The backward that a file asks for, and what it gives for it.
#[derive(Debug)]
pub(crate) struct Backward {
    pub(crate) problem: BackwardProblem,
    d_output: TensorData,
    d_lse: Option<Vec<f32>>,
    /// Shapes of the gradients as the file has those of their inputs.
    shapes: Vec<(&'static str, Vec<usize>)>,
}

impl Backward {
    /// Every gradient of a file's inputs, in F32 and in the shapes of these.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::Rank`], [`Error::ElementType`], [`Error::Backward`].
    pub(crate) fn new(opened: &Opened) -> Result<Self, Error> {
        let (forward, order) = (&opened.request.problem, opened.request.order);
        let mut spec = BackwardSpec::all(forward.spec().clone());
        let (d_output, shape) = opened.floats("d_output")?.ok_or_else(|| Error::MissingTensor {
            name: "d_output",
            found: "no gradient of the output, which --backward needs".to_owned(),
        })?;
        let swapped = |name, shape: &[usize]| {
            let axes = <[usize; 4]>::try_from(shape);
            axes.map(|axes| order.swap(axes)).map_err(|_| Error::Rank {
                name,
                found: shape.to_vec(),
                wanted: format!("4 axes, {}", order.axes()),
            })
        };
        let element = d_output.as_ref().element();
        spec.d_output = TensorSpec { element, layout: order.layout(swapped("d_output", &shape)?) };
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
            ("d_query", "query", &mut spec.d_query),
            ("d_key", "key", &mut spec.d_key),
            ("d_value", "value", &mut spec.d_value),
        ] {
            if let (Some(gradient), Some(shape)) = (gradient, opened.shape(input)) {
                *gradient = TensorSpec::f32(order.layout(swapped(input, &shape)?));
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
        Ok(Self { problem: BackwardProblem::new(spec)?, d_output, d_lse, shapes })
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

/// Compares gradients with the oracle.
///
/// # Errors
/// [`Error::Verify`].
pub(crate) fn verified(
    problem: &BackwardProblem,
    inputs: &BackwardInputs<'_>,
    gradients: &Gradients,
) -> Result<String, Error> {
    let report = verify::verify_backward(problem, inputs, gradients).map_err(cross_attention::Error::from)?;
    if report.passed() { Ok(report.to_string()) } else { Err(Error::Verify { report: report.to_string() }) }
}
