//! How sure the ratio of two medians is: a bootstrap (Efron 1979) over parts of the time, and over runs.

use super::stats::median;

/// How often it draws, and how much of the ratios that it draws lies within the interval.
const DRAWS: usize = 4000;
pub(super) const CONFIDENCE: f64 = 0.99;

/// Parts that each side needs for an interval to mean anything.
const FEWEST_BLOCKS: usize = 5;

/// The same intervals for the same rows.
const SEED: u64 = 1979;

/// Where a ratio lies, but for one of a hundred.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Interval {
    pub(super) low: f64,
    pub(super) high: f64,
}

/// The interval of the ratio of the second's median by the first's, each a list of runs, a run being a list of times of its
/// parts; `None` where there are too few. It draws runs, and of each run parts, as often as there are, with repeats.
pub(super) fn ratio(old: &[Vec<f64>], new: &[Vec<f64>]) -> Option<Interval> {
    if [old, new].iter().any(|runs| runs.iter().map(Vec::len).sum::<usize>() < FEWEST_BLOCKS) {
        return None;
    }
    let mut rng = fastrand::Rng::with_seed(SEED);
    let mut draw = |runs: &[Vec<f64>]| {
        let medians: Vec<f64> = (0..runs.len())
            .map(|_| {
                let run = &runs[rng.usize(..runs.len())];
                median(&(0..run.len()).map(|_| run[rng.usize(..run.len())]).collect::<Vec<_>>())
            })
            .collect();
        median(&medians)
    };
    let mut ratios: Vec<f64> = (0..DRAWS).map(|_| draw(new) / draw(old)).collect();
    ratios.sort_by(f64::total_cmp);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a number of draws")]
    let outside = (DRAWS as f64 * (1.0 - CONFIDENCE) / 2.0) as usize;
    Some(Interval { low: ratios[outside], high: ratios[DRAWS - 1 - outside] })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Times around 1 that differ by up to a tenth.
    fn run(seed: u64, factor: f64) -> Vec<f64> {
        let mut rng = fastrand::Rng::with_seed(seed);
        (0..32).map(|_| factor * (1.0 + 0.1 * rng.f64())).collect()
    }

    #[test]
    fn a_difference_is_told_from_noise() {
        let Interval { low, high } = ratio(&[run(1, 1.0)], &[run(2, 1.2)]).unwrap();
        assert!(low > 1.15 && low < 1.2 && high > 1.2 && high < 1.25, "{low} {high}");
        let mut wrong = 0;
        for seed in 0..40 {
            let Interval { low, high } = ratio(&[run(seed, 1.0)], &[run(seed + 1000, 1.0)]).unwrap();
            wrong += usize::from(low > 1.0 || high < 1.0);
        }
        assert!(wrong <= 3, "{wrong} of 40");
    }

    #[test]
    fn runs_that_differ_widen_the_interval() {
        let runs = |seed| [run(seed, 1.0), run(seed + 1, 1.3), run(seed + 2, 0.8)];
        let Interval { low, high } = ratio(&runs(1), &runs(7)).unwrap();
        assert!(low < 0.9 && high > 1.1, "{low} {high}");
        assert_eq!(ratio(&[vec![1.0; 4]], &[vec![1.0; 32]]), None);
        assert_eq!(ratio(&[], &[vec![1.0; 32]]), None);
    }
}
