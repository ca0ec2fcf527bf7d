//! The tolerance rule is itself tested: sound kernels pass, planted faults do not.

mod faults;
mod kernels;

use super::rounding::round;
use super::*;
use crate::TensorData;
use crate::cpu::{CpuKernel, attention_with};
use crate::workload::{InputRecipe, inputs_with};
use crate::{AttentionData, AttentionSpec, Layout, TensorSpec, f16};

#[test]
fn special_values_must_match() {
    let mut spec = AttentionSpec::new([1, 1, 3, 2], [1, 1, 4, 2]);
    (spec.row_ranges, spec.lse) = (true, true);
    spec.output.element = Element::F16;
    let problem = AttentionProblem::new(spec).unwrap();
    let mut data = inputs_with(&problem, "special", InputRecipe::Normal);
    // row 0 sees nothing, row 1 one value beyond f16, row 2 NaN
    (data.terms.row_start, data.terms.row_end) = (Some(vec![0, 1, 2]), Some(vec![0, 2, 4]));
    data.value = TensorData::F32(vec![1.0, 2.0, 65519.99, -70000.0, f32::NAN, 1.0, 2.0, 3.0]);
    let inputs = data.as_inputs();
    let sound = attention_with(CpuKernel::Fused, &problem, &inputs).unwrap();
    assert!(verify(&problem, &inputs, &sound).unwrap().passed());
    let fails = |index: usize, value: f32| {
        let mut output = sound.clone();
        if let TensorData::F16(data) = &mut output.output {
            data[index] = f16::from_f32(value);
        }
        !verify(&problem, &inputs, &output).unwrap().passed()
    };
    assert!(fails(0, 1e-7) && fails(0, f32::NAN) && fails(1, f32::INFINITY));
    assert!(!fails(2, 65504.0) && !fails(2, f32::INFINITY) && fails(2, 65000.0) && fails(2, f32::NEG_INFINITY));
    assert!(fails(3, -65504.0) && fails(3, f32::INFINITY) && fails(3, f32::NAN));
    assert!(fails(4, 0.0) && fails(4, f32::INFINITY) && fails(5, f32::NAN));
    for lse in [0.0, f32::NAN, f32::INFINITY] {
        let mut output = sound.clone();
        output.lse = Some(vec![lse; 3]);
        let report = verify(&problem, &inputs, &output).unwrap();
        assert!(!report.passed() && report.to_string().starts_with("failed: 3 of 3 rows"), "{report}");
    }
}

#[test]
fn gaps_and_lengths_are_looked_at() {
    let mut spec = AttentionSpec::new([1, 2, 3, 4], [1, 2, 5, 4]);
    spec.output.layout = Layout::bhld([1, 2, 3, 4]).with_strides([40, 20, 5, 1]);
    let problem = AttentionProblem::new(spec).unwrap();
    let data = inputs_with(&problem, "gaps", InputRecipe::Normal);
    let inputs = data.as_inputs();
    let mut output = attention_with(CpuKernel::Fused, &problem, &inputs).unwrap();
    assert!(verify(&problem, &inputs, &output).unwrap().passed());
    if let TensorData::F32(data) = &mut output.output {
        data[4] = 1.0;
    }
    let report = verify(&problem, &inputs, &output).unwrap();
    assert_eq!((report.failures, report.worst.unwrap().tensor), (1, Compared::Gap));
    output.lse = Some(vec![0.0; 6]);
    assert_eq!(verify(&problem, &inputs, &output), Err(InputError::Unexpected { name: "lse" }));
    output.output = TensorData::F32(vec![0.0; 3]);
    assert!(matches!(verify(&problem, &inputs, &output), Err(InputError::TooShort { name: "output", .. })));
}

