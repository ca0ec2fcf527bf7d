//! One dispatch of a shader beside plans, recorded into the caller's encoder.

use crate::dispatch::Variant;
use crate::gpu::error::GpuError;
use crate::gpu::open::Gpu;
use crate::gpu::pipelines::Interface;

impl Gpu {
    async fn empty_uniform(&self, name: &str, bytes: &[u8]) -> Result<wgpu::Buffer, GpuError> {
        let uses = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        self.buffer(name, bytes.len() as u64, uses).await
    }

    /// Records one dispatch with these parameters over these buffers, each with the bytes that are needed of it, in the order of the shader's
    /// ports.
    pub(crate) async fn encode_beside(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        variant: &Variant,
        params: &[u8],
        buffers: &[(&wgpu::Buffer, u64)],
        grid: [u32; 3],
    ) -> Result<(), GpuError> {
        let bound = || variant.shader.ports().iter().zip(buffers.iter().copied());
        let limit = self.caps().max_storage_buffer_binding_size;
        for (port, (buffer, needed)) in bound() {
            let name = port.name;
            if buffer.size() < needed {
                return Err(GpuError::BufferTooSmall { name, needed, found: buffer.size() });
            }
            if needed > limit {
                return Err(GpuError::BufferTooLarge { what: name.to_owned(), bytes: needed, max: limit });
            }
            let found = buffer.usage();
            if !found.contains(wgpu::BufferUsages::STORAGE) {
                return Err(GpuError::Usage { name, needed: wgpu::BufferUsages::STORAGE, found });
            }
        }
        for (n, (written, (to, _))) in bound().enumerate().filter(|(_, (port, _))| port.written) {
            if let Some((read, _)) = bound().take(n).find(|(_, (from, _))| *from == to) {
                return Err(GpuError::Aliased { written: written.name, read: read.name });
            }
        }
        let interface = variant.shader.ports().iter().map(|port| (port.binding, port.written)).collect();
        let pipeline = self.pipeline(variant, &Interface(interface)).await?;
        let uniform = self.empty_uniform("params of a command", params).await?;
        self.checked(variant.shader.name(), 0, || {
            self.queue().write_buffer(&uniform, 0, params);
            let mut entries = vec![wgpu::BindGroupEntry { binding: 0, resource: uniform.as_entire_binding() }];
            for (port, (buffer, needed)) in bound() {
                let resource = wgpu::BufferBinding { buffer, offset: 0, size: wgpu::BufferSize::new(needed) };
                entries.push(wgpu::BindGroupEntry {
                    binding: port.binding,
                    resource: wgpu::BindingResource::Buffer(resource),
                });
            }
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
