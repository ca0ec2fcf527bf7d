//! How long an attention takes on the device, inputs in place and pipelines warm.

use std::time::{Duration, Instant};

use crate::dispatch::Shader;
use crate::gpu::attention::GpuAttention;
use crate::gpu::bound::{BoundSteps, PASS};
use crate::gpu::error::GpuError;
use crate::gpu::open::Gpu;
use crate::timing::{Timing, TimingSource};

/// Calls between two looks at the clock where the device has no timestamps, to hide the cost of submitting.
const WALL_CALLS: u32 = 8;

/// Dispatches that are timed one by one in one submission: WebGPU allows 4096 queries in a set.
const TIMED_DISPATCHES: usize = 2048;

/// Times of one shader of an attention.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelTiming {
    /// The shader.
    pub shader: Shader,
    /// How often it is dispatched in one attention.
    pub dispatches: usize,
    /// All its dispatches of one attention together, each timed in a compute pass of its own.
    pub timing: Timing,
}

impl Gpu {
    /// Times what is bound on this device, an attention or gradients.
    pub(crate) async fn time_bound(
        &self,
        bound: &BoundSteps,
        min_rounds: usize,
        budget: Duration,
        on_round: &mut (dyn FnMut() + '_),
    ) -> Result<Timing, GpuError> {
        let stopwatch = Stopwatch::new(self).await?;
        let round = || stopwatch.call(bound);
        // warm up: the first call may compile or allocate
        round().await?;
        let mut millis = vec![];
        let start = Instant::now();
        while millis.len() < min_rounds || start.elapsed() < budget {
            millis.push(round().await?);
            on_round();
        }
        Ok(Timing { millis, source: stopwatch.source() })
    }
}

impl GpuAttention {
    /// Times what is bound: at least `min_rounds` rounds and until `budget` is used up. By the device's own clock where
    /// it has one, else from submission to idle over several calls.
    ///
    /// # Errors
    /// [`GpuError`] if the device refuses or was lost.
    pub async fn time(
        &self,
        bound: &BoundSteps,
        min_rounds: usize,
        budget: Duration,
        on_round: &mut (dyn FnMut() + '_),
    ) -> Result<Timing, GpuError> {
        self.gpu().time_bound(bound, min_rounds, budget, on_round).await
    }

    /// [`time`](Self::time), blocking.
    ///
    /// # Errors
    /// As [`time`](Self::time).
    pub fn time_blocking(
        &self,
        bound: &BoundSteps,
        min_rounds: usize,
        budget: Duration,
        on_round: &mut (dyn FnMut() + '_),
    ) -> Result<Timing, GpuError> {
        self.gpu().block_on(self.time(bound, min_rounds, budget, on_round))
    }

    /// Times each shader of what is bound by the device's own clock; `None` where it has none. Dispatches in passes of
    /// their own do not overlap, so the times add up to more than [`time`](Self::time) where the device would.
    ///
    /// # Errors
    /// [`GpuError`] if the device refuses or was lost.
    pub async fn time_kernels(&self, bound: &BoundSteps, rounds: usize) -> Result<Option<Vec<KernelTiming>>, GpuError> {
        if !self.gpu().caps().timestamps {
            return Ok(None);
        }
        let mut kernels: Vec<KernelTiming> = vec![];
        let mut kernel_of = Vec::with_capacity(bound.dispatches.len());
        for step in self.plan().steps() {
            let shader = step.variant.shader;
            let place = kernels.iter().position(|kernel| kernel.shader == shader).unwrap_or_else(|| {
                let timing = Timing { millis: vec![], source: TimingSource::Timestamps };
                kernels.push(KernelTiming { shader, dispatches: 0, timing });
                kernels.len() - 1
            });
            kernels[place].dispatches += 1;
            kernel_of.push(place);
        }
        let timestamps = Timestamps::new(self.gpu(), bound.dispatches.len().min(TIMED_DISPATCHES)).await?;
        // the first round warms up
        for round in 0..=rounds {
            let mut sums = vec![0.0; kernels.len()];
            let chunks = bound.dispatches.chunks(TIMED_DISPATCHES).zip(kernel_of.chunks(TIMED_DISPATCHES));
            for (n, (dispatches, kernel_of)) in chunks.enumerate() {
                let millis = timestamps
                    .spans(self.gpu(), dispatches.len(), |encoder| {
                        if n == 0 {
                            bound.copy(encoder);
                        }
                        for (span, dispatch) in (0..).zip(dispatches) {
                            let timestamp_writes = Some(timestamps.writes(span));
                            let mut pass =
                                encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { timestamp_writes, ..PASS });
                            dispatch.record(&mut pass);
                        }
                    })
                    .await?;
                for (kernel, millis) in kernel_of.iter().zip(millis) {
                    sums[*kernel] += millis;
                }
            }
            if round > 0 {
                kernels.iter_mut().zip(sums).for_each(|(kernel, sum)| kernel.timing.millis.push(sum));
            }
        }
        Ok(Some(kernels))
    }

    /// [`time_kernels`](Self::time_kernels), blocking.
    ///
    /// # Errors
    /// As [`time_kernels`](Self::time_kernels).
    pub fn time_kernels_blocking(
        &self,
        bound: &BoundSteps,
        rounds: usize,
    ) -> Result<Option<Vec<KernelTiming>>, GpuError> {
        self.gpu().block_on(self.time_kernels(bound, rounds))
    }
}

/// Times what is recorded: by the device's clock where it has one, else by the host's.
pub(crate) struct Stopwatch {
    gpu: Gpu,
    clock: Clock,
}

enum Clock {
    Timestamps(Timestamps),
    /// The host's clock, until a word comes back.
    Wall {
        marker: wgpu::Buffer,
    },
}

impl Stopwatch {
    pub(crate) async fn new(gpu: &Gpu) -> Result<Self, GpuError> {
        let clock = if gpu.caps().timestamps {
            Clock::Timestamps(Timestamps::new(gpu, 1).await?)
        } else {
            Clock::Wall { marker: gpu.allocate("marker", 4).await? }
        };
        Ok(Self { gpu: gpu.clone(), clock })
    }

