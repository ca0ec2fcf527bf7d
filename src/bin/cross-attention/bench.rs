//! `bench`: times attentions on a device, each verified before it is timed, and compares what was timed before.

mod bootstrap;
mod cases;
mod compare;
pub(crate) mod error;
mod format;
mod measure;
mod plot;
mod ranks;
mod report;
mod rows;
mod shapes;
mod stats;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::builder::PossibleValuesParser;
use cross_attention::workload::{self, Workload};
use cross_attention::{AttentionProblem, Device, DeviceClass, Element, Layout, Roofline};

use crate::error::Error;
use crate::host::Cpu;
use crate::input::is_dash;
use crate::open::{self, CacheFlag};
use crate::options::{DeviceFlags, OptionFlags};
use crate::shape::{KvFlags, ShapeFlags};
use crate::terminal::Terminal;
use crate::text::shown;
use crate::tuned::{TuneFlag, Tuned};
use error::BenchError;
use serde_json::Value;

use format::{Format, Output};
use ranks::RankFlags;

const EXAMPLE: &str = "\
Examples:
  cross-attention bench whisper_decode gqa --device cpu
  cross-attention bench --q-heads 8 --q-len 4096 --kv-len 77 --head-dim 40 --causal bottom_right
  cross-attention bench --file capture.safetensors --backward
  cross-attention bench --shapes shapes.json --format markdown
  cross-attention bench whisper_decode fid_decode --kv int8_32 --pages 16
  cross-attention bench --element f16 --save new.jsonl --plot roofline.svg
  cross-attention bench --compare old.jsonl new.jsonl --fail-if-slower 5

