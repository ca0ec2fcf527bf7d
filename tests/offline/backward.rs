//! Gradients on the CPU: the case table, random cases, others' results, planted faults, threads.

use cross_attention::backward::{BackwardInputs, BackwardProblem, BackwardSpec, Gradients};
use cross_attention::cpu::{CpuBackward, SimdLevel};
use cross_attention::verify::verify_backward;
use cross_attention::{AttentionInputs, AttentionSpec, TensorData, cpu};
use proptest::prelude::*;

use crate::common::backward::{self, BackwardCase, RunBackward};
use crate::common::{cases, random};
use crate::table::all;

/// The CPU path with every vector unit of the machine.
fn implementations() -> Vec<(String, Box<RunBackward<'static>>)> {
    let of = |level: SimdLevel| -> (String, Box<RunBackward<'static>>) {
        let run = move |problem: &BackwardProblem, inputs: &BackwardInputs<'_>| {
            CpuBackward::new(problem, level).run(inputs).map_err(|error| error.to_string())
        };
        (format!("cpu backward with {level}"), Box::new(run))
    };
    SimdLevel::available().map(of).collect()
}

#[test]
fn backward_of_every_case() {
    for (name, run) in implementations() {
        all(&name, &cases::all(), |case| backward::case_with(case, &run));
    }
}

#[test]
fn backward_of_others() {
    for (name, run) in implementations() {
        let times = if name.ends_with("scalar") { 2.0 } else { 1.0 };
        all(&name, &backward::golden(), |path| backward::golden_with(path, times, &run));
    }
}

proptest! {
    #![proptest_config(random::config(96))]

    #[test]
    fn random_backward(case in random::case()) {
        for (name, run) in implementations() {
            backward::case_with(&case, &run).map_err(|error| TestCaseError::fail(format!("{name}: {error}")))?;
        }
    }
}

proptest! {
    #![proptest_config(random::config(24))]

    #[test]
    fn random_long_backward(case in random::long_case()) {
        for (name, run) in implementations().into_iter().take(1) {
            backward::case_with(&case, &run).map_err(|error| TestCaseError::fail(format!("{name}: {error}")))?;
        }
    }
}

/// A wrong result for a case, or `None` where the fault has nothing to act on.
type Fault = fn(&BackwardCase) -> Option<Gradients>;

fn right(case: &BackwardCase) -> Gradients {
    cpu::backward(&case.problem, &case.inputs()).expect("the inputs fit")
}

fn changed(data: Option<&TensorData>, change: impl FnOnce(&mut Vec<f32>)) -> Option<TensorData> {
    let TensorData::F32(numbers) = data? else { return None };
    let mut numbers = numbers.clone();
    change(&mut numbers);
    Some(TensorData::F32(numbers))
}

/// The gradients of another problem, whose inputs are the same.
fn misread(case: &BackwardCase, change: impl FnOnce(&mut BackwardSpec)) -> Option<Gradients> {
    let mut spec = case.problem.spec().clone();
    change(&mut spec);
    cpu::backward(&BackwardProblem::new(spec).ok()?, &case.inputs()).ok()
}

