//! How a problem is cut to a device's limits, keys too.

use cross_attention::dispatch::Rejection;
use cross_attention::{
    AttentionProblem, AttentionSpec, DeviceCaps, Kernel, Layout, Plan, PlanError, ScoreStage, TensorSpec,
};
use proptest::prelude::*;

use super::{matrix_device, problem};
use crate::common::random;

#[test]
fn parts_fit_every_limit() {
    let mut caps = DeviceCaps::webgpu_defaults();
    // the rows kernel asks for one size of subgroups
    caps.subgroups = Some((8, 8));
    let problem = problem([3, 6, 100, 16], [3, 2, 20, 16], 24);
    for (binding, grid) in [(1 << 20, 65535), (30_000, 65535), (1 << 20, 5), (4096, 4)] {
        caps.max_storage_buffer_binding_size = binding;
        caps.max_compute_workgroups_per_dimension = grid;
        // the problem is in f32
        for kernel in Kernel::ALL.into_iter().filter(|kernel| *kernel != Kernel::Cooperative) {
            let plan = Plan::new(&problem, &caps, Some(kernel)).expect("a plan");
            for step in plan.steps() {
                assert!(step.workgroups().iter().all(|n| (1..=grid).contains(n)), "{plan}");
                assert!(step.bindings.iter().all(|b| b.size_bytes <= binding), "{plan}");
                assert!(step.bindings.iter().all(|b| b.start_bytes % 256 == 0), "{plan}");
            }
            assert_eq!(plan.parts() == 1, binding == 1 << 20 && grid == 65535, "{plan}");
        }
    }
}

/// Positions in a shader are 32 bits wide, so a device that binds more than 4 GiB gets no larger parts.
#[test]
fn no_binding_is_larger_than_positions_in_a_shader() {
    let caps = DeviceCaps { max_storage_buffer_binding_size: u64::MAX, max_buffer_size: u64::MAX, ..matrix_device() };
    let problem = problem([1, 1, 1, 128], [1, 1, 1 << 24, 128], 128);
    for kernel in [Kernel::Split, Kernel::Tiled, Kernel::Fused, Kernel::Plain] {
        let plan = Plan::new(&problem, &caps, Some(kernel)).expect("a plan");
        assert!(plan.key_parts() > 1, "{plan}");
        let sizes = plan.steps().iter().flat_map(|step| &step.bindings).map(|binding| binding.size_bytes);
        assert!(sizes.max() <= Some(u64::from(u32::MAX)), "{plan}");
    }
}

/// The merge of ranges of the keys has a workgroup for each row, and is cut like what it merges.
#[test]
fn rows_of_cut_keys_are_cut_for_their_merge() {
    let mut caps = DeviceCaps::webgpu_defaults();
    (caps.max_storage_buffer_binding_size, caps.max_compute_workgroups_per_dimension) = (4096, 8);
    let problem = problem([1, 1, 100, 16], [1, 1, 200, 16], 16);
    for kernel in [Kernel::Tiled, Kernel::Fused, Kernel::Split] {
        let plan = Plan::new(&problem, &caps, Some(kernel)).expect("a plan");
        assert!(plan.key_parts() > 1 && plan.parts() > plan.key_parts(), "{plan}");
        assert!(plan.steps().iter().all(|step| step.grid.iter().all(|n| (1..=8).contains(n))), "{plan}");
    }
}

#[test]
fn a_problem_is_not_cut_into_too_many_parts() {
    let caps = DeviceCaps { max_compute_workgroups_per_dimension: 1, ..DeviceCaps::webgpu_defaults() };
    let plan = |rows| Plan::new(&problem([1, 1, rows, 8], [1, 1, 4, 8], 8), &caps, Some(Kernel::Plain));
    assert_eq!(plan(1 << 8).expect("a plan").parts(), 1 << 8);
    let error = plan((1 << 14) + 1).expect_err("a workgroup for each row");
    let PlanError::NoKernel { reasons } = &error else { panic!("{error}") };
    assert!(matches!(reasons[..], [(Kernel::Plain, Rejection::Parts { found: 16384, .. })]), "{error}");
}

