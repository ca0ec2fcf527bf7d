//! A plan made for one device and another device: everything that a plan needs is compared, one thing at a time, and no
//! limit whatever makes planning panic.

use cross_attention::dispatch::{Rejection, Slot, Unmet, Unsupported};
use cross_attention::plan::{DeviceKind, WeightsPlan, catalog};
use cross_attention::weights::{HeadReduce, WeightsProblem, WeightsSpec};
use cross_attention::{
    AttentionProblem, AttentionSpec, CooperativeMatrix, DeviceCaps, DeviceClass, Element, Kernel, Layout, Plan,
    PlanError, ScoreStage, TensorSpec,
};
use proptest::prelude::*;

use crate::common::random;

/// A large device that has everything.
fn good() -> DeviceCaps {
    DeviceCaps {
        class: DeviceClass::Discrete,
        max_storage_buffer_binding_size: 1 << 31,
        max_buffer_size: 1 << 31,
        max_storage_buffers_per_shader_stage: 16,
        min_storage_buffer_offset_alignment: 32,
        min_uniform_buffer_offset_alignment: 64,
        max_compute_workgroup_storage_size: 65536,
        max_compute_invocations_per_workgroup: 1024,
        max_compute_workgroups_per_dimension: 65535,
        subgroups: Some((32, 32)),
        subgroup_fault: None,
        shader_f16: true,
        cooperative_matrix: Some(CooperativeMatrix::Size16),
        timestamps: true,
    }
}

/// Every optional tensor, so that a plan has all buffers that it may have; queries and keys enough for every kernel.
fn problem(q_len: usize, kv_len: usize, element: Element) -> AttentionProblem {
    let tensor = |shape| TensorSpec { element, layout: Layout::bhld(shape) };
    let mut spec =
        AttentionSpec::from_tensors(tensor([1, 4, q_len, 64]), tensor([1, 4, kv_len, 64]), tensor([1, 4, kv_len, 64]));
    let scores = Layout::bhld([1, 4, q_len, kv_len]);
    spec.bias = Some(TensorSpec::f32(scores));
    spec.mask = Some(scores);
    spec.kv_lens = true;
    spec.sinks = true;
    spec.lse = true;
    AttentionProblem::new(spec).expect("sound")
}

fn plan(kernel: Kernel) -> Plan {
    let problem = match kernel {
        Kernel::Split | Kernel::Rows => problem(2, 3000, Element::F32),
        Kernel::Cooperative => problem(200, 300, Element::F16),
        _ => problem(200, 300, Element::F32),
    };
    Plan::new(&problem, &good(), Some(kernel)).expect("a large device")
}

fn weights_plan() -> WeightsPlan {
    let wanted = WeightsSpec { reduce: HeadReduce::Mean, ..WeightsSpec::default() };
    let problem = WeightsProblem::new(&problem(20, 300, Element::F32), &wanted).expect("sound");
    WeightsPlan::new(&problem, &good()).expect("a large device")
}

fn unmet(result: Result<(), PlanError>) -> Option<Unmet> {
    match result {
        Ok(()) => None,
        Err(PlanError::OtherDevice { unmet }) => Some(unmet),
        Err(other) => panic!("{other:?}"),
    }
}

