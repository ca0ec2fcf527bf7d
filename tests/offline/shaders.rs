//! Every shader that a plan can choose, assembled, validated with its overrides applied, and translated; host and shader
//! compared.

use std::collections::HashSet;

use cross_attention::backward::{BackwardProblem, BackwardSpec};
use cross_attention::dispatch::{Shader, Step, Variant};
use cross_attention::plan::{BackwardPlan, WeightsPlan};
use cross_attention::weights::{HeadReduce, Keys, WeightsProblem, WeightsSpec};
use cross_attention::{
    AlibiSlopes, AttentionProblem, AttentionSpec, CooperativeMatrix, DeviceCaps, DeviceClass, Diagonal, Element,
    Kernel, Layout, Paged, Plan, ScoreStage, TensorSpec,
};
use naga::back::PipelineConstants;
use naga::proc::Layouter;
use naga::valid::{Capabilities, ModuleInfo, ShaderStages, SubgroupOperationSet, ValidationFlags, Validator};
use rayon::prelude::*;

/// Nothing beyond core WGSL: naga counts even `unpack2x16float` as a capability, since old GLSL lacks it.
const CORE: Capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;

/// What the cooperative kernel needs: matrices, f16 to store in workgroup memory, and subgroups to share the work.
const COOPERATIVE: Capabilities =
    CORE.union(Capabilities::COOPERATIVE_MATRIX).union(Capabilities::SHADER_FLOAT16).union(Capabilities::SUBGROUP);

/// Whether a shader is built with subgroup operations.
fn needs_subgroups(variant: &Variant) -> bool {
    variant.shader == Shader::Rows || variant.snippets.contains(&"row_parts_subgroup")
}

/// Core WGSL, and subgroups where a shader is made for them.
fn validator(variant: &Variant) -> Validator {
    let capabilities = if variant.shader == Shader::Cooperative { COOPERATIVE } else { CORE };
    if !needs_subgroups(variant) {
        return Validator::new(ValidationFlags::all(), capabilities);
    }
    let mut validator = Validator::new(ValidationFlags::all(), capabilities | Capabilities::SUBGROUP);
    validator.subgroup_stages(ShaderStages::COMPUTE).subgroup_operations(SubgroupOperationSet::all());
    validator
}

/// Query length, `head_dim`, `v_head_dim`: every tile that a plan can choose, and widths that fit no tile.
const SHAPES: [(usize, usize, usize); 9] = [
    (1, 1, 1),
    (3, 40, 24),
    (9, 64, 64),
    (9, 111, 59),
    (9, 128, 128),
    (5, 32, 160),
    (9, 192, 128),
    (9, 576, 512),
    (2, 2000, 2048),
];

/// Specs that between them need every combination of snippets and every set of override booleans.
fn specs() -> Vec<AttentionSpec> {
    let mut specs = vec![];
    let mut n = 0usize;
    for snippets in 0..16 * 3 * 2 * 2 {
        // more overrides than snippets: each combination of snippets meets several sets of overrides
        for _ in 0..4 {
            specs.push(spec(snippets, n));
            n += 1;
        }
    }
    // and one combination of snippets meets all of them
    specs.extend((0..64 * 9 * 5).map(|overrides| spec(95, overrides)));
    specs
}