#[test]
fn a_sample_has_the_first_and_the_last_row() {
    let problem = AttentionProblem::new(AttentionSpec::new([1, 2, 50, 8], [1, 2, 9, 8])).unwrap();
    let data = inputs_with(&problem, "sample", InputRecipe::Normal);
    let inputs = data.as_inputs();
    let sound = attention_with(CpuKernel::Fused, &problem, &inputs).unwrap();
    for row in [0, 99] {
        let mut output = sound.clone();
        if let TensorData::F32(data) = &mut output.output {
            data[row * 8] += 1.0;
        }
        let report = verify_sample(&problem, &inputs, &output, 7).unwrap();
        assert_eq!((report.rows, report.all_rows, report.failures), (7, 100, 1));
    }
}

/// 77 equal keys under a bias that serves as padding: each has 1/77, whatever a log-sum-exp of -10^9 says.
fn padded() -> (AttentionProblem, AttentionData) {
    let mut spec = AttentionSpec::new([1, 1, 2, 4], [1, 1, 77, 4]);
    spec.bias = Some(TensorSpec::f32(Layout::bhld([1, 1, 2, 77])));
    (spec.lse, spec.row_state, spec.scores) = (true, true, Some(ScoreStage::Probs));
    let problem = AttentionProblem::new(spec).unwrap();
    let mut data = inputs_with(&problem, "padded", InputRecipe::Normal);
    data.key = TensorData::F32(vec![0.0; 4 * 77]);
    data.terms.bias = Some(TensorData::F32(vec![-1e9; 2 * 77]));
    (problem, data)
}

/// An output of the direct algorithm in f64, with maxima and sums.
fn sound(problem: &AttentionProblem, inputs: &AttentionInputs<'_>) -> AttentionOutput {
    let mut output = reference::attention(problem, inputs).unwrap().to_output(problem);
    let mut state = crate::RowState::default();
    for n in 0..problem.rows() {
        let (b, h, i) = cpu::row_place(problem, n);
        let row = reference::row(problem, inputs, b, h, i);
        let sink = inputs.terms.sinks.map_or(f64::NEG_INFINITY, |sinks| f64::from(sinks[h]));
        let max = round(row.scores.iter().copied().fold(sink, f64::max));
        state.row_max.push(max);
        state.row_sum.push(round((row.lse - f64::from(max)).exp()));
        if row.lse == f64::NEG_INFINITY {
            *state.row_sum.last_mut().unwrap() = 0.0;
        }
    }
    output.row_state = Some(state);
    output
}

#[test]
fn padding_is_no_licence() {
    let (problem, data) = padded();
    let inputs = data.as_inputs();
    let mut right = sound(&problem, &inputs);
    // what f32 has for a score of -10^9
    let state = right.row_state.as_mut().unwrap();
    (state.row_max, state.row_sum) = (vec![-1e9; 2], vec![77.0; 2]);
    let report = verify(&problem, &inputs, &right).unwrap();
    assert!(report.passed(), "{report}");

    let fails = |change: &dyn Fn(&mut AttentionOutput), tensor: Compared| {
        let mut output = right.clone();
        change(&mut output);
        let report = verify(&problem, &inputs, &output).unwrap();
        assert!(!report.passed(), "{report}");
        assert_eq!(report.worst.unwrap().tensor, tensor, "{report}");
    };
    // from a rounded log-sum-exp
    fails(&|output| output.scores.as_mut().unwrap().fill(1.0), Compared::Scores);
    fails(&|output| output.scores.as_mut().unwrap()[5] *= 1.0 + 3e-6, Compared::Scores);
    // parts of 40 and 37 keys that weigh alike
    let halves = |output: &mut AttentionOutput| {
        for (n, weight) in output.scores.as_mut().unwrap().iter_mut().enumerate() {
            *weight = if n % 77 < 40 { 0.5 / 40.0 } else { 0.5 / 37.0 };
        }
    };
    fails(&halves, Compared::Scores);
    // the rounded log-sum-exp in place of the pair
    fails(&|output| output.row_state.as_mut().unwrap().row_sum.fill(1.0), Compared::State);
    fails(&|output| output.row_state.as_mut().unwrap().row_sum.fill(77.001), Compared::State);
    fails(&|output| output.row_state.as_mut().unwrap().row_max.fill(-1e9 + 64.0), Compared::State);
    fails(&|output| output.row_state.as_mut().unwrap().row_sum[1] = f32::INFINITY, Compared::State);
}