#[test]
fn what_cannot_be_cut_is_refused_with_a_reason_for_each_kernel() {
    let mut caps = DeviceCaps::webgpu_defaults();
    caps.max_storage_buffer_binding_size = 1024;
    let error = Plan::new(&problem([1, 1, 2, 320], [1, 1, 20, 320], 16), &caps, None).expect_err("a key of 1280 bytes");
    let PlanError::NoKernel { reasons } = &error else { panic!("{error}") };
    let considered: std::collections::BTreeSet<_> = reasons.iter().map(|(kernel, _)| *kernel).collect();
    assert_eq!(considered, Kernel::ALL.into());
    assert!(matches!(reasons[0].1, Rejection::Binding { needed: 1280, found: 1024, .. }), "{error}");
    let text = "tiled: query needs a binding of 1280 bytes for the smallest part, the device allows 1024";
    assert!(error.to_string().contains(text), "{error}");

    let mut caps = DeviceCaps::webgpu_defaults();
    caps.max_compute_workgroup_storage_size = 1000;
    let error =
        Plan::new(&problem([1, 1, 2, 576], [1, 1, 20, 576], 16), &caps, Some(Kernel::Fused)).expect_err("memory");
    assert!(error.to_string().contains("bytes of workgroup memory for head_dim 576, the device has 1000"), "{error}");
}

#[test]
fn keys_of_nearly_all_heads_are_cut_over_ranges() {
    let caps = DeviceCaps::webgpu_defaults();
    // [B, L, H, D]: one head spans nearly all heads, here 512 MiB; 8192 keys of all heads are 128 MiB
    let heads_inside = |q_len: usize, element: fn(Layout) -> TensorSpec| {
        let tensor = |len| element(Layout::blhd([1, 32, len, 128]));
        AttentionProblem::new(AttentionSpec::from_tensors(tensor(q_len), tensor(32768), tensor(32768))).expect("sound")
    };
    let problem = heads_inside(1, TensorSpec::f32);
    let plan = Plan::new(&problem, &caps, None).expect("a plan");
    assert_eq!((plan.kernel(), plan.parts(), plan.key_parts()), (Kernel::Split, 4, 4), "{plan}");
    // a step for each range, and the merge
    assert_eq!(plan.steps().len(), 5, "{plan}");
    let splits = plan.steps()[0].grid[0];
    assert_eq!(plan.workspace_bytes(), 4 * splits * 32 * (128 + 2) * 4, "{plan}");
    assert!(plan.to_string().contains("the keys in 4 ranges, merged by maximum and sum of their rows"), "{plan}");
    let forced = Plan::with_choice(&problem, &caps, &plan.choice()).expect("its own choice");
    assert_eq!(forced.steps(), plan.steps(), "{forced}");
    let half = Plan::new(&heads_inside(1, TensorSpec::f16), &caps, None).expect("a plan");
    assert_eq!(half.key_parts(), 2, "{half}");

    let many_rows = Plan::new(&heads_inside(4096, TensorSpec::f32), &caps, None).expect("a plan");
    assert_eq!((many_rows.kernel(), many_rows.key_parts()), (Kernel::Tiled, 4), "{many_rows}");
    assert!(many_rows.workspace_bytes() <= caps.max_storage_buffer_binding_size, "{many_rows}");
    // heads apart: each fits, so keys stay whole and the bits what they are
    let apart = Plan::new(&self::problem([1, 32, 1, 128], [1, 32, 32768, 128], 128), &caps, None).expect("a plan");
    assert_eq!((apart.parts(), apart.key_parts()), (4, 1), "{apart}");
}

