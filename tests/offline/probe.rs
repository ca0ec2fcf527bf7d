//! How lanes lie in subgroups: what a device answers is judged, and what is not as kernels need it is told.

use cross_attention::{AttentionProblem, AttentionSpec, DeviceCaps, DeviceClass, Kernel, Plan, SubgroupFault};

/// What a workgroup answers whose subgroups are neighbours.
fn neighbours(workgroup: u32, size: u32) -> Vec<[u32; 4]> {
    (0..workgroup).map(|index| [size, index % size, index / size * size, index ^ 1]).collect()
}

#[test]
fn neighbours_are_accepted() {
    for (workgroup, size, sizes) in [
        (64, 8, (8, 8)),
        (128, 32, (32, 32)),
        (64, 4, (4, 4)),
        // some drivers choose for each pipeline
        (64, 16, (8, 32)),
        // a subgroup that the workgroup does not fill
        (64, 128, (128, 128)),
        (1, 1, (1, 1)),
    ] {
        let several: Vec<_> = (0..3).flat_map(|_| neighbours(workgroup, size)).collect();
        assert_eq!(SubgroupFault::judge(workgroup, sizes, &several), Ok(()), "{size} of {workgroup}");
    }
    assert_eq!(SubgroupFault::judge(0, (8, 8), &[]), Ok(()));
}

/// Each answer that is wrong in one thing, in the last workgroup of several.
#[test]
fn every_other_order_is_told() {
    let judged = |change: &dyn Fn(u32) -> [u32; 4]| {
        let mut lanes = neighbours(64, 8);
        lanes.extend((0..64).map(change));
        SubgroupFault::judge(64, (8, 8), &lanes).expect_err("lanes that are no neighbours")
    };
    // lanes counted from the end
    let reversed = judged(&|index| [8, 7 - index % 8, index / 8 * 8, index ^ 1]);
    assert_eq!(reversed, SubgroupFault::Order { workgroup: 64, index: 0, lane: 7, first: 0, size: 8 });
    // two by two: 0, 1, 16, 17, ... in one subgroup
    let apart = judged(&|index| [8, index / 16 * 2 + index % 2, index % 16 / 2 * 2, index ^ 1]);
    assert!(matches!(apart, SubgroupFault::Order { index: 2, lane: 0, .. }), "{apart}");
    // numbers as they should be, but of another subgroup
    let other = judged(&|index| [8, index % 8, (index / 8 * 8 + 8) % 64, index ^ 1]);
    assert_eq!(other, SubgroupFault::Order { workgroup: 64, index: 0, lane: 0, first: 8, size: 8 });
    // shuffles that bring what the lane itself holds
    let shuffle = judged(&|index| [8, index % 8, index / 8 * 8, index]);
    assert_eq!(shuffle, SubgroupFault::Shuffle { workgroup: 64, index: 0, found: 0, wanted: 1 });
    // another size than the device says, or none at all: nothing was computed
    for found in [0, 3, 4, 16] {
        let size = judged(&|index| [found, index % found.max(1), index / found.max(1) * found, index ^ 1]);
        assert_eq!(size, SubgroupFault::Size { workgroup: 64, found, smallest: 8, largest: 8 });
    }
    let no_power = SubgroupFault::judge(64, (4, 16), &neighbours(48, 12)).expect_err("12 lanes");
    assert_eq!(no_power, SubgroupFault::Size { workgroup: 64, found: 12, smallest: 4, largest: 16 });
}

/// A plan says why it does without.
#[test]
fn a_plan_without_subgroups_says_why() {
    let fault = SubgroupFault::Order { workgroup: 64, index: 1, lane: 4, first: 0, size: 8 };
    let caps = DeviceCaps {
        class: DeviceClass::Software,
        subgroups: None,
        subgroup_fault: Some(fault.clone()),
        ..DeviceCaps::webgpu_defaults()
    };
    let problem = AttentionProblem::new(AttentionSpec::new([1, 2, 30, 16], [1, 2, 40, 16])).expect("sound");
    let plan = Plan::new(&problem, &caps, None).expect("others need none");
    assert_ne!(plan.kernel(), Kernel::Rows);
    let text = plan.to_string();
    assert!(text.contains(&format!("subgroups are not used: {fault}")), "{text}");
    let without = DeviceCaps { subgroup_fault: None, ..caps };
    assert!(!Plan::new(&problem, &without, None).expect("the same").to_string().contains("not used"));
}
