//! `bench`: times named workloads on a device, each verified before it is timed.

mod report;

use std::hint::black_box;
use std::time::{Duration, Instant};

use clap::builder::PossibleValuesParser;
use cross_attention::backward::{BackwardInputs, BackwardProblem, BackwardSpec};
use cross_attention::gpu::{HostCost, KernelTiming};
use cross_attention::workload::{self, Workload};
use cross_attention::{
    AttentionProblem, Device, DeviceClass, Element, KernelChoice, Layout, Plan, PreparedAttention, Roofline, Timing,
    cpu, verify,
};

use crate::error::Error;
use crate::open::{self, CacheFlag};
use crate::options::DeviceFlags;
use crate::run::shape;
use crate::shape::KvFlags;
use crate::table::Table;
use crate::terminal::Terminal;
use crate::text::wrap;
use crate::tuned::{TuneFlag, Tuned};

const EXAMPLE: &str = "\
Examples:
  cross-attention bench --list
  cross-attention bench whisper_decode gqa --device cpu
  cross-attention bench whisper_decode fid_decode --kv int8_32 --pages 16
  cross-attention bench square_1k perceiver --backward --device cpu
  cross-attention bench --element f16 --json > timings.jsonl";

/// Time named workloads, each verified before it is timed
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// Workloads to time; all if none is named
    #[arg(value_name = "NAME", value_parser = PossibleValuesParser::new(names()), hide_possible_values = true)]
    names: Vec<String>,
    /// List the workloads with their shapes, and do nothing else
    #[arg(long, conflicts_with_all = ["element", "kv", "pages", "backward", "seconds", "json", "device", "kernel", "pipeline_cache", "tune_cache"])]
    list: bool,
    /// Element type of query, key, value and output, f32, f16 or bf16
    #[arg(long, value_name = "TYPE", default_value_t = Element::F32)]
    element: Element,
    #[command(flatten)]
    kv: KvFlags,
    /// Time the backward alone, given what the forward returned: the gradients of query, key and value
    #[arg(long, conflicts_with_all = ["kv", "pages", "kernel", "tune_cache"])]
    backward: bool,
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
    #[command(flatten)]
    tuned: TuneFlag,
}

/// Work of a backward, by that of the forward: five products where that has two.
const BACKWARD_FLOPS: f64 = 2.5;

/// Rounds timed even where the time is up before.
const MIN_ROUNDS: usize = 5;

/// Rounds of host times, and of the times of single shaders.
const HOST_ROUNDS: usize = 100;
const KERNEL_ROUNDS: usize = 10;

/// Time to spend on each roof, unless less is given for a workload.
const ROOF_TIME: Duration = Duration::from_millis(500);

/// Query rows compared with the oracle before timing.
const VERIFIED_ROWS: usize = 64;

/// What was measured of one workload.
#[derive(Debug)]
struct Row {
    kernel: &'static str,
    max_abs_error: f64,
    /// Plan and pipelines, in milliseconds.
    prepare_ms: f64,
    /// Pipelines that were made for it; others were there.
    pipelines: usize,
    /// Upload, run and read back, in milliseconds.
    first_run_ms: f64,
    timing: Timing,
    flops: f64,
    bytes: f64,
    plan_us: f64,
    /// On a device of wgpu.
    gpu: Option<GpuRow>,
}

/// What was measured besides on a device of wgpu.
#[derive(Debug)]
struct GpuRow {
    host: HostCost,
    /// Where the device has a clock.
    kernels: Option<Vec<KernelTiming>>,
}

/// What holds for all workloads.
#[derive(Debug)]
struct Common<'a> {
    args: &'a Args,
    device: &'a Device,
    /// From the start of the program until the device was there, in milliseconds.
    device_ms: f64,
    /// The roofs, once they are measured; not every device has them.
    roofline: Option<Roofline>,
}

