//! A layer on the CPU.

use super::Call;
use super::config::{LayerConfig, LayerWeights, Norm, NormKind, NormWeights, Projection};
use super::names::Role;
use crate::cpu;
use crate::error::Error;
use crate::tensor::{Element, TensorData, TensorRef};

/// Weights as f32.
#[derive(Debug)]
pub(super) struct CpuWeights {
    query: CpuProjection,
    key: CpuProjection,
    value: CpuProjection,
    output: CpuProjection,
    query_norm: Option<NormWeights>,
    key_norm: Option<NormWeights>,
}

#[derive(Debug)]
struct CpuProjection {
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
}

impl CpuProjection {
    fn new(projection: &Projection) -> Self {
        Self { weight: projection.weight.to_f32(), bias: projection.bias.clone() }
    }

    fn apply(&self, x: &[f32], shape: [usize; 2]) -> Vec<f32> {
        cpu::linear(x, &self.weight, self.bias.as_deref(), shape)
    }
}

impl CpuWeights {
    pub(super) fn new(weights: &LayerWeights) -> Self {
        Self {
            query: CpuProjection::new(&weights.query),
            key: CpuProjection::new(&weights.key),
            value: CpuProjection::new(&weights.value),
            output: CpuProjection::new(&weights.output),
            query_norm: weights.query_norm.clone(),
            key_norm: weights.key_norm.clone(),
        }
    }

    /// Keys and values, `[batch, kv_len, kv_heads, head_dim]`.
    pub(super) fn context(&self, config: &LayerConfig, context: &[f32], element: Element) -> (TensorData, TensorData) {
        let mut key = self.key.apply(context, config.shape(Role::Key));
        normalise(&mut key, config.head_dim, config.key_norm, self.key_norm.as_ref());
        let value = self.value.apply(context, config.shape(Role::Value));
        (TensorData::from_f32(element, key), TensorData::from_f32(element, value))
    }

    pub(super) fn forward(
        &self,
        config: &LayerConfig,
        states: &[f32],
        key: TensorRef<'_>,
        value: TensorRef<'_>,
        call: &Call<'_>,
    ) -> Result<Vec<f32>, Error> {
        let mut query = self.query.apply(states, config.shape(Role::Query));
        normalise(&mut query, config.head_dim, config.query_norm, self.query_norm.as_ref());
        let attention = cpu::attention(&call.problem, &call.inputs(&query, key, value))?;
        Ok(self.output.apply(&attention.output.to_f32(), config.shape(Role::Output)))
    }
}

/// Each row of `width` on its own.
#[expect(clippy::cast_possible_truncation, reason = "summed in f64, kept in f32")]
fn normalise(rows: &mut [f32], width: usize, norm: Option<Norm>, weights: Option<&NormWeights>) {
    let (Some(norm), Some(weights)) = (norm, weights) else { return };
    for row in rows.chunks_exact_mut(width) {
        let mean_of = |map: &dyn Fn(f64) -> f64| row.iter().map(|&x| map(f64::from(x))).sum::<f64>() / width as f64;
        let mean = match norm.kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => mean_of(&|x| x),
        };
        let deviation = (mean_of(&|x| (x - mean) * (x - mean)) + f64::from(norm.epsilon)).sqrt();
        for (d, (x, weight)) in row.iter_mut().zip(&weights.weight).enumerate() {
            let bias = weights.bias.as_ref().map_or(0.0, |bias| bias[d]);
            *x = ((f64::from(*x) - mean) / deviation * f64::from(*weight) + f64::from(bias)) as f32;
        }
    }
}