/// A device that lacks one thing, and whether that is what a refusal names.
type Lowered = (&'static str, fn(&mut DeviceCaps), fn(&Unmet) -> bool);

const WORKGROUP_MEMORY: Lowered = (
    "workgroup memory",
    |caps| caps.max_compute_workgroup_storage_size = 12,
    |unmet| matches!(unmet, Unmet::WorkgroupMemory { found: 12, .. }),
);
const INVOCATIONS: Lowered = (
    "invocations",
    |caps| caps.max_compute_invocations_per_workgroup = 31,
    |unmet| matches!(unmet, Unmet::Invocations { found: 31, .. }),
);
const STORAGE_BUFFERS: Lowered = (
    "storage buffers",
    |caps| caps.max_storage_buffers_per_shader_stage = 3,
    |unmet| matches!(unmet, Unmet::StorageBuffers { found: 3, .. }),
);
const BINDING: Lowered = (
    "binding",
    |caps| caps.max_storage_buffer_binding_size = 256,
    |unmet| matches!(unmet, Unmet::Binding { found: 256, .. }),
);
const GRID: Lowered = (
    "grid",
    |caps| caps.max_compute_workgroups_per_dimension = 1,
    |unmet| matches!(unmet, Unmet::Grid { found: 1, .. }),
);
const NO_SUBGROUPS: Lowered =
    ("no subgroups", |caps| caps.subgroups = None, |unmet| matches!(unmet, Unmet::Subgroups { found: None, .. }));
const SMALL_SUBGROUPS: Lowered = (
    "small subgroups",
    |caps| caps.subgroups = Some((2, 32)),
    |unmet| matches!(unmet, Unmet::Subgroups { found: Some((2, 32)), .. }),
);
const LARGE_SUBGROUPS: Lowered = (
    "large subgroups",
    |caps| caps.subgroups = Some((32, 256)),
    |unmet| matches!(unmet, Unmet::Subgroups { found: Some((32, 256)), .. }),
);
const ODD_SUBGROUPS: Lowered = (
    "odd subgroups",
    |caps| caps.subgroups = Some((32, 48)),
    |unmet| matches!(unmet, Unmet::Subgroups { found: Some((32, 48)), .. }),
);
const F16: Lowered = ("f16", |caps| caps.shader_f16 = false, |unmet| *unmet == Unmet::ShaderF16);
const NO_MATRICES: Lowered = (
    "no matrices",
    |caps| caps.cooperative_matrix = None,
    |unmet| matches!(unmet, Unmet::CooperativeMatrix { needed: CooperativeMatrix::Size16, found: None }),
);
const OTHER_MATRICES: Lowered = (
    "other matrices",
    |caps| caps.cooperative_matrix = Some(CooperativeMatrix::Size8),
    |unmet| matches!(unmet, Unmet::CooperativeMatrix { found: Some(CooperativeMatrix::Size8), .. }),
);
const BUFFER: Lowered =
    ("buffer", |caps| caps.max_buffer_size = 4096, |unmet| matches!(unmet, Unmet::Buffer { found: 4096, .. }));

#[test]
fn each_requirement_is_compared_by_itself() {
    let common = [WORKGROUP_MEMORY, INVOCATIONS, STORAGE_BUFFERS, BINDING, GRID];
    let table: [(Kernel, &[Lowered]); 6] = [
        // it has no buffers but the caller's and a little row data
        (Kernel::Fused, &[]),
        (Kernel::Plain, &[BUFFER]),
        (Kernel::Split, &[BUFFER]),
        (Kernel::Tiled, &[NO_SUBGROUPS, SMALL_SUBGROUPS, ODD_SUBGROUPS]),
        (Kernel::Rows, &[NO_SUBGROUPS, SMALL_SUBGROUPS, LARGE_SUBGROUPS, ODD_SUBGROUPS, BUFFER]),
        (
            Kernel::Cooperative,
            &[NO_SUBGROUPS, SMALL_SUBGROUPS, LARGE_SUBGROUPS, ODD_SUBGROUPS, F16, NO_MATRICES, OTHER_MATRICES],
        ),
    ];
    for (kernel, own) in table {
        let plan = plan(kernel);
        assert_eq!(plan.check(&good()), Ok(()), "{kernel}");
        for (what, lower, named) in common.iter().chain(own) {
            let mut caps = good();
            lower(&mut caps);
            let found = unmet(plan.check(&caps));
            assert!(found.as_ref().is_some_and(named), "{kernel}, {what}: {found:?}");
        }
    }
    let plan = weights_plan();
    assert_eq!(plan.check(&good()), Ok(()));
    for (what, lower, named) in &common {
        let mut caps = good();
        lower(&mut caps);
        let found = unmet(plan.check(&caps));
        assert!(found.as_ref().is_some_and(named), "weights, {what}: {found:?}");
    }
}

/// What a plan does not use may be as little as it likes.
#[test]
fn what_is_not_needed_is_not_compared() {
    let caps = DeviceCaps {
        subgroups: None,
        shader_f16: false,
        cooperative_matrix: None,
        timestamps: false,
        min_uniform_buffer_offset_alignment: 256,
        ..good()
    };
    for kernel in [Kernel::Fused, Kernel::Plain, Kernel::Split] {
        assert_eq!(plan(kernel).check(&caps), Ok(()), "{kernel}");
    }
    assert_eq!(weights_plan().check(&caps), Ok(()));
}

#[test]
fn rows_for_32_lanes_do_not_run_on_8() {
    let plan = plan(Kernel::Rows);
    let caps = DeviceCaps { subgroups: Some((8, 8)), ..good() };
    let refused = plan.check(&caps).expect_err("lanes would be handed what others hold");
    assert_eq!(
        refused,
        PlanError::OtherDevice { unmet: Unmet::Subgroups { smallest: 32, largest: 32, found: Some((8, 8)) } }
    );
    assert_eq!(refused.to_string(), "the plan needs subgroups of 32, the device has them of 8; plan for this device");
}

/// A part of a problem begins where the device that it was planned for can bind it.
#[test]
fn bindings_begin_where_the_device_can_bind() {
    let caps = DeviceCaps { max_storage_buffer_binding_size: 600, min_storage_buffer_offset_alignment: 4, ..good() };
    let problem = AttentionProblem::new(AttentionSpec::new([1, 3, 7, 9], [1, 3, 11, 9])).expect("sound");
    let plan = Plan::new(&problem, &caps, Some(Kernel::Fused)).expect("in parts");
    assert!(plan.parts() > 1);
    assert_eq!(plan.check(&caps), Ok(()));
    let found = unmet(plan.check(&DeviceCaps { min_storage_buffer_offset_alignment: 256, ..caps }));
    assert!(matches!(found, Some(Unmet::Alignment { alignment: 256, .. })), "{found:?}");
}

/// Software drivers leave loops after some number of iterations; others do not.
#[test]
fn long_loops_do_not_run_on_software_drivers() {
    let software = DeviceCaps { class: DeviceClass::Software, ..good() };
    let long = AttentionProblem::new(AttentionSpec::new([1, 1, 2, 8], [1, 1, 1 << 20, 8])).expect("sound");
    for kernel in [Kernel::Fused, Kernel::Tiled, Kernel::Plain] {
        let plan = Plan::new(&long, &good(), Some(kernel)).expect("a large device");
        let found = unmet(plan.check(&software));
        assert!(matches!(found, Some(Unmet::Iterations { .. })), "{kernel}: {found:?}");
        assert!(Plan::new(&long, &software, Some(kernel)).is_err(), "{kernel}");
    }
    // the merge of very many parts, each with many columns
    let mut wide = AttentionSpec::new([1, 1, 1, 8], [1, 1, 1 << 20, 8]);
    wide.value = TensorSpec::f32(Layout::bhld([1, 1, 1 << 20, 1024]));
    wide.output = TensorSpec::f32(Layout::bhld([1, 1, 1, 1024]));
    let wide = AttentionProblem::new(wide).expect("sound");
    let caps = DeviceCaps { max_storage_buffer_binding_size: 1 << 33, max_buffer_size: 1 << 33, ..good() };
    let mut choice = Plan::new(&wide, &caps, Some(Kernel::Split)).expect("a large device").choice();
    choice.num_splits = Some(8000);
    let plan = Plan::with_choice(&wide, &caps, &choice).expect("a large device");
    let software = DeviceCaps { class: DeviceClass::Software, ..caps };
    let found = unmet(plan.check(&software));
    assert!(matches!(found, Some(Unmet::Iterations { .. })), "{found:?}");
    assert!(Plan::with_choice(&wide, &software, &choice).is_err());
}

/// Every shader of the catalog states what its text uses.
#[test]
fn needs_are_those_of_the_text() {
    for entry in catalog() {
        let (text, needs) = (entry.step.variant.wgsl(), entry.step.needs);
        let code: String = text.lines().map(|line| line.split("//").next().unwrap_or(line)).collect();
        assert_eq!(code.contains("subgroup"), needs.subgroups.is_some(), "{:?}", entry.step.variant);
        assert!(!needs.shader_f16 && needs.cooperative_matrix.is_none());
        assert!(needs.invocations > 0 && needs.iterations > 0);
    }
    assert_eq!(DeviceKind::all().len(), 40);
}

/// What a plan says it needs, the device that it was made for has; whatever the device, nothing panics.
fn plans(problem: &AttentionProblem, caps: &DeviceCaps) {
    for kernel in Kernel::ALL.map(Some).into_iter().chain([None]) {
        if let Ok(plan) = Plan::new(problem, caps, kernel) {
            assert_eq!(plan.check(caps), Ok(()), "{plan}");
            let limit = caps.max_buffer_size.min(caps.max_storage_buffer_binding_size);
            for binding in plan.steps().iter().flat_map(|step| &step.bindings) {
                assert!(binding.size_bytes <= limit, "{plan}");
                let own = [Slot::Workspace, Slot::States].contains(&binding.slot);
                assert!(!own || binding.start_bytes + binding.size_bytes <= caps.max_buffer_size, "{plan}");
            }
        }
    }
    // what a kernel says it can run it does not refuse for what its dispatches need
    for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.supports(problem, caps).is_ok()) {
        if let Err(PlanError::NoKernel { reasons }) = Plan::new(problem, caps, Some(kernel)) {
            use Unmet::{Invocations, StorageBuffers, Subgroups, WorkgroupMemory};
            let unmet = |reason: &Rejection| match reason {
                Rejection::Unsupported(Unsupported::Device(unmet)) => {
                    matches!(
                        unmet,
                        Invocations { .. } | StorageBuffers { .. } | Subgroups { .. } | WorkgroupMemory { .. }
                    )
                }
                _ => false,
            };
            assert!(!reasons.iter().any(|(_, reason)| unmet(reason)), "{kernel}: {reasons:?} on {caps:?}");
        }
    }
    let _ = Plan::candidates(problem, caps);
    if let Ok(wanted) = WeightsProblem::new(problem, &WeightsSpec::default())
        && let Ok(plan) = WeightsPlan::new(&wanted, caps)
    {
        assert_eq!(plan.check(caps), Ok(()));
    }
}