Shapes: the JSON of --shapes is a list of objects. Their keys are the names of the flags that describe a shape, with _ for \
-, and name; a flag without a value is true or false. One such object:
  {\"name\": \"mine\", \"q_heads\": 8, \"q_len\": 64, \"kv_len\": 77, \"head_dim\": 40, \"mask\": true}

Rounds: before those that count, parts of a tenth of --seconds each warm up, until the medians of two parts after each other \
are within 5 % or --seconds are over. Every round after that counts. One is an outlier where it is more than ten standard \
deviations off the median (modified Z-score, as hyperfine has it); more than 1 % of them are warned about. JSON has minimum, \
maximum, mean, deviation and quantiles, and the medians of 32 parts of the time.

Comparing: rows are paired where workload, shape, element types, terms, device, adapter and backend are the same. The ratio is \
that of the medians, new by old, with an interval of 99 % by a bootstrap over runs and, of each, over the parts. Where both files \
have five runs or more of a kind, one is faster or slower if the interval leaves out 1. With fewer the verdict has a question mark: \
the interval knows how rounds differ, and not how runs do, which differ more. --runs 5 saves five; on a machine that \
others use too, save to both files in turns.

Ranks: with --mpi the keys of each case are shared out evenly over the ranks of the MPI run, one process a rank, and each way of \
bringing their results together is a row: mpirun -n 4 cross-attention bench gqa --mpi --device cpu. A call is timed by the rank that \
takes longest. Every rank makes the whole input, and takes its share; where a machine has a GPU for each of its ranks, \
let the launcher's variable choose: sh -c 'cross-attention bench gqa --mpi --device $OMPI_COMM_WORLD_LOCAL_RANK'.";

/// All that has to do with measuring.
const MEASURING: [&str; 20] = [
    "names",
    "file",
    "shapes",
    "shape",
    "OptionFlags",
    "kv",
    "pages",
    "output_type",
    "probs",
    "backward",
    "seconds",
    "runs",
    "device",
    "kernel",
    "pipeline_cache",
    "tune_cache",
    "save",
    "mpi",
    "plot",
    "compare",
];

/// Time workloads, shapes or files, each verified before it is timed; or compare what was timed before
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE, mut_group("OptionFlags", |group| group.requires("own")))]
#[command(mut_arg("q_heads", |flag| flag.group("own")))]
pub(crate) struct Args {
    /// Named workloads to time (`--list` shows them); all if nothing else is given
    #[arg(
        value_name = "NAME", value_parser = PossibleValuesParser::new(names()), hide_possible_values = true,
        conflicts_with_all = ["file", "shapes", "q_heads", "OptionFlags"],
    )]
    names: Vec<String>,
    /// List the workloads with their shapes, and do nothing else
    #[arg(long, conflicts_with_all = &MEASURING[1..])]
    list: bool,
    /// Time the attention of these files, safetensors or NumPy (.npz), which hold what `run` takes
    #[arg(
        long, value_name = "FILE", num_args = 1.., group = "own",
        conflicts_with_all = ["shapes", "shape", "kv", "pages"],
    )]
    file: Vec<PathBuf>,
    /// Time the shapes of a JSON file (- is standard input); see below
    #[arg(long, value_name = "FILE", conflicts_with_all = ["shape", "kv", "pages"])]
    shapes: Option<PathBuf>,
    #[command(flatten)]
    shape: ShapeFlags,
    #[command(flatten)]
    kv: KvFlags,
    /// Element type of the output of a shape [default: that of the query] or a file [default: f32]
    #[arg(long, value_name = "TYPE", requires = "own")]
    output_type: Option<Element>,
    /// Return the attention weights of a shape or a file too
    #[arg(long, requires = "own", conflicts_with = "backward")]
    probs: bool,
    /// Time the backward alone, given what the forward returned: the gradients of query, key and value, or those that
    /// `run --backward` computes for a file
    #[arg(long, conflicts_with_all = ["kv", "pages", "kernel", "tune_cache"])]
    backward: bool,
    /// Time to spend on each workload, in seconds, after at most as much to warm up
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    seconds: Duration,
    /// Times to go through all workloads, each time a row of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// What to print: a table, comma-separated values, a table in Markdown, or one JSON object a line
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t)]
    format: Format,
    /// Print one JSON object a line; the same as --format json
    #[arg(long, conflicts_with = "format")]
    json: bool,
    /// Add the rows to this file too, as JSON; what it holds stays, and a file of something else is refused
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// Draw the rates under the measured limits of the device (a roofline), as .svg or .png
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Compare the rows of two files that were saved, and time nothing; - is standard input
    #[arg(long, num_args = 2, value_names = ["OLD", "NEW"], conflicts_with_all = &MEASURING[..19])]
    compare: Vec<PathBuf>,
    /// Fail if one is slower, question mark or not, by a ratio of more than so many percent above 1, or failed and did not before
    #[arg(long, value_name = "PERCENT", requires = "compare", value_parser = percent)]
    fail_if_slower: Option<f64>,
    #[command(flatten)]
    ranks: RankFlags,
    #[command(flatten)]
    device: DeviceFlags,
    #[command(flatten)]
    cache: CacheFlag,
    #[command(flatten)]
    tuned: TuneFlag,
    #[command(flatten)]
    options: OptionFlags,
}

/// Time to spend on each roof, unless less is given for a workload.
const ROOF_TIME: Duration = Duration::from_millis(500);

/// What holds for all workloads.
#[derive(Debug)]
struct Common<'a> {
    args: &'a Args,
    device: &'a Device,
    cpu: Cpu,
    /// From the start of the program until the device was there, in milliseconds.
    device_ms: f64,
    /// The roofs, once they are measured; not every device has them.
    roofline: Option<Roofline>,
}

