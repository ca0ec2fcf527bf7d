//! `tune`: times the choices of a plan on a device, and keeps the best one in a file.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::PossibleValuesParser;
use cross_attention::files::{Ours, OutputFile, UpdateLock};
use cross_attention::gpu::Gpu;
use cross_attention::tune::{
    DeviceKey, Outcome, TuneCache, TuneCandidate, TuneOptions, TuneProgress, TuneReport, TuneWarning,
};
use cross_attention::{AttentionProblem, Choice, Device, Element, KernelChoice, Plan, PlanChoice, TileShape, workload};

use serde_json::{Value, json};

use crate::bench::{names, seconds, software, stored};
use crate::error::Error;
use crate::options::{DeviceFlags, OptionFlags};
use crate::record;
use crate::run::shape;
use crate::shape::{KvFlags, ShapeFlags};
use crate::table::Table;
use crate::terminal::Terminal;

const EXAMPLE: &str = "\
Examples:
  cross-attention tune --workload whisper_decode gqa --cache tune.json
  cross-attention tune --q-heads 8 --q-len 4096 --kv-len 77 --head-dim 40 --cache tune.json
  cross-attention bench whisper_decode --tune-cache tune.json";

/// Time the choices of a plan on a device, each verified before it is timed, and keep the best
///
/// The choices are kernels, their tiles, and the number of parts that keys are split into. What is found is used where
/// --tune-cache names the file, on the same device with the same driver, for problems of the same class: equal widths,
/// element types and terms, lengths and heads that round up to the same powers of two.
///
/// --json prints name, problem, device, flops, planned (the choice of the plan's rules), chosen (null if none), why, and
/// candidates: choice, result (timed, wrong, failed or not_tried), median_ms, p10_ms, p90_ms, rounds, first_ms and reason.
#[derive(Debug, clap::Args)]
#[command(
    after_help = EXAMPLE,
    mut_arg("q_heads", |flag| flag.required_unless_present("input")),
    mut_arg("q_len", |flag| flag.required_unless_present("input")),
    mut_arg("kv_len", |flag| flag.required_unless_present("input")),
    mut_arg("head_dim", |flag| flag.required_unless_present("input")),
)]
pub(crate) struct Args {
    /// Workloads to tune (`bench --list` shows them); without any, the shape is given by flags
    #[arg(
        id = "input", long = "workload", value_name = "NAME", num_args = 1..,
        conflicts_with_all = ["shape", "OptionFlags", "output_type"],
        value_parser = PossibleValuesParser::new(names()), hide_possible_values = true,
    )]
    workloads: Vec<String>,
    #[command(flatten)]
    shape: ShapeFlags,
    #[command(flatten)]
    kv: KvFlags,
    /// Element type of the output, f32, f16 or bf16 [default: that of the query]
    #[arg(long, value_name = "TYPE")]
    output_type: Option<Element>,
    /// The file to keep the choices in; made if need be
    #[arg(long, value_name = "FILE")]
    cache: Option<PathBuf>,
    /// Print a JSON object for each problem instead
    #[arg(long)]
    json: bool,
    /// Time to spend on each problem, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    seconds: Duration,
    #[command(flatten)]
    device: DeviceFlags,
    #[command(flatten)]
    options: OptionFlags,
}

/// Tunes every problem; whether all of them went well.
///
/// # Errors
/// What kept all of them from being tuned.
pub(crate) fn tune(args: &Args, terminal: &mut Terminal) -> Result<bool, Error> {
    let problems = args.problems(terminal)?;
    let choice = Device::choose_blocking(&args.device.device)?;
    let Device::Gpu(context) = &choice.device else {
        return Err(Error::NotTunable { device: choice.device.name() });
    };
    // what the file holds is not lost, whatever it is
    let device = DeviceKey::of(context.info());
    if let Some(path) = &args.cache {
        for warning in open(path, &device)?.1 {
            terminal.note(format_args!("warning: {warning}"));
        }
        // tried before anything is timed; that it is a cache is known
        OutputFile::check(path, Ours::ANYTHING)?;
    }
    if !args.json {
        tell_device(&choice, terminal)?;
    }
    let mut failed = 0;
    for (name, problem) in &problems {
        if !args.json {
            terminal.line(format_args!("{name}: {}", shape(problem)))?;
        }
        let kept = tune_one(args, context, problem, terminal).and_then(|report| {
            if args.json {
                let record = as_json(name, problem, &choice, &report);
                terminal.line(format_args!("{record}"))?;
            } else {
                terminal.line(format_args!("{}", table(&report).text(terminal.width())))?;
            }
            let entry = report.entry().ok_or(Error::NothingChosen)?;
            if !args.json {
                terminal.line(format_args!("chosen: {}, {}", entry.choice, entry.why()))?;
            }
            // after each problem, so that what was found is kept whatever happens next
            if let Some(path) = &args.cache {
                // read each time: another run may have added to it, or may want to now
                let _alone = UpdateLock::of(path)?;
                let (mut cache, _) = open(path, &device)?;
                cache.insert(entry);
                cache.save(path)?;
            }
            let wrong = |candidate: &&TuneCandidate| matches!(candidate.outcome, Outcome::Wrong { .. });
            match report.candidates.iter().filter(wrong).count() {
                0 => Ok(()),
                count => Err(Error::WrongChoices { count }),
            }
        });
        match kept {
            Ok(()) => {}
            Err(error @ (Error::Stdout { .. } | Error::Output(_))) => return Err(error),
            Err(error) => {
                terminal.note(format_args!("error: {name}: {}", error.chain()));
                failed += 1;
            }
        }
        if terminal.closed() {
            break;
        }
    }
    Ok(failed == 0)
}

