//! The tolerance rule is itself tested: sound kernels pass, planted faults do not.

use super::*;
use crate::AlibiSlopes;
use crate::OwnedTerms;
use crate::TensorData;
use crate::cpu::{CpuKernel, SimdLevel, attention_at, attention_with};
use crate::workload::{InputRecipe, inputs_with};
use crate::{AttentionData, AttentionSpec, Diagonal, Layout, TensorSpec, f16};

/// What is wrong with the faulty twin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    MaskOffByOne,
    LastKeyDropped,
    ScaleLeftOut,
    NoRescale,
    HeadsSwapped,
}

/// A small online softmax over blocks of 16 keys, for causal masks and key lengths.
fn twin(problem: &AttentionProblem, inputs: &AttentionInputs<'_>, fault: Fault) -> AttentionOutput {
    let spec = problem.spec();
    let mut output = TensorData::zeros(spec.output.element, spec.output.layout.extent().unwrap());
    let mut lse = Vec::new();
    for n in 0..problem.rows() {
        let (b, h, i) = cpu::row_place(problem, n);
        let kv_head = match fault {
            Fault::HeadsSwapped => h % problem.kv_heads(),
            _ => h / problem.group_size(),
        };
        let mut keys = inputs.row_keys(problem, b, i);
        match fault {
            Fault::MaskOffByOne => keys.end = (keys.end + 1).min(problem.kv_len()),
            Fault::LastKeyDropped => keys.end = keys.end.saturating_sub(1),
            _ => {}
        }
        let row = |data: crate::TensorRef<'_>, layout: &Layout, at: [usize; 3]| -> Vec<f32> {
            (0..layout.shape[3]).map(|d| data.get(layout.index([at[0], at[1], at[2], d]))).collect()
        };
        let query = row(inputs.query, &spec.query.layout, [b, h, i]);
        let scale = if fault == Fault::ScaleLeftOut { 1.0 } else { problem.scale() };
        let mut acc = vec![0.0f32; problem.v_head_dim()];
        let (mut row_max, mut row_sum) = (f32::NEG_INFINITY, 0.0f32);
        for block in keys.clone().step_by(16) {
            let block = block..(block + 16).min(keys.end);
            let score = |j| {
                let key = row(inputs.key, &spec.key.layout, [b, kv_head, j]);
                scale * query.iter().zip(key).map(|(q, k)| q * k).sum::<f32>()
            };
            let scores: Vec<f32> = block.clone().map(score).collect();
            let new_max = scores.iter().copied().fold(row_max, f32::max);
            if fault != Fault::NoRescale {
                let rescale = (row_max - new_max).exp();
                row_sum *= rescale;
                acc.iter_mut().for_each(|x| *x *= rescale);
            }
            row_max = new_max;
            for (j, score) in block.zip(scores) {
                let weight = (score - row_max).exp();
                row_sum += weight;
                let value = row(inputs.value, &spec.value.layout, [b, kv_head, j]);
                acc.iter_mut().zip(value).for_each(|(x, v)| *x += weight * v);
            }
        }
        lse.push(row_max + row_sum.ln());
        for (d, x) in acc.into_iter().enumerate() {
            let x = if row_sum == 0.0 { 0.0 } else { x / row_sum };
            let at = spec.output.layout.index([b, h, i, d]);
            match &mut output {
                TensorData::F32(data) => data[at] = x,
                TensorData::F16(data) => data[at] = f16::from_f32(x),
                other => panic!("no output of {other:?} here"),
            }
        }
    }
    AttentionOutput { output, lse: spec.lse.then_some(lse), row_state: None, scores: None }
}

