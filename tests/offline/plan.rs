//! Planning by tables: shape and capabilities in, kernel, tiles, grid and workspace out.

mod choices;
mod parts;

use cross_attention::cpu::{CpuPlan, CpuStrategy, SimdLevel};
use cross_attention::dispatch::Unsupported;
use cross_attention::{
    AlibiSlopes, AttentionProblem, AttentionSpec, CooperativeMatrix, DeviceCaps, DeviceClass, Diagonal, Element,
    Kernel, Layout, Plan, PlanChoice, PlanError, ScoreStage, TensorSpec, TileShape, workload,
};

fn problem(query: [usize; 4], key: [usize; 4], v_head_dim: usize) -> AttentionProblem {
    let value = [key[0], key[1], key[2], v_head_dim];
    let tensor = |shape| TensorSpec::f32(Layout::bhld(shape));
    AttentionProblem::new(AttentionSpec::from_tensors(tensor(query), tensor(key), tensor(value))).expect("sound")
}

fn constant(plan: &Plan, name: &str) -> Option<u32> {
    let step = plan.steps().first()?;
    step.variant.constants.iter().find(|(known, _)| *known == name).map(|(_, value)| *value)
}

#[test]
fn fused_tiles_and_grids() {
    // query, key, v_head_dim -> rows of a workgroup, value dimensions of an invocation, grid
    let table = [
        ([1, 6, 1, 64], [1, 6, 1500, 64], 64, 1, 1, [1, 6, 1]),
        ([2, 8, 4096, 40], [2, 8, 77, 40], 40, 8, 1, [512, 8, 2]),
        ([1, 4, 4, 64], [1, 4, 9, 64], 64, 4, 1, [1, 4, 1]),
        ([1, 4, 9, 256], [1, 2, 9, 256], 256, 8, 4, [2, 4, 1]),
        ([1, 1, 9, 576], [1, 1, 9, 576], 512, 4, 8, [3, 1, 1]),
        ([1, 1, 9, 32], [1, 1, 9, 32], 2048, 1, 32, [9, 1, 1]),
        ([1, 1, 9, 3000], [1, 1, 9, 3000], 8, 1, 1, [9, 1, 1]),
    ];
    for (query, key, v_head_dim, rows, dims, grid) in table {
        let caps = DeviceCaps::webgpu_defaults();
        let plan = Plan::new(&problem(query, key, v_head_dim), &caps, Some(Kernel::Fused)).expect("a plan");
        assert_eq!((constant(&plan, "ROWS"), constant(&plan, "DIMS_PER_LANE")), (Some(rows), Some(dims)), "{plan}");
        assert_eq!(plan.steps()[0].grid, grid, "{plan}");
        assert_eq!((plan.workspace_bytes(), plan.parts()), (0, 1));
    }
}

#[test]
fn tiled_tiles_fit_every_class_and_width() {
    for class in [DeviceClass::Discrete, DeviceClass::Integrated, DeviceClass::Unknown] {
        for memory in [16384, 32768, 49152] {
            let mut caps = DeviceCaps::webgpu_defaults();
            caps.class = class;
            caps.max_compute_workgroup_storage_size = memory;
            for (head_dim, v_head_dim) in [
                (16, 16),
                (40, 40),
                (64, 64),
                (80, 80),
                (96, 96),
                (128, 128),
                (160, 160),
                (192, 128),
                (256, 256),
                (576, 512),
            ] {
                let problem = problem([1, 8, 1024, head_dim], [1, 8, 1024, head_dim], v_head_dim);
                let plan = Plan::new(&problem, &caps, None).expect("a plan");
                assert_eq!(plan.kernel(), Kernel::Tiled, "{class} {memory} {plan}");
                assert!(plan.steps()[0].workgroup_bytes <= u64::from(memory));
                // lanes of a row are neighbours in every subgroup, or exchange nothing by shuffles
                for smallest in [1, 4, 8, 32] {
                    let caps = DeviceCaps { subgroups: Some((smallest, 64)), ..caps.clone() };
                    let plan = Plan::new(&problem, &caps, Some(Kernel::Tiled)).expect("with subgroups or without");
                    let lanes = constant(&plan, "KEY_LANES").expect("it has tiles");
                    let shuffled = constant(&plan, "LANE_BITS");
                    let may = lanes.is_power_of_two() && lanes <= smallest;
                    assert_eq!(shuffled, may.then(|| lanes.ilog2()), "{plan}");
                }
            }
        }
    }
}

