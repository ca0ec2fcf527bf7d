//! `bench`: times named workloads on a device, each verified before it is timed.

use std::time::{Duration, Instant};

use clap::builder::PossibleValuesParser;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use cross_attention::workload::{self, Workload};
use cross_attention::{AttentionProblem, Device, DeviceClass, Element, TimingSource, verify};
use serde_json::{Value, json};

use crate::error::Error;
use crate::options::{DeviceFlags, ElementName};
use crate::run::shape;
use crate::terminal::Terminal;
use crate::tuned::{CacheFlag, Tuned};

const EXAMPLE: &str = "\
Examples:
  cross-attention bench --list
  cross-attention bench whisper_decode gqa --device cpu
  cross-attention bench --element f16 --json > timings.jsonl";

/// Time named workloads, each verified before it is timed
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// Workloads to time; all if none is named
    #[arg(value_name = "NAME", value_parser = PossibleValuesParser::new(names()), hide_possible_values = true)]
    names: Vec<String>,
    /// List the workloads with their shapes, and do nothing else
    #[arg(long)]
    list: bool,
    /// Element type of query, key, value and output
    #[arg(long, value_enum, value_name = "TYPE", default_value_t)]
    element: ElementName,
    /// Time to spend on each workload, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    seconds: Duration,
    /// Print one JSON object a line instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceFlags,
    #[command(flatten)]
    cache: CacheFlag,
}

/// Rounds timed even where the time is up before.
const MIN_ROUNDS: usize = 5;

/// Query rows compared with the oracle before timing.
const VERIFIED_ROWS: usize = 64;

/// What was measured of one workload.
#[derive(Debug)]
struct Row {
    kernel: &'static str,
    max_abs_error: f64,
    first_ms: f64,
    median_ms: f64,
    p10_ms: f64,
    p90_ms: f64,
    rounds: usize,
    gflops: f64,
    gbps: f64,
    timing: TimingSource,
}

/// Times the workloads; whether all of them were right.
///
/// # Errors
/// What kept all of them from running.
pub(crate) fn bench(args: &Args, terminal: &mut Terminal) -> Result<bool, Error> {
    let mut workloads = workload::all();
    if !args.names.is_empty() {
        workloads = args.names.iter().filter_map(|name| workload::find(name)).collect();
    }
    if args.list {
        return list(&workloads, terminal).map(|()| true);
    }
    let choice = Device::choose_blocking(&args.device.device)?;
    let device = &choice.device;
    let tuned = Tuned::load(&args.cache, device, false, terminal);
    let reason = format!("device: {choice}");
    if args.json {
        terminal.note(format_args!("{reason}"));
    } else {
        terminal.line(format_args!("{reason}"))?;
        terminal.line(format_args!("driver: {}, {}", device.driver(), device.backend()))?;
    }
    terminal.start_bar(workloads.len());
    let mut table = headed_table();
    let mut failed = 0;
    for workload in &workloads {
        terminal.bar().set_message(workload.name);
        let result = measure(workload, args, device, tuned.as_ref(), terminal);
        if let Err(error) = &result {
            terminal.note(format_args!("error: {}: {}", workload.name, error.chain()));
            failed += 1;
        }
        if args.json {
            terminal.line(format_args!("{}", as_json(workload, args, device, &result)))?;
        } else {
            table.add_row(cells(workload, args, device, &result));
        }
        if terminal.closed() {
            break;
        }
        terminal.bar().inc(1);
    }
    terminal.end_bar();
    if !args.json {
        terminal.line(format_args!("{table}"))?;
    }
    Ok(failed == 0)
}

fn measure(
    workload: &Workload,
    args: &Args,
    device: &Device,
    tuned: Option<&Tuned>,
    terminal: &Terminal,
) -> Result<Row, Error> {
    let problem = stored(workload, args.element)?;
    let data = workload::inputs(&problem, workload.name);
    let inputs = data.as_inputs();
    let start = Instant::now();
    let prepared = Tuned::prepare(tuned, device, &problem, args.device.kernel, terminal)?;
    let results = prepared.run_blocking(&inputs)?;
    let first_ms = start.elapsed().as_secs_f64() * 1e3;
    let report = verify::verify_sample(&problem, &inputs, &results, VERIFIED_ROWS)?;
    if !report.passed() {
        return Err(Error::Verify { report: report.to_string() });
    }
    let mut rounds = 0usize;
    let mut on_round = || {
        rounds += 1;
        terminal.bar().set_message(format!("{}, round {rounds}", workload.name));
    };
    let timing = prepared.time_blocking(&inputs, MIN_ROUNDS, args.seconds, &mut on_round)?;
    let median_ms = timing.quantile(0.5);
    Ok(Row {
        kernel: prepared.kernel_name(),
        max_abs_error: report.max_abs_error,
        first_ms,
        median_ms,
        p10_ms: timing.quantile(0.1),
        p90_ms: timing.quantile(0.9),
        rounds: timing.millis.len(),
        gflops: workload::flops(&problem, &inputs) / (median_ms * 1e6),
        gbps: workload::bytes(&problem) / (median_ms * 1e6),
        timing: timing.source,
    })
}