/// Does what the flags ask for; whether all went well. The program started at `started`.
///
/// # Errors
/// What kept all of it from running.
pub(crate) fn bench(args: &Args, started: Instant, terminal: &mut Terminal) -> Result<bool, Error> {
    let format = if args.json { Format::Json } else { args.format };
    if args.list && args.fail_if_slower.is_none() {
        return format::list(&cases::workloads(&args.names), format, terminal).map(|()| true);
    }
    if let [old, new] = &args.compare[..] {
        if is_dash(old) && is_dash(new) {
            return Err(BenchError::CompareStdinTwice.into());
        }
        return compare::compare(old, new, args.fail_if_slower, format, terminal);
    }
    if args.fail_if_slower.is_some() {
        return Err(BenchError::NothingToCompare.into());
    }
    args.no_streams()?;
    if args.ranks.mpi {
        return ranks::bench(args, started, terminal);
    }
    let cases = cases::cases(args, terminal)?;
    // what cannot be written is known before anything is timed
    let mut saved = args.save.as_deref().map(rows::Sink::open).transpose()?;
    let plot = args.plot.as_deref().map(plot::Plot::open).transpose()?;
    let choice = open::open(&args.device, &args.cache, terminal)?;
    let device = &choice.device;
    let mut common = Common { args, device, cpu: Cpu::of_this_machine(), device_ms: millis(started), roofline: None };
    let tuned = Tuned::load(&args.tuned, device, false, terminal);
    let mut output = Output::new(format);
    output.about(format_args!("device: {choice}"), terminal)?;
    output.about(format_args!("driver: {}, {}", device.driver(), device.backend()), terminal)?;
    let runs = (1..=args.runs).flat_map(|run| cases.iter().map(move |case| (run, case)));
    terminal.start_bar(cases.len() * args.runs as usize);
    let mut rows = vec![];
    let (mut failed, mut unsaved) = (0, false);
    for (n, (run, (case, problem))) in runs.enumerate() {
        terminal.doing(&case.name);
        let result = match problem {
            Ok(problem) => measure::measure(case, problem, &common, tuned.as_ref(), terminal),
            Err(reason) => Err(BenchError::Refused { reason: reason.clone() }.into()),
        };
        if n == 0 {
            // not before: the first result comes from a device that did nothing yet
            terminal.doing("the device's limits");
            common.roofline = roofline(&common, terminal);
            report::opening(case, &common, &result, &mut output, terminal)?;
        }
        if let Err(error) = &result {
            terminal.note(format_args!("error: {}: {}", shown(&case.name), error.chain()));
            failed += 1;
        }
        let row = report::as_json(case, &common, &result, run, n == 0);
        if let Some(Err(error)) = saved.as_mut().map(|saved| saved.add(&row)) {
            // what is measured is still printed
            terminal.note(format_args!("error: {}", error.chain()));
            (saved, unsaved) = (None, true);
        }
        output.row(case, &common, &result, &row, terminal)?;
        rows.push((row, result));
        if terminal.closed() && saved.is_none() && plot.is_none() {
            break;
        }
        terminal.bar().inc(1);
    }
    terminal.end_bar();
    output.finish(terminal)?;
    report::warn(&rows, terminal);
    open::close(device)?;
    saved.map_or(Ok(()), rows::Sink::finish)?;
    if let Some(plot) = plot {
        plot.draw(middle_runs(&rows, cases.len()).into_iter())?;
    }
    Ok(failed == 0 && !unsaved)
}

impl Args {
    /// Whether `-` stands where only a file does.
    fn no_streams(&self) -> Result<(), BenchError> {
        let dash = |path: Option<&PathBuf>| path.is_some_and(|path| is_dash(path));
        match () {
            () if dash(self.save.as_ref()) => Err(BenchError::SaveToStdout),
            () if dash(self.plot.as_ref()) => Err(BenchError::PlotToStdout),
            () if self.file.iter().any(|path| is_dash(path)) => Err(BenchError::FileFromStdin),
            () => Ok(()),
        }
    }
}

/// Of the runs of each case, the one with the middle time.
fn middle_runs(rows: &[(Value, Result<measure::Row, Error>)], cases: usize) -> Vec<&Value> {
    let runs = |case: usize| rows.iter().map(|(row, _)| row).skip(case).step_by(cases.max(1));
    let middle = |case: usize| {
        let mut runs: Vec<_> = runs(case).filter_map(|row| Some((row["median_ms"].as_f64()?, row))).collect();
        runs.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        runs.get(runs.len() / 2).map(|(_, row)| *row)
    };
    // where all failed, one stands for them
    (0..cases).filter_map(|case| middle(case).or_else(|| runs(case).next())).collect()
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

fn roofline(common: &Common<'_>, terminal: &Terminal) -> Option<Roofline> {
    let measured = common.device.roofline_blocking(ROOF_TIME.min(common.args.seconds));
    measured.unwrap_or_else(|error| {
        terminal.note(format_args!("warning: the device's limits could not be measured: {error}"));
        None
    })
}

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
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

fn percent(text: &str) -> Result<f64, &'static str> {
    let percent: Option<f64> = text.parse().ok().filter(|percent: &f64| percent.is_finite() && *percent >= 0.0);
    percent.ok_or("needs a number of percent, 0 or more")
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