fn fault_cases() -> Vec<AttentionProblem> {
    let mut specs = vec![
        AttentionSpec::new([1, 1, 1, 8], [1, 1, 1, 8]),
        AttentionSpec::new([1, 4, 3, 64], [1, 2, 300, 64]),
        AttentionSpec::new([2, 8, 5, 40], [2, 2, 77, 40]),
        AttentionSpec::new([1, 2, 40, 16], [1, 2, 33, 16]),
    ];
    specs[2].kv_lens = true;
    specs[3].causal = Some(Diagonal::BottomRight);
    let mut halves = specs[1].clone();
    for tensor in [&mut halves.query, &mut halves.key, &mut halves.value, &mut halves.output] {
        tensor.element = Element::F16;
    }
    specs.push(halves);
    let problem = |mut spec: AttentionSpec| {
        spec.lse = true;
        AttentionProblem::new(spec).unwrap()
    };
    specs.into_iter().map(problem).collect()
}

#[test]
fn planted_faults_are_rejected() {
    let mut rejected = std::collections::BTreeMap::new();
    for (n, problem) in fault_cases().iter().enumerate() {
        for recipe in InputRecipe::ALL {
            let data = inputs_with(problem, &format!("faults {n}"), recipe);
            let inputs = data.as_inputs();
            let run = |fault| verify(problem, &inputs, &twin(problem, &inputs, fault)).unwrap();
            let sound = run(Fault::None);
            assert!(sound.passed(), "case {n}, {recipe:?}: {sound}");
            assert!(sound.beyond_f32 == 0, "case {n}, {recipe:?}: {sound}");
            for fault in
                [Fault::MaskOffByOne, Fault::LastKeyDropped, Fault::ScaleLeftOut, Fault::NoRescale, Fault::HeadsSwapped]
            {
                let found = rejected.entry(format!("{fault:?}")).or_insert_with(Vec::new);
                if !run(fault).passed() {
                    found.push((n, recipe));
                }
            }
        }
    }
    for (fault, cases) in rejected {
        assert!(cases.len() > 1, "{fault} was rejected on {cases:?}");
    }
}

#[test]
fn one_dropped_key_of_many_is_seen() {
    let mut spec = AttentionSpec::new([1, 2, 2, 64], [1, 2, 8192, 64]);
    spec.lse = true;
    let problem = AttentionProblem::new(spec).unwrap();
    let data = inputs_with(&problem, "one of many", InputRecipe::Normal);
    let inputs = data.as_inputs();
    for fault in [Fault::None, Fault::LastKeyDropped] {
        let report = verify(&problem, &inputs, &twin(&problem, &inputs, fault)).unwrap();
        assert_eq!(report.passed(), fault == Fault::None, "{fault:?}: {report}");
        assert!(fault == Fault::None || report.worst_ratio > 5.0, "{report}");
    }
}