#[test]
fn the_kernel_follows_the_regime() {
    let few_queries = problem([1, 8, 1, 64], [1, 8, 1500, 64], 64);
    let beams_of_groups = problem([1, 32, 4, 128], [1, 8, 2048, 128], 128);
    let few_keys = problem([2, 8, 4096, 40], [2, 8, 77, 40], 40);
    let both_long = problem([1, 12, 4096, 128], [1, 12, 512, 128], 128);
    for class in [DeviceClass::Discrete, DeviceClass::Integrated, DeviceClass::Unknown] {
        let mut caps = DeviceCaps::webgpu_defaults();
        caps.class = class;
        let kernel = |problem| Plan::new(problem, &caps, None).expect("a plan").kernel();
        let found = [&few_queries, &beams_of_groups, &few_keys, &both_long].map(kernel);
        assert_eq!(found, [Kernel::Split, Kernel::Split, Kernel::Tiled, Kernel::Tiled], "{class}");
    }
}

#[test]
fn software_drivers_get_the_rows_kernel_and_no_other_device_does() {
    let mut caps = DeviceCaps::webgpu_defaults();
    let shared = problem([1, 12, 4096, 128], [1, 12, 512, 128], 128);
    let wide = problem([1, 2, 9, 576], [1, 1, 70, 576], 512);
    for class in [DeviceClass::Discrete, DeviceClass::Integrated, DeviceClass::Virtual, DeviceClass::Unknown] {
        (caps.class, caps.subgroups) = (class, Some((32, 32)));
        let plan = Plan::new(&shared, &caps, None).expect("a plan");
        assert_eq!(plan.kernel(), Kernel::Tiled);
        assert!(plan.to_string().contains("not rows: made for software drivers"), "{plan}");
        assert_eq!(Plan::new(&shared, &caps, Some(Kernel::Rows)).expect("by name").kernel(), Kernel::Rows);
    }
    caps.class = DeviceClass::Software;
    for lanes in [4, 8, 32, 128] {
        caps.subgroups = Some((lanes, lanes));
        assert_eq!(Plan::new(&shared, &caps, None).expect("a plan").kernel(), Kernel::Rows);
        assert_eq!(Plan::new(&wide, &caps, None).expect("a plan").kernel(), Kernel::Fused);
    }
    for subgroups in [None, Some((8, 32)), Some((2, 2)), Some((12, 12)), Some((256, 256))] {
        caps.subgroups = subgroups;
        let plan = Plan::new(&shared, &caps, None).expect("a plan");
        assert_eq!(plan.kernel(), Kernel::Fused);
        assert!(plan.to_string().contains("not rows: needs subgroups of one size"), "{plan}");
    }
}

#[test]
fn rows_are_laid_over_the_lanes_of_a_subgroup() {
    let mut caps = DeviceCaps::webgpu_defaults();
    caps.class = DeviceClass::Software;
    // subgroup; query, key -> rows of a lane, lanes of rows, lanes of keys, parts of the keys, grid
    let table = [
        (8, [1, 8, 4096, 40], [1, 8, 77, 40], 4, 8, 1, 1, [128, 8, 1]),
        (4, [1, 8, 4096, 40], [1, 8, 77, 40], 4, 4, 1, 1, [256, 8, 1]),
        (32, [1, 8, 4096, 40], [1, 8, 77, 40], 4, 8, 4, 1, [128, 8, 1]),
        // few rows leave lanes for keys, and few heads leave threads for parts of them
        (8, [1, 8, 1, 64], [1, 8, 1500, 64], 1, 1, 8, 1, [1, 8, 1]),
        (8, [1, 2, 1, 64], [1, 2, 1500, 64], 1, 1, 8, 2, [1, 4, 1]),
        // heads of a group are taken together
        (8, [1, 32, 1, 128], [1, 8, 2048, 128], 2, 2, 4, 1, [1, 8, 1]),
        // wide rows: fewer a lane; a small problem: less to compile
        (8, [1, 8, 256, 128], [1, 8, 2048, 128], 2, 8, 1, 1, [16, 8, 1]),
        (8, [1, 8, 256, 512], [1, 8, 2048, 512], 1, 8, 1, 1, [32, 8, 1]),
        (8, [1, 2, 9, 64], [1, 2, 70, 64], 1, 8, 1, 1, [2, 2, 1]),
    ];
    for (lanes, query, key, rows, row_lanes, key_lanes, splits, grid) in table {
        caps.subgroups = Some((lanes, lanes));
        let plan = Plan::new(&problem(query, key, key[3]), &caps, None).expect("a plan");
        let found = ["ROWS", "ROW_LANES", "KEY_LANES"].map(|name| constant(&plan, name));
        assert_eq!(found, [rows, row_lanes, key_lanes].map(Some), "{plan}");
        assert_eq!(plan.choice().num_splits, Some(splits), "{plan}");
        assert_eq!(plan.steps()[0].grid, grid, "{plan}");
        assert_eq!(plan.steps().len(), if splits > 1 { 2 } else { 1 }, "{plan}");
    }
}

