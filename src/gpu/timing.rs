//! How long an attention takes on the device, inputs in place and pipelines warm.

use std::time::{Duration, Instant};

use super::attention::{BoundAttention, PreparedAttention};
use super::error::GpuError;
use crate::timing::{Timing, TimingSource};

/// Calls between two looks at the clock where the device has no timestamps, to hide the cost of submitting.
const WALL_CALLS: u32 = 8;

impl PreparedAttention {
    /// Times what is bound: at least `min_rounds` rounds and until `budget` is used up. By the device's own clock where
    /// it has one, else from submission to idle over several calls.
    ///
    /// # Errors
    /// [`GpuError`] if the device refuses or was lost.
    pub async fn time(
        &self,
        bound: &BoundAttention,
        min_rounds: usize,
        budget: Duration,
        on_round: &mut (dyn FnMut() + '_),
    ) -> Result<Timing, GpuError> {
        let clock = Clock::new(self).await?;
        // warm up: the first call may compile or allocate
        self.round(bound, &clock).await?;
        let mut millis = vec![];
        let start = Instant::now();
        while millis.len() < min_rounds || start.elapsed() < budget {
            millis.push(self.round(bound, &clock).await?);
            on_round();
        }
        Ok(Timing { millis, source: clock.source() })
    }

    /// [`time`](Self::time), blocking.
    ///
    /// # Errors
    /// As [`time`](Self::time).
    #[cfg(feature = "native")]
    pub fn time_blocking(
        &self,
        bound: &BoundAttention,
        min_rounds: usize,
        budget: Duration,
        on_round: &mut (dyn FnMut() + '_),
    ) -> Result<Timing, GpuError> {
        self.context().block_on(self.time(bound, min_rounds, budget, on_round))
    }

    /// Milliseconds of one call.
    pub(crate) async fn round(&self, bound: &BoundAttention, clock: &Clock) -> Result<f64, GpuError> {
        let context = self.context();
        let start = Instant::now();
        context
            .checked("a timed attention", 0, || {
                let mut encoder = context.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
                match clock {
                    Clock::Timestamps { queries, ticks } => {
                        let writes = wgpu::ComputePassTimestampWrites {
                            query_set: queries,
                            beginning_of_pass_write_index: Some(0),
                            end_of_pass_write_index: Some(1),
                        };
                        bound.encode_timed(&mut encoder, Some(writes));
                        encoder.resolve_query_set(queries, 0..2, ticks, 0);
                    }
                    Clock::Wall { .. } => (0..WALL_CALLS).for_each(|_| bound.encode(&mut encoder)),
                }
                context.queue().submit([encoder.finish()]);
            })
            .await?;
        match clock {
            Clock::Timestamps { ticks, .. } => {
                let ticks: Vec<u64> = context.read("timestamps", ticks.slice(..), 2).await?;
                let elapsed = ticks[1].saturating_sub(ticks[0]);
                Ok(elapsed as f64 * f64::from(context.queue().get_timestamp_period()) * 1e-6)
            }
            Clock::Wall { marker } => {
                // a word that is read back arrives when all that was submitted before is done
                let _: Vec<u32> = context.read("marker", marker.slice(..), 1).await?;
                Ok(start.elapsed().as_secs_f64() * 1e3 / f64::from(WALL_CALLS))
            }
        }
    }
}

/// What a round is timed by.
pub(crate) enum Clock {
    /// Two timestamps, and the buffer that they are read from.
    Timestamps { queries: wgpu::QuerySet, ticks: wgpu::Buffer },
    /// The host's clock, until a word comes back.
    Wall { marker: wgpu::Buffer },
}

impl Clock {
    pub(crate) const fn source(&self) -> TimingSource {
        match self {
            Self::Timestamps { .. } => TimingSource::Timestamps,
            Self::Wall { .. } => TimingSource::Wall,
        }
    }

    pub(crate) async fn new(prepared: &PreparedAttention) -> Result<Self, GpuError> {
        let context = prepared.context();
        if !context.caps().timestamps {
            return Ok(Self::Wall { marker: context.allocate("marker", 4).await? });
        }
        let uses = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
        let ticks = context.buffer("timestamps", 16, uses).await?;
        let descriptor =
            wgpu::QuerySetDescriptor { label: Some("timestamps"), ty: wgpu::QueryType::Timestamp, count: 2 };
        let queries = context.checked("timestamps", 16, || context.device().create_query_set(&descriptor)).await?;
        Ok(Self::Timestamps { queries, ticks })
    }
}