fn tell_device(choice: &Choice, terminal: &mut Terminal) -> Result<(), Error> {
    terminal.line(format_args!("device: {choice}"))?;
    let (driver, backend) = (choice.device.driver(), choice.device.backend());
    let kind = if software(&choice.device) { ", software: these times say nothing about GPUs" } else { "" };
    terminal.line(format_args!("driver: {driver}, {backend}{kind}"))
}

fn tune_one(
    args: &Args,
    context: &Gpu,
    problem: &AttentionProblem,
    terminal: &mut Terminal,
) -> Result<TuneReport, Error> {
    let mut options = TuneOptions { budget: args.seconds, ..TuneOptions::default() };
    match args.device.kernel {
        KernelChoice::Auto => {}
        KernelChoice::Gpu(kernel) => {
            let own = Plan::new(problem, context.caps(), Some(kernel)).map_err(cross_attention::Error::from)?.choice();
            let all = Plan::candidates(problem, context.caps());
            let others = all.into_iter().filter(|choice| choice.kernel == kernel && *choice != own);
            options.candidates = Some([own].into_iter().chain(others).collect());
        }
        KernelChoice::Cpu(_) => {
            // refused in the library's words
            let device = Device::Gpu(context.clone());
            device.prepare_blocking(problem, args.device.kernel)?;
        }
    }
    terminal.start_bar(1);
    let bar = terminal.bar().clone();
    let mut count = 0;
    let report = context.tune_blocking(problem, &options, &mut |progress| match progress {
        TuneProgress::Checking { candidate, of, choice } => {
            count = of;
            bar.set_length((of + options.rounds + 1) as u64);
            bar.set_position(candidate as u64);
            bar.set_message(format!("checking {choice}"));
        }
        TuneProgress::Timing { round, .. } => {
            bar.set_position((count + round) as u64);
            bar.set_message("timing");
        }
        _ => {}
    });
    terminal.end_bar();
    Ok(report?)
}

impl Args {
    /// The problems, each with a name.
    fn problems(&self, terminal: &Terminal) -> Result<Vec<(String, AttentionProblem)>, Error> {
        let element = self.shape.element.unwrap_or(Element::F32);
        if self.workloads.is_empty() {
            let problem =
                self.shape.problem(self.kv, &self.options, self.output_type.unwrap_or(element), None, terminal)?;
            return Ok(vec![("problem".to_owned(), problem)]);
        }
        let workloads = self.workloads.iter().filter_map(|name| workload::find(name));
        let problem = |workload: &_| stored(workload, element, self.kv);
        workloads.map(|workload| Ok((workload.name.to_owned(), problem(&workload)?))).collect()
    }
}

/// Reads the cache that is to be written, with what is to be said of it; a file that is something else is left alone.
fn open(path: &std::path::Path, device: &DeviceKey) -> Result<(TuneCache, Vec<TuneWarning>), Error> {
    if std::fs::metadata(path).is_ok_and(|found| found.is_file() && found.len() == 0) {
        return Ok((TuneCache::new(device.clone()), vec![]));
    }
    let (cache, warnings) = TuneCache::load(path, device);
    let mut said = vec![];
    for warning in warnings {
        match warning {
            TuneWarning::Missing { .. } | TuneWarning::Foreign { .. } => {}
            TuneWarning::Unreadable { .. } | TuneWarning::Format { .. } => return Err(Error::NotACache { warning }),
            _ => said.push(warning),
        }
    }
    Ok((cache, said))
}