/// A GPU with matrices of 16 by 16.
fn matrix_device() -> DeviceCaps {
    DeviceCaps {
        class: DeviceClass::Discrete,
        max_compute_workgroup_storage_size: 49152,
        subgroups: Some((32, 32)),
        shader_f16: true,
        cooperative_matrix: Some(CooperativeMatrix::Size16),
        ..DeviceCaps::webgpu_defaults()
    }
}

#[test]
fn matrix_units_take_many_f16_queries_and_keys_on_a_gpu() {
    let caps = matrix_device();
    let problem = |q_len, kv_len, width, element| {
        let tensor = |len| TensorSpec { element, layout: Layout::bhld([1, 8, len, width]) };
        let spec = AttentionSpec::from_tensors(tensor(q_len), tensor(kv_len), tensor(kv_len));
        AttentionProblem::new(spec).expect("sound")
    };
    let kernel = |caps: &DeviceCaps, problem: &_| Plan::new(problem, caps, None).expect("a plan").kernel();
    let many = problem(1024, 1024, 64, Element::F16);
    assert_eq!(kernel(&caps, &many), Kernel::Cooperative);
    assert_eq!(kernel(&caps, &problem(1024, 77, 64, Element::F16)), Kernel::Tiled);
    assert_eq!(kernel(&caps, &problem(64, 1024, 64, Element::F16)), Kernel::Tiled);
    assert_eq!(kernel(&caps, &problem(1024, 1024, 40, Element::F16)), Kernel::Tiled);
    assert_eq!(kernel(&caps, &problem(1024, 1024, 64, Element::F32)), Kernel::Tiled);
    for class in [DeviceClass::Software, DeviceClass::Unknown] {
        assert_ne!(kernel(&DeviceCaps { class, ..caps.clone() }, &many), Kernel::Cooperative, "{class}");
    }
    let plan = Plan::new(&problem(1024, 1024, 64, Element::F32), &caps, None).expect("a plan");
    assert!(plan.to_string().contains("not cooperative: query is stored as f32, the kernel takes f16"), "{plan}");
}