#[test]
fn weights_of_a_row_add_up() {
    let mut spec = AttentionSpec::new([1, 2, 3, 8], [1, 1, 4000, 8]);
    (spec.scores, spec.sinks) = (Some(ScoreStage::Probs), true);
    let problem = AttentionProblem::new(spec).unwrap();
    let data = inputs_with(&problem, "adding up", InputRecipe::Normal);
    let mut output = sound(&problem, &data.as_inputs());
    output.row_state = None;
    let report = verify(&problem, &data.as_inputs(), &output).unwrap();
    assert!(report.passed(), "{report}");
    // each weight by little, all of them in one direction
    output.scores.as_mut().unwrap().iter_mut().for_each(|weight| *weight *= 1.0 + 5e-6);
    let report = verify(&problem, &data.as_inputs(), &output).unwrap();
    assert!(!report.passed(), "{report}");
}

/// Where every score is an f32, whatever the order of a sum, nothing is allowed on account of its size.
#[test]
fn large_scores_that_are_exact_give_no_room() {
    let mut spec = AttentionSpec::new([1, 1, 2, 4], [1, 1, 40, 4]);
    (spec.scale, spec.lse) = (Some(1.0), true);
    let problem = AttentionProblem::new(spec).unwrap();
    let mut data = inputs_with(&problem, "exact", InputRecipe::Normal);
    data.query = TensorData::F32(vec![1.0; 8]);
    data.key = TensorData::F32((0..160).map(|n| if n % 4 == 0 { 1e6 } else { ((n / 4) % 5) as f32 / 4.0 }).collect());
    let mut output = reference::attention(&problem, &data.as_inputs()).unwrap().to_output(&problem);
    assert!(verify(&problem, &data.as_inputs(), &output).unwrap().passed());
    if let TensorData::F32(numbers) = &mut output.output {
        numbers.iter_mut().for_each(|x| *x *= 1.0 + 1e-5);
    }
    let report = verify(&problem, &data.as_inputs(), &output).unwrap();
    assert!(!report.passed(), "{report}");
}

/// The state of a row by its mass, whatever its maximum; rows without keys exactly.
#[test]
fn maxima_and_sums_are_compared() {
    let mut spec = AttentionSpec::new([1, 2, 3, 8], [1, 1, 40, 8]);
    (spec.row_ranges, spec.row_state, spec.sinks) = (true, true, true);
    let problem = AttentionProblem::new(spec).unwrap();
    let mut data = inputs_with(&problem, "states", InputRecipe::Normal);
    (data.terms.row_start, data.terms.row_end) = (Some(vec![0, 5, 7]), Some(vec![0, 6, 40]));
    data.terms.sinks = Some(vec![0.5, f32::NEG_INFINITY]);
    let inputs = data.as_inputs();
    let right = sound(&problem, &inputs);
    let verdict = |change: &dyn Fn(&mut crate::RowState)| {
        let mut output = right.clone();
        change(output.row_state.as_mut().unwrap());
        verify(&problem, &inputs, &output).unwrap()
    };
    assert!(verdict(&|_| {}).passed(), "{}", verdict(&|_| {}));
    // another maximum, with the sum that goes with it
    let moved = verdict(&|state| {
        (state.row_max[2], state.row_sum[2]) = (state.row_max[2] + 1.0, state.row_sum[2] / 1f32.exp());
    });
    assert!(moved.passed(), "{moved}");
    let faults: [&dyn Fn(&mut crate::RowState); 7] = [
        &|state| state.row_sum[0] = 1.0 + f32::EPSILON,
        &|state| state.row_max[0] = 0.5 + f32::EPSILON,
        &|state| state.row_sum[3] = 1.0,
        &|state| state.row_max[3] = 0.0,
        &|state| state.row_max[4] *= 1.0 + 1e-5,
        &|state| state.row_sum[5] *= 1.0 + 1e-5,
        &|state| state.row_sum[2] = f32::NAN,
    ];
    for (n, fault) in faults.into_iter().enumerate() {
        assert!(!verdict(fault).passed(), "fault {n}");
    }
    let mut output = right.clone();
    output.row_state.as_mut().unwrap().row_sum.pop();
    assert_eq!(verify(&problem, &inputs, &output), Err(InputError::Len { name: "row_sum", wanted: 6, found: 5 }));
    output.row_state = None;
    assert_eq!(verify(&problem, &inputs, &output), Err(InputError::Missing { name: "row_max" }));
}

