//! Every shader that a plan can choose, assembled, validated with its overrides applied, and translated; host and shader
//! compared.

mod module;
mod steps;

use std::collections::HashSet;

use cross_attention::dispatch::{Shader, Variant};
use cross_attention::{AttentionProblem, AttentionSpec, DeviceCaps, DeviceClass, Diagonal, Layout, Plan, TensorSpec};
use rayon::prelude::*;

use self::module::{
    compare_bindings, compare_params, compare_ports, needs_subgroups, resolve, translate, workgroup_bytes,
};
use self::steps::{backward_steps, cooperative_steps, steps, weights_steps};

#[test]
fn every_variant_is_valid_and_host_and_shader_agree() {
    let steps = steps();
    assert!(steps.len() > 1000, "only {} variants", steps.len());
    let mut shaders: HashSet<_> = steps.iter().map(|step| step.variant.shader).collect();
    shaders.extend(Variant::beside_plans().into_iter().map(|variant| variant.shader));
    assert_eq!(
        shaders.len() + 8,
        Shader::ALL.len(),
        "weights and gradients have plans of their own, cooperative is in none of these"
    );
    // the longest of all tests: on every core that others leave
    steps.par_iter().enumerate().for_each(|(n, step)| {
        let (module, info) = resolve(&step.variant);
        compare_bindings(&module, step);
        compare_params(&module, step.variant.shader);
        let entry = &module.entry_points[0];
        assert!(entry.workgroup_size.iter().product::<u32>() <= 256);
        assert_eq!(workgroup_bytes(&module), step.workgroup_bytes, "{:?}", step.variant);
        // translation is the slow part, and depends little on single values: a spread of them
        if n % 16 == 0 {
            translate(&module, &info, needs_subgroups(&step.variant));
        }
    });
}

/// The choices that tuning ranges over, of a few shapes; masks and elements are the business of the test above.
#[test]
fn every_candidate_is_valid() {
    let mut larger = DeviceCaps::webgpu_defaults();
    larger.class = DeviceClass::Discrete;
    larger.max_compute_workgroup_storage_size = 49152;
    let software =
        DeviceCaps { class: DeviceClass::Software, subgroups: Some((8, 8)), ..DeviceCaps::webgpu_defaults() };
    let mut seen = HashSet::new();
    for (q_len, kv_len, head_dim, v_head_dim) in
        [(1, 600, 64, 64), (70, 77, 40, 40), (70, 600, 128, 96), (9, 70, 7, 5), (70, 70, 192, 128), (9, 70, 256, 256)]
    {
        let tensor = |shape| TensorSpec::f32(Layout::bhld(shape));
        let mut spec = AttentionSpec::from_tensors(
            tensor([1, 4, q_len, head_dim]),
            tensor([1, 2, kv_len, head_dim]),
            tensor([1, 2, kv_len, v_head_dim]),
        );
        spec.lse = true;
        spec.causal = Some(Diagonal::BottomRight);
        let problem = AttentionProblem::new(spec).expect("a sound spec");
        for caps in [&larger, &DeviceCaps::webgpu_defaults(), &software] {
            for choice in Plan::candidates(&problem, caps) {
                let plan = Plan::with_choice(&problem, caps, &choice).expect("a candidate runs");
                for step in plan.steps() {
                    if !seen.insert(step.variant.clone()) {
                        continue;
                    }
                    let (module, info) = resolve(&step.variant);
                    compare_bindings(&module, step);
                    assert_eq!(workgroup_bytes(&module), step.workgroup_bytes, "{choice}");
                    assert!(module.entry_points[0].workgroup_size.iter().product::<u32>() <= 256);
                    if seen.len() % 8 == 0 {
                        translate(&module, &info, needs_subgroups(&step.variant));
                    }
                }
            }
        }
    }
    assert!(seen.len() > 100, "only {} variants", seen.len());
}

#[test]
fn cooperative_is_valid_and_host_and_shader_agree() {
    let steps = cooperative_steps();
    assert!(steps.len() > 100, "only {} variants", steps.len());
    for (n, step) in steps.iter().enumerate() {
        let (module, info) = resolve(&step.variant);
        compare_bindings(&module, step);
        compare_params(&module, step.variant.shader);
        assert_eq!(workgroup_bytes(&module), step.workgroup_bytes, "{:?}", step.variant);
        if n % 16 == 0 {
            // matrices are for Vulkan only
            let options = naga::back::spv::Options { lang_version: (1, 4), ..Default::default() };
            naga::back::spv::write_vec(&module, &info, &options, None).expect("SPIR-V");
        }
    }
}

