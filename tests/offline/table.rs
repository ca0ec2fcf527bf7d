//! The case table on the oracle and on every CPU kernel.

use std::collections::HashSet;

use cross_attention::cpu::{self, CpuKernel, SimdLevel, reference};
use cross_attention::{AttentionInputs, AttentionOutput, AttentionProblem};

use crate::common::check::{Run, case_with};
use crate::common::{cases, meaning};

/// Runs all and reports all failures, not just the first.
pub(crate) fn all<T>(name: &str, items: &[T], check: impl Fn(&T) -> Result<(), String>) {
    let failures: Vec<String> = items.iter().filter_map(|item| check(item).err()).collect();
    let count = failures.len();
    assert!(failures.is_empty(), "{name}: {count} of {} failed\n\n{}", items.len(), failures.join("\n\n"));
}

/// The oracle, every CPU kernel, and the fused one with every lesser vector unit of the machine.
pub(crate) fn implementations() -> Vec<(String, Box<Run<'static>>)> {
    let mut implementations: Vec<(String, Box<Run<'static>>)> = vec![("oracle".to_owned(), Box::new(oracle))];
    for kernel in CpuKernel::ALL {
        implementations.push((kernel.to_string(), Box::new(cpu_kernel(kernel))));
    }
    for level in SimdLevel::available().filter(|level| *level != SimdLevel::best()) {
        implementations.push((format!("{} with {level}", CpuKernel::Fused), Box::new(cpu_fused_at(level))));
    }
    implementations
}

fn cpu_fused_at(
    level: SimdLevel,
) -> impl Fn(&AttentionProblem, &AttentionInputs<'_>) -> Result<AttentionOutput, String> {
    move |problem, inputs| cpu::attention_at(level, problem, inputs).map_err(|error| error.to_string())
}

pub(crate) fn cpu_kernel(
    kernel: CpuKernel,
) -> impl Fn(&AttentionProblem, &AttentionInputs<'_>) -> Result<AttentionOutput, String> {
    move |problem, inputs| cpu::attention_with(kernel, problem, inputs).map_err(|error| error.to_string())
}

/// The oracle, rounded once to what is asked for.
pub(crate) fn oracle(problem: &AttentionProblem, inputs: &AttentionInputs<'_>) -> Result<AttentionOutput, String> {
    let exact = reference::attention(problem, inputs).map_err(|error| error.to_string())?;
    Ok(exact.to_output(problem))
}

#[test]
fn every_case() {
    let cases = cases::all();
    for (name, run) in implementations() {
        all(&name, &cases, |case| case_with(case, &run));
        println!("{name}: {} cases", cases.len());
    }
}

#[test]
fn names_are_unique_and_cases_small() {
    let cases = cases::all();
    let mut names = HashSet::new();
    for case in &cases {
        assert!(names.insert(&case.name), "{} is there twice", case.name);
        assert!(case.name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'), "{}", case.name);
        let problem = case.problem();
        let steps = problem.rows() * problem.kv_len() * (problem.head_dim() + problem.v_head_dim());
        assert!(steps <= 2_000_000, "{} takes {steps} multiplications", case.name);
    }
}

#[test]
fn terms_mean_what_they_say() {
    for (name, run) in implementations() {
        all(&name, &meaning::SIGHTS, |sight| sight.check(&run).map_err(|error| format!("{}: {error}", sight.name)));
        meaning::scores(&run).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

/// A cap so small that its inverse is infinite: every score is capped to about nothing, and all keys weigh the same.
#[test]
fn the_least_cap() {
    let mut spec = cross_attention::AttentionSpec::new([1, 2, 40, 8], [1, 2, 30, 8]);
    spec.softcap = Some(f32::from_bits(1));
    let problem = AttentionProblem::new(spec).expect("finite and above 0");
    let (query, key, value) = (vec![0.0f32; 640], vec![1.0f32; 480], vec![2.0f32; 480]);
    let inputs = AttentionInputs::new(&query, &key, &value);
    for level in SimdLevel::available() {
        let output = cpu::attention_at(level, &problem, &inputs).expect("sound").output.to_f32();
        assert!(output.iter().all(|x| (x - 2.0).abs() < 1e-6), "{level}: {}", output[0]);
    }
}