#[test]
fn matrix_units_are_asked_for_by_name_where_they_are() {
    let tensor = |dim| TensorSpec::f16(Layout::bhld([1, 1, 3, dim]));
    let problem =
        AttentionProblem::new(AttentionSpec::from_tensors(tensor(64), tensor(64), tensor(80))).expect("sound");
    let caps = matrix_device();
    let lacking = [
        (DeviceCaps { cooperative_matrix: None, ..caps.clone() }, "needs cooperative matrices of f16"),
        (DeviceCaps { shader_f16: false, ..caps.clone() }, "needs arithmetic in f16"),
        (DeviceCaps { subgroups: None, ..caps.clone() }, "whose size divides 128, the device has none"),
        (DeviceCaps { subgroups: Some((8, 256)), ..caps.clone() }, "the device has them from 8 to 256"),
        (DeviceCaps { max_compute_workgroup_storage_size: 4096, ..caps.clone() }, "bytes of workgroup memory"),
        (DeviceCaps { max_compute_invocations_per_workgroup: 64, ..caps.clone() }, "needs 128 invocations"),
    ];
    for (caps, reason) in lacking {
        let error = Plan::new(&problem, &caps, Some(Kernel::Cooperative)).expect_err(reason).to_string();
        assert!(error.contains(reason), "{error}");
    }
    let tile = |block_q, block_kv| TileShape { block_q, block_kv, query_resident: true, paired_keys: false };
    let choice = |tile| PlanChoice { tile: Some(tile), ..PlanChoice::of(Kernel::Cooperative) };
    let plan = Plan::with_choice(&problem, &caps, &choice(tile(16, 64))).expect("a plan");
    assert_eq!(constant(&plan, "BLOCK_Q"), Some(16), "{plan}");
    let error = Plan::with_choice(&problem, &caps, &choice(tile(64, 64))).expect_err("no such tile").to_string();
    assert!(error.contains("possible: block_q=32 block_kv=64 query_resident=true; "), "{error}");
    let tried = Plan::candidates(&problem, &caps).into_iter().filter(|choice| choice.kernel == Kernel::Cooperative);
    assert_eq!(tried.count(), 4);
    // a software driver that is told to
    let caps = DeviceCaps { class: DeviceClass::Software, ..caps };
    let plan = Plan::new(&problem, &caps, Some(Kernel::Cooperative)).expect("a plan");
    assert_eq!((plan.kernel(), plan.steps()[0].grid), (Kernel::Cooperative, [1, 1, 1]));
}

#[test]
fn a_scale_that_a_device_may_take_for_0_is_refused_by_every_kernel() {
    let mut spec = AttentionSpec::new([1, 1, 2, 8], [1, 1, 3, 8]);
    spec.scale = Some(-1e-40);
    // the CPU takes it
    let problem = AttentionProblem::new(spec).expect("any finite scale is sound");
    let Err(PlanError::NoKernel { reasons }) = Plan::new(&problem, &DeviceCaps::webgpu_defaults(), None) else {
        panic!("a plan");
    };
    let said = "scale is -1e-40, which devices may take for 0; needs 0, or at least 1.1754944e-38 in size";
    for (kernel, reason) in reasons.iter().filter(|(kernel, _)| *kernel != Kernel::Rows) {
        assert_eq!(reason.to_string(), said, "{kernel}");
    }
}

#[test]
fn keys_are_split_to_fill_the_device_and_heads_of_a_group_share_them() {
    let mut caps = DeviceCaps::webgpu_defaults();
    caps.class = DeviceClass::Discrete;
    // 8 key/value heads, 4 query heads each: 8 workgroups without a split, 256 wanted, 256 keys each at least
    let plan = Plan::new(&problem([1, 32, 1, 128], [1, 8, 4096, 128], 128), &caps, None).expect("a plan");
    assert_eq!((plan.kernel(), plan.steps()[0].grid, plan.steps()[1].grid), (Kernel::Split, [16, 8, 1], [1, 32, 1]));
    assert_eq!((constant(&plan, "GROUP"), constant(&plan, "ROWS")), (Some(4), Some(4)));
    assert_eq!(plan.workspace_bytes(), 16 * 32 * (128 + 2) * 4);
}

#[test]
fn a_software_driver_is_not_asked_for_more_iterations_than_it_runs() {
    let mut caps = DeviceCaps::webgpu_defaults();
    caps.class = DeviceClass::Software;
    let long = problem([1, 64, 64, 64], [1, 64, 1_000_000, 64], 64);
    for (kernel, subgroups, splits) in [(Kernel::Rows, Some((8, 8)), 31), (Kernel::Split, None, 32)] {
        caps.subgroups = subgroups;
        caps.max_storage_buffer_binding_size = 1 << 32;
        let plan = Plan::new(&long, &caps, None).expect("a plan");
        assert_eq!((plan.kernel(), plan.choice().num_splits), (kernel, Some(splits)), "{plan}");
        let choice = PlanChoice { num_splits: Some(1), ..PlanChoice::of(kernel) };
        assert!(Plan::with_choice(&long, &caps, &choice).is_err());
    }
    for kernel in [Kernel::Tiled, Kernel::Fused, Kernel::Plain] {
        let error = Plan::new(&long, &caps, Some(kernel)).expect_err("too long");
        assert!(error.to_string().contains("loop iterations in an invocation"), "{error}");
    }
    // no others are known to do this
    caps.class = DeviceClass::Discrete;
    assert_eq!(Plan::new(&long, &caps, None).expect("a plan").kernel(), Kernel::Tiled);
}