/// The problem of a workload with its tensors of one element type.
pub(crate) fn stored(workload: &Workload, element: ElementName) -> Result<AttentionProblem, Error> {
    let mut spec = workload.spec.clone();
    for tensor in [&mut spec.query, &mut spec.key, &mut spec.value, &mut spec.output] {
        tensor.element = element.into();
    }
    Ok(AttentionProblem::new(spec)?)
}

fn list(workloads: &[Workload], terminal: &mut Terminal) -> Result<(), Error> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    for workload in workloads {
        let shape = AttentionProblem::new(workload.spec.clone()).map(|problem| shape(&problem))?;
        table.add_row([workload.name.to_owned(), shape, workload.about.to_owned()]);
    }
    terminal.line(format_args!("{table}"))
}

const COLUMNS: [&str; 12] = [
    "workload",
    "batch x heads x q_len x kv_len x dim",
    "kernel",
    "element",
    "median ms",
    "p10",
    "p90",
    "first",
    "GFLOP/s",
    "GB/s",
    "max error",
    "timing",
];

fn headed_table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(COLUMNS);
    for column in table.column_iter_mut().skip(4).take(7) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn cells(workload: &Workload, args: &Args, device: &Device, result: &Result<Row, Error>) -> Vec<String> {
    let mut cells = vec![workload.name.to_owned(), short_shape(workload)];
    match result {
        Ok(row) => cells.extend([
            row.kernel.to_owned(),
            Element::from(args.element).to_string(),
            format!("{:.3}", row.median_ms),
            format!("{:.3}", row.p10_ms),
            format!("{:.3}", row.p90_ms),
            format!("{:.1}", row.first_ms),
            format!("{:.1}", row.gflops),
            format!("{:.1}", row.gbps),
            format!("{:.1e}", row.max_abs_error),
            format!("{}{}", row.timing, if software(device) { ", software" } else { "" }),
        ]),
        Err(_) => cells.push("failed".to_owned()),
    }
    cells
}

/// `batch x q_heads/kv_heads x q_len x kv_len x head_dim/v_head_dim`, where equal ones are named once.
fn short_shape(workload: &Workload) -> String {
    let [batch, q_heads, q_len, head_dim] = workload.spec.query.layout.shape;
    let [_, kv_heads, kv_len, _] = workload.spec.key.layout.shape;
    let pair = |first, second| if first == second { format!("{first}") } else { format!("{first}/{second}") };
    let (heads, dim) = (pair(q_heads, kv_heads), pair(head_dim, workload.spec.value.layout.shape[3]));
    format!("{batch} x {heads} x {q_len} x {kv_len} x {dim}")
}

fn as_json(workload: &Workload, args: &Args, device: &Device, result: &Result<Row, Error>) -> Value {
    let [batch, q_heads, q_len, head_dim] = workload.spec.query.layout.shape;
    let [_, kv_heads, kv_len, _] = workload.spec.key.layout.shape;
    let mut object = json!({
        "workload": workload.name,
        "device": kind(device),
        "adapter": device.name(),
        "driver": device.driver(),
        "backend": device.backend(),
        "software": software(device),
        "element": Element::from(args.element).name(),
        "batch": batch,
        "q_heads": q_heads,
        "kv_heads": kv_heads,
        "q_len": q_len,
        "kv_len": kv_len,
        "head_dim": head_dim,
        "v_head_dim": workload.spec.value.layout.shape[3],
    });
    let measured = match result {
        Ok(row) => json!({
            "kernel": row.kernel,
            "median_ms": row.median_ms,
            "p10_ms": row.p10_ms,
            "p90_ms": row.p90_ms,
            "first_ms": row.first_ms,
            "rounds": row.rounds,
            "gflops": row.gflops,
            "gbps": row.gbps,
            "max_abs_error": row.max_abs_error,
            "timing": row.timing.to_string(),
        }),
        Err(error) => json!({ "error": error.chain() }),
    };
    if let (Value::Object(object), Value::Object(measured)) = (&mut object, measured) {
        object.extend(measured);
    }
    object
}

const fn kind(device: &Device) -> &'static str {
    match device {
        Device::Cpu => "cpu",
        Device::Oracle => "oracle",
        Device::Gpu(_) => "gpu",
    }
}

/// Whether a GPU is played by the CPU: such times say nothing about GPUs.
pub(crate) fn software(device: &Device) -> bool {
    matches!(device, Device::Gpu(context) if context.caps().class == DeviceClass::Software)
}

pub(crate) fn names() -> Vec<&'static str> {
    workload::all().into_iter().map(|workload| workload.name).collect()
}

pub(crate) fn seconds(text: &str) -> Result<Duration, &'static str> {
    let seconds: Option<f64> = text.parse().ok().filter(|&seconds| seconds >= 0.0);
    seconds
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or("needs a number of seconds, not below 0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_a_length_of_time() {
        assert_eq!(seconds("0.25"), Ok(Duration::from_millis(250)));
        for text in ["-1", "NaN", "inf", "1e300", "soon"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }
}
