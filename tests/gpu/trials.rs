//! The list of trials: names, what is ignored and why, what a failure prints.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use cross_attention::{
    AttentionInputs, AttentionOutput, AttentionProblem, DeviceClass, Element, Error, Kernel, PlanError,
};
use libtest_mimic::{Completion, Failed, Trial};

use super::adapters::Adapter;
use super::{
    backward, composed, executors, keys, known_faults, levels, linear, merging, parts, places, shared, weights,
};
use crate::common::case::Case;
use crate::common::check::{self, Extent, Run};
use crate::common::{cases, meaning, onnx, random, real};

/// Random specs with few keys and with many, for each kernel.
const RANDOM_CASES: u32 = 32;
const LONG_CASES: u32 = 8;

/// What a trial does with an implementation.
type Check = Box<dyn Fn(&Run<'_>) -> Result<(), String> + Send + Sync>;

/// Everything that a kernel runs, by name.
fn checks() -> Vec<(String, Check)> {
    let mut checks: Vec<(String, Check)> = Vec::new();
    for case in cases::all() {
        checks.push((case.name.clone(), Box::new(move |run| check::case_with(&case, run))));
    }
    for sight in &meaning::SIGHTS {
        checks.push((format!("sees_{}", sight.name), Box::new(|run| sight.check(run))));
    }
    checks.push(("scores_by_hand".to_string(), Box::new(|run| meaning::scores(run))));
    for case in onnx::all() {
        let name = case.name.trim_start_matches("test_").to_string();
        checks.push((format!("onnx_{name}"), Box::new(move |run| check::onnx(&case, run))));
    }
    for capture in real::all() {
        checks.push((
            format!("real_{}", capture.name),
            Box::new(move |run| check::capture(&capture, run, Extent::Sample)),
        ));
    }
    for (n, case) in random_cases().into_iter().enumerate() {
        checks.push((format!("random_{n:02}"), Box::new(move |run| check::case_with(&case, run))));
    }
    for (n, case) in random::drawn(&random::long_case(), LONG_CASES).into_iter().enumerate() {
        checks.push((format!("random_long_{n:02}"), Box::new(move |run| check::case_with(&case, run))));
    }
    checks
}

pub(crate) fn random_cases() -> Vec<Case> {
    random::drawn(&random::case(), RANDOM_CASES)
}

/// The table and random cases once more with inputs in f16, which is all that the cooperative kernel takes.
fn cases_in_f16() -> Vec<Case> {
    let random = random_cases().into_iter().zip(0..).map(|(case, n)| Case { name: format!("random_{n:02}"), ..case });
    let twin = |case: Case| {
        let twin = f16_inputs(case.clone());
        (twin.spec != case.spec).then_some(twin)
    };
    cases::all().into_iter().chain(random).filter_map(twin).collect()
}

/// All trials of an adapter.
pub(crate) fn of_adapter(adapter: &Adapter) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, check) in checks() {
        let check = Arc::new(check);
        for kernel in kernels(adapter) {
            let check = Arc::clone(&check);
            let on = adapter.clone();
            trials.push(trial(adapter, kernel.name(), &name, move || check(&run_with(&on, kernel))));
        }
    }
    if adapter.context.caps().cooperative_matrix.is_some() {
        for case in cases_in_f16() {
            let (on, name) = (adapter.clone(), format!("f16_inputs_{}", case.name));
            let kernel = Kernel::Cooperative;
            trials.push(trial(adapter, kernel.name(), &name, move || check::case_with(&case, &run_with(&on, kernel))));
        }
    }
    for kernel in kernels(adapter) {
        trials.extend(parts::trials(adapter, kernel));
        trials.extend(keys::trials(adapter, kernel));
    }
    let all = std::env::var("GPU_TRIALS").is_ok_and(|value| value == "all");
    if adapter.context.caps().class == DeviceClass::Software && !all {
        trials = shared_out(adapter, trials);
    }
    trials.extend(merging::trials(adapter));
    trials.extend(weights::trials(adapter));
    trials.extend(backward::trials(adapter));
    trials.extend(composed::trials(adapter));
    trials.extend(shared::trials(adapter));
    trials.extend(linear::trials(adapter));
    trials.extend(executors::trials(adapter));
    trials.extend(places::trials(adapter));
    trials.extend(levels::trials(adapter));
    #[cfg(feature = "tune")]
    trials.extend(super::tuning::trials(adapter));
    trials
}

/// The kernels that are tried: that on matrix units where there are any, and all others.
fn kernels(adapter: &Adapter) -> impl Iterator<Item = Kernel> + use<> {
    let matrices = adapter.context.caps().cooperative_matrix.is_some();
    Kernel::ALL.into_iter().filter(move |kernel| *kernel != Kernel::Cooperative || matrices)
}

/// Trials of combinations, which every kernel runs in its own way: what one kernel misses of them another one runs.
const SHARED_OUT: [&str; 3] = ["pairs_", "onnx_", "cut_keys_"];

