//! Nothing but multiply-adds, and nothing but reads: what the machine can do at most.

use super::{Simd, array, dispatch};

/// Chains that run side by side: more than two units with a latency of four steps, and few enough for 16 registers.
const CHAINS: usize = 12;

/// Steps of every chain between two looks at the counter.
const STEPS: usize = 16;

/// Floating point operations of [`fma_chains`] for one of its `rounds`, on vectors of `lanes`.
pub(in crate::cpu) const fn flops_per_round(lanes: usize) -> usize {
    2 * CHAINS * STEPS * lanes
}

dispatch! {
    /// Runs chains of `x = a * x + b` in registers, and gives a number that depends on all of them.
    fn fma_chains(a: f32, b: f32, rounds: usize) -> f32 = fma_chains_on
}

dispatch! {
    /// Reads all elements, as fast as they come, and gives a number that depends on all but a few at the end.
    fn read_all(data: &[f32]) -> f32 = read_all_on
}

#[inline(always)]
fn fma_chains_on<S: Simd>(s: S, a: f32, b: f32, rounds: usize) -> f32 {
    let (a, b) = (s.splat(a), s.splat(b));
    let mut x = array![CHAINS; n => s.splat(n as f32)];
    for _ in 0..rounds {
        for _ in 0..STEPS {
            x = array![CHAINS; n => s.fma(a, x[n], b)];
        }
    }
    sum(s, x)
}

#[inline(always)]
fn read_all_on<S: Simd>(s: S, data: &[f32]) -> f32 {
    let mut x = [s.splat(0.0); CHAINS];
    for block in data.chunks_exact(CHAINS * S::LANES) {
        // SAFETY: a block has LANES elements for each chain
        x = array![CHAINS; n => s.add(x[n], unsafe { s.load(block.as_ptr().add(n * S::LANES)) })];
    }
    sum(s, x)
}

#[inline(always)]
fn sum<S: Simd>(s: S, x: [S::V; CHAINS]) -> f32 {
    let mut total = 0.0;
    for n in (0..CHAINS).step_by(4) {
        total += s.sums([x[n], x[n + 1], x[n + 2], x[n + 3]]).iter().sum::<f32>();
    }
    total
}