#[test]
fn shaders_beside_plans_are_valid_and_host_and_shader_agree() {
    for variant in Variant::beside_plans() {
        let (module, info) = resolve(&variant);
        compare_params(&module, variant.shader);
        compare_ports(&module, variant.shader);
        assert!(workgroup_bytes(&module) <= 16 << 10, "{variant:?}");
        assert!(module.entry_points[0].workgroup_size.iter().product::<u32>() <= 256);
        translate(&module, &info, false);
    }
}

#[test]
fn weights_are_valid_and_host_and_shader_agree() {
    let steps = weights_steps();
    assert!(steps.len() > 300, "only {} variants", steps.len());
    for (n, step) in steps.iter().enumerate() {
        let (module, info) = resolve(&step.variant);
        compare_bindings(&module, step);
        compare_params(&module, step.variant.shader);
        assert_eq!(workgroup_bytes(&module), step.workgroup_bytes, "{:?}", step.variant);
        assert!(module.entry_points[0].workgroup_size.iter().product::<u32>() <= 256);
        if n % 16 == 0 {
            translate(&module, &info, false);
        }
    }
}

#[test]
fn gradients_are_valid_and_host_and_shader_agree() {
    let steps = backward_steps();
    assert!(steps.len() > 1000, "only {} variants", steps.len());
    let shaders: HashSet<_> = steps.iter().map(|step| step.variant.shader).collect();
    assert_eq!(shaders.len(), 6);
    steps.par_iter().enumerate().for_each(|(n, step)| {
        let (module, info) = resolve(&step.variant);
        compare_bindings(&module, step);
        compare_params(&module, step.variant.shader);
        assert_eq!(workgroup_bytes(&module), step.workgroup_bytes, "{:?}", step.variant);
        assert!(step.workgroup_bytes <= 32768 && module.entry_points[0].workgroup_size.iter().product::<u32>() <= 256);
        if n % 16 == 0 {
            translate(&module, &info, false);
        }
    });
}

#[test]
fn linear_maps_are_valid_and_host_and_shader_agree() {
    for variant in Variant::all_linear() {
        let (module, info) = resolve(&variant);
        compare_params(&module, variant.shader);
        let bytes = match variant.shader {
            Shader::Linear => 8192,
            Shader::LinearFew => 4096,
            _ => 256,
        };
        assert_eq!(workgroup_bytes(&module), bytes, "{variant:?}");
        translate(&module, &info, false);
    }
}

/// What is left of a weight after its first f16 is stored times a factor, so that it does not fall among the subnormals; a
/// sum of such rests must be divided by it. No adapter of the tests has matrix units, so the text must do.
#[test]
fn rests_are_scaled_back() {
    let text = include_str!("../../shaders/cooperative.wgsl");
    let code: String = text.lines().filter_map(|line| line.split("//").next()).collect::<Vec<_>>().join("\n");
    assert_eq!((code.matches(") * REST_SCALE").count(), code.matches("* (1.0 / REST_SCALE)").count()), (1, 1));
}

/// The browser's own WGSL compiler must take every shader as well: it checks uniformity.
#[test]
#[ignore = "needs tint on the PATH: cargo test --test offline -- --ignored tint"]
fn tint_accepts_the_shaders() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut seen = HashSet::new();
    let variants = steps()
        .into_iter()
        .chain(weights_steps())
        .chain(backward_steps())
        .map(|step| step.variant)
        .chain(Variant::beside_plans());
    // one of each combination of snippets: overrides are open in the text, and tint checks them as such
    let variants = variants.filter(|v| seen.insert((v.shader, v.snippets.clone())));
    // naga does not know the directive, browsers need it
    let directive = |variant: &Variant| if needs_subgroups(variant) { "enable subgroups;\n" } else { "" };
    let texts = variants.map(|v| format!("{}{}", directive(&v), v.wgsl()));
    for text in texts.step_by(7) {
        let file = folder.path().join("shader.wgsl");
        std::fs::write(&file, &text).expect("a file");
        let output = std::process::Command::new("tint")
            .args(["--format", "wgsl", "-o"])
            .arg(folder.path().join("out.wgsl"))
            .arg(&file)
            .output()
            .expect("tint runs");
        assert!(output.status.success(), "{}\n{text}", String::from_utf8_lossy(&output.stderr));
    }
}