/// What software drivers run of the trials of kernels, for it takes them seconds to compile a kernel whose loops are written
/// out: the first of them a quarter of the combinations, each kernel others, of the two kernels that take longest half of the rest;
/// one beside it a share of everything.
/// `GPU_TRIALS=all` leaves out nothing.
fn shared_out(adapter: &Adapter, trials: Vec<Trial>) -> Vec<Trial> {
    // SwiftShader has subgroups of 4, and takes as long for the rows kernel as for the tiled one
    let small_subgroups = adapter.context.caps().subgroups.is_some_and(|(_, largest)| largest < 8);
    let one_in = |kernel: Kernel, case: &str| match (adapter.sparing, kernel) {
        (true, Kernel::Split | Kernel::Tiled) => 13,
        (true, Kernel::Rows) if small_subgroups => 13,
        (true, Kernel::Fused | Kernel::Plain) => 5,
        (false, Kernel::Split | Kernel::Tiled | Kernel::Rows)
            if SHARED_OUT.iter().any(|start| case.starts_with(start)) =>
        {
            4
        }
        (false, Kernel::Tiled | Kernel::Rows) => 2,
        _ => 1,
    };
    // of each kernel, and of each share
    let mut counts: HashMap<(usize, usize), usize> = HashMap::new();
    let kept = trials.into_iter().filter(|trial| {
        let mut parts = trial.name().splitn(3, '/').skip(1);
        let (group, case) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let Some(place) = Kernel::ALL.iter().position(|kernel| kernel.name() == group) else { return true };
        // whether a fault that is listed is still there is seen on all kernels
        if known_faults::find(adapter, case).is_some() {
            return true;
        }
        let one_in = one_in(Kernel::ALL[place], case);
        let count = counts.entry((place, one_in)).or_default();
        *count += 1;
        // kernels begin at different trials, so that each trial is run by some
        (*count + place).is_multiple_of(one_in)
    });
    kept.collect()
}

/// The case with query, key and value in f16.
pub(crate) fn f16_inputs(case: Case) -> Case {
    let output = case.spec.output.element;
    case.stored([Element::F16, Element::F16, Element::F16, output])
        .spec(|spec| (spec.key_scale, spec.value_scale) = (None, None))
}

/// A kernel on an adapter as an implementation.
pub(crate) fn run_with(
    adapter: &Adapter,
    kernel: Kernel,
) -> impl Fn(&AttentionProblem, &AttentionInputs<'_>) -> Result<AttentionOutput, String> {
    move |problem, inputs| adapter.context.attention_blocking(problem, inputs, Some(kernel)).map_err(|e| message(&e))
}

/// What marks a message as a kernel's refusal.
const UNSUPPORTED: &str = "not supported: ";

pub(crate) fn message(error: &Error) -> String {
    match error {
        Error::Plan(PlanError::NoKernel { .. }) => format!("{UNSUPPORTED}{error}"),
        other => other.to_string(),
    }
}

/// One trial. A kernel that refuses makes it ignored with the reason; a known fault of the driver, too.
pub(crate) fn trial(
    adapter: &Adapter,
    group: &str,
    name: &str,
    check: impl Fn() -> Result<(), String> + Send + 'static,
) -> Trial {
    let full = format!("{}/{group}/{name}", adapter.slug);
    let (adapter, group, name) = (adapter.clone(), group.to_string(), name.to_string());
    Trial::ignorable_test(full.clone(), move || {
        let start = Instant::now();
        let result = check();
        if let Some(refusal) = result.as_ref().err().and_then(|error| error.find(UNSUPPORTED).map(|at| &error[at..])) {
            return Ok(Completion::ignored_with(refusal.lines().next().unwrap_or_default()));
        }
        adapter.count(&group, start.elapsed());
        match (known_faults::find(&adapter, &name), result) {
            (None, Ok(())) => Ok(Completion::Completed),
            (None, Err(error)) => Err(Failed::from(format!(
                "{error}\n{group} on {}\nalone: WGPU_ADAPTER_NAME='{}' cargo test --test gpu -- --exact {full}",
                adapter.describe(),
                adapter.context.info().name,
            ))),
            (Some(fault), Ok(())) if fault.may_pass => {
                known_faults::met(&adapter, &name, true);
                Ok(Completion::Completed)
            }
            (Some(fault), Ok(())) => Err(Failed::from(format!(
                "passes, though it is listed as a fault of the driver ({}); take it off the list",
                fault.about
            ))),
            (Some(fault), Err(error)) if fault.messages.iter().any(|part| error.contains(part)) => {
                known_faults::met(&adapter, &name, false);
                Ok(Completion::ignored_with(format!("known fault of the driver: {}", fault.about)))
            }
            (Some(fault), Err(error)) => Err(Failed::from(format!(
                "fails in another way than the known fault {:?} ({}):\n{error}",
                fault.messages, fault.about
            ))),
        }
    })
}

/// The trials where there is no adapter: all ignored, and one that fails if a GPU is required.
pub(crate) fn without_adapter(reason: &str) -> Vec<Trial> {
    let ignored = |name: String| {
        let reason = reason.to_string();
        Trial::ignorable_test(name, move || Ok(Completion::ignored_with(reason)))
    };
    let mut trials = Vec::new();
    for (name, _) in checks() {
        trials.extend(Kernel::ALL.map(|kernel| ignored(format!("none/{kernel}/{name}"))));
    }
    if std::env::var("REQUIRE_GPU").is_ok_and(|value| value == "1") {
        let reason = reason.to_string();
        let missing = move || Err(Failed::from(format!("REQUIRE_GPU=1 and {reason}")));
        trials.push(Trial::test("none/an_adapter_is_there", missing));
    }
    trials
}