#[test]
fn a_bias_is_cut_over_rows_and_then_over_keys() {
    let with_bias = |q_len: usize, kv_len: usize| {
        let mut spec = AttentionSpec::new([1, 1, q_len, 4], [1, 1, kv_len, 4]);
        spec.bias = Some(TensorSpec::f32(Layout::bhld([1, 1, q_len, kv_len])));
        AttentionProblem::new(spec).expect("sound")
    };
    let mut caps = DeviceCaps::webgpu_defaults();
    caps.max_storage_buffer_binding_size = 1 << 20;
    // 256 KiB a row
    let plan = Plan::new(&with_bias(64, 1 << 16), &caps, Some(Kernel::Tiled)).expect("a plan");
    assert_eq!((plan.parts(), plan.key_parts()), (16, 1), "{plan}");
    // 2 MiB a row
    let plan = Plan::new(&with_bias(2, 1 << 19), &caps, Some(Kernel::Tiled)).expect("a plan");
    assert!(plan.key_parts() >= 8 && plan.parts() == 2 * plan.key_parts(), "{plan}");
}

#[test]
fn returned_scores_of_cut_keys() {
    let mut caps = DeviceCaps::webgpu_defaults();
    caps.max_storage_buffer_binding_size = 2048;
    let mut spec = AttentionSpec::new([1, 1, 3, 16], [1, 1, 70, 16]);
    let steps = |spec: &AttentionSpec, kernel| {
        let problem = AttentionProblem::new(spec.clone()).expect("sound");
        let plan = Plan::new(&problem, &caps, Some(kernel)).expect("a plan");
        (plan.key_parts(), plan.steps().iter().map(|step| step.variant.shader.name()).collect::<Vec<_>>())
    };
    let fused = |scores: usize, rest: &[&'static str]| {
        let parts = vec!["fused"; 3].into_iter().chain(["combine"]).chain(vec!["scores"; scores]);
        (3, parts.chain(rest.iter().copied()).collect::<Vec<_>>())
    };
    assert_eq!(steps(&spec, Kernel::Fused), fused(0, &[]));
    spec.scores = Some(ScoreStage::Masked);
    assert_eq!(steps(&spec, Kernel::Fused), fused(3, &[]));
    // a row of scores is whole where it is returned, so its softmax needs no keys
    spec.scores = Some(ScoreStage::Probs);
    assert_eq!(steps(&spec, Kernel::Fused), fused(3, &["softmax"]));
    (caps.max_storage_buffer_binding_size, caps.min_storage_buffer_offset_alignment) = (256, 32);
    let mut narrow = AttentionSpec::new([1, 1, 3, 1], [1, 1, 70, 1]);
    narrow.scores = spec.scores;
    let problem = AttentionProblem::new(narrow).expect("sound");
    let error = Plan::new(&problem, &caps, None).expect_err("a row of 280 bytes");
    assert!(error.to_string().contains("scores needs a binding of 280 bytes for the smallest part"), "{error}");
}

proptest! {
    #![proptest_config(crate::properties::config())]

    #[test]
    fn random_plans_fit(case in random::case(), binding in 200u64..6000, groups in 1u32..40) {
        let mut caps = DeviceCaps::webgpu_defaults();
        caps.max_storage_buffer_binding_size = binding;
        caps.max_compute_workgroups_per_dimension = groups;
        for kernel in Kernel::ALL {
            let Ok(plan) = Plan::new(&case.problem(), &caps, Some(kernel)) else { continue };
            for step in plan.steps() {
                prop_assert!(step.workgroups().iter().all(|n| (1..=groups).contains(n)), "{plan}");
                prop_assert!(step.bindings.iter().all(|b| b.size_bytes <= binding), "{plan}");
                prop_assert!(step.bindings.iter().all(|b| b.start_bytes % 256 == 0), "{plan}");
                // two ranges that a dispatch writes never meet
                let written: Vec<_> = step.bindings.iter().filter(|b| b.slot.name().starts_with("part_")).collect();
                if let [a, b] = written[..] {
                    prop_assert!(a.start_bytes + a.size_bytes <= b.start_bytes, "{plan}");
                }
            }
        }
    }
}