#[test]
fn probabilities_choose_the_plain_kernel_and_no_workspace() {
    let mut spec = AttentionSpec::new([2, 4, 17, 8], [2, 2, 33, 8]);
    let caps = DeviceCaps::webgpu_defaults();
    spec.scores = Some(ScoreStage::Probs);
    let plan = Plan::new(&AttentionProblem::new(spec.clone()).expect("sound"), &caps, None).expect("a plan");
    assert_eq!((plan.kernel(), plan.workspace_bytes()), (Kernel::Plain, 0));
    // scores of another stage are an extra pass beside either kernel
    spec.scores = Some(ScoreStage::Scaled);
    let problem = AttentionProblem::new(spec).expect("sound");
    let plan = Plan::new(&problem, &caps, None).expect("a plan");
    assert_eq!((plan.kernel(), plan.steps().len(), plan.workspace_bytes()), (Kernel::Tiled, 2, 0));
    let plan = Plan::new(&problem, &caps, Some(Kernel::Plain)).expect("a plan");
    assert_eq!((plan.steps().len(), plan.workspace_bytes()), (4, 2 * 4 * 17 * 33 * 4));
}

#[test]
fn a_plan_says_why_not() {
    let plan =
        Plan::new(&problem([1, 1, 2, 8], [1, 1, 3, 8], 8), &DeviceCaps::webgpu_defaults(), None).expect("a plan");
    let rejected: Vec<_> = plan.rejected().iter().map(|(kernel, _)| *kernel).collect();
    let others = vec![Kernel::Fused, Kernel::Split, Kernel::Plain, Kernel::Rows, Kernel::Cooperative];
    assert_eq!((plan.kernel(), rejected), (Kernel::Tiled, others));
    assert!(plan.to_string().contains("not plain: stores q_len * kv_len scores"), "{plan}");
}

#[test]
fn a_value_row_is_as_wide_as_registers_allow() {
    let of = |v_head_dim, kernel: Kernel| {
        kernel.supports(&problem([1, 1, 4, 16], [1, 1, 20, 16], v_head_dim), &DeviceCaps::webgpu_defaults())
    };
    assert_eq!(of(2048, Kernel::Fused), Ok(()));
    let found = of(2049, Kernel::Fused);
    assert!(matches!(found, Err(Unsupported::Dim { name: "v_head_dim", found: 2049, max: 2048 })), "{found:?}");
    let found = of(4096, Kernel::Tiled);
    assert!(matches!(found, Err(Unsupported::Dim { name: "v_head_dim", .. })), "{found:?}");
}

/// Not even where no other kernel will do.
#[test]
fn a_gpu_gets_the_rows_kernel_by_name_only() {
    let caps = DeviceCaps {
        class: DeviceClass::Discrete,
        max_compute_invocations_per_workgroup: 32,
        subgroups: Some((8, 8)),
        ..DeviceCaps::webgpu_defaults()
    };
    let problem = problem([1, 2, 5, 16], [1, 2, 20, 16], 16);
    let error = Plan::new(&problem, &caps, None).expect_err("all others have 64 invocations");
    assert!(error.to_string().contains("on a discrete GPU it runs where it is asked for by name"), "{error}");
    assert_eq!(Plan::new(&problem, &caps, Some(Kernel::Rows)).expect("by name").kernel(), Kernel::Rows);
}

#[test]
fn positions_beyond_the_kernels_integers_are_refused() {
    let mut spec = AttentionSpec::new([1, 1, 2, 8], [1, 1, 3, 8]);
    spec.causal = Some(Diagonal::Fixed(i32::MAX));
    // a causal mask alone only compares, and may be cut
    let caps = DeviceCaps::webgpu_defaults();
    assert!(Plan::new(&AttentionProblem::new(spec.clone()).expect("sound"), &caps, None).is_ok());
    // ALiBi needs the distance itself
    spec.alibi_slopes = Some(AlibiSlopes::PerHead);
    let error = Plan::new(&AttentionProblem::new(spec).expect("sound"), &caps, None).expect_err("too far");
    assert!(error.to_string().contains("offset is 2147483647, positions in a kernel go up to 536870911"), "{error}");
}

