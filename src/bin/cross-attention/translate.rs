//! An assembled shader in a target's language, with the checks that wgpu puts in by default.

use std::collections::BTreeMap;

use clap::ValueEnum;
use cross_attention::dispatch::Variant;
use naga::back::{PipelineConstants, hlsl, msl, pipeline_constants, spv};
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, Module, ResourceBinding, ShaderStage, StorageAccess};

use crate::error::Error;

/// What a shader is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
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
            Self::Wgsl => "wgsl",
            Self::WgslWeb => "web.wgsl",
            Self::Spirv => "spv",
            Self::Hlsl => "hlsl",
            Self::Msl => "metal",
        }
    }

    /// The value of the flag.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Wgsl => "wgsl",
            Self::WgslWeb => "wgsl-web",
            Self::Spirv => "spirv",
            Self::Hlsl => "hlsl",
            Self::Msl => "msl",
        }
    }

    /// Workgroup memory that the target allows at most, in bytes: what DX12 has on every device.
    pub(crate) const fn max_workgroup_bytes(self) -> u64 {
        match self {
            Self::Hlsl => 32768,
            Self::Wgsl | Self::WgslWeb | Self::Spirv | Self::Msl => u64::MAX,
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A shader that was read and whose overrides are given.
#[derive(Debug)]
pub(crate) struct Source<'a> {
    variant: &'a Variant,
    text: String,
    module: Module,
    info: ModuleInfo,
    /// In the order of their numbers, which is the order in which wgpu lays them out.
    pub(crate) buffers: Vec<Buffer>,
    /// Invocations along x, y and z.
    pub(crate) workgroup_size: [u32; 3],
}

/// A buffer that the shader binds.
#[derive(Debug)]
pub(crate) struct Buffer {
    pub(crate) name: String,
    pub(crate) space: Space,
    /// The number in WGSL and SPIR-V, in group (descriptor set) 0.
    pub(crate) binding: u32,
    /// The register in HLSL: `b0`, `t0`, `u0`, each kind counted apart.
    pub(crate) register: String,
    /// The slot in MSL: all buffers counted, and behind them the slot of their sizes.
    pub(crate) slot: u8,
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

impl<'a> Source<'a> {
    /// Reads a variant.
    ///
    /// # Errors
    /// [`Error::Translate`], which is a fault of ours: tests read every variant.
    pub(crate) fn new(variant: &'a Variant) -> Result<Self, Error> {
        let text = variant.wgsl();
        let (module, info) = resolve(variant, &text).map_err(|reason| failed(variant, Target::Wgsl, reason))?;
        let workgroup_size = module.entry_points.first().map_or([0; 3], |entry| entry.workgroup_size);
        let buffers = buffers(&module);
        Ok(Self { variant, text, module, info, buffers, workgroup_size })
    }

    /// The bytes of a file, and the name of the entry point in it.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(crate) fn write(&self, target: Target) -> Result<(Vec<u8>, String), Error> {
        let main = || ENTRY_POINT.to_owned();
        let written = match target {
            Target::Wgsl => Ok((self.text.clone().into_bytes(), main())),
            Target::WgslWeb => Ok((self.variant.wgsl_web().into_bytes(), main())),
            Target::Spirv => self.spirv().map(|bytes| (bytes, main())),
            Target::Hlsl => self.hlsl().map(|(text, name)| (text.into_bytes(), name)),
            Target::Msl => self.msl().map(|(text, name)| (text.into_bytes(), name)),
        };
        written.map_err(|reason| failed(self.variant, target, reason))
    }
}

fn failed(variant: &Variant, target: Target, reason: String) -> Error {
    Error::Translate { shader: variant.shader.name(), target: target.name(), reason }
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

fn buffers(module: &Module) -> Vec<Buffer> {
    let mut found: Vec<(u32, Space, String)> = vec![];
    for (_, variable) in module.global_variables.iter() {
        let space = match variable.space {
            AddressSpace::Uniform => Space::Uniform,
            AddressSpace::Storage { access } if access.contains(StorageAccess::STORE) => Space::ReadWrite,
            AddressSpace::Storage { .. } => Space::Read,
            _ => continue,
        };
        if let Some(binding) = variable.binding {
            found.push((binding.binding, space, variable.name.clone().unwrap_or_default()));
        }
    }
    found.sort_by_key(|(binding, _, _)| *binding);
    let mut registers: BTreeMap<char, u32> = BTreeMap::new();
    let place = |(slot, (binding, space, name)): (u8, (u32, Space, String))| {
        let kind = match space {
            Space::Uniform => 'b',
            Space::Read => 't',
            Space::ReadWrite => 'u',
        };
        let number = registers.entry(kind).or_default();
        let register = format!("{kind}{number}");
        *number += 1;
        Buffer { name, space, binding, register, slot }
    };
    (0..).zip(found).map(place).collect()
}

impl Source<'_> {
    /// As wgpu's Vulkan backend on a driver with robustBufferAccess2, but for the version, which is the least that will do.
    fn spirv(&self) -> Result<Vec<u8>, String> {
        let binding = |buffer: &Buffer| {
            let info = spv::BindingInfo { descriptor_set: 0, binding: buffer.binding, binding_array_size: None };
            (buffer.resource(), info)
        };
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
            binding_map: self.buffers.iter().map(binding).collect(),
            ..spv::Options::default()
        };
        let pipeline = spv::PipelineOptions { shader_stage: STAGE, entry_point: ENTRY_POINT.to_owned() };
        let words =
            spv::write_vec(&self.module, &self.info, &options, Some(&pipeline)).map_err(|error| error.to_string())?;
        Ok(words.into_iter().flat_map(u32::to_le_bytes).collect())
    }

    /// As wgpu's DX12 backend.
    fn hlsl(&self) -> Result<(String, String), String> {
        let mut binding_map = hlsl::BindingMap::default();
        for buffer in &self.buffers {
            let register = buffer.register[1..].parse().map_err(|_| format!("register {}", buffer.register))?;
            binding_map.insert(buffer.resource(), hlsl::BindTarget { register, ..Default::default() });
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
            .write(&self.module, &self.info, None)
            .map_err(|error| error.to_string())?;
        Ok((text, name(written.entry_point_names)?))
    }

    /// As wgpu's Metal backend.
    fn msl(&self) -> Result<(String, String), String> {
        let mut resources = msl::EntryPointResources::default();
        for buffer in &self.buffers {
            let mutable = buffer.space == Space::ReadWrite;
            let target = msl::BindTarget { buffer: Some(buffer.slot), mutable, ..Default::default() };
            resources.resources.insert(buffer.resource(), target);
        }
        resources.sizes_buffer = self.buffers.iter().map(|buffer| buffer.slot + 1).max();
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
        let pipeline =
            msl::PipelineOptions { entry_point: Some((STAGE, ENTRY_POINT.to_owned())), ..Default::default() };
        let (text, written) =
            msl::write_string(&self.module, &self.info, &options, &pipeline).map_err(|error| error.to_string())?;
        Ok((text, name(written.entry_point_names)?))
    }
}

impl Buffer {
    const fn resource(&self) -> ResourceBinding {
        ResourceBinding { group: 0, binding: self.binding }
    }
}

/// The name of the one entry point.
fn name<E: std::fmt::Display>(names: Vec<Result<String, E>>) -> Result<String, String> {
    match names.into_iter().next() {
        Some(name) => name.map_err(|error| error.to_string()),
        None => Err("no entry point was written".to_owned()),
    }
}