fn spec(snippets: usize, overrides: usize) -> AttentionSpec {
    let (q_len, head_dim, v_head_dim) = SHAPES[overrides / 64 % SHAPES.len()];
    // enough keys to be split, now and then
    let kv_len = if overrides % 3 == 1 { 600 } else { 70 };
    // the shorter element is one or the other
    let short = if overrides % 7 == 3 { Element::Bf16 } else { Element::F16 };
    let element = |bit: usize| if snippets >> bit & 1 == 1 { short } else { Element::F32 };
    let tensor = |element, shape| TensorSpec { element, layout: Layout::bhld(shape) };
    let mut spec = AttentionSpec::from_tensors(
        tensor(element(0), [2, 4, q_len, head_dim]),
        tensor(element(1), [2, 2, kv_len, head_dim]),
        tensor(element(2), [2, 2, kv_len, v_head_dim]),
    );
    spec.output.element = element(3);
    let terms = snippets / 16;
    let scores = [2, 4, q_len, kv_len];
    spec.bias = match terms % 3 {
        0 => None,
        1 => Some(tensor(Element::F32, scores)),
        _ => Some(tensor(short, scores)),
    };
    let blocks = |width: usize| if width.is_multiple_of(32) { width / 32 } else { 1 };
    if overrides % 11 == 5 || overrides % 11 == 7 {
        (spec.key.element, spec.key_scale) = (Element::I8, Some(tensor(element(1), [2, 2, kv_len, blocks(head_dim)])));
    }
    if overrides % 11 == 5 || overrides % 11 == 8 {
        (spec.value.element, spec.value_scale) =
            (Element::I8, Some(tensor(element(2), [2, 2, kv_len, blocks(v_head_dim)])));
    }
    // scales are f32 or f16
    for scale in [&mut spec.key_scale, &mut spec.value_scale].into_iter().flatten() {
        scale.element = if scale.element == Element::F32 { Element::F32 } else { Element::F16 };
    }
    if overrides % 13 == 4 {
        let table_len = kv_len.div_ceil(16);
        let AttentionSpec { key, value, key_scale, value_scale, .. } = &mut spec;
        for of in [Some(key), Some(value), key_scale.as_mut(), value_scale.as_mut()].into_iter().flatten() {
            let [_, heads, _, width] = of.layout.shape;
            of.layout = Layout::bhld([2 * table_len, heads, 16, width]);
        }
        spec.paged = Some(Paged { table_len, kv_len });
    }
    spec.mask = (terms / 3 % 2 == 1).then(|| Layout::bhld(scores));
    spec.lse = terms / 6 % 2 == 1;
    spec.row_state = terms % 4 == 2;
    let on = |bit: usize| overrides >> bit & 1 == 1;
    spec.kv_lens = on(0);
    spec.row_ranges = on(1);
    spec.causal = Some(if on(2) { Diagonal::EndOfKeys } else { Diagonal::BottomRight });
    spec.softcap = on(3).then_some(5.0);
    spec.alibi_slopes = on(4).then_some(AlibiSlopes::PerHead);
    spec.q_lens = overrides % 5 == 1;
    spec.sinks = on(5);
    let stages =
        [None, Some(ScoreStage::Scaled), Some(ScoreStage::Capped), Some(ScoreStage::Masked), Some(ScoreStage::Probs)];
    spec.scores = stages[overrides / 576 % stages.len()];
    spec
}

/// Steps with different variants, of every kernel, for the smallest device and for a larger one.
fn steps() -> Vec<Step> {
    // both scales, and all terms
    let smallest = DeviceCaps { max_storage_buffers_per_shader_stage: 10, ..DeviceCaps::webgpu_defaults() };
    // the rows kernel runs nowhere else
    let with_subgroups = DeviceCaps { subgroups: Some((8, 8)), ..smallest.clone() };
    let mut larger = smallest.clone();
    larger.class = DeviceClass::Discrete;
    larger.max_compute_workgroup_storage_size = 32768;
    larger.subgroups = Some((32, 32));
    let mut seen = HashSet::new();
    let mut steps = vec![];
    for (n, spec) in specs().into_iter().enumerate() {
        let problem = AttentionProblem::new(spec).expect("a sound spec");
        // the cooperative kernel has a test of its own
        for kernel in Kernel::ALL.into_iter().filter(|kernel| *kernel != Kernel::Cooperative) {
            let caps = match kernel {
                _ if n % 4 == 3 => &larger,
                Kernel::Rows => &with_subgroups,
                _ => &smallest,
            };
            // their loops are written out, so they take long to read; a spread of what they share with the others will do
            let spread = match kernel {
                Kernel::Tiled => 17,
                Kernel::Rows => 37,
                Kernel::Split => 5,
                _ => 1,
            };
            if n % spread > 0 {
                continue;
            }
            let Ok(plan) = Plan::new(&problem, caps, Some(kernel)) else {
                let max = if kernel == Kernel::Rows { 512 } else { 576 };
                assert!(problem.head_dim() > max, "{kernel} refuses {problem:?}");
                continue;
            };
            // now and then with bindings that one head's keys do not fit
            let widest = problem.head_dim().max(problem.v_head_dim());
            let binding = (problem.kv_len() * widest * 2).max(2048) as u64;
            let tight = DeviceCaps { max_storage_buffer_binding_size: binding, ..caps.clone() };
            let cut = (n % 16 == 5).then(|| Plan::new(&problem, &tight, Some(kernel)));
            let cut = cut.iter().flatten().flat_map(Plan::steps);
            for step in plan.steps().iter().chain(cut) {
                assert!(step.workgroup_bytes <= u64::from(caps.max_compute_workgroup_storage_size), "{plan}");
                if seen.insert(step.variant.clone()) {
                    steps.push(step.clone());
                }
            }
        }
    }
    steps
}

