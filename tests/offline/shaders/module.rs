//! A shader as naga reads it: validated, compared with what the host says of it, and translated.

use std::collections::HashSet;

use cross_attention::dispatch::{Shader, Step, Variant};
use naga::back::PipelineConstants;
use naga::proc::Layouter;
use naga::valid::{Capabilities, ModuleInfo, ShaderStages, SubgroupOperationSet, ValidationFlags, Validator};

/// Nothing beyond core WGSL: naga counts even `unpack2x16float` as a capability, since old GLSL lacks it.
const CORE: Capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;

/// What the cooperative kernel needs: matrices, f16 to store in workgroup memory, and subgroups to share the work.
const COOPERATIVE: Capabilities =
    CORE.union(Capabilities::COOPERATIVE_MATRIX).union(Capabilities::SHADER_FLOAT16).union(Capabilities::SUBGROUP);

/// Whether a shader is built with subgroup operations.
pub(super) fn needs_subgroups(variant: &Variant) -> bool {
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

/// A shader as a driver gets it: parsed, validated, overrides applied.
pub(super) fn resolve(variant: &Variant) -> (naga::Module, ModuleInfo) {
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
pub(super) fn compare_ports(module: &naga::Module, shader: Shader) {
    let in_wgsl: Vec<_> = storage_buffers(module).iter().map(|(binding, written, _)| (*binding, *written)).collect();
    let on_host: Vec<_> = shader.ports().iter().map(|port| (port.binding, port.written)).collect();
    assert_eq!(in_wgsl, on_host, "buffers of {}: in WGSL, on the host", shader.name());
}

/// Binding numbers, access and names of the storage buffers.
pub(super) fn compare_bindings(module: &naga::Module, step: &Step) {
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
pub(super) fn compare_params(module: &naga::Module, shader: Shader) {
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

pub(super) fn workgroup_bytes(module: &naga::Module) -> u64 {
    let mut layouter = Layouter::default();
    layouter.update(module.to_ctx()).expect("types have layouts");
    let variables = module.global_variables.iter().filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup);
    variables.map(|(_, variable)| u64::from(layouter[variable.ty].size).next_multiple_of(16)).sum()
}

pub(super) fn translate(module: &naga::Module, info: &ModuleInfo, subgroups: bool) {
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