/// Times the workloads; whether all of them were right. The program started at `started`.
///
/// # Errors
/// What kept all of them from running.
pub(crate) fn bench(args: &Args, started: Instant, terminal: &mut Terminal) -> Result<bool, Error> {
    let mut workloads = workload::all();
    if !args.names.is_empty() {
        workloads = args.names.iter().filter_map(|name| workload::find(name)).collect();
    }
    if args.list {
        return list(&workloads, terminal).map(|()| true);
    }
    let choice = open::open(&args.device, &args.cache, terminal)?;
    let mut common = Common { args, device: &choice.device, device_ms: millis(started), roofline: None };
    let tuned = Tuned::load(&args.tuned, &choice.device, false, terminal);
    let reason = format!("device: {choice}");
    if args.json {
        terminal.note(format_args!("{reason}"));
    } else {
        terminal.line(format_args!("{reason}"))?;
        terminal.line(format_args!("driver: {}, {}", common.device.driver(), common.device.backend()))?;
    }
    terminal.start_bar(workloads.len());
    let mut table = report::headed_table();
    let mut failed = 0;
    for (n, workload) in workloads.iter().enumerate() {
        terminal.bar().set_message(workload.name);
        let result = match args.backward {
            true => measure_backward(workload, &common, terminal),
            false => measure(workload, &common, tuned.as_ref(), terminal),
        };
        if n == 0 {
            // not before: the first result comes from a device that did nothing yet
            terminal.bar().set_message("the device's limits");
            common.roofline = roofline(&common, terminal);
            if !args.json {
                report::opening(&common, workload, &result, terminal)?;
            }
        }
        if let Err(error) = &result {
            terminal.note(format_args!("error: {}: {}", workload.name, error.chain()));
            failed += 1;
        }
        if args.json {
            terminal.line(format_args!("{}", report::as_json(workload, &common, &result, n == 0)))?;
        } else {
            report::add_row(&mut table, workload, &common, &result);
        }
        if terminal.closed() {
            break;
        }
        terminal.bar().inc(1);
    }
    terminal.end_bar();
    if !args.json {
        terminal.line(format_args!("{}", table.text(terminal.width())))?;
    }
    open::close(&choice.device)?;
    Ok(failed == 0)
}

fn measure(workload: &Workload, common: &Common<'_>, tuned: Option<&Tuned>, terminal: &Terminal) -> Result<Row, Error> {
    let Common { args, device, .. } = common;
    let problem = stored(workload, args.element, args.kv)?;
    let data = workload::inputs(&problem, workload.name);
    let inputs = data.as_inputs();
    let made_before = pipelines(device);
    let start = Instant::now();
    let prepared = Tuned::prepare(tuned, device, &problem, args.device.kernel, terminal)?;
    let prepare_ms = millis(start);
    let start = Instant::now();
    let results = prepared.run_blocking(&inputs)?;
    let first_run_ms = millis(start);
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
    let mut gpu = None;
    if let PreparedAttention::Gpu(prepared) = &prepared {
        let tensors = prepared.upload_blocking(&inputs)?;
        let bound = prepared.bind(&tensors.buffers()).map_err(cross_attention::Error::from)?;
        let host = prepared.time_host(&tensors.buffers(), HOST_ROUNDS).map_err(cross_attention::Error::from)?;
        let kernels = prepared.time_kernels_blocking(&bound, KERNEL_ROUNDS).map_err(cross_attention::Error::from)?;
        gpu = Some(GpuRow { host, kernels });
    }
    Ok(Row {
        kernel: prepared.kernel_name(),
        max_abs_error: report.max_abs_error,
        prepare_ms,
        pipelines: pipelines(device) - made_before,
        first_run_ms,
        timing,
        flops: workload::flops(&problem, &inputs),
        bytes: workload::bytes(&problem),
        plan_us: plan_us(&problem, device, args.device.kernel),
        gpu,
    })
}

