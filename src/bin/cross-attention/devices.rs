//! `devices`: the adapters there are, what they can do, and which one would be chosen.

use cross_attention::gpu::{self, AdapterSummary};
use cross_attention::wgpu::Features;
use cross_attention::{Choice, Device};
use serde_json::{Value, json};

use crate::error::Error;
use crate::table::Table;
use crate::terminal::Terminal;

const EXAMPLE: &str = "\
Examples:
  cross-attention devices
  WGPU_BACKEND=vulkan cross-attention devices --json";

/// List the adapters, what they can do, and which one would be chosen
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// Print one JSON object instead
    #[arg(long)]
    json: bool,
}

/// Lists the adapters.
///
/// # Errors
/// Standard output that can't be written.
pub(crate) fn devices(args: &Args, terminal: &mut Terminal) -> Result<(), Error> {
    let adapters = gpu::adapters_blocking();
    let auto = Device::auto();
    if args.json {
        let list: Vec<_> = adapters.iter().enumerate().map(|(index, adapter)| as_json(index, adapter)).collect();
        let auto = match auto {
            Ok(Choice { device, reason }) => {
                json!({ "device": device.name(), "driver": device.driver(), "backend": device.backend(), "reason": reason })
            }
            Err(error) => json!({ "error": error.to_string() }),
        };
        return terminal.line(format_args!("{}", json!({ "adapters": list, "auto": auto })));
    }
    if adapters.is_empty() {
        terminal.line(format_args!(
            "no adapter: no driver for Vulkan, Metal, DX12 or GL was found, or WGPU_BACKEND or WGPU_ADAPTER_NAME leaves none"
        ))?;
    } else {
        terminal.line(format_args!("{}", table(&adapters).text(terminal.width())))?;
    }
    match auto {
        Ok(Choice { device, reason }) => terminal.line(format_args!("auto chooses: {}: {reason}", device.name()))?,
        Err(error) => terminal.line(format_args!("auto chooses nothing: {error}"))?,
    }
    terminal.line(format_args!(
        "another: --device with a number of this list, a backend, part of an adapter's name, cpu or oracle; \
         WGPU_BACKEND (vulkan, metal, dx12, gl) and WGPU_ADAPTER_NAME narrow the list"
    ))
}

fn table(adapters: &[AdapterSummary]) -> Table {
    let mut table = Table::new(&["#", "adapter", "driver", "limits", "features"], 0..0);
    for (index, adapter) in adapters.iter().enumerate() {
        let AdapterSummary { info, caps, limits, features } = adapter;
        let subgroups = match subgroups(adapter) {
            None => "no".to_owned(),
            Some((min, max)) if min == max => format!("of {min}"),
            Some((min, max)) => format!("of {min} to {max}"),
        };
        table.push(vec![
            index.to_string(),
            format!("{}\n{}, {}", info.name, caps.class, info.backend.to_str()),
            driver(adapter),
            format!(
                "binding {} MiB\nworkgroup memory {} KiB\n{} invocations\n{} storage buffers",
                limits.max_storage_buffer_binding_size >> 20,
                limits.max_compute_workgroup_storage_size >> 10,
                limits.max_compute_invocations_per_workgroup,
                limits.max_storage_buffers_per_shader_stage,
            ),
            format!(
                "f16 {}\nsubgroups {subgroups}\ntimestamps {}",
                yes(features.contains(Features::SHADER_F16)),
                yes(features.contains(Features::TIMESTAMP_QUERY)),
            ),
        ]);
    }
    table
}

/// What a program may want to know of an adapter.
pub(crate) fn as_json(index: usize, adapter: &AdapterSummary) -> Value {
    let AdapterSummary { info, caps, limits, features } = adapter;
    json!({
        "index": index,
        "name": info.name,
        "type": caps.class.to_string(),
        "backend": info.backend.to_str(),
        "driver": driver(adapter),
        "max_storage_buffer_binding_bytes": limits.max_storage_buffer_binding_size,
        "max_buffer_bytes": limits.max_buffer_size,
        "max_workgroup_memory_bytes": limits.max_compute_workgroup_storage_size,
        "max_invocations": limits.max_compute_invocations_per_workgroup,
        "max_workgroups_per_dimension": limits.max_compute_workgroups_per_dimension,
        "max_storage_buffers": limits.max_storage_buffers_per_shader_stage,
        "f16": features.contains(Features::SHADER_F16),
        "subgroup_sizes": subgroups(adapter).map(|(min, max)| [min, max]),
        "timestamps": features.contains(Features::TIMESTAMP_QUERY),
    })
}

fn driver(AdapterSummary { info, .. }: &AdapterSummary) -> String {
    format!("{} {}", info.driver, info.driver_info).trim().to_owned()
}

/// Smallest and largest subgroup, where there are subgroups.
fn subgroups(AdapterSummary { info, features, .. }: &AdapterSummary) -> Option<(u32, u32)> {
    features.contains(Features::SUBGROUP).then_some((info.subgroup_min_size, info.subgroup_max_size))
}

const fn yes(is: bool) -> &'static str {
    if is { "yes" } else { "no" }
}
