//! Projections and norms of a layer on the device.

use super::context::Context;
use super::error::GpuError;
use crate::error::Error;
use crate::kernels::linear::{HeadNormParams, LinearPlan};
use crate::plan::Variant;
use crate::tensor::{Element, TensorRef};

/// A matrix of weights and a bias on a device.
#[derive(Clone, Debug)]
pub(crate) struct GpuLinear {
    weight: wgpu::Buffer,
    bias: wgpu::Buffer,
    has_bias: bool,
    element: Element,
    inputs: usize,
    outputs: usize,
}

/// What each head is multiplied by after its norm, and what is added.
#[derive(Clone, Debug)]
pub(crate) struct GpuHeadNorm {
    gain: wgpu::Buffer,
    shift: wgpu::Buffer,
    has_shift: bool,
    centered: bool,
    epsilon: f32,
    width: usize,
}

impl Context {
    /// Copies weights `[outputs, inputs]` to the device.
    pub(crate) async fn upload_linear(
        &self,
        [inputs, outputs]: [usize; 2],
        weight: TensorRef<'_>,
        bias: Option<&[f32]>,
    ) -> Result<GpuLinear, GpuError> {
        Ok(GpuLinear {
            element: weight.element(),
            weight: self.upload_tensor("weight", weight).await?,
            bias: self.upload("bias", bias.unwrap_or(&[0.0])).await?,
            has_bias: bias.is_some(),
            inputs,
            outputs,
        })
    }

    /// Copies gain and shift to the device.
    pub(crate) async fn upload_head_norm(
        &self,
        gain: &[f32],
        shift: Option<&[f32]>,
        centered: bool,
        epsilon: f32,
    ) -> Result<GpuHeadNorm, GpuError> {
        Ok(GpuHeadNorm {
            gain: self.upload("gain", gain).await?,
            shift: self.upload("shift", shift.unwrap_or(&[0.0])).await?,
            has_shift: shift.is_some(),
            centered,
            epsilon,
            width: gain.len(),
        })
    }

    /// Records `y = x W^T + b` for `rows` rows into a new buffer `[rows, outputs]`.
    pub(crate) async fn encode_linear(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        linear: &GpuLinear,
        name: &str,
        rows: usize,
        x: &wgpu::Buffer,
    ) -> Result<wgpu::Buffer, Error> {
        let sizes = [rows, linear.inputs, linear.outputs];
        let plan =
            LinearPlan::new(sizes, linear.has_bias, self.caps()).map_err(|reason| Error::LayerPlan { reason })?;
        let y = self.allocate(name, rows as u64 * linear.outputs as u64 * 4).await?;
        if let Some(plan) = plan {
            let params = self.uniform("params of a projection", bytemuck::bytes_of(&plan.params)).await?;
            let variant = Variant::linear(plan.shader, linear.element);
            let read = [x, &linear.weight, &linear.bias];
            self.encode_small(encoder, &variant, &params, &read, &y, plan.grid).await?;
        }
        Ok(y)
    }

    /// Records the norm of `vectors` heads, in place.
    pub(crate) async fn encode_head_norm(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        norm: &GpuHeadNorm,
        vectors: usize,
        x: &wgpu::Buffer,
    ) -> Result<(), Error> {
        if vectors == 0 {
            return Ok(());
        }
        let (params, grid) = HeadNormParams::new(vectors, norm.width, norm.epsilon, norm.has_shift, self.caps())
            .map_err(|reason| Error::LayerPlan { reason })?;
        let params = self.uniform("params of a norm", bytemuck::bytes_of(&params)).await?;
        let variant = Variant::head_norm(norm.centered);
        self.encode_small(encoder, &variant, &params, &[&norm.gain, &norm.shift], x, grid).await?;
        Ok(())
    }
}