/// Every term, alone and together, in every layout.
fn cases() -> Vec<(String, AttentionSpec)> {
    type Change = fn(&mut AttentionSpec);
    let base = || AttentionSpec::new([5, 4, 35, 20], [5, 2, 70, 20]);
    let changes: [(&str, Change); 18] = [
        ("bare", |_| {}),
        ("softcap", |s| s.softcap = Some(3.0)),
        ("bias", |s| s.bias = Some(TensorSpec::f32(Layout::bhld([5, 4, 35, 70])))),
        ("bias_head", |s| s.bias = Some(TensorSpec::f16(Layout::bhld([1, 4, 35, 70])))),
        ("mask", |s| s.mask = Some(Layout::bhld([5, 1, 35, 70]))),
        ("mask_row", |s| s.mask = Some(Layout::bhld([1, 4, 35, 1]))),
        ("kv_lens", |s| s.kv_lens = true),
        ("row_ranges", |s| s.row_ranges = true),
        ("alibi", |s| (s.alibi_slopes, s.offset) = (Some(AlibiSlopes::PerHead), Some(Diagonal::BottomRight))),
        ("sinks", |s| s.sinks = true),
        ("causal", |s| s.causal = Some(Diagonal::Fixed(-3))),
        ("end_of_keys", |s| (s.causal, s.kv_lens) = (Some(Diagonal::EndOfKeys), true)),
        ("window", |s| (s.window_left, s.window_right) = (Some(5), Some(2))),
        ("scale", |s| s.scale = Some(-0.5)),
        ("scale_0", |s| s.scale = Some(0.0)),
        ("no_keys", |s| {
            (s.key.layout.shape[2], s.value.layout.shape[2]) = (0, 0);
            s.sinks = true;
        }),
        ("strided", |s| {
            s.query = TensorSpec::f32(Layout::blhd([5, 4, 35, 20]).with_offset(3));
            s.key = TensorSpec::f16(Layout::packed([5, 2, 70, 20], 2, 0));
            s.value = TensorSpec::f32(Layout::bhld([1, 2, 70, 36]).with_strides([0, 1, 2, 140]));
            s.output = TensorSpec::f16(Layout::blhd([5, 4, 35, 36]).with_strides([9000, 40, 160, 1]).with_offset(1));
        }),
        ("all", |s| {
            s.softcap = Some(20.0);
            s.bias = Some(TensorSpec::f16(Layout::bhld([1, 4, 35, 70])));
            s.mask = Some(Layout::bhld([5, 1, 35, 70]));
            (s.q_lens, s.kv_lens, s.row_ranges, s.sinks) = (true, true, true, true);
            s.alibi_slopes = Some(AlibiSlopes::PerBatchAndHead);
            (s.causal, s.window_left) = (Some(Diagonal::BottomRight), Some(40));
            s.query.element = Element::F16;
        }),
    ];
    let stages =
        [None, Some(ScoreStage::Scaled), Some(ScoreStage::Capped), Some(ScoreStage::Masked), Some(ScoreStage::Probs)];
    let mut cases = Vec::new();
    for (name, change) in changes {
        for stage in stages {
            let mut spec = base();
            change(&mut spec);
            (spec.lse, spec.scores) = (true, stage);
            cases.push((format!("{name} {stage:?}"), spec));
        }
    }
    for shape in [[0, 4, 3, 8], [2, 4, 0, 8]] {
        let [batch, heads, _, dim] = shape;
        cases.push((format!("{shape:?}"), AttentionSpec::new(shape, [batch, heads, 5, dim])));
    }
    cases
}

#[test]
fn cpu_kernels_pass_every_case() {
    for (name, spec) in cases() {
        let problem = AttentionProblem::new(spec).unwrap();
        // each stage once, each recipe once
        let recipes = if problem.spec().scores.is_none() { &InputRecipe::ALL[..] } else { &InputRecipe::ALL[3..4] };
        for &recipe in recipes {
            let data = inputs_with(&problem, &name, recipe);
            let inputs = data.as_inputs();
            for kernel in CpuKernel::ALL {
                let output = attention_with(kernel, &problem, &inputs).unwrap();
                let report = verify(&problem, &inputs, &output).unwrap();
                assert!(report.passed() && report.beyond_f32 == 0, "{kernel} {name} {recipe:?}: {report}");
            }
            for level in SimdLevel::available() {
                let output = attention_at(level, &problem, &inputs).unwrap();
                let report = verify(&problem, &inputs, &output).unwrap();
                assert!(report.passed() && report.beyond_f32 == 0, "{level} {name} {recipe:?}: {report}");
            }
            let rounded = reference::attention(&problem, &inputs).unwrap().to_output(&problem);
            let report = verify(&problem, &inputs, &rounded).unwrap();
            assert!(report.passed() && report.worst_ratio < 1.0, "oracle {name} {recipe:?}: {report}");
        }
    }
}