fn edge_u32() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), Just(1), Just(2), Just(3), Just(63), Just(64), Just(256), Just(65535), Just(u32::MAX)]
}

fn edge_u64() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0),
        Just(1),
        Just(4),
        Just(63),
        Just(4096),
        Just(1 << 27),
        Just(u64::from(u32::MAX)),
        Just(u64::MAX)
    ]
}

fn any_caps() -> impl Strategy<Value = DeviceCaps> {
    let usual = DeviceCaps::webgpu_defaults();
    // each limit is at an edge, or as usual, so that plans get past the first refusal
    let narrow = |usual: u32| prop_oneof![2 => Just(usual), 1 => edge_u32()];
    let wide = |usual: u64| prop_oneof![2 => Just(usual), 1 => edge_u64()];
    let limits = (
        wide(usual.max_storage_buffer_binding_size),
        wide(usual.max_buffer_size),
        narrow(usual.max_storage_buffers_per_shader_stage),
        narrow(usual.min_storage_buffer_offset_alignment),
        narrow(usual.min_uniform_buffer_offset_alignment),
        narrow(usual.max_compute_workgroup_storage_size),
        narrow(usual.max_compute_invocations_per_workgroup),
        narrow(usual.max_compute_workgroups_per_dimension),
    );
    let size = prop_oneof![edge_u32(), Just(4u32), Just(8), Just(32), Just(128)];
    let subgroups =
        prop_oneof![Just(None), size.clone().prop_map(|size| Some((size, size))), (size.clone(), size).prop_map(Some),];
    let matrix = prop_oneof![Just(None), Just(Some(CooperativeMatrix::Size8)), Just(Some(CooperativeMatrix::Size16))];
    let class = prop::sample::select(DeviceClass::ALL.to_vec());
    (limits, subgroups, matrix, class, any::<bool>()).prop_map(|(limits, subgroups, cooperative_matrix, class, f16)| {
        let (binding, buffer, buffers, storage, uniform, memory, invocations, grid) = limits;
        DeviceCaps {
            class,
            max_storage_buffer_binding_size: binding,
            max_buffer_size: buffer,
            max_storage_buffers_per_shader_stage: buffers,
            min_storage_buffer_offset_alignment: storage,
            min_uniform_buffer_offset_alignment: uniform,
            max_compute_workgroup_storage_size: memory,
            max_compute_invocations_per_workgroup: invocations,
            max_compute_workgroups_per_dimension: grid,
            subgroups,
            subgroup_fault: None,
            shader_f16: f16,
            cooperative_matrix,
            timestamps: false,
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn no_limit_makes_planning_panic(case in random::case(), caps in any_caps()) {
        plans(&case.problem(), &caps);
    }
}

/// Each limit at 0, at 1 and as large as can be, the others as usual, for problems of every kind.
#[test]
fn one_limit_at_its_edge() {
    let mut scores = AttentionSpec::new([1, 2, 5, 8], [1, 2, 70, 8]);
    scores.scores = Some(ScoreStage::Probs);
    let scores = AttentionProblem::new(scores).expect("sound");
    let none = AttentionProblem::new(AttentionSpec::new([1, 2, 5, 8], [1, 2, 0, 8])).expect("sound");
    let problems = [problem(3, 700, Element::F16), problem(70, 40, Element::F32), scores, none];
    for problem in &problems {
        for edge in [0, 1, u32::MAX] {
            let wide = if edge == u32::MAX { u64::MAX } else { u64::from(edge) };
            let set: [fn(&mut DeviceCaps, u32, u64); 9] = [
                |caps, _, wide| caps.max_storage_buffer_binding_size = wide,
                |caps, _, wide| caps.max_buffer_size = wide,
                |caps, edge, _| caps.max_storage_buffers_per_shader_stage = edge,
                |caps, edge, _| caps.min_storage_buffer_offset_alignment = edge,
                |caps, edge, _| caps.min_uniform_buffer_offset_alignment = edge,
                |caps, edge, _| caps.max_compute_workgroup_storage_size = edge,
                |caps, edge, _| caps.max_compute_invocations_per_workgroup = edge,
                |caps, edge, _| caps.max_compute_workgroups_per_dimension = edge,
                |caps, edge, _| caps.subgroups = Some((edge, edge)),
            ];
            for set in set {
                for class in [DeviceClass::Discrete, DeviceClass::Software] {
                    let mut caps = DeviceCaps { class, ..good() };
                    set(&mut caps, edge, wide);
                    plans(problem, &caps);
                }
            }
        }
    }
}

/// Kernels ask for pairs behind the last row and key, and throw the answer away. What they read there must lie within the
/// binding all the same: `tools/races` looks whether it does, this whether each read goes through the one function that sees to it.
#[test]
fn what_there_is_for_each_pair_is_read_by_one_function() {
    let (mut seen, mut texts) = ([0, 0], 0);
    for entry in catalog() {
        let text = entry.step.variant.wgsl();
        texts += 1;
        for line in text.lines().filter(|line| line.contains("params.bias_") || line.contains("params.mask_")) {
            assert!(line.contains("offset_pair(params."), "{}: {line}", entry.step.variant.shader.name());
            seen[usize::from(line.contains("params.mask_"))] += 1;
        }
        if let Some(at) = text.find("fn offset_pair(") {
            let body = text[at..].split("\n}").next().unwrap_or_default();
            assert!(body.contains("min(row.i, params.q_len - 1u)"), "{body}");
            assert!(body.contains("min(j, max(params.kv_len, 1u) - 1u)"), "{body}");
        }
    }
    assert!(texts > 100 && seen.iter().all(|count| *count > 20), "{seen:?} in {texts}");
}
