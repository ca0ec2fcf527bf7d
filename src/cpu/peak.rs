//! The roofs of this machine: its best rates of arithmetic and of reading memory, on all threads of the current pool.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::simd::{SimdLevel, flops_per_round, fma_chains, read_all};
use crate::roofline::{Roofline, best_millis};
use crate::timing::TimingSource;

/// Rounds of multiply-adds between two looks at the clock: some milliseconds.
const ROUNDS: usize = 100_000;
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
    let gflops = {
        let work = || {
            rayon::broadcast(|_| black_box(fma_chains(level, black_box(0.5), black_box(0.5), ROUNDS)));
        };
        (threads * ROUNDS * flops_per_round(level.lanes())) as f64 / (best(budget, work) * 1e6)
    };
    let len = (READ_LEN / threads).max(READ_LEN_PER_THREAD);
    // each thread writes what it will read: pages that nobody wrote to would all be read from one, and lie near nobody
    let shares: Option<Vec<_>> = rayon::broadcast(|_| filled(len)).into_iter().collect();
    let shares = shares?;
    let work = || {
        rayon::broadcast(|place| black_box(read_all(level, &shares[place.index()])));
    };
    let gbps = (threads * len * size_of::<f32>()) as f64 / (best(budget, work) * 1e6);
    Some(Roofline { gflops, gbps, timing: TimingSource::Cpu })
}

fn filled(len: usize) -> Option<Vec<f32>> {
    let mut data = vec![];
    data.try_reserve_exact(len).ok()?;
    data.resize(len, 1.0);
    Some(data)
}

/// Milliseconds of the fastest round.
fn best(budget: Duration, work: impl Fn()) -> f64 {
    let round = || {
        let start = Instant::now();
        work();
        Ok::<_, std::convert::Infallible>(start.elapsed().as_secs_f64() * 1e3)
    };
    let Ok(millis) = best_millis(budget, round);
    millis
}