/// Puts `poison` into key, value and bias wherever no row looks.
fn poisoned(problem: &AttentionProblem, data: &AttentionData, poison: f32) -> AttentionData {
    let spec = problem.spec();
    let inputs = data.as_inputs();
    let (mut key, mut value) = (data.key.to_f32(), data.value.to_f32());
    let mut bias = data.terms.bias.as_ref().map(TensorData::to_f32);
    let mut seen = vec![false; problem.batch() * problem.kv_heads() * problem.kv_len()];
    let seen_at = |b: usize, h: usize, j: usize| (b * problem.kv_heads() + h) * problem.kv_len() + j;
    for n in 0..problem.rows() {
        let (b, h, i) = cpu::row_place(problem, n);
        let row = reference::row(problem, &inputs, b, h, i);
        for (j, &allowed) in row.allowed.iter().enumerate() {
            seen[seen_at(b, h / problem.group_size(), j)] |= allowed;
            if let (Some(bias), Some(of), false) = (&mut bias, &spec.bias, allowed) {
                let at = of.layout.index([b, h, i, j]);
                // -inf forbids, so it has to stay
                if bias[at] != f32::NEG_INFINITY {
                    bias[at] = poison;
                }
            }
        }
    }
    for b in 0..problem.batch() {
        for h in 0..problem.kv_heads() {
            for j in (0..problem.kv_len()).filter(|&j| !seen[seen_at(b, h, j)]) {
                (0..problem.head_dim()).for_each(|d| key[spec.key.layout.index([b, h, j, d])] = poison);
                (0..problem.v_head_dim()).for_each(|d| value[spec.value.layout.index([b, h, j, d])] = poison);
            }
        }
    }
    AttentionData {
        key: TensorData::from_f32(spec.key.element, key),
        value: TensorData::from_f32(spec.value.element, value),
        terms: OwnedTerms {
            bias: bias.zip(spec.bias.as_ref()).map(|(bias, of)| TensorData::from_f32(of.element, bias)),
            ..data.terms.clone()
        },
        ..data.clone()
    }
}

#[test]
fn what_is_not_allowed_changes_no_bit() {
    let mut spec = AttentionSpec::new([4, 4, 9, 12], [4, 2, 150, 12]);
    spec.mask = Some(Layout::bhld([4, 1, 1, 150]));
    spec.bias = Some(TensorSpec::f32(Layout::bhld([4, 4, 9, 150])));
    (spec.kv_lens, spec.lse, spec.scores) = (true, true, Some(ScoreStage::Probs));
    let problem = AttentionProblem::new(spec).unwrap();
    let data = inputs_with(&problem, "poison", InputRecipe::Normal);
    for poison in [f32::NAN, f32::INFINITY, 1e30] {
        let poisoned = poisoned(&problem, &data, poison);
        for kernel in CpuKernel::ALL {
            let clean = attention_with(kernel, &problem, &data.as_inputs()).unwrap();
            assert_eq!(attention_with(kernel, &problem, &poisoned.as_inputs()).unwrap(), clean, "{kernel}");
        }
        for level in SimdLevel::available() {
            let clean = attention_at(level, &problem, &data.as_inputs()).unwrap();
            assert_eq!(attention_at(level, &problem, &poisoned.as_inputs()).unwrap(), clean, "{level}");
        }
    }
}

#[test]
fn nan_and_infinity_reach_their_rows_only() {
    let mut spec = AttentionSpec::new([1, 2, 20, 8], [1, 1, 70, 8]);
    (spec.causal, spec.lse) = (Some(Diagonal::Fixed(50)), true);
    let problem = AttentionProblem::new(spec).unwrap();
    for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for tensor in ["key", "value"] {
            let mut data = inputs_with(&problem, "spreading", InputRecipe::Normal);
            let of = if tensor == "key" { &mut data.key } else { &mut data.value };
            if let TensorData::F32(data) = of {
                data[66 * 8 + 3] = poison;
            }
            for kernel in CpuKernel::ALL {
                let output = attention_with(kernel, &problem, &data.as_inputs()).unwrap();
                let report = verify(&problem, &data.as_inputs(), &output).unwrap();
                assert!(report.passed(), "{kernel} {tensor} {poison}: {report}");
                let values = output.output.to_f32();
                let touched = |i: usize| values[i * 8..][..8].iter().any(|x| !x.is_finite());
                assert!((0..16).all(|i| !touched(i)), "{kernel} {tensor} {poison}");
                assert!(poison.is_finite() || tensor == "key" || (16..20).all(touched));
            }
        }
    }
}

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