/// A shader as a driver gets it: parsed, validated, overrides applied.
fn resolve(variant: &Variant) -> (naga::Module, ModuleInfo) {
    let text = variant.wgsl();
    let numbered = || text.lines().zip(1..).map(|(line, n)| format!("{n:4} {line}\n")).collect::<String>();
    let module = naga::front::wgsl::parse_str(&text)
        .unwrap_or_else(|error| panic!("{}\n{}", error.emit_to_string(&text), numbered()));
    let info = validator(variant)
        .validate(&module)
        .unwrap_or_else(|error| panic!("{}\n{}", error.emit_to_string(&text), numbered()));
    let declared: HashSet<_> = module.overrides.iter().filter_map(|(_, o)| o.name.clone()).collect();
    let given: HashSet<_> = variant.overrides.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(declared, given, "overrides of {}: declared in WGSL, given by the host", variant.shader.name());
    let mut constants = PipelineConstants::default();
    for (name, value) in &variant.overrides {
        constants.insert((*name).to_owned(), f64::from(*value));
    }
    let entry = Some((naga::ShaderStage::Compute, "main"));
    let (module, _) = naga::back::pipeline_constants::process_overrides(&module, &info, entry, &constants)
        .unwrap_or_else(|error| panic!("{error}\n{}", numbered()));
    let module = module.into_owned();
    let info = validator(variant).validate(&module).unwrap_or_else(|error| panic!("{error:?}\n{}", numbered()));
    (module, info)
}

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