#[test]
fn empty_problems_need_no_dispatch() {
    for query in [[0, 2, 3, 8], [1, 2, 0, 8]] {
        let plan =
            Plan::new(&problem(query, [query[0], 2, 3, 8], 8), &DeviceCaps::webgpu_defaults(), None).expect("a plan");
        assert!(plan.steps().is_empty());
        assert!(plan.to_string().contains("no dispatch: the output has no elements"));
    }
    // no keys: rows of zeros must still be written
    let plan =
        Plan::new(&problem([1, 2, 3, 8], [1, 2, 0, 8], 8), &DeviceCaps::webgpu_defaults(), None).expect("a plan");
    assert_eq!(plan.steps().len(), 1);
}

/// What the benchmarks rely on (benches/attention.rs).
#[test]
fn every_cpu_strategy_has_a_workload() {
    for (name, strategy) in [
        ("perceiver_io", CpuStrategy::ManyQueries),
        ("sd15_16", CpuStrategy::FewKeys),
        ("sam_image_to_token", CpuStrategy::HandfulOfKeys),
        ("ip_adapter_4", CpuStrategy::HandfulOfKeys),
        ("whisper_decode", CpuStrategy::FewQueries),
    ] {
        let problem = AttentionProblem::new(workload::find(name).expect("known").spec).expect("sound");
        for level in SimdLevel::available() {
            assert_eq!(CpuPlan::new(&problem, level).strategy(), strategy, "{name} at {level}");
        }
    }
}

#[test]
fn batch_entries_that_share_keys_are_rows() {
    let mut caps = DeviceCaps::webgpu_defaults();
    caps.class = DeviceClass::Discrete;
    let shared = |batch: usize, heads: [usize; 2], axes: &[usize]| {
        let mut spec = AttentionSpec::new([batch, heads[0], 1, 64], [batch, heads[1], 1500, 64]);
        for &axis in axes {
            spec.key.layout.strides[axis] = 0;
            spec.value.layout.strides[axis] = 0;
        }
        Plan::new(&AttentionProblem::new(spec).expect("sound"), &caps, None).expect("a plan")
    };
    // batch, heads, shared axes -> heads together, rows of a workgroup, workgroups along y and z
    type Row<'a> = (usize, [usize; 2], &'a [usize], [u32; 4]);
    let table: [Row<'_>; 6] = [
        (5, [8, 8], &[], [1, 1, 8, 5]),
        (5, [8, 8], &[0], [1, 5, 8, 1]),
        (5, [8, 4], &[0], [2, 10, 4, 1]),
        // 40 rows in 3 workgroups of 14
        (5, [8, 1], &[0], [8, 14, 3, 1]),
        (5, [8, 8], &[0, 1], [8, 14, 3, 1]),
        (5, [8, 8], &[1], [8, 8, 1, 5]),
    ];
    for (batch, heads, axes, found) in table {
        let plan = shared(batch, heads, axes);
        assert_eq!(plan.kernel(), Kernel::Split);
        let [_, y, z] = plan.steps()[0].workgroups();
        let of = |name| constant(&plan, name).expect("it has tiles");
        assert_eq!([of("GROUP"), of("ROWS"), y, z], found, "{plan}");
    }
    // keys that are shared, or values, are not enough
    for value in [false, true] {
        let mut spec = AttentionSpec::new([5, 8, 1, 64], [5, 8, 1500, 64]);
        let shared = if value { &mut spec.value } else { &mut spec.key };
        (shared.layout.strides[0], shared.layout.strides[1]) = (0, 0);
        let plan = Plan::new(&AttentionProblem::new(spec).expect("sound"), &caps, None).expect("a plan");
        assert_eq!((plan.steps()[0].grid[1..].to_vec(), constant(&plan, "GROUP")), (vec![8, 5], Some(1)), "{plan}");
    }
}
