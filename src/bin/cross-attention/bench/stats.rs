//! What the rounds of one case say: their spread, those that stand far off, and whether the first of them were slower.

use std::time::{Duration, Instant};

use cross_attention::Timing;

use crate::error::Error;

/// A round is an outlier where its modified Z-score (Iglewicz and Hoaglin 1993) is beyond this: ten standard deviations,
/// the deviation being told from the median one, as hyperfine does.
const OUTLIER: f64 = 10.0;
/// From the median absolute deviation, and the mean one, to the standard deviation of a normal distribution.
const OF_MEDIAN: f64 = 1.4826;
const OF_MEAN: f64 = 1.2533;

/// Share of outliers from which on they are worth a word: the median does not move by fewer.
const MANY: f64 = 0.01;

/// Parts that the rounds are cut into in the order of time. Rounds that follow each other are slow together; parts hardly are.
const BLOCKS: usize = 32;

/// Rounds of a part of the warm-up at least, its share of the time that is given, and how close the medians of two parts are
/// when nothing gets faster any more.
const WARM_ROUNDS: usize = 1;
const WARM_PARTS: u32 = 10;
const WARM_CLOSE: f64 = 0.05;

/// How it went before the rounds that count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct WarmUp {
    pub(super) rounds: usize,
    /// Whether two parts after each other took the same time; `None` where there were no two.
    pub(super) steady: Option<bool>,
}

/// The spread of rounds, in milliseconds.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Spread {
    pub(super) min: f64,
    pub(super) max: f64,
    pub(super) mean: f64,
    /// Of a sample; 0 for one round.
    pub(super) stddev: f64,
    pub(super) outliers: usize,
    /// The median of each of at most [`BLOCKS`] parts, in the order of time.
    pub(super) blocks: Vec<f64>,
}

/// Runs parts of a tenth of the time until two after each other take the same, or the time is up.
///
/// # Errors
/// What a round says.
pub(super) fn warm_up(
    budget: Duration,
    time: impl FnMut(usize, Duration) -> Result<Timing, Error>,
) -> Result<WarmUp, Error> {
    let start = Instant::now();
    warm_up_by(budget, || start.elapsed(), time)
}

/// The same by another clock, which several processes may share.
///
/// # Errors
/// What a round says.
pub(super) fn warm_up_by(
    budget: Duration,
    elapsed: impl Fn() -> Duration,
    mut time: impl FnMut(usize, Duration) -> Result<Timing, Error>,
) -> Result<WarmUp, Error> {
    let (mut rounds, mut before) = (0, f64::NAN);
    loop {
        let part = time(WARM_ROUNDS, budget / WARM_PARTS)?;
        rounds += part.millis.len();
        let median = part.quantile(0.5);
        if (median / before - 1.0).abs() <= WARM_CLOSE {
            return Ok(WarmUp { rounds, steady: Some(true) });
        }
        if elapsed() >= budget {
            return Ok(WarmUp { rounds, steady: before.is_finite().then_some(false) });
        }
        before = median;
    }
}

impl Spread {
    /// That of rounds in the order of time.
    pub(super) fn of(timing: &Timing) -> Self {
        let millis = &timing.millis;
        let count = millis.len() as f64;
        let mean = millis.iter().sum::<f64>() / count;
        let squares: f64 = millis.iter().map(|x| (x - mean).powi(2)).sum();
        Self {
            min: timing.quantile(0.0),
            max: timing.quantile(1.0),
            mean,
            stddev: (squares / (count - 1.0).max(1.0)).sqrt(),
            outliers: outliers(millis),
            blocks: blocks(millis).map(median).collect(),
        }
    }

    /// Whether so many of the rounds stand far off that somebody should know.
    pub(super) fn is_disturbed(&self, rounds: usize) -> bool {
        self.outliers as f64 > MANY * rounds as f64
    }
}

/// The middle of numbers; NaN if there is none.
pub(super) fn median(numbers: &[f64]) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

fn outliers(millis: &[f64]) -> usize {
    let middle = median(millis);
    let deviations: Vec<f64> = millis.iter().map(|x| (x - middle).abs()).collect();
    // a coarse clock gives most rounds the same time, and a median deviation of 0
    let deviation = match OF_MEDIAN * median(&deviations) {
        deviation if deviation > 0.0 => deviation,
        _ => OF_MEAN * deviations.iter().sum::<f64>() / deviations.len() as f64,
    };
    deviations.iter().filter(|far| **far > OUTLIER * deviation).count()
}

/// Parts of nearly the same length, in their order; none is empty.
fn blocks(millis: &[f64]) -> impl Iterator<Item = &[f64]> {
    let count = millis.len().min(BLOCKS);
    (0..count).map(move |n| &millis[n * millis.len() / count..(n + 1) * millis.len() / count])
}

#[cfg(test)]
mod tests {
    use cross_attention::TimingSource;

    use super::*;

    fn timing(millis: Vec<f64>) -> Timing {
        Timing { millis, source: TimingSource::Cpu }
    }

    #[test]
    fn rounds_are_summed_up() {
        let spread = Spread::of(&timing(vec![1.0, 3.0, 2.0, 4.0]));
        assert_eq!((spread.min, spread.max, spread.mean, spread.outliers), (1.0, 4.0, 2.5, 0));
        assert!((spread.stddev - (5.0f64 / 3.0).sqrt()).abs() < 1e-12);
        assert_eq!(spread.blocks, [1.0, 3.0, 2.0, 4.0]);
        let many: Vec<f64> = (0..100).map(f64::from).collect();
        let blocks = Spread::of(&timing(many)).blocks;
        assert!(blocks.len() == BLOCKS && blocks.is_sorted() && blocks[0] >= 0.5, "{blocks:?}");
        assert!(Spread::of(&timing(vec![2.0])).stddev.abs() < 1e-12);
    }

    #[test]
    fn one_that_stands_far_off_is_an_outlier() {
        let mut millis: Vec<f64> = (0..50).map(|n| 1.0 + f64::from(n % 5) * 0.01).collect();
        assert_eq!(outliers(&millis), 0);
        millis[7] = 1.5;
        assert_eq!(outliers(&millis), 1);
        assert!(Spread::of(&timing(millis)).is_disturbed(50));
        // with a coarse clock
        let mut coarse = vec![1.0; 99];
        assert_eq!(outliers(&coarse), 0);
        coarse.push(2.0);
        assert_eq!(outliers(&coarse), 1);
    }

    #[test]
    fn a_warm_up_ends_when_nothing_changes() {
        let mut times = [8.0, 4.0, 2.0, 2.05].into_iter();
        let mut parts = 0;
        let warm = warm_up(Duration::from_secs(9), |rounds, _| {
            parts += 1;
            Ok(timing(vec![times.next().unwrap(); rounds]))
        });
        assert_eq!((warm.unwrap(), parts), (WarmUp { rounds: 4, steady: Some(true) }, 4));
        let mut next = 1.0;
        let warm = warm_up(Duration::ZERO, |rounds, _| {
            next *= 2.0;
            Ok(timing(vec![next; rounds]))
        });
        assert_eq!(warm.unwrap(), WarmUp { rounds: 1, steady: None });
        let mut next = 1.0;
        let warm = warm_up(Duration::from_millis(20), |rounds, _| {
            next *= 2.0;
            std::thread::sleep(Duration::from_millis(11));
            Ok(timing(vec![next; rounds]))
        });
        assert_eq!(warm.unwrap().steady, Some(false));
    }
}
