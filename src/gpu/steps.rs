//! Steps of a plan on a device: their pipelines and parameters, and what each of them binds.

use super::bound::Dispatch;
use super::error::GpuError;
use super::open::Gpu;
use super::pipelines::Pipeline;
use crate::dispatch::{Params, Slot, Step};

/// What steps need on a device beside the buffers that they bind.
#[derive(Clone, Debug)]
pub(super) struct PreparedSteps {
    pipelines: Vec<Pipeline>,
    /// Each at a multiple of the device's alignment.
    params: wgpu::Buffer,
    params_stride: u64,
}

impl PreparedSteps {
    /// `params` are those of each step, then any others that steps may be run with.
    pub(super) async fn new(gpu: &Gpu, steps: &[Step], params: &[Params]) -> Result<Self, GpuError> {
        let pipelines = gpu.pipelines_of(&steps.iter().collect::<Vec<_>>()).await?;
        let alignment = u64::from(gpu.caps().min_uniform_buffer_offset_alignment.max(1));
        let params_stride = (size_of::<Params>() as u64).next_multiple_of(alignment);
        let uses = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let buffer = gpu.buffer("params", params_stride * params.len() as u64, uses).await?;
        gpu.checked("params", buffer.size(), || {
            for (n, params) in params.iter().enumerate() {
                gpu.queue().write_buffer(&buffer, n as u64 * params_stride, bytemuck::bytes_of(params));
            }
        })
        .await?;
        Ok(Self { pipelines, params: buffer, params_stride })
    }

    /// Bytes of device memory that it holds.
    pub(super) fn held_bytes(&self) -> u64 {
        self.params.size()
    }

    /// The dispatches over what `slice` finds for each slot, with the parameters from `first_params` on.
    pub(super) fn bind<'a>(
        &'a self,
        gpu: &'a Gpu,
        steps: &'a [Step],
        first_params: usize,
        slice: impl Fn(Slot) -> Option<wgpu::BufferSlice<'a>>,
    ) -> Vec<Dispatch> {
        let mut dispatches = Vec::with_capacity(steps.len());
        let mut entries = vec![];
        for (n, (step, pipeline)) in steps.iter().zip(&self.pipelines).enumerate() {
            entries.clear();
            entries.extend(self.entries(gpu, step, first_params + n, &slice));
            let group = gpu.device().create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(step.variant.shader.name()),
                layout: &pipeline.layout,
                entries: &entries,
            });
            dispatches.push(Dispatch { pipeline: pipeline.pipeline.clone(), group, grid: step.workgroups() });
        }
        dispatches
    }

    /// What a step binds, with the parameters at this place.
    pub(super) fn entries<'a>(
        &'a self,
        gpu: &'a Gpu,
        step: &'a Step,
        params: usize,
        slice: impl Fn(Slot) -> Option<wgpu::BufferSlice<'a>>,
    ) -> impl Iterator<Item = wgpu::BindGroupEntry<'a>> {
        let entry = |binding, buffer| wgpu::BindGroupEntry { binding, resource: wgpu::BindingResource::Buffer(buffer) };
        let params = wgpu::BufferBinding {
            buffer: &self.params,
            offset: params as u64 * self.params_stride,
            size: wgpu::BufferSize::new(size_of::<Params>() as u64),
        };
        let storage = step.bindings.iter().map(move |binding| {
            let bound = match (slice(binding.slot), wgpu::BufferSize::new(binding.size_bytes)) {
                (Some(slice), Some(size)) => wgpu::BufferBinding {
                    buffer: slice.buffer(),
                    offset: slice.offset() + binding.start_bytes,
                    size: Some(size),
                },
                // an empty tensor: nothing of the buffer is touched, but something must be bound
                _ => wgpu::BufferBinding { buffer: gpu.empty_buffer(binding.written), offset: 0, size: None },
            };
            entry(binding.slot.binding(), bound)
        });
        std::iter::once(entry(0, params)).chain(storage)
    }

    /// The layout of the bind group of each step.
    #[cfg(feature = "threads")]
    pub(super) fn layouts(&self) -> impl Iterator<Item = &wgpu::BindGroupLayout> {
        self.pipelines.iter().map(|pipeline| &pipeline.layout)
    }
}
