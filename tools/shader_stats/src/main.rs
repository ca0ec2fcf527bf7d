//! Compiles a compute shader with a Vulkan driver and prints, as one JSON object, what the driver's compiler says of it:
//! statistics and assembly. Nothing is dispatched, so a driver without its GPU will do.
//!
//!     shader_stats FILE.spv [SUBGROUP_SIZE]
//!
//! The shader has one entry point, `main`, and buffers in descriptor set 0. Needs VK_KHR_pipeline_executable_properties.

use std::error::Error;
use std::ffi::{CStr, c_char};
use std::io::Write as _;

use ash::vk;
use serde_json::{Map, Value, json};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let file = args.next().ok_or("usage: shader_stats FILE.spv [SUBGROUP_SIZE]")?;
    let subgroup_size = args.next().map(|size| size.parse()).transpose()?;
    let code: Vec<u32> = std::fs::read(&file)?
        .chunks_exact(4)
        .map(|bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
        .collect();
    // SAFETY: the calls follow Vulkan's order, and all that is pointed to outlives the call it is given to; the shader
    // was validated when it was written
    let found = unsafe { compile(&code, subgroup_size)? };
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{found}")?;
    stdout.flush()?;
    // a driver without its GPU may not survive being closed
    std::process::exit(0);
}

/// Binding and type of every buffer: read off the decorations and variables of the module.
fn buffers(code: &[u32]) -> Result<Vec<(u32, vk::DescriptorType)>, Box<dyn Error>> {
    const VARIABLE: u32 = 59;
    const DECORATE: u32 = 71;
    const BINDING: u32 = 33;
    if code.first() != Some(&0x0723_0203) {
        return Err("not a SPIR-V module of this machine's byte order".into());
    }
    let (mut bindings, mut types) = (vec![], vec![]);
    let mut at = 5;
    while at < code.len() {
        let (length, operation) = ((code[at] >> 16) as usize, code[at] & 0xffff);
        match (operation, code.get(at + 1..at + length).ok_or("a broken SPIR-V module")?) {
            (DECORATE, [id, BINDING, binding, ..]) => bindings.push((*id, *binding)),
            (VARIABLE, [_, id, 2, ..]) => types.push((*id, vk::DescriptorType::UNIFORM_BUFFER)),
            (VARIABLE, [_, id, 12, ..]) => types.push((*id, vk::DescriptorType::STORAGE_BUFFER)),
            _ => {}
        }
        at += length.max(1);
    }
    let binding = |id: u32| bindings.iter().find(|(of, _)| *of == id).map(|(_, binding)| *binding);
    Ok(types.into_iter().filter_map(|(id, kind)| Some((binding(id)?, kind))).collect())
}

