//! Every GPU kernel on every adapter: one trial per adapter, kernel and case, `llvmpipe/fused/causal_gqa_odd`.
//!
//! Adapters are those that `WGPU_BACKEND` and `WGPU_ADAPTER_NAME` leave; GL only if `WGPU_BACKEND` names it. Without
//! an adapter all trials are ignored; with `REQUIRE_GPU=1` that is a failure. Trials run one after another unless
//! `--test-threads` says otherwise: a software driver uses all cores for one.

#![expect(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a trial that cannot go on stops; results go to the terminal"
)]

#[path = "../common/mod.rs"]
mod common;

mod adapters;
mod host;
mod interop;
mod known_faults;
mod levels;
mod merging;
mod parts;
mod trials;
#[cfg(feature = "tune")]
mod tuning;

use libtest_mimic::{Arguments, Conclusion, Trial};

fn main() -> std::process::ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = arguments.test_threads.or(Some(1));
    let (adapters, missing) = adapters::open();
    let mut trials: Vec<Trial> = adapters.iter().flat_map(trials::of_adapter).collect();
    if let Some(reason) = missing {
        trials.extend(trials::without_adapter(&reason));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    if !arguments.list {
        summary(&adapters, &conclusion);
    }
    conclusion.exit_code()
}

fn summary(adapters: &[adapters::Adapter], conclusion: &Conclusion) {
    for adapter in adapters {
        println!("{}: {}", adapter.slug, adapter.describe());
        for (kernel, count) in adapter.ran() {
            println!("  {kernel}: {count} trials ran");
        }
    }
    println!("{} passed, {} failed, {} ignored", conclusion.num_passed, conclusion.num_failed, conclusion.num_ignored);
}
