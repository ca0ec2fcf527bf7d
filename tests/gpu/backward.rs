//! Gradients on the device: as f64 has them, cut, with a workspace full of NaN, in the caller's encoder, and the same bits every
//! time.

use cross_attention::backward::{BackwardInputs, BackwardProblem, Gradients};
use cross_attention::gpu::GpuBackward;
use libtest_mimic::Trial;

use super::adapters::Adapter;
use super::trials::{message, random_cases, trial};
use crate::common::backward::{self, bits};
use crate::common::case::Case;
use crate::common::{cases, random};

const GROUP: &str = "backward";
/// Random cases with many keys.
const LONG_CASES: u32 = 6;

pub(crate) fn trials(adapter: &Adapter) -> Vec<Trial> {
    let mut trials = Vec::new();
    let random = random_cases().into_iter().zip(0..).map(|(case, n)| Case { name: format!("random_{n:02}"), ..case });
    let long = random::drawn(&random::long_case(), LONG_CASES).into_iter().zip(0..);
    let long = long.map(|(case, n)| Case { name: format!("random_long_{n:02}"), ..case });
    for case in cases::all().into_iter().chain(random).chain(long) {
        let on = adapter.clone();
        let name = case.name.clone();
        trials.push(trial(adapter, GROUP, &name, move || {
            backward::case_with(&case, &|problem, inputs| run_twice(&on, problem, inputs))
        }));
    }
    for (n, path) in backward::golden().into_iter().enumerate() {
        let on = adapter.clone();
        trials.push(trial(adapter, GROUP, &format!("golden_{n:02}"), move || {
            backward::golden_with(&path, 2.0, &|problem, inputs| run_twice(&on, problem, inputs))
        }));
    }
    trials
}

fn prepared(on: &Adapter, problem: &BackwardProblem) -> Result<GpuBackward, String> {
    on.context.prepare_backward_blocking(problem).map_err(|error| message(&error))
}

/// Twice on one workspace: the second call gives the same bits.
fn run_twice(on: &Adapter, problem: &BackwardProblem, inputs: &BackwardInputs<'_>) -> Result<Gradients, String> {
    let prepared = prepared(on, problem)?;
    let first = prepared.run_blocking(inputs).map_err(|error| message(&error))?;
    let second = prepared.run_blocking(inputs).map_err(|error| message(&error))?;
    if bits(&first) == bits(&second) { Ok(first) } else { Err("another run gives other bits".to_owned()) }
}
