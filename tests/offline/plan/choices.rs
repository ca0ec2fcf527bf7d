//! What tuning may choose, and what a choice is refused for.

use cross_attention::dispatch::{Rejection, Unsupported};
use cross_attention::{AttentionProblem, DeviceCaps, DeviceClass, Kernel, Plan, PlanChoice, PlanError, TileShape};

use super::problem;

/// Problems of every regime.
fn regimes() -> [AttentionProblem; 7] {
    [
        problem([1, 8, 1, 64], [1, 8, 1500, 64], 64),
        problem([1, 32, 4, 128], [1, 8, 2048, 128], 128),
        problem([2, 8, 4096, 40], [2, 8, 77, 40], 40),
        problem([1, 12, 4096, 128], [1, 12, 512, 128], 128),
        problem([1, 2, 3, 7], [1, 1, 5, 7], 9),
        problem([1, 1, 9, 576], [1, 1, 300, 576], 512),
        problem([0, 2, 3, 8], [0, 2, 3, 8], 8),
    ]
}

#[test]
fn candidates_are_distinct_and_run_as_they_say() {
    for class in [DeviceClass::Discrete, DeviceClass::Integrated, DeviceClass::Unknown, DeviceClass::Software] {
        for (memory, binding) in [(16384, 1 << 27), (49152, 1 << 27), (16384, 4 << 20)] {
            let mut caps = DeviceCaps::webgpu_defaults();
            caps.class = class;
            caps.subgroups = Some((8, 8));
            caps.max_compute_workgroup_storage_size = memory;
            caps.max_storage_buffer_binding_size = binding;
            for problem in regimes() {
                let choices = Plan::candidates(&problem, &caps);
                let own = Plan::new(&problem, &caps, None).expect("a plan");
                assert_eq!(choices[0], own.choice(), "{own}");
                let forced = Plan::with_choice(&problem, &caps, &own.choice()).expect("its own choice");
                // the last part of several may be smaller, and leaves more of the device to its keys
                assert!(own.parts() > 1 || forced.steps() == own.steps(), "{own}\n{forced}");
                for (n, choice) in choices.iter().enumerate() {
                    assert!(!choices[..n].contains(choice), "{choice} twice");
                    let plan = Plan::with_choice(&problem, &caps, choice).expect("a candidate runs");
                    assert_eq!(plan.choice(), *choice, "{plan}");
                    for step in plan.steps() {
                        assert!(step.workgroup_bytes <= u64::from(memory), "{plan}");
                        assert!(step.bindings.iter().all(|b| b.size_bytes <= binding), "{plan}");
                    }
                }
                let kernels: std::collections::BTreeSet<_> = choices.iter().map(|choice| choice.kernel).collect();
                assert!(class == DeviceClass::Software || !kernels.contains(&Kernel::Rows), "{choices:?}");
                assert!(problem.is_empty() || kernels.len() >= 3, "{choices:?}");
                assert!(choices.len() <= 64, "{} candidates", choices.len());
            }
        }
    }
}

#[test]
fn candidates_range_over_tiles_and_splits() {
    let mut caps = DeviceCaps::webgpu_defaults();
    caps.class = DeviceClass::Discrete;
    caps.max_compute_workgroup_storage_size = 49152;
    let choices = Plan::candidates(&problem([1, 8, 1024, 64], [1, 8, 1024, 64], 64), &caps);
    let tiles: Vec<_> = choices.iter().filter(|c| c.kernel == Kernel::Tiled).filter_map(|c| c.tile).collect();
    for (block_q, block_kv) in [(16, 64), (8, 64), (32, 32), (16, 32)] {
        for (query_resident, paired_keys) in [(true, true), (false, true), (true, false)] {
            let tile = TileShape { block_q, block_kv, query_resident, paired_keys };
            assert!(tiles.contains(&tile), "{tile} is not among {tiles:?}");
        }
    }
    let choices = Plan::candidates(&problem([1, 8, 1, 64], [1, 8, 4096, 64], 64), &caps);
    let splits: Vec<_> = choices.iter().filter_map(|choice| choice.num_splits).collect();
    for num_splits in [1, 2, 4, 8, 16, 32] {
        assert!(splits.contains(&num_splits), "{splits:?}");
    }
    // a plain kernel with 13 GiB of scores is no candidate
    let choices = Plan::candidates(&problem([1, 12, 32760, 128], [1, 12, 8192, 128], 128), &caps);
    assert!(choices.iter().all(|choice| choice.kernel != Kernel::Plain));
}

