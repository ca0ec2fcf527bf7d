//! Problems cut into parts to fit small limits, plans for less than the device has, and the same bits twice.

use cross_attention::{DeviceCaps, DeviceClass, Kernel, Plan};
use libtest_mimic::Trial;

use super::adapters::Adapter;
use super::trials::{f16_inputs, message, run_with, trial};
use crate::common::case::Case;
use crate::common::{cases, check};

/// Cases with every kind of input there is to cut, and some that leave a part with little.
const CASES: [&str; 15] = [
    "causal_gqa_odd",
    "heads_gqa_of_8",
    "wide_batch",
    "q_longer_bottom_right",
    "q_len_33",
    "q_len_65",
    "layout_blhd",
    "layout_batch_inside",
    "layout_bias_and_mask",
    "broadcast_batch",
    "f16_odd_strides",
    "f16_wide",
    "masks_together",
    "scores_probs_all_terms",
    // two groups of columns, which only a GPU's tiles have
    "nan_in_value_of_64",
];

pub(crate) fn trials(adapter: &Adapter, kernel: Kernel) -> Vec<Trial> {
    let mut trials = Vec::new();
    for case in cases(kernel) {
        for (limit, caps) in limits(adapter.context.caps(), kernel, &case) {
            if limit == "gpu_tiles" && adapter.sparing {
                continue;
            }
            let (on, case) = (adapter.clone(), case.clone());
            let name = format!("{limit}_{}", case.name);
            trials.push(trial(adapter, kernel.name(), &name, move || planned_for(&on, kernel, &caps, &case)));
        }
        if kernel == Kernel::Rows {
            let (on, case) = (adapter.clone(), case.clone());
            let name = format!("cut_bits_{}", case.name);
            trials.push(trial(adapter, kernel.name(), &name, move || cut_bits(&on, kernel, &case)));
        }
        let on = adapter.clone();
        let name = format!("twice_{}", case.name);
        trials.push(trial(adapter, kernel.name(), &name, move || twice(&on, kernel, &case)));
    }
    trials.push({
        let on = adapter.clone();
        trial(adapter, kernel.name(), "limits_cut", move || limits_cut(&on, kernel))
    });
    trials
}

fn cases(kernel: Kernel) -> Vec<Case> {
    let of_kernel = |case: Case| if kernel == Kernel::Cooperative { f16_inputs(case) } else { case };
    cases::all().into_iter().filter(|case| CASES.contains(&case.name.as_str())).map(of_kernel).collect()
}

/// Capabilities below those of the device: few workgroups, bindings half as large as the case would like, and what
/// WebGPU has everywhere. And the tiles that a GPU would get, for a software driver gets smaller ones.
fn limits(of: &DeviceCaps, kernel: Kernel, case: &Case) -> [(&'static str, DeviceCaps); 4] {
    // the rows kernel needs few
    let most = if kernel == Kernel::Rows { 1 } else { 5 };
    let few_groups = DeviceCaps { max_compute_workgroups_per_dimension: most, ..of.clone() };
    let bindings = Plan::new(&case.problem(), of, Some(kernel)).into_iter().flat_map(|plan| plan.steps().to_vec());
    let largest = bindings.flat_map(|step| step.bindings).map(|binding| binding.size_bytes).max();
    let half = largest.map_or(of.max_storage_buffer_binding_size, |bytes| bytes / 2);
    let small_bindings = DeviceCaps { max_storage_buffer_binding_size: half, ..of.clone() };
    // subgroups are no limit, and the rows kernel runs nowhere without
    let subgroups = if kernel == Kernel::Rows { of.subgroups } else { None };
    let webgpu = DeviceCaps { class: of.class, subgroups, ..DeviceCaps::webgpu_defaults() };
    let gpu_tiles = DeviceCaps { class: DeviceClass::Discrete, ..of.clone() };
    [
        ("few_groups", few_groups),
        ("small_bindings", small_bindings),
        ("webgpu_limits", webgpu),
        ("gpu_tiles", gpu_tiles),
    ]
}

pub(crate) fn planned_for(adapter: &Adapter, kernel: Kernel, caps: &DeviceCaps, case: &Case) -> Result<(), String> {
    check::case_with(case, &|problem, inputs| {
        let plan = Plan::new(problem, caps, Some(kernel)).map_err(|error| message(&error.into()))?;
        let context = &adapter.context;
        let prepared = pollster::block_on(context.prepare_plan(plan)).map_err(|error| message(&error))?;
        prepared.run_blocking(inputs).map_err(|error| message(&error))
    })
}

/// A row's bits do not depend on the rows beside it, so cutting over batch, heads and rows changes none.
fn cut_bits(adapter: &Adapter, kernel: Kernel, case: &Case) -> Result<(), String> {
    let (problem, data) = (case.problem(), case.data());
    let [(_, few_groups), ..] = limits(adapter.context.caps(), kernel, case);
    // a grid over all keys of returned scores may need keys cut, which does change bits
    if Plan::new(&problem, &few_groups, Some(kernel)).is_ok_and(|plan| plan.key_parts() > 1) {
        return Ok(());
    }
    let run = |caps: &DeviceCaps| {
        let plan = Plan::new(&problem, caps, Some(kernel)).map_err(|error| message(&error.into()))?;
        let prepared = pollster::block_on(adapter.context.prepare_plan(plan)).map_err(|error| message(&error))?;
        prepared.run_blocking(&data.as_inputs()).map_err(|error| message(&error))
    };
    let (whole, cut) = (run(adapter.context.caps())?, run(&few_groups)?);
    check::same_bits(&whole, &cut).map_err(|error| format!("{case}\ncut: {error}"))
}

/// The limits above cut many of the cases, else those trials guard nothing.
fn limits_cut(adapter: &Adapter, kernel: Kernel) -> Result<(), String> {
    // a kernel that the device cannot run cuts nothing
    Plan::new(&cases(kernel)[0].problem(), adapter.context.caps(), Some(kernel))
        .map_err(|error| message(&error.into()))?;
    for limit in 0..2 {
        let cut = cases(kernel).into_iter().filter(|case| {
            let (_, caps) = &limits(adapter.context.caps(), kernel, case)[limit];
            Plan::new(&case.problem(), caps, Some(kernel)).is_ok_and(|plan| plan.parts() > 1)
        });
        let cut = cut.count();
        if cut < CASES.len() / 3 {
            return Err(format!("limit {limit} cuts {cut} of {} cases", CASES.len()));
        }
    }
    Ok(())
}

/// The same bits from a second run, from a third on what was prepared for the first, and with other work between.
fn twice(adapter: &Adapter, kernel: Kernel, case: &Case) -> Result<(), String> {
    let (problem, data) = (case.problem(), case.data());
    let inputs = data.as_inputs();
    let prepared = adapter.context.prepare_blocking(&problem, Some(kernel)).map_err(|error| message(&error))?;
    let first = prepared.run_blocking(&inputs).map_err(|error| message(&error))?;
    let other = f16_inputs(Case::new("between", "other work on the device", 1, [2, 2], [9, 70], [16, 16]));
    run_with(adapter, kernel)(&other.problem(), &other.data().as_inputs())?;
    let second = prepared.run_blocking(&inputs).map_err(|error| message(&error))?;
    let third = run_with(adapter, kernel)(&problem, &inputs)?;
    check::same_bits(&first, &second).map_err(|error| format!("{case}\nrun again: {error}"))?;
    check::same_bits(&first, &third).map_err(|error| format!("{case}\nprepared again: {error}"))
}