const FAULTS: [(&str, Fault); 11] = [
    ("the sign of a gradient", |case| {
        let right = right(case);
        let d_key = changed(right.d_key.as_ref(), |all| all.iter_mut().for_each(|x| *x = -*x))?;
        Some(Gradients { d_key: Some(d_key), ..right })
    }),
    ("delta without d_lse", |case| {
        let mut inputs = case.inputs();
        let zeros = vec![0.0; inputs.d_lse?.len()];
        inputs.d_lse = Some(&zeros);
        cpu::backward(&case.problem, &inputs).ok()
    }),
    ("chosen weights without their share of delta", |case| {
        let mut inputs = case.inputs();
        let zeros = vec![0.0; inputs.d_weights?.len()];
        inputs.d_weights = Some(&zeros);
        cpu::backward(&case.problem, &inputs).ok()
    }),
    ("one row left out of a sum", |case| {
        let mut d_output = case.d_output.to_f32();
        let width = case.problem.forward().v_head_dim();
        d_output.get_mut(..width)?.fill(0.0);
        let d_output = TensorData::from_f32(case.d_output.as_ref().element(), d_output);
        let inputs = BackwardInputs { d_output: (&d_output).into(), ..case.inputs() };
        let d_value = cpu::backward(&case.problem, &inputs).ok()?.d_value;
        Some(Gradients { d_value, ..right(case) })
    }),
    ("softcap's factor left out", |case| {
        let softcap = case.problem.spec().attention.softcap?;
        // so wide a cap does nothing, but the weights are those of the same maximum and sum
        (softcap < 1e3).then(|| misread(case, |spec| spec.attention.softcap = Some(1e6)))?
    }),
    ("heads of a group swapped", |case| {
        let forward = case.problem.forward();
        let (group, len) = (forward.group_size(), forward.q_len() * forward.head_dim());
        let fits = group > 1 && len > 0 && case.problem.spec().d_query?.layout.strides[1] == len;
        let right = right(case);
        let swap = |all: &mut Vec<f32>| all.chunks_exact_mut(2 * len).for_each(|two| two.rotate_left(len));
        let d_query = fits.then(|| changed(right.d_query.as_ref(), swap))??;
        Some(Gradients { d_query: Some(d_query), ..right })
    }),
    ("the scale left out", |case| misread(case, |spec| spec.attention.scale = Some(1.0))),
    ("a sink's gradient without its weight", |case| {
        let mut right = right(case);
        right.d_sinks.as_mut()?.iter_mut().for_each(|x| *x *= 1.001);
        Some(right)
    }),
    ("slopes by another distance", |case| {
        let mut right = right(case);
        right.d_alibi_slopes.as_mut()?.iter_mut().for_each(|x| *x *= 1.001);
        Some(right)
    }),
    ("a bias summed over one axis too few", |case| {
        let right = right(case);
        let half = |all: &mut Vec<f32>| all.iter_mut().for_each(|x| *x *= 0.5);
        let d_bias = changed(right.d_bias.as_ref(), half)?;
        Some(Gradients { d_bias: Some(d_bias), ..right })
    }),
    ("a gradient off by 1e-4 of itself", |case| {
        let right = right(case);
        let d_query = changed(right.d_query.as_ref(), |all| all.iter_mut().for_each(|x| *x *= 1.0 + 1e-4))?;
        Some(Gradients { d_query: Some(d_query), ..right })
    }),
];

#[test]
fn every_planted_gradient_fault_is_rejected() {
    let cases: Vec<_> = cases::all().iter().filter_map(BackwardCase::of).collect();
    for (name, fault) in FAULTS {
        let mut planted = 0;
        let rejected = cases.iter().any(|case| {
            fault(case).is_some_and(|gradients| {
                planted += 1;
                !verify_backward(&case.problem, &case.inputs(), &gradients).expect("they fit").passed()
            })
        });
        assert!(rejected, "{name}: planted in {planted} cases, rejected in none");
    }
}

/// The same bits for any number of threads, and a thousand times over.
#[cfg(feature = "native")]
#[test]
fn backward_gives_the_same_bits() {
    for (query, key) in
        [([1, 4, 40, 24], [1, 2, 600, 24]), ([1, 2, 700, 16], [1, 2, 77, 16]), ([2, 4, 1, 8], [2, 4, 900, 8])]
    {
        let problem = BackwardProblem::new(BackwardSpec::new(AttentionSpec::new(query, key))).expect("sound");
        let mut random = fastrand::Rng::with_seed(3);
        let mut numbers =
            |shape: [usize; 4]| (0..shape.iter().product()).map(|_| random.f32() - 0.5).collect::<Vec<f32>>();
        let (q, k, v, d) = (numbers(query), numbers(key), numbers(key), numbers(query));
        let inputs = AttentionInputs::new(&q, &k, &v);
        let forward = cpu::attention(problem.forward(), &inputs).expect("it fits");
        let inputs = BackwardInputs::new(inputs, &forward, &d).expect("state is there");
        let prepared = CpuBackward::new(&problem, SimdLevel::best());
        let wanted = backward::bits(&prepared.run(&inputs).expect("it fits"));
        for threads in [1, 2, 3, 7] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
            let found = pool.install(|| cpu::backward(&problem, &inputs)).expect("it fits");
            assert!(backward::bits(&found) == wanted, "{threads} threads");
        }
        let mut into = prepared.run(&inputs).expect("it fits");
        for round in 0..1000 {
            prepared.run_into(&inputs, (&mut into).into()).expect("it fits");
            assert!(backward::bits(&into) == wanted, "round {round}");
        }
    }
}

/// Nothing grows with `q_len * kv_len`: at the shapes of Stable Diffusion's attention the workspace is less than one head's scores.
#[test]
fn the_workspace_is_linear() {
    for (query, key) in [([1, 8, 4096, 40], [1, 8, 4096, 40]), ([2, 8, 4096, 40], [2, 8, 77, 40])] {
        let problem = BackwardProblem::new(BackwardSpec::new(AttentionSpec::new(query, key))).expect("sound");
        let [of_thread, shared] = CpuBackward::new(&problem, SimdLevel::best()).workspace_bytes();
        let gradients = 4 * (query.iter().product::<usize>() + 2 * key.iter().product::<usize>());
        assert!(of_thread < 4 << 20, "{of_thread}");
        assert!(shared <= 8 * gradients, "{shared}, with gradients of {gradients}");
    }
}