/// The backward of a workload, its gradients of one head compared with the oracle before they are timed.
fn measure_backward(workload: &Workload, common: &Common<'_>, terminal: &Terminal) -> Result<Row, Error> {
    let Common { args, device, .. } = common;
    let attention = stored(workload, args.element, args.kv)?.spec().clone();
    let problem = BackwardProblem::new(BackwardSpec::new(attention))?;
    let forward = problem.forward();
    let data = workload::inputs(forward, workload.name);
    let inputs = data.as_inputs();
    let results = device.prepare_blocking(forward, KernelChoice::Auto)?.run_blocking(&inputs)?;
    // numbers like those of an output
    let d_output = workload::inputs(forward, "the gradient of the output").query.to_f32();
    let len = problem.spec().d_output.layout.extent().unwrap_or(0);
    let d_output: Vec<f32> = d_output.iter().copied().cycle().take(len).collect();
    let inputs = BackwardInputs::new(inputs, &results, &d_output).map_err(cross_attention::Error::from)?;
    let made_before = pipelines(device);
    let start = Instant::now();
    let prepared = device.prepare_backward_blocking(&problem)?;
    let prepare_ms = millis(start);
    let start = Instant::now();
    let gradients = prepared.run_blocking(&inputs)?;
    let first_run_ms = millis(start);
    let report =
        verify::verify_backward_head(&problem, &inputs, &gradients, 0).map_err(cross_attention::Error::from)?;
    if !report.passed() {
        return Err(Error::Verify { report: report.to_string() });
    }
    let mut rounds = 0usize;
    let mut on_round = || {
        rounds += 1;
        terminal.bar().set_message(format!("{}, round {rounds}", workload.name));
    };
    let timing = prepared.time_blocking(&inputs, MIN_ROUNDS, args.seconds, &mut on_round)?;
    Ok(Row {
        kernel: prepared.kernel_name(),
        max_abs_error: report.max_abs_error,
        prepare_ms,
        pipelines: pipelines(device) - made_before,
        first_run_ms,
        timing,
        flops: BACKWARD_FLOPS * workload::flops(forward, &inputs.attention),
        bytes: 2.0 * workload::bytes(forward),
        plan_us: prepare_ms * 1e3,
        gpu: None,
    })
}

/// The problem of a workload with its tensors of one element type, but for keys and values that are stored in another way.
pub(crate) fn stored(workload: &Workload, element: Element, kv: KvFlags) -> Result<AttentionProblem, Error> {
    let mut spec = workload.spec.clone();
    for tensor in [&mut spec.query, &mut spec.key, &mut spec.value, &mut spec.output] {
        tensor.element = element;
    }
    kv.apply(&mut spec, Layout::bhld)?;
    Ok(AttentionProblem::new(spec)?)
}

/// Microseconds of making a plan, the median of many.
fn plan_us(problem: &AttentionProblem, device: &Device, kernel: KernelChoice) -> f64 {
    let forced = if let KernelChoice::Gpu(kernel) = kernel { Some(kernel) } else { None };
    let rounds = (0..HOST_ROUNDS).map(|_| {
        let start = Instant::now();
        match device {
            Device::Gpu(context) => drop(black_box(Plan::new(problem, context.caps(), forced))),
            Device::Cpu | Device::Oracle => drop(black_box(cpu::prepare(problem))),
        }
        millis(start)
    });
    Timing { millis: rounds.collect(), source: cross_attention::TimingSource::Cpu }.quantile(0.5) * 1e3
}

fn roofline(common: &Common<'_>, terminal: &Terminal) -> Option<Roofline> {
    let measured = common.device.roofline_blocking(ROOF_TIME.min(common.args.seconds));
    measured.unwrap_or_else(|error| {
        terminal.note(format_args!("warning: the device's limits could not be measured: {error}"));
        None
    })
}

fn pipelines(device: &Device) -> usize {
    if let Device::Gpu(context) = device { context.pipelines() } else { 0 }
}

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn list(workloads: &[Workload], terminal: &mut Terminal) -> Result<(), Error> {
    let mut table = Table::new(&["", "", ""], 0..0);
    for workload in workloads {
        let shape = AttentionProblem::new(workload.spec.clone()).map(|problem| shape(&problem))?;
        // on a terminal, lines break at words
        let cell = |text: String| terminal.width().map_or(text.clone(), |width| wrap(&text, width.saturating_sub(20)));
        table.push(vec![workload.name.to_owned(), cell(shape), cell(workload.about.to_owned())]);
    }
    terminal.line(format_args!("{}", table.text(terminal.width())))
}

/// Whether a GPU is played by the CPU: such times say nothing about GPUs.
pub(crate) fn software(device: &Device) -> bool {
    matches!(device, Device::Gpu(context) if context.caps().class == DeviceClass::Software)
}

pub(crate) fn names() -> Vec<&'static str> {
    workload::all().into_iter().map(|workload| workload.name).collect()
}

pub(crate) fn seconds(text: &str) -> Result<Duration, &'static str> {
    // a year, beyond which a number is a slip
    const MOST: f64 = 31_536_000.0;
    let seconds: Option<f64> = text.parse().ok().filter(|seconds| (0.0..=MOST).contains(seconds));
    seconds
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or("needs a number of seconds from 0 to 31536000")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_a_length_of_time() {
        assert_eq!(seconds("0.25"), Ok(Duration::from_millis(250)));
        for text in ["-1", "NaN", "inf", "1e300", "1e30", "soon"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }
}
