//! An assembled shader in a target's language, with the checks that wgpu puts in by default.

use std::collections::BTreeMap;

use clap::ValueEnum;
use cross_attention::plan::Variant;
use naga::back::{PipelineConstants, hlsl, msl, pipeline_constants, spv};
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, Module, ResourceBinding, ShaderStage, StorageAccess};

use crate::error::Error;

/// What a shader is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Target {
    /// WGSL as wgpu reads it, overrides open
    Wgsl,
    /// WGSL as browsers read it, overrides open
    WgslWeb,
    /// SPIR-V 1.3 for Vulkan, overrides resolved
    Spirv,
    /// HLSL for DX12, shader model 6.0, overrides resolved
    Hlsl,
    /// Metal's language, version 2.4, overrides resolved
    Msl,
}

impl Target {
    /// The ending of a file's name.
    pub(crate) const fn extension(self) -> &'static str {
        match self {
            Self::Wgsl | Self::WgslWeb => "wgsl",
            Self::Spirv => "spv",
            Self::Hlsl => "hlsl",
            Self::Msl => "metal",
        }
    }

    /// The value of the flag.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

/// A shader in a target's language.
#[derive(Debug)]
pub(crate) struct Translated {
    pub(crate) bytes: Vec<u8>,
    /// The name of the entry point; HLSL and MSL may rename it.
    pub(crate) entry_point: String,
    /// Invocations along x, y and z.
    pub(crate) workgroup_size: [u32; 3],
    pub(crate) buffers: Vec<Buffer>,
}

/// A buffer that the shader binds.
#[derive(Debug)]
pub(crate) struct Buffer {
    pub(crate) name: String,
    pub(crate) space: Space,
    /// The number in WGSL and SPIR-V, in group (descriptor set) 0.
    pub(crate) binding: u32,
    /// The place in the target's own numbering, as wgpu lays it out: `t0`, `u1`, `b0` in HLSL, `buffer(3)` in MSL.
    pub(crate) place: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Uniform,
    Read,
    ReadWrite,
}

impl Space {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Read => "read",
            Self::ReadWrite => "read_write",
        }
    }
}

const ENTRY_POINT: &str = "main";
const STAGE: ShaderStage = ShaderStage::Compute;

/// Translates a variant.
///
/// # Errors
/// [`Error::Translate`], which is a fault of ours: tests translate every variant.
pub(crate) fn translate(variant: &Variant, target: Target) -> Result<Translated, Error> {
    let shader = variant.shader.name();
    let failed = |reason: String| Error::Translate { shader, target: target.name(), reason };
    let text = variant.wgsl();
    let (module, info) = resolve(variant, &text).map_err(failed)?;
    let workgroup_size = module.entry_points.first().map_or([0; 3], |entry| entry.workgroup_size);
    let mut buffers = buffers(&module);
    let (bytes, entry_point) = match target {
        Target::Wgsl => (text.into_bytes(), ENTRY_POINT.to_owned()),
        Target::WgslWeb => (variant.wgsl_web().into_bytes(), ENTRY_POINT.to_owned()),
        Target::Spirv => (spirv(&module, &info).map_err(failed)?, ENTRY_POINT.to_owned()),
        Target::Hlsl => {
            let (text, entry_point) = hlsl(&module, &info, &mut buffers).map_err(failed)?;
            (text.into_bytes(), entry_point)
        }
        Target::Msl => {
            let (text, entry_point) = msl(&module, &info, &mut buffers).map_err(failed)?;
            (text.into_bytes(), entry_point)
        }
    };
    Ok(Translated { bytes, entry_point, workgroup_size, buffers })
}

/// The module with its overrides given, as wgpu hands it to a backend.
fn resolve(variant: &Variant, text: &str) -> Result<(Module, ModuleInfo), String> {
    let module = naga::front::wgsl::parse_str(text).map_err(|error| error.emit_to_string(text))?;
    let mut validator = Validator::new(ValidationFlags::all(), Capabilities::all());
    let info = validator.validate(&module).map_err(|error| error.emit_to_string(text))?;
    let mut constants = PipelineConstants::default();
    for (name, value) in &variant.overrides {
        constants.insert((*name).to_owned(), f64::from(*value));
    }
    let entry = Some((STAGE, ENTRY_POINT));
    let (module, info) =
        pipeline_constants::process_overrides(&module, &info, entry, &constants).map_err(|error| error.to_string())?;
    Ok((module.into_owned(), info.into_owned()))
}

/// The buffers in the order of their numbers, which is the order in which wgpu lays them out.
fn buffers(module: &Module) -> Vec<Buffer> {
    let mut buffers: Vec<Buffer> = module
        .global_variables
        .iter()
        .filter_map(|(_, variable)| {
            let space = match variable.space {
                AddressSpace::Uniform => Space::Uniform,
                AddressSpace::Storage { access } if access.contains(StorageAccess::STORE) => Space::ReadWrite,
                AddressSpace::Storage { .. } => Space::Read,
                _ => return None,
            };
            let name = variable.name.clone().unwrap_or_default();
            Some(Buffer { name, space, binding: variable.binding?.binding, place: None })
        })
        .collect();
    buffers.sort_by_key(|buffer| buffer.binding);
    buffers
}

