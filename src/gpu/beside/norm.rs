//! Norms of rows of heads on the device.

use crate::dispatch::{Shader, Variant};
use crate::error::Error;
use crate::gpu::open::Gpu;
use crate::kernels::beside::linear::NormPlan;
use crate::tensor::Element;

/// A norm over rows of one width, with its weights on a device.
#[derive(Clone, Debug)]
pub(crate) struct PreparedNorm {
    gpu: Gpu,
    weight: wgpu::Buffer,
    bias: Option<wgpu::Buffer>,
    width: usize,
    centred: bool,
    epsilon: f32,
}

impl Gpu {
    /// The weights are `[width]` each; lengths are checked by the caller. `centred`: the mean is taken off first.
    pub(crate) async fn prepare_norm(
        &self,
        weight: &[f32],
        bias: Option<&[f32]>,
        centred: bool,
        epsilon: f32,
    ) -> Result<PreparedNorm, Error> {
        let width = weight.len();
        let weight = self.upload("norm weight", weight).await?;
        let bias = match bias {
            Some(bias) => Some(self.upload("norm bias", bias).await?),
            None => None,
        };
        Ok(PreparedNorm { gpu: self.clone(), weight, bias, width, centred, epsilon })
    }
}

impl PreparedNorm {
    pub(crate) const fn width(&self) -> usize {
        self.width
    }

    /// Records the norm of `rows` rows of f32 into `output`.
    pub(crate) async fn encode(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        rows: usize,
        input: &wgpu::Buffer,
        output: &wgpu::Buffer,
        element: Element,
    ) -> Result<(), Error> {
        let has_bias = self.bias.is_some();
        let plan = NormPlan::new(rows, self.width, [self.centred, has_bias], self.epsilon, self.gpu.caps())
            .map_err(|reason| Error::LinearPlan { reason })?;
        let Some(plan) = plan else { return Ok(()) };
        let elements = rows as u64 * self.width as u64;
        let weights = self.width as u64 * 4;
        let bias = self.bias.as_ref().unwrap_or_else(|| self.gpu.empty_buffer(false));
        let bound = [
            (input, elements * 4),
            (&self.weight, weights),
            (bias, if has_bias { weights } else { 4 }),
            (output, (elements * element.size_bytes() as u64).next_multiple_of(4)),
        ];
        let variant = Variant::linear(Shader::HeadNorm, Element::F32, Element::F32, element);
        let params = bytemuck::bytes_of(&plan.params);
        self.gpu.encode_beside(encoder, &variant, params, &bound, plan.grid).await?;
        Ok(())
    }
}