unsafe fn compile(code: &[u32], subgroup_size: Option<u32>) -> Result<Value, Box<dyn Error>> {
    unsafe {
        let vulkan = ash::Entry::load()?;
        let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_3);
        let instance =
            vulkan.create_instance(&vk::InstanceCreateInfo::default().application_info(&application), None)?;
        let adapter = *instance.enumerate_physical_devices()?.first().ok_or("no Vulkan device")?;
        let mut driver = vk::PhysicalDeviceDriverProperties::default();
        let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut driver);
        instance.get_physical_device_properties2(adapter, &mut properties);
        let device_name = text(&properties.properties.device_name);

        // wgpu asks for robustBufferAccess and, where it is, for robustBufferAccess2; compilers show no difference
        let extensions = [ash::khr::pipeline_executable_properties::NAME.as_ptr()];
        let mut executables =
            vk::PhysicalDevicePipelineExecutablePropertiesFeaturesKHR::default().pipeline_executable_info(true);
        let mut sizes =
            vk::PhysicalDeviceVulkan13Features::default().subgroup_size_control(true).compute_full_subgroups(true);
        let queues = [vk::DeviceQueueCreateInfo::default().queue_family_index(0).queue_priorities(&[1.0])];
        let info = vk::DeviceCreateInfo::default()
            .queue_create_infos(&queues)
            .enabled_extension_names(&extensions)
            .push_next(&mut executables)
            .push_next(&mut sizes);
        let device = instance.create_device(adapter, &info, None)?;

        let bindings: Vec<_> = buffers(code)?
            .into_iter()
            .map(|(binding, kind)| {
                vk::DescriptorSetLayoutBinding::default()
                    .binding(binding)
                    .descriptor_type(kind)
                    .descriptor_count(1)
                    .stage_flags(vk::ShaderStageFlags::COMPUTE)
            })
            .collect();
        let sets = [device
            .create_descriptor_set_layout(&vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings), None)?];
        let layout =
            device.create_pipeline_layout(&vk::PipelineLayoutCreateInfo::default().set_layouts(&sets), None)?;
        let module = device.create_shader_module(&vk::ShaderModuleCreateInfo::default().code(code), None)?;
        let mut required = vk::PipelineShaderStageRequiredSubgroupSizeCreateInfo::default()
            .required_subgroup_size(subgroup_size.unwrap_or_default());
        let mut stage = vk::PipelineShaderStageCreateInfo::default()
            .stage(vk::ShaderStageFlags::COMPUTE)
            .module(module)
            .name(c"main");
        if subgroup_size.is_some() {
            stage = stage.push_next(&mut required);
        }
        let flags = vk::PipelineCreateFlags::CAPTURE_STATISTICS_KHR
            | vk::PipelineCreateFlags::CAPTURE_INTERNAL_REPRESENTATIONS_KHR;
        let info = vk::ComputePipelineCreateInfo::default().flags(flags).stage(stage).layout(layout);
        let pipelines = device.create_compute_pipelines(vk::PipelineCache::null(), &[info], None);
        let pipeline = pipelines.map_err(|(_, error)| error)?[0];

        let asked = ash::khr::pipeline_executable_properties::Device::new(&instance, &device);
        let of = vk::PipelineInfoKHR::default().pipeline(pipeline);
        let executables = asked.get_pipeline_executable_properties(&of)?;
        let executable = executables.first().ok_or("the driver tells nothing of the pipeline")?;
        let which = vk::PipelineExecutableInfoKHR::default().pipeline(pipeline).executable_index(0);
        let statistics: Map<String, Value> = asked
            .get_pipeline_executable_statistics(&which)?
            .iter()
            .map(|statistic| (text(&statistic.name), number(statistic)))
            .collect();
        Ok(json!({
            "device": device_name,
            "driver": format!("{} {}", text(&driver.driver_name), text(&driver.driver_info)),
            "subgroup_size": executable.subgroup_size,
            "statistics": statistics,
            "texts": texts(&asked, &device, &which)?,
        }))
    }
}

unsafe fn number(statistic: &vk::PipelineExecutableStatisticKHR<'_>) -> Value {
    // SAFETY: the format says which field of the union is filled
    unsafe {
        match statistic.format {
            vk::PipelineExecutableStatisticFormatKHR::BOOL32 => json!(statistic.value.b32 != 0),
            vk::PipelineExecutableStatisticFormatKHR::INT64 => json!(statistic.value.i64),
            vk::PipelineExecutableStatisticFormatKHR::UINT64 => json!(statistic.value.u64),
            _ => json!(statistic.value.f64),
        }
    }
}

/// The compiler's texts by name, the assembly among them.
unsafe fn texts(
    asked: &ash::khr::pipeline_executable_properties::Device,
    device: &ash::Device,
    which: &vk::PipelineExecutableInfoKHR<'_>,
) -> Result<Map<String, Value>, Box<dyn Error>> {
    // asked twice: ash's own call does not fill the buffers
    let ask = asked.fp().get_pipeline_executable_internal_representations_khr;
    let mut count = 0;
    let mut found;
    let mut buffers: Vec<Vec<u8>>;
    unsafe {
        ask(device.handle(), which, &mut count, std::ptr::null_mut()).result()?;
        found = vec![vk::PipelineExecutableInternalRepresentationKHR::default(); count as usize];
        ask(device.handle(), which, &mut count, found.as_mut_ptr()).result()?;
        buffers = found.iter().map(|one| vec![0; one.data_size]).collect();
        for (one, buffer) in found.iter_mut().zip(&mut buffers) {
            one.p_data = buffer.as_mut_ptr().cast();
        }
        ask(device.handle(), which, &mut count, found.as_mut_ptr()).result()?;
    }
    let texts = found.iter().zip(&buffers).filter(|(one, _)| one.is_text != 0);
    Ok(texts
        .map(|(one, buffer)| {
            let end = buffer.iter().position(|&byte| byte == 0).unwrap_or(buffer.len());
            (text(&one.name), json!(String::from_utf8_lossy(&buffer[..end])))
        })
        .collect())
}

/// A name of Vulkan's: bytes up to a zero.
fn text(name: &[c_char]) -> String {
    let bytes: Vec<u8> = name.iter().map(|&c| c.cast_unsigned()).collect();
    CStr::from_bytes_until_nul(&bytes).map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
