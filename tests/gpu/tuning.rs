//! Tuning: every choice is right, the report tells what was done, and what was found is used.

use std::time::Duration;

use cross_attention::tune::{DeviceKey, Lookup, Outcome, TuneCache, TuneOptions, TuneProgress};
use cross_attention::{AttentionProblem, AttentionSpec, Error, Kernel, Plan, PlanChoice, TileShape};
use libtest_mimic::Trial;

use super::adapters::Adapter;
use super::trials::{message, trial};
use crate::common::case::Case;
use crate::common::check::within_tolerance;
use crate::common::recipe::Ranges;

const GROUP: &str = "tune";

type Check = fn(&Adapter) -> Result<(), String>;

const TRIALS: [(&str, Check); 5] = [
    ("every_choice_for_few_queries", |adapter| every_choice(adapter, &few_queries())),
    ("every_choice_for_many_queries", |adapter| every_choice(adapter, &many_queries())),
    ("a_problem_is_tuned", a_problem_is_tuned),
    ("what_cannot_run_is_told", what_cannot_run_is_told),
    #[cfg(feature = "cli")]
    ("the_program_tunes", the_program_tunes),
];

pub(crate) fn trials(adapter: &Adapter) -> Vec<Trial> {
    let of = |(name, check): (&str, Check)| {
        let on = adapter.clone();
        trial(adapter, GROUP, name, move || check(&on))
    };
    // each choice is a shader to be made, and is made once elsewhere
    TRIALS.into_iter().filter(|(name, _)| !adapter.sparing || !name.starts_with("every_choice")).map(of).collect()
}

fn failed(error: impl Into<Error>) -> String {
    message(&error.into())
}

fn few_queries() -> Case {
    Case::new("tune_few", "parts of the keys, folded rows", 1, [4, 2], [2, 300], [16, 12]).ranges(Ranges::Wild)
}

fn many_queries() -> Case {
    Case::new("tune_many", "tiles of every shape", 1, [1, 1], [37, 70], [20, 24]).alibi()
}

fn every_choice(adapter: &Adapter, case: &Case) -> Result<(), String> {
    let (problem, data) = (case.problem(), case.data());
    let context = &adapter.context;
    let choices = Plan::candidates(&problem, context.caps());
    if choices.len() < 8 {
        return Err(format!("only {} choices", choices.len()));
    }
    for choice in choices {
        let plan = Plan::with_choice(&problem, context.caps(), &choice).map_err(failed)?;
        let prepared = context.prepare_plan_blocking(plan).map_err(failed)?;
        let output = prepared.run_blocking(&data.as_inputs()).map_err(failed)?;
        within_tolerance(&problem, &data, &output).map_err(|error| format!("{case}\n{choice}: {error}"))?;
    }
    Ok(())
}

fn split(num_splits: u32) -> PlanChoice {
    let tile = Some(TileShape { block_q: 2, block_kv: 128, query_resident: true, paired_keys: false });
    PlanChoice { kernel: Kernel::Split, tile, num_splits: Some(num_splits) }
}

fn tiny() -> AttentionProblem {
    AttentionProblem::new(AttentionSpec::new([1, 2, 2, 16], [1, 2, 300, 16])).expect("sound")
}

fn a_problem_is_tuned(adapter: &Adapter) -> Result<(), String> {
    let context = &adapter.context;
    let problem = tiny();
    let fused = Plan::new(&problem, context.caps(), Some(Kernel::Fused)).map_err(failed)?.choice();
    let choices = vec![fused, split(1), split(2), split(3)];
    let budget = Duration::from_secs(60);
    let options = TuneOptions { candidates: Some(choices.clone()), budget, rounds: 3 };
    let mut heard = vec![];
    let report = context.tune_blocking(&problem, &options, &mut |progress| heard.push(progress)).map_err(failed)?;
    let tried: Vec<_> = report.candidates.iter().map(|candidate| candidate.choice).collect();
    assert_eq!(tried, choices);
    for candidate in &report.candidates {
        let Outcome::Timed { timing, first_ms, worst_ratio } = &candidate.outcome else {
            return Err(format!("{}: {:?}", candidate.choice, candidate.outcome));
        };
        assert!((1..=3).contains(&timing.millis.len()) && timing.millis.iter().all(|ms| *ms > 0.0), "{timing:?}");
        assert!(*first_ms > 0.0 && *worst_ratio <= 1.0);
        let stamped = timing.source == cross_attention::TimingSource::Timestamps;
        assert_eq!(stamped, context.caps().timestamps);
    }
    let checked = heard.iter().filter(|progress| matches!(progress, TuneProgress::Checking { of: 4, .. })).count();
    let timed = heard.iter().filter(|progress| matches!(progress, TuneProgress::Timing { of: 4, .. })).count();
    assert_eq!((checked, timed), (4, 4));

    // what was found is used here, and not elsewhere
    let entry = report.entry().ok_or("nothing was chosen")?;
    let fastest = report.candidates.iter().filter_map(|c| c.outcome.median_ms()).fold(f64::INFINITY, f64::min);
    assert!(entry.median_ms <= fastest / 0.98);
    let mut cache = TuneCache::new(DeviceKey::of(context.info()));
    cache.insert(entry.clone());
    let (prepared, lookup) = context.prepare_tuned_blocking(&problem, &cache).map_err(failed)?;
    assert_eq!((prepared.plan().choice(), lookup), (entry.choice, Lookup::Tuned(Box::new(entry.clone()))));
    assert!(prepared.plan().why().starts_with("tuned on this device: "), "{}", prepared.plan());
    let mut elsewhere = DeviceKey::of(context.info());
    elsewhere.driver_info += " and more";
    let mut foreign = TuneCache::new(elsewhere.clone());
    foreign.insert(cross_attention::tune::TuneEntry { device: elsewhere, ..entry });
    let (prepared, lookup) = context.prepare_tuned_blocking(&problem, &foreign).map_err(failed)?;
    assert!(matches!(lookup, Lookup::Ignored(_)), "{lookup:?}");
    assert_eq!(*prepared.plan(), Plan::new(&problem, context.caps(), None).map_err(failed)?);
    Ok(())
}

