//! The roofs of this machine: its best rates of arithmetic and of reading memory, on all threads of the current pool.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::simd::{SimdLevel, flops_per_round, fma_chains, read_all};
use crate::roofline::Roofline;
use crate::timing::{Timing, TimingSource};

/// Rounds of multiply-adds between two looks at the clock: some 50 microseconds, which are seldom interrupted.
const ROUNDS: usize = 2000;
/// Looks at the clock of each thread, at least.
const LOOKS: usize = 100;
/// f32 that are read in all at least, and for each thread: several times the last cache of current machines.
const READ_LEN: usize = 64 << 20;
const READ_LEN_PER_THREAD: usize = 8 << 20;

/// Measures what the machine can do at most with the best instructions it has, spending about `budget` on each roof.
/// Takes 256 MiB of memory, 32 MiB a thread on large machines. Shares the machine with whatever else runs on it.
///
/// `None` where there is no memory for that.
#[must_use]
pub fn roofline(budget: Duration) -> Option<Roofline> {
    let level = SimdLevel::best();
    let threads = rayon::current_num_threads();
    let gflops: f64 = rayon::broadcast(|_| thread_gflops(level, budget)).into_iter().sum();
    let len = (READ_LEN / threads).max(READ_LEN_PER_THREAD);
    // each thread writes what it will read: pages that nobody wrote to would all be read from one, and lie near nobody
    let shares: Option<Vec<_>> = rayon::broadcast(|_| filled(len)).into_iter().collect();
    let shares = shares?;
    let start = Instant::now();
    let mut best = f64::INFINITY;
    let mut reads = 0;
    while reads < 3 || start.elapsed() < budget {
        let start = Instant::now();
        rayon::broadcast(|place| black_box(read_all(level, &shares[place.index()])));
        best = best.min(start.elapsed().as_secs_f64());
        reads += 1;
    }
    let gbps = (threads * len * size_of::<f32>()) as f64 / (best * 1e9);
    Some(Roofline { gflops, gbps, timing: TimingSource::Cpu })
}

/// What a thread does when it is not interrupted, while the others do the same.
fn thread_gflops(level: SimdLevel, budget: Duration) -> f64 {
    let start = Instant::now();
    let mut millis = vec![];
    while millis.len() < LOOKS || start.elapsed() < budget {
        let start = Instant::now();
        black_box(fma_chains(level, black_box(0.5), black_box(0.5), ROUNDS));
        millis.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let fast = Timing { millis, source: TimingSource::Cpu }.quantile(0.1);
    (ROUNDS * flops_per_round(level.lanes())) as f64 / (fast * 1e6)
}

fn filled(len: usize) -> Option<Vec<f32>> {
    let mut data = vec![];
    data.try_reserve_exact(len).ok()?;
    data.resize(len, 1.0);
    Some(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_settle_and_reads_miss_nothing() {
        for level in SimdLevel::available() {
            // every chain of x = x / 2 + 1/2 ends at 1
            let chains = fma_chains(level, 0.5, 0.5, 100);
            assert!((chains - (12 * level.lanes()) as f32).abs() < 1e-3, "{level}: {chains}");
            let read = read_all(level, &vec![1.0; 12 * 16 * 50]);
            assert!((read - 9600.0).abs() < 1e-3, "{level}: {read}");
        }
    }

    #[test]
    fn roofs_are_numbers() {
        let roofline = roofline(Duration::ZERO).unwrap();
        assert!(roofline.gflops.is_finite() && roofline.gflops > 0.0, "{roofline:?}");
        assert!(roofline.gbps.is_finite() && roofline.gbps > 0.0, "{roofline:?}");
    }
}
