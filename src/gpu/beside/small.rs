//! Small shaders that run beside attentions, in the same encoder.

use crate::dispatch::Variant;
use crate::gpu::context::Context;
use crate::gpu::error::GpuError;
use crate::gpu::pipelines::Interface;

impl Context {
    /// A uniform with its contents.
    pub(crate) async fn uniform(&self, name: &str, bytes: &[u8]) -> Result<wgpu::Buffer, GpuError> {
        let uses = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let buffer = self.buffer(name, bytes.len() as u64, uses).await?;
        self.checked(name, 0, || self.queue().write_buffer(&buffer, 0, bytes)).await?;
        Ok(buffer)
    }

    /// Records one dispatch: params at binding 0, what is read from 1 on, what is written last.
    pub(crate) async fn encode_small(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        variant: &Variant,
        params: &wgpu::Buffer,
        read: &[&wgpu::Buffer],
        written: &wgpu::Buffer,
        grid: [u32; 3],
    ) -> Result<(), GpuError> {
        let limit = self.caps().max_storage_buffer_binding_size;
        for buffer in read.iter().chain([&written]) {
            if buffer.size() > limit {
                let what = variant.shader.name().to_owned();
                return Err(GpuError::BufferTooLarge { what, bytes: buffer.size(), max: limit });
            }
        }
        let buffers = || (0u32..).zip([params].into_iter().chain(read.iter().copied()).chain([written]));
        let last = u32::try_from(read.len() + 1).unwrap_or(u32::MAX);
        let interface = Interface(buffers().skip(1).map(|(binding, _)| (binding, binding == last)).collect());
        let pipeline = self.pipeline(variant, &interface).await?;
        self.checked(variant.shader.name(), 0, || {
            let entries: Vec<_> = buffers()
                .map(|(binding, buffer)| wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() })
                .collect();
            let group = self.device().create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(variant.shader.name()),
                layout: &pipeline.layout,
                entries: &entries,
            });
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            pass.set_pipeline(&pipeline.pipeline);
            pass.set_bind_group(0, &group, &[]);
            let [x, y, z] = grid;
            pass.dispatch_workgroups(x, y, z);
        })
        .await
    }
}
