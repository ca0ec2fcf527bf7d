//! What an attention costs the host, beside what wgpu alone costs.

use std::time::Instant;

use crate::gpu::attention::GpuAttention;
use crate::gpu::bound::PASS;
use crate::gpu::buffers::AttentionBuffers;
use crate::gpu::error::GpuError;
use crate::timing::{Timing, TimingSource};

/// Host times of one call, each beside that of the same work by calls of wgpu alone.
#[doc(hidden)]
#[derive(Clone, Debug, PartialEq)]
pub struct HostCost {
    /// [`GpuAttention::bind`]: buffers compared with the plan, bind groups made.
    pub bind: Timing,
    /// The same bind groups, made by wgpu from entries that lie ready.
    pub bind_wgpu: Timing,
    /// [`BoundSteps::encode`](super::BoundSteps::encode), from an empty encoder to a finished command buffer.
    pub encode: Timing,
    /// The same dispatches, each recorded by wgpu with its pipeline and bind group.
    pub encode_wgpu: Timing,
}

impl HostCost {
    /// Median milliseconds of bind and encode beyond what wgpu takes for the same: what this crate adds to a call that
    /// binds its buffers anew. May be below 0 by noise.
    #[must_use]
    pub fn added_millis(&self) -> f64 {
        let median = |timing: &Timing| timing.quantile(0.5);
        median(&self.bind) + median(&self.encode) - median(&self.bind_wgpu) - median(&self.encode_wgpu)
    }
}

impl GpuAttention {
    /// Times the host's work of one call, by turns with wgpu's own, `rounds` times behind a first one that does not
    /// count. Nothing is submitted.
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    #[doc(hidden)]
    pub fn time_host(&self, buffers: &AttentionBuffers<'_>, rounds: usize) -> Result<HostCost, GpuError> {
        let device = self.gpu().device();
        let bound = self.bind(buffers)?;
        let (row_data, _) = self.row_data(buffers)?;
        let entries: Vec<_> = self.entries(buffers, row_data).collect();
        let mut millis: [Vec<f64>; 4] = Default::default();
        self.gpu().checked_now("host times", || {
            // the first round warms up
            for round in 0..=rounds {
                let times = [
                    timed(|| self.bind(buffers)),
                    timed(|| {
                        let groups = entries.iter().map(|(entries, layout)| {
                            device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries })
                        });
                        groups.collect::<Vec<_>>()
                    }),
                    timed(|| {
                        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
                        bound.encode(&mut encoder);
                        encoder.finish()
                    }),
                    timed(|| {
                        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
                        bound.copy(&mut encoder);
                        let mut pass = encoder.begin_compute_pass(&PASS);
                        for dispatch in &bound.dispatches {
                            pass.set_pipeline(&dispatch.pipeline);
                            pass.set_bind_group(0, &dispatch.group, &[]);
                            pass.dispatch_workgroups(dispatch.grid[0], dispatch.grid[1], dispatch.grid[2]);
                        }
                        drop(pass);
                        encoder.finish()
                    }),
                ];
                if round > 0 {
                    millis.iter_mut().zip(times).for_each(|(millis, time)| millis.push(time));
                }
            }
        })?;
        let [bind, bind_wgpu, encode, encode_wgpu] = millis.map(|millis| Timing { millis, source: TimingSource::Cpu });
        Ok(HostCost { bind, bind_wgpu, encode, encode_wgpu })
    }
}

/// Milliseconds of `work`, without those of dropping what it gives.
fn timed<T>(work: impl FnOnce() -> T) -> f64 {
    let start = Instant::now();
    let made = work();
    let millis = start.elapsed().as_secs_f64() * 1e3;
    drop(made);
    millis
}
