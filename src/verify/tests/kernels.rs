//! The CPU's kernels are within the tolerance at their edges, and what no row may see changes no bit.

use crate::cpu::{self, CpuKernel, SimdLevel, attention_at, attention_with, reference};
use crate::verify::{verify, verify_sample};
use crate::workload::{InputRecipe, inputs_with};
use crate::{
    AlibiSlopes, AttentionData, AttentionProblem, AttentionSpec, Diagonal, Element, Layout, OwnedTerms, ScoreStage,
    TensorData, TensorSpec,
};

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

#[cfg(feature = "threads")]
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