/// A finite result is judged also where sums in another order overflow on the way to it.
#[test]
fn what_f32_reaches_is_judged() {
    let mut spec = AttentionSpec::new([1, 1, 1, 4], [1, 1, 2, 4]);
    (spec.scale, spec.lse) = (Some(1.0), true);
    let problem = AttentionProblem::new(spec).unwrap();
    let query = vec![1.0f32; 4];
    let value = vec![1.0f32; 8];
    let verdict = |key: [f32; 8], x: f32| {
        let inputs = AttentionInputs::new(&query, &key[..], &value);
        let output = AttentionOutput {
            output: TensorData::F32(vec![x; 4]),
            lse: Some(vec![if x.to_bits() == 1f32.to_bits() { 2f32.ln() } else { x }]),
            row_state: None,
            scores: None,
        };
        verify(&problem, &inputs, &output).unwrap()
    };
    // in order infinite, in truth 0
    let cancelling = [3e38, 3e38, -3e38, -3e38, 0.0, 0.0, 0.0, 0.0];
    assert!(verdict(cancelling, 1.0).passed(), "{}", verdict(cancelling, 1.0));
    let wrong = verdict(cancelling, f32::NAN);
    assert!(!wrong.passed() && wrong.beyond_f32 == 0, "{wrong}");
    // a score of 6e38 is beyond f32
    let beyond = verdict([3e38, 3e38, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], f32::NAN);
    assert!(beyond.passed() && beyond.beyond_f32 > 0, "{beyond}");
}

/// The yardstick is off by no more than its roundings add up to, so that a fault of its own would not be a licence; and no
/// more than a few times what it is off by is allowed in all.
#[test]
fn the_yardstick_has_a_bound_of_its_own() {
    for (width, size) in [(8, 1.0), (64, 4.0), (224, 6.0), (258, 6.0)] {
        let mut spec = AttentionSpec::new([1, 2, 9, width], [1, 1, 150, width]);
        spec.lse = true;
        let problem = AttentionProblem::new(spec).unwrap();
        let mut data = inputs_with(&problem, "yardstick", InputRecipe::Normal);
        if let TensorData::F32(query) = &mut data.query {
            query.iter_mut().for_each(|x| *x *= size);
        }
        let inputs = data.as_inputs();
        let (mut largest, mut floor) = (0.0f64, 0.0f64);
        for n in 0..problem.rows() {
            let (b, h, i) = cpu::row_place(&problem, n);
            let oracle = reference::row(&problem, &inputs, b, h, i);
            let plain = yardstick::plain(&problem, &inputs, [b, h, i], &oracle);
            let twin = yardstick::twin(&problem, &inputs, [b, h, i], &oracle);
            let bounds = Bounds::new(&problem, &inputs, [b, h, i], &oracle, &twin);
            for (d, column) in bounds.columns.iter().enumerate() {
                let error = (f64::from(plain.output[d]) - oracle.output[d]).abs();
                assert!(error <= column.bound.plain, "{width}: {error:e} of {:e}", column.bound.plain);
                (largest, floor) = (largest.max(error), floor.max(column.bound.floor));
            }
            assert!((f64::from(plain.lse) - oracle.lse).abs() <= bounds.lse.plain);
        }
        let looseness = (2.0 * largest + floor) / (2.0 * largest);
        println!("{width}: {looseness}");
        // where sums are short, the exponential that WGSL allows is most of it
        assert!(width < 224 || looseness < 2.5, "{width}: {looseness}");
    }
}
