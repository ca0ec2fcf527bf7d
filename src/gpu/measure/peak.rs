//! The roofs of a device: its best rates of arithmetic and of memory traffic, by shaders that do nothing else.

use std::time::{Duration, Instant};

use super::timing::Stopwatch;
use crate::caps::DeviceClass;
use crate::dispatch::wgsl;
use crate::gpu::bound::PASS;
use crate::gpu::error::GpuError;
use crate::gpu::open::Gpu;
use crate::gpu::pipelines::{Interface, Pipeline};
use crate::roofline::Roofline;

/// Invocations of a workgroup in both shaders.
const WIDTH: u32 = 256;
/// Steps of each chain written out in the loop of `peak_fma.wgsl`, and turns of the loop.
const STEPS: u32 = 16;
const ROUNDS: u32 = 64;
/// Chains of an invocation there.
const CHAINS: u32 = 12;
/// Vectors of 16 bytes that an invocation of `peak_copy.wgsl` moves.
const VECTORS: u32 = 4;
/// A dispatch that takes this long hides what starting it costs, in milliseconds.
const LONG_ENOUGH: f64 = 4.0;
/// Bytes of each buffer of the copy, where the device allows: several times the caches of current GPUs.
const COPY_BYTES: u64 = 256 << 20;
/// The same where a CPU plays GPU.
const COPY_BYTES_SOFTWARE: u64 = 64 << 20;

impl Gpu {
    /// Measures what the device can do at most, spending about `budget` on each roof. Shares the device with whatever
    /// else runs on it.
    ///
    /// # Errors
    /// [`GpuError`] if the device refuses, has no memory for two large buffers, or was lost.
    pub async fn roofline(&self, budget: Duration) -> Result<Roofline, GpuError> {
        let stopwatch = Stopwatch::new(self).await?;
        let gflops = self.peak_gflops(&stopwatch, budget).await?;
        let gbps = self.peak_gbps(&stopwatch, budget).await?;
        Ok(Roofline { gflops, gbps, timing: stopwatch.source() })
    }

    /// [`roofline`](Self::roofline), blocking.
    ///
    /// # Errors
    /// As [`roofline`](Self::roofline).
    pub fn roofline_blocking(&self, budget: Duration) -> Result<Roofline, GpuError> {
        self.block_on(self.roofline(budget))
    }

    async fn peak_gflops(&self, stopwatch: &Stopwatch, budget: Duration) -> Result<f64, GpuError> {
        let sink = self.allocate("sink", 16).await?;
        // chains fall towards 1, and their sum never below 0
        let params = [0.5f32.to_bits(), 0.5f32.to_bits(), ROUNDS, (-1f32).to_bits()];
        let wgsl = wgsl::peak_fma(STEPS);
        let work = Work::new(self, "peak_fma", wgsl, params, &[(&sink, true)]).await?;
        let largest = self.caps().max_compute_workgroups_per_dimension.max(1);
        let mut workgroups = 16.min(largest);
        while work.millis(stopwatch, workgroups).await? < LONG_ENOUGH && workgroups < largest {
            workgroups = workgroups.saturating_mul(2).min(largest);
        }
        let best = work.best_millis(stopwatch, workgroups, budget).await?;
        let flops = 2.0 * f64::from(workgroups) * f64::from(WIDTH * CHAINS * STEPS * ROUNDS);
        Ok(flops / (best * 1e6))
    }

    async fn peak_gbps(&self, stopwatch: &Stopwatch, budget: Duration) -> Result<f64, GpuError> {
        let caps = self.caps();
        let software = caps.class == DeviceClass::Software;
        let wanted = if software { COPY_BYTES_SOFTWARE } else { COPY_BYTES };
        let block = u64::from(WIDTH * VECTORS) * 16;
        let blocks = wanted.min(caps.max_storage_buffer_binding_size).min(caps.max_buffer_size) / block;
        let workgroups = u32::try_from(blocks).unwrap_or(u32::MAX).min(caps.max_compute_workgroups_per_dimension);
        let bytes = u64::from(workgroups) * block;
        let (source, copy) = (self.allocate("source", bytes).await?, self.allocate("copy", bytes).await?);
        let wgsl = wgsl::peak_copy(VECTORS);
        let work = Work::new(self, "peak_copy", wgsl, [0; 4], &[(&source, false), (&copy, true)]).await?;
        let best = work.best_millis(stopwatch, workgroups, budget).await?;
        Ok(2.0 * bytes as f64 / (best * 1e6))
    }
}

/// A pipeline with its buffers.
struct Work {
    pipeline: wgpu::ComputePipeline,
    group: wgpu::BindGroup,
}

impl Work {
    async fn new(
        gpu: &Gpu,
        name: &str,
        wgsl: String,
        params: [u32; 4],
        buffers: &[(&wgpu::Buffer, bool)],
    ) -> Result<Self, GpuError> {
        let uses = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let uniform = gpu.buffer("params", 16, uses).await?;
        let binds = Interface((1..).zip(buffers).map(|(binding, (_, written))| (binding, *written)).collect());
        gpu.checked(name, 0, || {
            gpu.queue().write_buffer(&uniform, 0, bytemuck::cast_slice(&params));
            let Pipeline { pipeline, layout } = Pipeline::from_wgsl(gpu.device(), name, wgsl, &[], &binds, None);
            let buffers = std::iter::once(&uniform).chain(buffers.iter().map(|(buffer, _)| *buffer));
            let entries: Vec<_> = (0..)
                .zip(buffers)
                .map(|(binding, buffer)| wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() })
                .collect();
            let group = gpu.device().create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(name),
                layout: &layout,
                entries: &entries,
            });
            Self { pipeline, group }
        })
        .await
    }

    async fn millis(&self, stopwatch: &Stopwatch, workgroups: u32) -> Result<f64, GpuError> {
        stopwatch
            .round(|encoder, timestamp_writes| {
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { timestamp_writes, ..PASS });
                pass.set_pipeline(&self.pipeline);
                pass.set_bind_group(0, &self.group, &[]);
                pass.dispatch_workgroups(workgroups, 1, 1);
            })
            .await
    }

    /// The best of all rounds: three at least, until the budget is used up, behind one that does not count.
    async fn best_millis(&self, stopwatch: &Stopwatch, workgroups: u32, budget: Duration) -> Result<f64, GpuError> {
        self.millis(stopwatch, workgroups).await?;
        let start = Instant::now();
        let mut best = f64::INFINITY;
        let mut rounds = 0;
        while rounds < 3 || start.elapsed() < budget {
            best = best.min(self.millis(stopwatch, workgroups).await?);
            rounds += 1;
        }
        Ok(best)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shaders_are_valid() {
        for text in [wgsl::peak_fma(STEPS), wgsl::peak_copy(VECTORS)] {
            let module = naga::front::wgsl::parse_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
            let flags = naga::valid::ValidationFlags::all();
            naga::valid::Validator::new(flags, naga::valid::Capabilities::empty()).validate(&module).unwrap();
        }
        assert_eq!(wgsl::peak_fma(STEPS).matches("fma(a, x, b)").count(), STEPS as usize);
    }
}
