//! What tuning found for a problem, and which candidate that makes the best.

use super::cache::TuneEntry;
use super::class::{DeviceKey, ProblemClass};
use crate::dispatch::PlanChoice;
use crate::error::Error;
use crate::timing::Timing;
use crate::verify::Report;

/// How far the tuning of a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TuneProgress {
    /// A candidate is about to be made and checked.
    Checking {
        /// Which one, from 0.
        candidate: usize,
        /// How many there are.
        of: usize,
        /// The candidate.
        choice: PlanChoice,
    },
    /// A round of timing is about to begin; the first warms up.
    Timing {
        /// Which one, from 0.
        round: usize,
        /// How many there are at most.
        of: usize,
    },
}

/// A choice that was tried, and what came of it.
#[derive(Clone, Debug, PartialEq)]
pub struct TuneCandidate {
    /// The choice.
    pub choice: PlanChoice,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of a choice.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Outcome {
    /// Right, and timed.
    Timed {
        /// Milliseconds of the rounds it took part in, and the clock.
        timing: Timing,
        /// Milliseconds until its first result was there, pipelines made: some drivers compile at the first dispatch.
        first_ms: f64,
        /// The largest ratio of an error to what is allowed, over the rows that were checked; at most 1.
        worst_ratio: f64,
    },
    /// Its result is out of tolerance: a fault of a kernel or of a driver. It is never chosen.
    Wrong {
        /// How far.
        report: Box<Report>,
    },
    /// The device or the plan refused it.
    Failed {
        /// Why.
        error: Box<Error>,
    },
    /// It was left out.
    NotTried {
        /// Why.
        reason: &'static str,
    },
}

impl Outcome {
    /// Median time in milliseconds, if it was timed.
    #[must_use]
    pub fn median_ms(&self) -> Option<f64> {
        match self {
            Self::Timed { timing, .. } => Some(timing.quantile(0.5)),
            Self::Wrong { .. } | Self::Failed { .. } | Self::NotTried { .. } => None,
        }
    }
}

/// What tuning found for a problem.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct TuneReport {
    /// The device.
    pub device: DeviceKey,
    /// The class of the problem.
    pub class: ProblemClass,
    /// All candidates, in the order they were tried.
    pub candidates: Vec<TuneCandidate>,
    /// The choice that the plan's rules make.
    pub planned: PlanChoice,
    /// The fastest of those that are right, by its place in `candidates`; the plan's own where none is faster by more than
    /// 2 %. `None` if none was timed.
    pub chosen: Option<usize>,
    /// Floating point operations of one attention.
    pub flops: f64,
}

impl TuneReport {
    /// The candidate that was chosen.
    #[must_use]
    pub fn best(&self) -> Option<&TuneCandidate> {
        self.candidates.get(self.chosen?)
    }

    /// Median time of the choice that the plan's rules make, in milliseconds, if it was timed.
    #[must_use]
    pub fn planned_ms(&self) -> Option<f64> {
        self.candidates.iter().find(|candidate| candidate.choice == self.planned)?.outcome.median_ms()
    }

    /// What to keep in a cache; `None` if nothing was chosen.
    #[must_use]
    pub fn entry(&self) -> Option<TuneEntry> {
        let best = self.best()?;
        let Outcome::Timed { timing, .. } = &best.outcome else { return None };
        Some(TuneEntry {
            device: self.device.clone(),
            class: self.class.clone(),
            choice: best.choice,
            median_ms: timing.quantile(0.5),
            planned_ms: self.planned_ms(),
            timing: timing.source,
        })
    }
}

/// How much faster than the plan's own choice another must be to be chosen: less is within what clocks and clock rates do.
const MARGIN: f64 = 0.98;
/// The fastest, or the plan's own if nothing beats it by the margin.
pub(super) fn choose(candidates: &[TuneCandidate], planned: &PlanChoice) -> Option<usize> {
    let timed = || candidates.iter().enumerate().filter_map(|(n, c)| Some((n, c.outcome.median_ms()?)));
    let (best, best_ms) = timed().min_by(|(_, a), (_, b)| a.total_cmp(b))?;
    let own = timed().find(|(n, _)| candidates[*n].choice == *planned);
    match own {
        Some((own, own_ms)) if best_ms > own_ms * MARGIN => Some(own),
        _ => Some(best),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::Kernel;
    use crate::timing::TimingSource;

    fn timed(kernel: Kernel, millis: &[f64]) -> TuneCandidate {
        let timing = Timing { millis: millis.to_vec(), source: TimingSource::Timestamps };
        let outcome = Outcome::Timed { timing, first_ms: 1.0, worst_ratio: 0.1 };
        TuneCandidate { choice: PlanChoice::of(kernel), outcome }
    }

    #[test]
    fn the_fastest_right_one_is_chosen_and_the_plans_own_within_the_margin() {
        let own = PlanChoice::of(Kernel::Tiled);
        let left_out = Outcome::NotTried { reason: "the time was up" };
        let mut candidates = vec![
            timed(Kernel::Tiled, &[1.0, 1.0, 9.0]),
            timed(Kernel::Split, &[0.99, 0.99, 0.5]),
            TuneCandidate { choice: PlanChoice::of(Kernel::Plain), outcome: left_out.clone() },
        ];
        assert_eq!(choose(&candidates, &own), Some(0));
        candidates[1] = timed(Kernel::Split, &[0.9, 0.9, 5.0]);
        assert_eq!(choose(&candidates, &own), Some(1));
        candidates[0].outcome = left_out.clone();
        assert_eq!(choose(&candidates, &own), Some(1));
        candidates[1].outcome = left_out;
        assert_eq!(choose(&candidates, &own), None);
    }
}
