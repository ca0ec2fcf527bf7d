//! A layer on the CPU.

use super::{HeadNorm, LayerConfig, LayerTerms, LayerWeights, LinearWeights, NormKind, NormWeights, Projection};
use crate::cpu::linear::{head_norm, linear};
use crate::cpu::{self};
use crate::error::Error;
use crate::inputs::InputError;
use crate::problem::AttentionProblem;

/// Weights in f32.
#[derive(Debug)]
pub(super) struct CpuLayer {
    /// Query, key, value, out.
    projections: [(Vec<f32>, Option<Vec<f32>>); 4],
    /// Of queries and keys.
    norms: [Option<NormWeights>; 2],
}

impl CpuLayer {
    pub(super) fn new(config: &LayerConfig, weights: &LayerWeights) -> Self {
        let f32_of = |linear: &LinearWeights| (linear.weight.to_f32(), linear.bias.clone());
        let norm = |norm: &Option<NormWeights>| norm.clone().filter(|_| config.norm.is_some());
        Self {
            projections: [&weights.query, &weights.key, &weights.value, &weights.out].map(f32_of),
            norms: [norm(&weights.query_norm), norm(&weights.key_norm)],
        }
    }

    fn project(&self, config: &LayerConfig, of: Projection, x: &[f32]) -> Result<Vec<f32>, Error> {
        let (weight, bias) = &self.projections[of as usize];
        let sizes @ [inputs, outputs] = config.sizes(of);
        cpu::check_bytes((x.len() / inputs).checked_mul(outputs).and_then(|n| n.checked_mul(2 * size_of::<f32>())))?;
        // the sizes were compared when the layer was made, and those of the states before
        linear(sizes, x, weight, bias.as_deref())
            .map_err(|_| InputError::TooShort { name: "states", needed: inputs, found: x.len() }.into())
    }

    fn normalise(&self, config: &LayerConfig, norm: usize, x: &mut [f32]) {
        if let (Some(HeadNorm { kind, epsilon }), Some(weights)) = (config.norm, &self.norms[norm]) {
            head_norm(x, &weights.gain, weights.shift.as_deref(), kind == NormKind::Layer, epsilon);
        }
    }

    pub(super) fn project_context(&self, config: &LayerConfig, context: &[f32]) -> Result<[Vec<f32>; 2], Error> {
        let mut key = self.project(config, Projection::Key, context)?;
        self.normalise(config, 1, &mut key);
        Ok([key, self.project(config, Projection::Value, context)?])
    }

    pub(super) fn forward(
        &self,
        config: &LayerConfig,
        problem: &AttentionProblem,
        states: &[f32],
        [key, value]: &[Vec<f32>; 2],
        terms: &LayerTerms<'_>,
    ) -> Result<Vec<f32>, Error> {
        let mut query = self.project(config, Projection::Query, states)?;
        self.normalise(config, 0, &mut query);
        let output = cpu::attention(problem, &terms.inputs(&query, key, value))?.output.to_f32();
        self.project(config, Projection::Out, &output)
    }
}
