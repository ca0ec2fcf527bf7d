//! Times of repeated calls, and by which clock.

#[cfg(feature = "threads")]
use std::time::{Duration, Instant};

/// The clock that a time was read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "tune", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
pub enum TimingSource {
    /// The device's own timestamps, at the start and end of the compute pass.
    Timestamps,
    /// The host's clock from submission to idle, over several calls.
    Wall,
    /// The host's clock around work of the CPU.
    Cpu,
}

impl std::fmt::Display for TimingSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Timestamps => "timestamps",
            Self::Wall => "wall",
            Self::Cpu => "cpu",
        })
    }
}

/// Times of repeated calls.
#[derive(Clone, Debug, PartialEq)]
pub struct Timing {
    /// Milliseconds of each round.
    pub millis: Vec<f64>,
    /// The clock.
    pub source: TimingSource,
}

impl Timing {
    /// The time below which a share of the rounds lies: 0.5 is the median. NaN without rounds.
    #[must_use]
    pub fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.millis.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().saturating_sub(1);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of an index")]
        let at = (last as f64 * share.clamp(0.0, 1.0)).round() as usize;
        sorted.get(at).copied().unwrap_or(f64::NAN)
    }
}

/// Times calls by the host's clock: at least so many rounds, and until the budget is used up; `on_round` is called after each.
#[cfg(feature = "threads")]
pub(crate) fn time_calls<E>(
    min_rounds: usize,
    budget: Duration,
    on_round: &mut (dyn FnMut() + '_),
    mut call: impl FnMut() -> Result<(), E>,
) -> Result<Timing, E> {
    let mut millis = vec![];
    let begin = Instant::now();
    while millis.len() < min_rounds || begin.elapsed() < budget {
        let start = Instant::now();
        call()?;
        millis.push(start.elapsed().as_secs_f64() * 1e3);
        on_round();
    }
    Ok(Timing { millis, source: TimingSource::Cpu })
}