    pub(crate) const fn source(&self) -> TimingSource {
        match self.clock {
            Clock::Timestamps(_) => TimingSource::Timestamps,
            Clock::Wall { .. } => TimingSource::Wall,
        }
    }

    /// Milliseconds of one call of what is bound.
    pub(crate) async fn call(&self, bound: &BoundSteps) -> Result<f64, GpuError> {
        self.round(|encoder, writes| bound.encode_timed(encoder, writes)).await
    }

    /// Milliseconds of what `record` records: copies and one compute pass, with these timestamps.
    pub(super) async fn round(
        &self,
        record: impl Fn(&mut wgpu::CommandEncoder, Option<wgpu::ComputePassTimestampWrites<'_>>),
    ) -> Result<f64, GpuError> {
        match &self.clock {
            Clock::Timestamps(timestamps) => {
                let work = |encoder: &mut wgpu::CommandEncoder| record(encoder, Some(timestamps.writes(0)));
                Ok(timestamps.spans(&self.gpu, 1, work).await?[0])
            }
            Clock::Wall { marker } => {
                let start = Instant::now();
                submit(&self.gpu, |encoder| (0..WALL_CALLS).for_each(|_| record(encoder, None))).await?;
                // a word that is read back arrives when all that was submitted before is done
                let _: Vec<u32> = self.gpu.read("marker", marker.slice(..), 1).await?;
                Ok(start.elapsed().as_secs_f64() * 1e3 / f64::from(WALL_CALLS))
            }
        }
    }
}

/// Two timestamps for each span, and the buffer that they are read from.
struct Timestamps {
    queries: wgpu::QuerySet,
    ticks: wgpu::Buffer,
}

impl Timestamps {
    async fn new(gpu: &Gpu, spans: usize) -> Result<Self, GpuError> {
        // not even an attention without dispatches makes an empty set
        let count = 2 * u32::try_from(spans.clamp(1, TIMED_DISPATCHES)).unwrap_or(1);
        let bytes = u64::from(count) * 8;
        let uses = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
        let ticks = gpu.buffer("timestamps", bytes, uses).await?;
        let descriptor = wgpu::QuerySetDescriptor { label: Some("timestamps"), ty: wgpu::QueryType::Timestamp, count };
        let queries = gpu.checked("timestamps", bytes, || gpu.device().create_query_set(&descriptor)).await?;
        Ok(Self { queries, ticks })
    }

    const fn writes(&self, span: u32) -> wgpu::ComputePassTimestampWrites<'_> {
        wgpu::ComputePassTimestampWrites {
            query_set: &self.queries,
            beginning_of_pass_write_index: Some(2 * span),
            end_of_pass_write_index: Some(2 * span + 1),
        }
    }

    /// Milliseconds of each of the first `count` spans that `record` writes.
    async fn spans(
        &self,
        gpu: &Gpu,
        count: usize,
        record: impl FnOnce(&mut wgpu::CommandEncoder),
    ) -> Result<Vec<f64>, GpuError> {
        let queries = 2 * u32::try_from(count).unwrap_or(u32::MAX);
        submit(gpu, |encoder| {
            record(encoder);
            encoder.resolve_query_set(&self.queries, 0..queries, &self.ticks, 0);
        })
        .await?;
        let ticks: Vec<u64> = gpu.read("timestamps", self.ticks.slice(..), 2 * count).await?;
        let millis = f64::from(gpu.queue().get_timestamp_period()) * 1e-6;
        Ok(ticks.chunks_exact(2).map(|span| span[1].saturating_sub(span[0]) as f64 * millis).collect())
    }
}

async fn submit(gpu: &Gpu, record: impl FnOnce(&mut wgpu::CommandEncoder)) -> Result<(), GpuError> {
    gpu.checked("timed work", 0, || {
        let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        record(&mut encoder);
        gpu.queue().submit([encoder.finish()]);
    })
    .await
}