fn what_cannot_run_is_told(adapter: &Adapter) -> Result<(), String> {
    let context = &adapter.context;
    let problem = tiny();
    let own = Plan::new(&problem, context.caps(), None).map_err(failed)?.choice();
    // the first does not fit; the time is up before the last
    let choices = vec![split(9), own];
    let options = TuneOptions { candidates: Some(choices), budget: Duration::from_secs(60), rounds: 1 };
    let report = context.tune_blocking(&problem, &options, &mut |_| {}).map_err(failed)?;
    let [first, second] = &report.candidates[..] else { return Err(format!("{:?}", report.candidates)) };
    assert!(matches!(&first.outcome, Outcome::Failed { error } if error.to_string().contains("num_splits is 9")));
    assert_eq!((report.chosen, report.planned, second.choice), (Some(1), own, own));
    assert_eq!(report.planned_ms(), second.outcome.median_ms());

    let options = TuneOptions { budget: Duration::ZERO, ..TuneOptions::default() };
    let report = context.tune_blocking(&problem, &options, &mut |_| {}).map_err(failed)?;
    let timed = report.candidates.iter().filter(|candidate| candidate.outcome.median_ms().is_some()).count();
    let left_out = report.candidates.iter().filter(|c| matches!(c.outcome, Outcome::NotTried { .. })).count();
    assert_eq!((timed, left_out, report.chosen), (1, report.candidates.len() - 1, Some(0)));

    let nothing = AttentionProblem::new(AttentionSpec::new([1, 2, 0, 16], [1, 2, 3, 16])).expect("sound");
    let report = context.tune_blocking(&nothing, &TuneOptions::default(), &mut |_| {}).map_err(failed)?;
    assert_eq!((report.chosen, report.entry()), (None, None));

    let huge = AttentionProblem::new(AttentionSpec::new([1, 1, 1 << 28, 16384], [1, 1, 3, 16384])).expect("sound");
    match context.tune_blocking(&huge, &TuneOptions::default(), &mut |_| {}) {
        Err(Error::Gpu(_) | Error::HostMemory { .. } | Error::Plan(_)) => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

/// The subcommand writes a file, other subcommands use it and say so, and a file that is something else is left alone.
#[cfg(feature = "cli")]
fn the_program_tunes(adapter: &Adapter) -> Result<(), String> {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("tune.json").display().to_string();
    let name = adapter.context.info().name.clone();
    let run = |args: &[&str]| {
        let program = env!("CARGO_BIN_EXE_cross-attention");
        let on = ["--device", &name, "--q-heads", "2", "--q-len", "2", "--kv-len", "300", "--head-dim", "16"];
        let output = std::process::Command::new(program).args(args).args(on).output().expect("the program starts");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, said, noted) = run(&["tune", "--cache", &file, "--seconds", "0.1", "--kernel", "fused"]);
    assert_eq!((code, noted.as_str()), (Some(0), ""), "{said}");
    assert!(said.contains("median ms") && said.contains("chosen: fused "), "{said}");
    let (code, said, noted) = run(&["explain", "--tune-cache", &file]);
    assert_eq!(code, Some(0), "{noted}");
    assert!(said.contains("kernel     fused: tuned on this device: "), "{said}");
    assert!(noted.starts_with("fused block_q="), "{noted}");
    // another class of problems
    let (code, said, noted) = run(&["explain", "--tune-cache", &file, "--lse"]);
    assert!(code == Some(0) && !said.contains("tuned") && noted.starts_with("no tuned choice"), "{said}{noted}");
    let (code, _, noted) = run(&["explain", "--tune-cache", &format!("{file}x")]);
    assert!(code == Some(0) && noted.starts_with("warning: there is no tune cache"), "{noted}");
    std::fs::write(&file, "precious").expect("a file");
    let (code, _, noted) = run(&["tune", "--cache", &file, "--seconds", "0", "--kernel", "fused"]);
    assert!(code == Some(1) && noted.contains("it is not overwritten"), "{noted}");
    assert_eq!(std::fs::read_to_string(&file).expect("a file"), "precious");
    Ok(())
}