/// Steps of the cooperative kernel, for each size of matrix and several sizes of memory.
fn cooperative_steps() -> Vec<Step> {
    let mut caps = DeviceCaps { shader_f16: true, subgroups: Some((32, 64)), ..DeviceCaps::webgpu_defaults() };
    let mut seen = HashSet::new();
    let mut steps = vec![];
    for (n, mut spec) in specs().into_iter().enumerate().filter(|(n, _)| n % 5 == 0) {
        for tensor in [&mut spec.query, &mut spec.key, &mut spec.value] {
            tensor.element = Element::F16;
        }
        (spec.key_scale, spec.value_scale) = (None, None);
        caps.class = [DeviceClass::Discrete, DeviceClass::Software][n / 5 % 2];
        caps.cooperative_matrix = Some([CooperativeMatrix::Size8, CooperativeMatrix::Size16][n / 10 % 2]);
        caps.max_compute_workgroup_storage_size = [32768, 49152, 65536][n / 20 % 3];
        caps.subgroups = Some([(4, 4), (8, 8), (32, 64)][n / 60 % 3]);
        let problem = AttentionProblem::new(spec).expect("a sound spec");
        let Ok(plan) = Plan::new(&problem, &caps, Some(Kernel::Cooperative)) else {
            assert_eq!(problem.head_dim(), 2000, "{problem:?}");
            continue;
        };
        let own = plan.steps().iter().filter(|step| step.variant.shader == Shader::Cooperative);
        for step in own.filter(|step| seen.insert(step.variant.clone())) {
            assert!(step.workgroup_bytes <= u64::from(caps.max_compute_workgroup_storage_size), "{plan}");
            steps.push(step.clone());
        }
    }
    steps
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

/// Steps of selected weights, each variant once.
fn weights_steps() -> Vec<Step> {
    // the scales of the keys, and all terms
    let caps = DeviceCaps { max_storage_buffers_per_shader_stage: 9, ..DeviceCaps::webgpu_defaults() };
    let mut seen = HashSet::new();
    let mut steps = vec![];
    for (n, spec) in specs().into_iter().enumerate() {
        let problem = AttentionProblem::new(spec).expect("a sound spec");
        let spec = WeightsSpec {
            reduce: [HeadReduce::Each, HeadReduce::Mean][n % 2],
            keys: if n / 2 % 2 == 0 { Keys::default() } else { Keys::Segments(vec![0..7, 7..70]) },
            ..WeightsSpec::default()
        };
        let wanted = WeightsProblem::new(&problem, &spec).expect("a sound selection");
        let plan = WeightsPlan::new(&wanted, &caps).expect("it fits");
        steps.extend(plan.steps().iter().filter(|step| seen.insert(step.variant.clone())).cloned());
    }
    steps
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

/// Steps of gradients, each variant once: every gradient that there is, or some of them, biases of every shape, chosen weights, for the
/// smallest device and for others.
fn backward_steps() -> Vec<Step> {
    // both scales, and all terms
    let smallest = DeviceCaps { max_storage_buffers_per_shader_stage: 10, ..DeviceCaps::webgpu_defaults() };
    let classes = [DeviceClass::Discrete, DeviceClass::Integrated, DeviceClass::Software];
    let mut seen = HashSet::new();
    let mut steps = vec![];
    for (n, mut spec) in specs().into_iter().enumerate().filter(|(n, _)| n % 7 == 0) {
        spec.scores = None;
        if let Some(bias) = &mut spec.bias {
            let mut shape = bias.layout.shape;
            (0..4).filter(|axis| (n / 7) >> axis & 1 == 1).for_each(|axis| shape[axis] = 1);
            bias.layout = Layout::bhld(shape);
        }
        let mut backward = BackwardSpec::all(spec);
        backward.d_output.element = [Element::F32, Element::F16, Element::Bf16][n % 3];
        let gradients = [&mut backward.d_query, &mut backward.d_key, &mut backward.d_value, &mut backward.d_bias];
        for (axis, gradient) in gradients.into_iter().enumerate() {
            *gradient = gradient
                .filter(|_| n / 3 % 5 != axis)
                .map(|of| TensorSpec { element: [Element::F32, Element::F16, Element::Bf16][n / 9 % 3], ..of });
        }
        (backward.d_lse, backward.d_scale) = (n % 2 == 0, n % 4 == 1);
        backward.d_weights = (n % 6 == 0).then(WeightsSpec::default);
        let problem = BackwardProblem::new(backward).expect("a sound spec");
        let caps = DeviceCaps { class: classes[n / 7 % 3], ..smallest.clone() };
        let plan = BackwardPlan::new(&problem, &caps).expect("it fits");
        plan.check(&caps).expect("it runs on what it was made for");
        assert!(!plan.to_string().is_empty());
        steps.extend(plan.steps().iter().filter(|step| seen.insert(step.variant.clone())).cloned());
    }
    steps
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
        assert!(step.workgroup_bytes <= 16384 && module.entry_points[0].workgroup_size.iter().product::<u32>() <= 256);
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

/// Binding number, access and name of each storage buffer.
fn storage_buffers(module: &naga::Module) -> Vec<(u32, bool, String)> {
    let mut in_wgsl = vec![];
    for (_, variable) in module.global_variables.iter() {
        if let naga::AddressSpace::Storage { access } = variable.space {
            let binding = variable.binding.as_ref().expect("a storage buffer has a binding");
            assert_eq!(binding.group, 0);
            let written = access.contains(naga::StorageAccess::STORE);
            in_wgsl.push((binding.binding, written, variable.name.clone().unwrap_or_default()));
        }
    }
    in_wgsl.sort();
    in_wgsl
}

/// Binding numbers and access of the storage buffers of a shader beside plans.
fn compare_ports(module: &naga::Module, shader: Shader) {
    let in_wgsl: Vec<_> = storage_buffers(module).iter().map(|(binding, written, _)| (*binding, *written)).collect();
    let on_host: Vec<_> = shader.ports().iter().map(|port| (port.binding, port.written)).collect();
    assert_eq!(in_wgsl, on_host, "buffers of {}: in WGSL, on the host", shader.name());
}

/// Binding numbers, access and names of the storage buffers.
fn compare_bindings(module: &naga::Module, step: &Step) {
    let in_wgsl = storage_buffers(module);
    // to a shader, what is in the workspace is what is returned elsewhere
    let name = |binding: &cross_attention::dispatch::Binding| match binding.slot.name() {
        "workspace" => "scores".to_owned(),
        "part_row_state" => "lse".to_owned(),
        "d_query" | "d_key" | "d_value" | "d_bias" | "d_alibi_slopes" | "d_sinks" | "d_scale" => "output".to_owned(),
        name => name.trim_start_matches("part_").to_owned(),
    };
    let number = |name: &str| {
        let names = ["params", "query", "key", "value", "bias", "mask", "row_data", "output", "lse", "scores"];
        let names = names.into_iter().chain(["selection", "weights", "key_scale", "value_scale", "d_output", "d_lse"]);
        let name = if matches!(name, "states" | "gradients") { "scores" } else { name };
        (0..).zip(names).find(|(_, known)| *known == name).expect("a known buffer").0
    };
    let mut on_host: Vec<_> =
        step.bindings.iter().map(|binding| (number(&name(binding)), binding.written, name(binding))).collect();
    on_host.sort();
    assert_eq!(in_wgsl, on_host, "buffers of {:?}: in WGSL, on the host", step.variant);
    // WebGPU promises 8 to a shader; scales of signed bytes are the only ones above
    let scales = on_host.iter().filter(|(_, _, name)| name.ends_with("_scale")).count();
    assert!(on_host.len() <= 8 + scales);
}

/// Names and offsets of the uniform's fields.
fn compare_params(module: &naga::Module, shader: Shader) {
    let (_, params) = module
        .global_variables
        .iter()
        .find(|(_, variable)| variable.space == naga::AddressSpace::Uniform)
        .expect("a uniform");
    let naga::TypeInner::Struct { members, .. } = &module.types[params.ty].inner else {
        panic!("params is not a struct");
    };
    let fields: Vec<_> = members.iter().map(|m| (m.name.as_deref().unwrap_or(""), m.offset as usize)).collect();
    assert_eq!(fields, shader.param_fields(), "{}", shader.name());
}

fn workgroup_bytes(module: &naga::Module) -> u64 {
    let mut layouter = Layouter::default();
    layouter.update(module.to_ctx()).expect("types have layouts");
    let variables = module.global_variables.iter().filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup);
    variables.map(|(_, variable)| u64::from(layouter[variable.ty].size).next_multiple_of(16)).sum()
}

fn translate(module: &naga::Module, info: &ModuleInfo, subgroups: bool) {
    let pipeline =
        naga::back::spv::PipelineOptions { shader_stage: naga::ShaderStage::Compute, entry_point: "main".into() };
    let mut options = naga::back::spv::Options::default();
    if subgroups {
        options.lang_version = (1, 3);
    }
    naga::back::spv::write_vec(module, info, &options, Some(&pipeline)).expect("SPIR-V");
    let mut options = naga::back::msl::Options { fake_missing_bindings: true, ..Default::default() };
    if subgroups {
        options.lang_version = (2, 1);
    }
    naga::back::msl::write_string(module, info, &options, &naga::back::msl::PipelineOptions::default()).expect("MSL");
    let mut options = naga::back::hlsl::Options { fake_missing_bindings: true, ..Default::default() };
    if subgroups {
        options.shader_model = naga::back::hlsl::ShaderModel::V6_0;
    }
    let mut text = String::new();
    naga::back::hlsl::Writer::new(&mut text, &options, &naga::back::hlsl::PipelineOptions::default())
        .write(module, info, None)
        .expect("HLSL");
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
