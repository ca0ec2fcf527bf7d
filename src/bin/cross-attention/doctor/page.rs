//! The page for people: 80 columns, whatever the terminal, but for words that are longer.

use std::fmt::Write;

use serde_json::Value;

use super::Machine;
use super::child::{Adapters, Examined};
use super::probe::Part;
use crate::about;
use crate::host::Cpu;
use crate::table::Table;
use crate::text::wrap;

const COLUMNS: usize = 80;
/// Columns of the names of facts.
const NAME: usize = 10;

pub(super) fn page(
    machine: &Machine,
    adapters: &Adapters,
    fault: Option<&str>,
    devices: &[Examined],
    passed: bool,
) -> String {
    let mut page = Page::default();
    page.fact("version", about::VERSION);
    for (name, value) in about::lines() {
        page.fact(name, &value);
    }
    page.fact("system", &machine.system);
    let Machine { cpu: Cpu { model, cores, threads }, memory_mib, vectors, .. } = machine;
    let cores = cores.map_or_else(String::new, |cores| format!("{cores} cores, "));
    page.fact("cpu", &format!("{model}, {cores}{threads} threads, {vectors}, {memory_mib} MiB of memory"));
    if !machine.environment.is_empty() {
        page.head("Environment");
    }
    for (name, value) in &machine.environment {
        page.line(&format!("{name}={value}"));
    }
    page.head("Adapters");
    for adapter in &adapters.list {
        page.adapter(adapter);
    }
    if adapters.list.is_empty() && fault.is_none() {
        page.line("none: no driver was found, or WGPU_BACKEND leaves none");
    }
    if let Some(fault) = fault {
        page.line(&format!("FAILED: they could not be looked for to the end: {fault}"));
    }
    if let Some(auto) = &adapters.auto {
        page.line(&format!("auto chooses {auto}"));
    }
    page.head("Kernels that typical problems get");
    page.text.push_str(&kernels(devices));
    page.text.push('\n');
    page.head("Tests against the oracle");
    for device in devices {
        page.tested(device);
    }
    page.line("");
    page.line(if passed { "All is well." } else { "Not all is well: see FAILED above." });
    page.text
}

#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn line(&mut self, line: &str) {
        // writing to a String cannot fail
        let _ = writeln!(self.text, "{}", wrap(line, COLUMNS));
    }

    fn head(&mut self, head: &str) {
        let _ = writeln!(self.text, "\n{head}");
    }

    fn fact(&mut self, name: &str, value: &str) {
        self.line(&format!("{name:<NAME$} {value}"));
    }

    /// An adapter as `devices --json` has it.
    fn adapter(&mut self, adapter: &Value) {
        let text = |name: &str| adapter[name].as_str().unwrap_or_default();
        let number = |name: &str| adapter[name].as_u64().unwrap_or_default();
        let has = |name: &str| if adapter[name] == true { name.to_owned() } else { format!("no {name}") };
        self.line(&format!("{}: {}, {}, {}", number("index"), text("name"), text("backend"), text("type")));
        self.line(&format!("  driver {}", text("driver")));
        let subgroups = match adapter["subgroup_sizes"].as_array().map(Vec::as_slice) {
            Some([min, max]) if min == max => format!("subgroups of {min}"),
            Some([min, max]) => format!("subgroups of {min} to {max}"),
            _ => "no subgroups".to_owned(),
        };
        self.line(&format!(
            "  bindings of {} MiB, {} KiB of workgroup memory, {} invocations, {} storage buffers, {} workgroups a side, \
             {subgroups}, {}, {}",
            number("max_storage_buffer_binding_bytes") >> 20,
            number("max_workgroup_memory_bytes") >> 10,
            number("max_invocations"),
            number("max_storage_buffers"),
            number("max_workgroups_per_dimension"),
            has("f16"),
            has("timestamps"),
        ));
    }

    fn tested(&mut self, device: &Examined) {
        let right = device.trials.iter().filter(|trial| trial.fault.is_none()).count();
        let worst = device.trials.iter().filter_map(|trial| trial.worst).fold(0.0, f64::max);
        let seconds = device.spent().as_secs_f64();
        let verdict = if device.passed() { "passed" } else { "FAILED" };
        let left_out = match device.left_out {
            0 => String::new(),
            count => format!(", {count} not tried for want of time (--seconds)"),
        };
        self.fact(
            &device.part.to_string(),
            &format!(
                "{verdict}: {right} of {} right, errors at worst {worst:.2} of what is allowed, {seconds:.1} s{left_out}",
                device.trials.len()
            ),
        );
        for trial in &device.trials {
            if let Some(fault) = &trial.fault {
                fault.lines().enumerate().for_each(|(n, line)| {
                    let before = if n == 0 { format!("{}: ", trial.name) } else { String::new() };
                    self.line(&format!("  {before}{line}"));
                });
            }
        }
        for text in device.fault.iter().chain(&device.warnings) {
            self.line(&format!("  {text}"));
        }
    }
}

fn kernels(devices: &[Examined]) -> String {
    let known: Vec<&Examined> = devices.iter().filter(|device| !device.kernels.is_empty()).collect();
    let names: Vec<String> = known.iter().map(|device| device.part.to_string()).collect();
    let header: Vec<&str> = std::iter::once("").chain(names.iter().map(String::as_str)).collect();
    let mut table = Table::new(&header, 0..0);
    let rows = known.first().map_or(0, |device| device.kernels.len());
    let mut refusals = String::new();
    for row in 0..rows {
        let mut cells = vec![known[0].kernels[row].problem.clone()];
        for device in &known {
            let kernel = &device.kernels[row].kernel;
            let (name, why) = kernel.split_once(": ").unwrap_or((kernel, ""));
            let strategy = device.kernels[row].strategy.iter();
            cells.push(strategy.fold(name.to_owned(), |name, strategy| format!("{name}, {strategy}")));
            if !why.is_empty() {
                let Part::Adapter(number) = device.part else { continue };
                let line = format!("{} on {number}: {why}", device.kernels[row].problem);
                let _ = writeln!(refusals, "{}", wrap(&line, COLUMNS));
            }
        }
        table.push(cells);
    }
    let text = table.text(Some(COLUMNS));
    if refusals.is_empty() { text } else { format!("{text}\n{}", refusals.trim_end()) }
}