#[test]
fn a_choice_that_does_not_fit_is_refused() {
    let mut caps = DeviceCaps::webgpu_defaults();
    caps.subgroups = Some((8, 8));
    let problem = problem([1, 8, 4, 64], [1, 8, 1000, 64], 64);
    let refused = |choice: PlanChoice| match Plan::with_choice(&problem, &caps, &choice) {
        Err(PlanError::Choice { choice: found, reason: Rejection::Unsupported(reason) }) if found == choice => reason,
        other => panic!("{choice}: {other:?}"),
    };
    let tile = |block_q, block_kv| Some(TileShape { block_q, block_kv, query_resident: true, paired_keys: false });
    // the cooperative kernel refuses what is in f32 first
    for kernel in Kernel::ALL.into_iter().filter(|kernel| *kernel != Kernel::Cooperative) {
        for tile in [tile(0, 0), tile(u32::MAX, u32::MAX), tile(17, 64), tile(16, 63), tile(64, 4)] {
            let reason = refused(PlanChoice { tile, ..PlanChoice::of(kernel) });
            assert!(matches!(reason, Unsupported::Tile { .. }), "{kernel}: {reason}");
        }
        for num_splits in [Some(0), Some(9), Some(u32::MAX)] {
            let reason = refused(PlanChoice { num_splits, ..PlanChoice::of(kernel) });
            match kernel {
                Kernel::Rows | Kernel::Split => {
                    assert!(matches!(reason, Unsupported::NumSplits { max: 8, .. }), "{reason}");
                }
                _ => assert!(matches!(reason, Unsupported::NotSplit { .. }), "{reason}"),
            }
        }
    }
    let streamed = Some(TileShape { block_q: 4, block_kv: 64, query_resident: false, paired_keys: false });
    let reason = refused(PlanChoice { tile: streamed, ..PlanChoice::of(Kernel::Fused) });
    let text = "has no tile block_q=4 block_kv=64 query_resident=false; possible: block_q=8 block_kv=64";
    assert!(reason.to_string().starts_with(text), "{reason}");

    // one that fits another device
    let mut larger = caps.clone();
    larger.max_compute_workgroup_storage_size = 49152;
    let wide = self::problem([1, 1, 64, 256], [1, 1, 64, 256], 256);
    let choice = PlanChoice {
        tile: Some(TileShape { block_q: 16, block_kv: 32, query_resident: true, paired_keys: false }),
        ..PlanChoice::of(Kernel::Tiled)
    };
    assert!(Plan::with_choice(&wide, &larger, &choice).is_ok());
    let error = Plan::with_choice(&wide, &caps, &choice).expect_err("too much workgroup memory");
    assert!(error.to_string().contains("bytes of workgroup memory"), "{error}");
}

#[test]
fn a_plan_tells_its_choice() {
    let caps = DeviceCaps::webgpu_defaults();
    let problem = problem([1, 8, 1, 64], [1, 8, 1500, 64], 64);
    let choice = PlanChoice { num_splits: Some(3), ..PlanChoice::of(Kernel::Split) };
    let plan = Plan::with_choice(&problem, &caps, &choice).expect("a plan");
    let text = plan.to_string();
    assert!(text.contains("kernel     split: asked for as a choice\n"), "{text}");
    assert!(text.contains("choice     split block_q=1 block_kv=128 query_resident=true num_splits=3\n"), "{text}");
    assert_eq!((plan.kernel(), plan.steps()[0].grid), (Kernel::Split, [3, 8, 1]));
}