/// Edges of tiles, blocks, parts and strategies of the CPU path.
#[test]
fn every_strategy_passes_at_its_edges() {
    let shapes = [
        ([1, 2, 1, 59], [1, 2, 1500, 59]),
        ([1, 8, 1, 64], [1, 2, 700, 64]),
        ([5, 2, 1, 40], [1, 2, 600, 40]),
        ([3, 4, 7, 40], [1, 2, 130, 40]),
        ([1, 1, 7, 160], [1, 1, 2100, 160]),
        ([1, 1, 16, 72], [1, 1, 1100, 72]),
        ([1, 1, 17, 80], [1, 1, 77, 80]),
        ([1, 2, 63, 96], [1, 1, 128, 96]),
        ([1, 1, 65, 5], [1, 1, 129, 5]),
        ([1, 1, 300, 20], [1, 1, 2100, 20]),
        ([1, 4, 130, 33], [1, 2, 65, 33]),
        ([1, 1, 9, 576], [1, 1, 90, 576]),
    ];
    for (query, key) in shapes {
        for causal in [None, Some(Diagonal::BottomRight)] {
            let mut spec = AttentionSpec::new(query, key);
            (spec.causal, spec.lse, spec.sinks) = (causal, true, causal.is_some());
            let problem = AttentionProblem::new(spec).unwrap();
            let data = inputs_with(&problem, "edges", InputRecipe::Rising);
            let inputs = data.as_inputs();
            for level in SimdLevel::available() {
                let output = attention_at(level, &problem, &inputs).unwrap();
                let report = verify_sample(&problem, &inputs, &output, 24).unwrap();
                assert!(report.passed() && report.beyond_f32 == 0, "{level} {query:?} {key:?} {causal:?}: {report}");
            }
        }
    }
}

/// A value that one row of a tile sees and another does not.
#[test]
fn what_one_row_sees_stays_from_the_others() {
    let shapes = [([1, 2, 20, 8], [1, 1, 70, 8]), ([1, 2, 2, 8], [1, 1, 70, 8])];
    for (query, key) in shapes {
        let mut spec = AttentionSpec::new(query, key);
        spec.mask = Some(Layout::bhld([1, 2, query[2], 70]));
        spec.lse = true;
        let problem = AttentionProblem::new(spec).unwrap();
        let mut data = inputs_with(&problem, "one row", InputRecipe::Normal);
        let mask: Vec<bool> = (0..2 * query[2] * 70).map(|n| n % 70 != 33 || n / 70 == 1).collect();
        data.terms.mask = Some(mask);
        for level in SimdLevel::available() {
            let clean = attention_at(level, &problem, &data.as_inputs()).unwrap().output.to_f32();
            let mut poisoned = data.clone();
            if let TensorData::F32(value) = &mut poisoned.value {
                (value[33 * 8 + 2], value[33 * 8 + 5]) = (f32::NAN, f32::INFINITY);
            }
            let output = attention_at(level, &problem, &poisoned.as_inputs()).unwrap();
            assert!(verify(&problem, &poisoned.as_inputs(), &output).unwrap().passed(), "{level}");
            let found = output.output.to_f32();
            for (row, (clean, found)) in clean.chunks(8).zip(found.chunks(8)).enumerate() {
                assert_eq!(row == 1, clean != found, "{level} row {row}: {clean:?} {found:?}");
            }
        }
    }
}

#[cfg(feature = "native")]
#[test]
fn bits_do_not_depend_on_the_threads() {
    for (query, key) in [([2, 4, 70, 40], [2, 2, 200, 40]), ([1, 2, 1, 64], [1, 2, 3000, 64])] {
        let problem = AttentionProblem::new(AttentionSpec::new(query, key)).unwrap();
        let data = inputs_with(&problem, "threads", InputRecipe::Normal);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| attention_with(CpuKernel::Fused, &problem, &data.as_inputs()).unwrap())
        };
        assert_eq!(run(1), run(3));
    }
}