/// As wgpu's Vulkan backend on a driver with robustBufferAccess2, but for the version, which is the least that will do.
fn spirv(module: &Module, info: &ModuleInfo) -> Result<Vec<u8>, String> {
    let options = spv::Options {
        lang_version: (1, 3),
        flags: spv::WriterFlags::LABEL_VARYINGS | spv::WriterFlags::FORCE_POINT_SIZE,
        bounds_check_policies: BoundsCheckPolicies {
            index: BoundsCheckPolicy::Restrict,
            ..BoundsCheckPolicies::default()
        },
        zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
        fake_missing_bindings: false,
        force_loop_bounding: true,
        binding_map: buffers(module)
            .iter()
            .map(|buffer| {
                let binding = buffer.binding;
                let info = spv::BindingInfo { descriptor_set: 0, binding, binding_array_size: None };
                (resource(buffer), info)
            })
            .collect(),
        ..spv::Options::default()
    };
    let pipeline = spv::PipelineOptions { shader_stage: STAGE, entry_point: ENTRY_POINT.to_owned() };
    let words = spv::write_vec(module, info, &options, Some(&pipeline)).map_err(|error| error.to_string())?;
    Ok(words.into_iter().flat_map(u32::to_le_bytes).collect())
}

/// As wgpu's DX12 backend: registers of each kind are numbered in the order of the bindings.
fn hlsl(module: &Module, info: &ModuleInfo, buffers: &mut [Buffer]) -> Result<(String, String), String> {
    let mut next: BTreeMap<char, u32> = BTreeMap::new();
    let mut binding_map = hlsl::BindingMap::default();
    for buffer in buffers {
        let kind = match buffer.space {
            Space::Uniform => 'b',
            Space::Read => 't',
            Space::ReadWrite => 'u',
        };
        let register = next.entry(kind).or_default();
        binding_map.insert(resource(buffer), hlsl::BindTarget { register: *register, ..Default::default() });
        buffer.place = Some(format!("{kind}{register}"));
        *register += 1;
    }
    let options = hlsl::Options {
        shader_model: hlsl::ShaderModel::V6_0,
        binding_map,
        fake_missing_bindings: false,
        zero_initialize_workgroup_memory: false,
        restrict_indexing: true,
        force_loop_bounding: true,
        ..hlsl::Options::default()
    };
    let pipeline = hlsl::PipelineOptions { entry_point: Some((STAGE, ENTRY_POINT.to_owned())) };
    let mut text = String::new();
    let written = hlsl::Writer::new(&mut text, &options, &pipeline)
        .write(module, info, None)
        .map_err(|error| error.to_string())?;
    Ok((text, name(written.entry_point_names)?))
}

/// As wgpu's Metal backend: buffers are numbered in the order of the bindings, and their sizes come last.
fn msl(module: &Module, info: &ModuleInfo, buffers: &mut [Buffer]) -> Result<(String, String), String> {
    let mut resources = msl::EntryPointResources::default();
    let mut slot = 0;
    for buffer in buffers {
        let mutable = buffer.space == Space::ReadWrite;
        let target = msl::BindTarget { buffer: Some(slot), mutable, ..Default::default() };
        resources.resources.insert(resource(buffer), target);
        buffer.place = Some(format!("buffer({slot})"));
        slot += 1;
    }
    resources.sizes_buffer = Some(slot);
    let checked = BoundsCheckPolicy::Restrict;
    let options = msl::Options {
        lang_version: (2, 4),
        per_entry_point_map: [(ENTRY_POINT.to_owned(), resources)].into_iter().collect(),
        fake_missing_bindings: false,
        bounds_check_policies: BoundsCheckPolicies {
            index: checked,
            buffer: checked,
            image_load: checked,
            binding_array: BoundsCheckPolicy::Unchecked,
        },
        zero_initialize_workgroup_memory: false,
        force_loop_bounding: true,
        ..msl::Options::default()
    };
    let pipeline = msl::PipelineOptions { entry_point: Some((STAGE, ENTRY_POINT.to_owned())), ..Default::default() };
    let (text, written) = msl::write_string(module, info, &options, &pipeline).map_err(|error| error.to_string())?;
    Ok((text, name(written.entry_point_names)?))
}

fn resource(buffer: &Buffer) -> ResourceBinding {
    ResourceBinding { group: 0, binding: buffer.binding }
}

/// The name of the one entry point.
fn name<E: std::fmt::Display>(names: Vec<Result<String, E>>) -> Result<String, String> {
    match names.into_iter().next() {
        Some(name) => name.map_err(|error| error.to_string()),
        None => Err("no entry point was written".to_owned()),
    }
}
