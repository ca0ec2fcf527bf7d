//! `doctor`: what a report of a fault needs, on one page, with a test of every device against the oracle.

mod child;
mod page;
mod probe;
mod trials;

use std::time::Duration;

use serde_json::{Value, json};

use crate::about;
use crate::bench::seconds;
use crate::error::Error;
use crate::host::Cpu;
use crate::terminal::Terminal;
use child::Examined;
use probe::Part;

const EXAMPLE: &str = "\
Examples:
  cross-attention doctor
  cross-attention doctor --json > report.json
  WGPU_BACKEND=vulkan cross-attention doctor --seconds 10";

/// Print what a report of a fault needs, and test every device against the oracle
///
/// Each device is looked at by a process of its own: a driver that ends or hangs its process is reported like any other
/// fault. The exit code is 1 if a device gave a wrong result, or failed in any other way.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// Print one JSON object instead
    #[arg(long)]
    json: bool,
    /// Time for the tests of all devices together; a test that has begun is finished, and each device gets at least one
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = seconds)]
    seconds: Duration,
    /// What such a process looks at
    #[arg(long, hide = true)]
    part: Option<Part>,
}

/// What is known of the machine.
#[derive(Debug)]
struct Machine {
    system: String,
    cpu: Cpu,
    memory_mib: u64,
    vectors: &'static str,
    /// Variables that drivers and this program heed, those that are set.
    environment: Vec<(&'static str, String)>,
}

const VARIABLES: [&str; 9] = [
    "WGPU_BACKEND",
    "WGPU_ADAPTER_NAME",
    "WGPU_DX12_COMPILER",
    "VK_DRIVER_FILES",
    "VK_ICD_FILENAMES",
    "VK_INSTANCE_LAYERS",
    "LIBGL_ALWAYS_SOFTWARE",
    "LP_NATIVE_VECTOR_WIDTH",
    "RAYON_NUM_THREADS",
];

impl Machine {
    fn look() -> Self {
        let mut system = sysinfo::System::new();
        system.refresh_memory();
        let or_unknown = |text: Option<String>| text.unwrap_or_else(|| "unknown".to_owned());
        Self {
            system: format!(
                "{}, kernel {}, {}",
                or_unknown(sysinfo::System::long_os_version()),
                or_unknown(sysinfo::System::kernel_version()),
                sysinfo::System::cpu_arch(),
            ),
            cpu: Cpu::of_this_machine(),
            memory_mib: system.total_memory() >> 20,
            vectors: cross_attention::cpu::SimdLevel::best().name(),
            environment: VARIABLES.into_iter().filter_map(|name| Some((name, std::env::var(name).ok()?))).collect(),
        }
    }

    fn as_json(&self) -> Value {
        let environment: serde_json::Map<String, Value> =
            self.environment.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
        json!({
            "system": self.system,
            "cpu": self.cpu.model,
            "cores": self.cpu.cores,
            "threads": self.cpu.threads,
            "memory_mib": self.memory_mib,
            "vectors": self.vectors,
            "environment": environment,
        })
    }
}

/// Prints the page; whether all devices passed.
///
/// # Errors
/// Standard output that can't be written; a program that can't start itself.
pub(crate) fn doctor(args: &Args, terminal: &mut Terminal) -> Result<bool, Error> {
    if let Some(part) = args.part {
        return probe::probe(part, args.seconds, terminal).map(|()| true);
    }
    let machine = Machine::look();
    let bar = terminal.start_work("looking for adapters");
    let (adapters, fault) = child::adapters()?;
    let count = adapters.list.len();
    let mut devices: Vec<Examined> = vec![];
    let mut left = args.seconds;
    for (n, part) in std::iter::once(Part::Cpu).chain((0..count).map(Part::Adapter)).enumerate() {
        bar.set_message(format!("testing {part}"));
        // what one device does not need, the next ones have
        let share = left / u32::try_from(count + 1 - n).unwrap_or(u32::MAX);
        let device = child::examine(part, share)?;
        left = left.saturating_sub(device.spent());
        devices.push(device);
    }
    terminal.end_bar();
    let passed = fault.is_none() && devices.iter().all(Examined::passed);
    if args.json {
        let report = json!({
            "program": about::as_json(),
            "machine": machine.as_json(),
            "adapters": adapters.list,
            "adapters_fault": fault,
            "auto": adapters.auto,
            "devices": devices,
            "passed": passed,
        });
        terminal.line(format_args!("{report}"))?;
    } else {
        let page = page::page(&machine, &adapters, fault.as_deref(), &devices, passed);
        terminal.line(format_args!("{}", page.trim_end()))?;
    }
    Ok(passed)
}
