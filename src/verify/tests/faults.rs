//! Faults planted in a small kernel of its own: the tolerance rejects each of them.

use crate::cpu;
use crate::verify::verify;
use crate::workload::{InputRecipe, inputs_with};
use crate::{
    AttentionInputs, AttentionOutput, AttentionProblem, AttentionSpec, Diagonal, Element, Layout, TensorData, f16,
};

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