fn as_json(name: &str, problem: &AttentionProblem, choice: &Choice, report: &TuneReport) -> Value {
    let candidate = |TuneCandidate { choice, outcome, .. }: &TuneCandidate| {
        let timed = match outcome {
            Outcome::Timed { timing, first_ms, .. } => Some((timing, first_ms)),
            _ => None,
        };
        let kind = match outcome {
            Outcome::Timed { .. } => "timed",
            Outcome::Wrong { .. } => "wrong",
            Outcome::Failed { .. } => "failed",
            _ => "not_tried",
        };
        json!({
            "choice": choice,
            "result": kind,
            "median_ms": timed.map(|(timing, _)| timing.quantile(0.5)),
            "p10_ms": timed.map(|(timing, _)| timing.quantile(0.1)),
            "p90_ms": timed.map(|(timing, _)| timing.quantile(0.9)),
            "rounds": timed.map(|(timing, _)| timing.millis.len()),
            "first_ms": timed.map(|(_, first)| first),
            "reason": result(outcome),
        })
    };
    json!({
        "name": name,
        "problem": record::problem(problem),
        "device": record::device(&choice.device),
        "software": software(&choice.device),
        "flops": report.flops,
        "planned": report.planned,
        "chosen": report.best().map(|best| best.choice),
        "why": report.entry().map(|entry| entry.why()),
        "candidates": report.candidates.iter().map(candidate).collect::<Vec<_>>(),
    })
}

const COLUMNS: [&str; 14] = [
    // what tells rows apart in every part of a table that is too wide
    "#",
    "kernel",
    "block_q",
    "block_kv",
    "query",
    "keys",
    "splits",
    "median ms",
    "p10",
    "p90",
    "rounds",
    "GFLOP/s",
    "first ms",
    "result",
];

fn table(report: &TuneReport) -> Table {
    let mut table = Table::new(&COLUMNS, 2..COLUMNS.len() - 1);
    let mut rows: Vec<_> = report.candidates.iter().enumerate().collect();
    let time = |outcome: &Outcome| outcome.median_ms().unwrap_or(f64::INFINITY);
    rows.sort_by(|(_, a), (_, b)| time(&a.outcome).total_cmp(&time(&b.outcome)));
    for (place, (n, candidate)) in rows.into_iter().enumerate() {
        let mut cells = vec![(place + 1).to_string()];
        cells.extend(choice_cells(&candidate.choice));
        cells.extend(time_cells(&candidate.outcome, report.flops));
        let own = if candidate.choice == report.planned { " (the plan's own)" } else { "" };
        let result = if report.chosen == Some(n) { "chosen".to_owned() } else { result(&candidate.outcome) };
        cells.push(format!("{result}{own}"));
        table.push(cells);
    }
    table
}

fn choice_cells(choice: &PlanChoice) -> Vec<String> {
    let tile = |of: fn(&TileShape) -> String| choice.tile.as_ref().map_or_else(String::new, of);
    vec![
        choice.kernel.to_string(),
        tile(|tile| tile.block_q.to_string()),
        tile(|tile| tile.block_kv.to_string()),
        tile(|tile| if tile.query_resident { "resident" } else { "streamed" }.to_owned()),
        tile(|tile| if tile.paired_keys { "paired" } else { "" }.to_owned()),
        choice.num_splits.map_or_else(String::new, |splits| splits.to_string()),
    ]
}

fn time_cells(outcome: &Outcome, flops: f64) -> Vec<String> {
    let Outcome::Timed { timing, first_ms, .. } = outcome else { return vec![String::new(); 6] };
    let median = timing.quantile(0.5);
    vec![
        format!("{median:.4}"),
        format!("{:.4}", timing.quantile(0.1)),
        format!("{:.4}", timing.quantile(0.9)),
        timing.millis.len().to_string(),
        format!("{:.1}", flops / (median * 1e6)),
        format!("{first_ms:.0}"),
    ]
}

fn result(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Timed { worst_ratio, .. } => format!("right, {worst_ratio:.2} of the error that is allowed"),
        Outcome::Wrong { report } => format!("WRONG, rejected: {report}"),
        Outcome::Failed { error } => format!("rejected: {error}"),
        Outcome::NotTried { reason } => format!("not tried: {reason}"),
        _ => String::new(),
    }
}
