//! Gradients on the CPU: the case table, random cases, others' results, planted faults, threads.

use cross_attention::backward::{BackwardInputs, BackwardProblem, BackwardSpec, Gradients};
use cross_attention::cpu::{CpuAttention, CpuBackward, SimdLevel};
use cross_attention::verify::verify_backward;
use cross_attention::{AttentionInputs, AttentionSpec, Device, Layout, TensorData, TensorSpec, cpu};
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

#[test]
fn what_is_explained_is_what_is_prepared() {
    let spec = AttentionSpec::new([1, 4, 30, 40], [1, 2, 77, 40]);
    let problem = BackwardProblem::new(BackwardSpec::new(spec)).expect("it is sound");
    for device in [Device::Cpu, Device::Oracle] {
        let prepared = pollster::block_on(device.prepare_backward(&problem)).expect("there is memory");
        assert_eq!(device.explain_backward(&problem), Ok(prepared.plan_text()));
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

/// Weights are made anew of scores that are summed as the forward summed them: of a gradient of the output that is the identity,
/// that of the values are the weights, which sum to 1 however large the scores are.
#[test]
fn weights_of_large_scores_sum_to_one() {
    const SCORE: f32 = 1e4;
    // rows and keys on both sides of every rule; batch and bias, where rows of a batch share their keys
    let shapes = [1, 5, 9, 33].into_iter().flat_map(|rows| [1, 4, 16, 17, 77, 200].map(|keys| (rows, keys, 1)));
    for (rows, keys, batch) in shapes.chain([(7, 200, 2), (7, 12, 2), (20, 200, 2)]) {
        let mut spec = AttentionSpec::new([batch, 1, rows, 64], [1, 1, keys, 64]);
        let width = batch * rows;
        spec.value.layout = Layout::bhld([1, 1, keys, width]);
        spec.output.layout = Layout::bhld([batch, 1, rows, width]);
        (spec.key, spec.value) = [spec.key, spec.value].map(|of| shared(of, batch)).into();
        spec.scale = Some(SCORE / 8.0);
        spec.bias = (batch > 1).then(|| TensorSpec::f32(Layout::bhld([batch, 1, rows, keys])));
        let problem = BackwardProblem::new(BackwardSpec::all(spec)).expect("sound");
        let mut random = fastrand::Rng::with_seed(7);
        let mut numbers = |len: usize| (0..len).map(|_| 4.0 * random.f32() - 2.0).collect::<Vec<f32>>();
        let (q, k, v, bias) =
            (numbers(batch * rows * 64), numbers(keys * 64), numbers(keys * width), numbers(batch * rows * keys));
        let mut inputs = AttentionInputs::new(&q, &k, &v);
        inputs.terms.bias = (batch > 1).then_some((&bias).into());
        let d: Vec<f32> = (0..width * width).map(|n| if n / width == n % width { 1.0 } else { 0.0 }).collect();
        for level in SimdLevel::available() {
            let forward = CpuAttention::new(problem.forward(), level).run(&inputs).expect("it fits");
            let inputs = BackwardInputs::new(inputs, &forward, &d).expect("state is there");
            let gradients = CpuBackward::new(&problem, level).run(&inputs).expect("it fits");
            let weights = gradients.d_value.expect("it was asked for").to_f32();
            for row in 0..width {
                let sum: f64 = weights.iter().skip(row).step_by(width).map(|&weight| f64::from(weight)).sum();
                // exponentials, their sum and its inverse are rounded, and the sum's terms one after another
                let allowed = f64::from(f32::EPSILON) * (8.0 + keys as f64);
                assert!((sum - 1.0).abs() <= allowed, "{level}, {rows} rows, {keys} keys: row {row} sums to {sum}");
            }
        }
    }
}

/// The scale by the cap may be beyond f32; times a dot product of 0 that is no NaN.
#[test]
fn a_scale_by_softcap_beyond_f32_is_no_nan() {
    let mut spec = AttentionSpec::new([1, 1, 9, 8], [1, 1, 5, 8]);
    (spec.scale, spec.softcap) = (Some(100.0), Some(1e-38));
    let problem = BackwardProblem::new(BackwardSpec::all(spec)).expect("sound");
    let mut random = fastrand::Rng::with_seed(5);
    let mut numbers = |len: usize| (0..len).map(|_| random.f32() - 0.5).collect::<Vec<f32>>();
    let (mut q, k, v, d) = (numbers(72), numbers(40), numbers(40), numbers(72));
    q[8..16].fill(0.0);
    let inputs = AttentionInputs::new(&q, &k, &v);
    for (name, run) in implementations() {
        let forward = cpu::attention(problem.forward(), &inputs).expect("it fits");
        let inputs = BackwardInputs::new(inputs, &forward, &d).expect("state is there");
        let gradients = run(&problem, &inputs).expect("it fits");
        let d_query = gradients.d_query.as_ref().expect("it was asked for").to_f32();
        assert!(
            d_query.iter().all(|x| x.is_finite()) && d_query[8..16].iter().any(|x| *x != 0.0),
            "{name}: {d_query:?}"
        );
        let report = verify_backward(&problem, &inputs, &gradients).expect("it fits");
        assert!(report.passed(), "{name}: {report}");
    }
}

/// One entry that the whole batch shares.
fn shared(of: TensorSpec, batch: usize) -> TensorSpec {
    let [_, heads, len, width] = of.layout.shape;
    let layout = of.layout.broadcast_to([batch, heads, len, width]).expect("of one entry");
    TensorSpec { layout, ..of }
}
