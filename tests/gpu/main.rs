//! Every GPU kernel on every adapter: one trial per adapter, kernel and case, `llvmpipe/fused/causal_gqa_odd`.
//!
//! Adapters are those that `WGPU_BACKEND` and `WGPU_ADAPTER_NAME` leave; GL only if `WGPU_BACKEND` names it. Without
//! an adapter all trials are ignored; with `REQUIRE_GPU=1` that is a failure. There are as many threads as adapters unless
//! `--test-threads` says otherwise: a software driver compiles on one core and computes on all. Software drivers are spared
//! some trials of the kernels that take long to compile, unless `GPU_TRIALS=all`; the lesser of several runs a share of all.

#![expect(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a trial that cannot go on stops; results go to the terminal"
)]

#[path = "../common/mod.rs"]
mod common;

mod adapters;
mod backward;
mod composed;
mod executors;
mod host;
mod interop;
mod keys;
mod known_faults;
mod levels;
mod linear;
mod merging;
mod parts;
mod places;
mod shared;
mod trials;
#[cfg(feature = "tune")]
mod tuning;
mod weights;

use libtest_mimic::{Arguments, Conclusion, Trial};

fn main() -> std::process::ExitCode {
    let mut arguments = Arguments::from_args();
    let (adapters, missing) = adapters::open();
    arguments.test_threads = arguments.test_threads.or(Some(adapters.len().max(1)));
    let mut trials = in_turns(adapters.iter().map(trials::of_adapter).collect());
    if let Some(reason) = missing {
        trials.extend(trials::without_adapter(&reason));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    if !arguments.list {
        summary(&adapters, &conclusion);
    }
    // a run of some trials cannot know
    let whole = arguments.filter.is_none() && arguments.skip.is_empty() && !arguments.list && !arguments.ignored;
    let gone = if whole { known_faults::gone() } else { vec![] };
    if !gone.is_empty() {
        println!("listed as faults of a driver, yet no kernel meets them; take them off the list: {}", gone.join(", "));
        return std::process::ExitCode::FAILURE;
    }
    conclusion.exit_code()
}

/// One of each list after another, so that the threads work on different adapters most of the time.
fn in_turns(lists: Vec<Vec<Trial>>) -> Vec<Trial> {
    let mut lists: Vec<_> = lists.into_iter().map(Vec::into_iter).collect();
    let longest = lists.iter().map(ExactSizeIterator::len).max().unwrap_or_default();
    (0..longest).flat_map(|_| lists.iter_mut().filter_map(Iterator::next).collect::<Vec<_>>()).collect()
}

fn summary(adapters: &[adapters::Adapter], conclusion: &Conclusion) {
    for adapter in adapters {
        println!("{}: {}", adapter.slug, adapter.describe());
        for (kernel, (count, time)) in adapter.ran() {
            println!("  {kernel}: {count} trials ran, {:.0} s", time.as_secs_f64());
        }
    }
    println!("{} passed, {} failed, {} ignored", conclusion.num_passed, conclusion.num_failed, conclusion.num_ignored);
}
