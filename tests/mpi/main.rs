//! Attention over shards on 1 to 4 ranks: one trial per scenario and number of ranks, `ranks_3/random`.
//!
//! A trial starts this program again under `mpirun`, where every rank plays the scenario; more ranks than cores are well. Every
//! run is bounded in time and ended with all its processes after that. Without `mpirun` all trials are ignored; with
//! `REQUIRE_MPI=1` that is a failure. `TRIALS` and `SEED` are as for other random cases.

#![expect(
    clippy::expect_used,
    clippy::print_stderr,
    reason = "a trial that cannot go on stops; what went wrong goes to the terminal"
)]

#[path = "../common/mod.rs"]
#[allow(dead_code, unused_imports, unused_mut, reason = "shared with tests that use more of it")]
mod common;

mod beside;
mod hostile;
mod launch;
mod own;
mod program;
mod refusals;
mod scenarios;
mod shards;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use mpi::environment::Threading;
use mpi::topology::{Communicator, SimpleCommunicator};

/// What a scenario is: played on every rank, it says what went wrong on its own.
type Scenario = fn(&SimpleCommunicator) -> Result<(), String>;

/// The argument that makes this program a rank.
const CHILD: &str = "--as-rank";

/// Scenarios by name, and on how many ranks.
fn all() -> Vec<(&'static str, Scenario, &'static [usize])> {
    const EACH: &[usize] = &[1, 2, 3, 4];
    vec![
        ("random", scenarios::random, EACH),
        ("own_queries", own::random, EACH),
        ("table", scenarios::table, &[1, 3]),
        ("long", scenarios::long, &[4]),
        ("same_bits", scenarios::same_bits, EACH),
        ("own_merges", scenarios::own_merges, EACH),
        ("weights", beside::weights, &[1, 4]),
        ("gradients", beside::gradients, &[1, 4]),
        ("neither", beside::neither, &[1, 3]),
        ("contexts", scenarios::contexts, &[3]),
        ("pools", scenarios::pools, &[1, 3]),
        ("on_a_gpu", scenarios::on_a_gpu, &[2]),
        ("disagree", refusals::disagree, EACH),
        ("refused", refusals::refused, &[1, 3]),
        ("parts", hostile::parts, &[4]),
        ("nothing", hostile::nothing, &[3]),
        ("storage", hostile::storage, &[2]),
        ("memory", hostile::memory, &[3]),
        ("messages", hostile::messages, &[2]),
        ("threads", hostile::threads, &[2]),
    ]
}

fn main() -> std::process::ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, child, name] = &arguments[..]
        && child == CHILD
    {
        return rank(name);
    }
    let arguments = Arguments::from_args();
    let missing = launch::missing();
    let no_adapter = scenarios::no_adapter();
    let why = |name: &str| missing.clone().or_else(|| no_adapter.clone().filter(|_| name == "on_a_gpu"));
    let mut trials: Vec<Trial> = all()
        .into_iter()
        .flat_map(|(name, _, ranks)| ranks.iter().map(move |&ranks| (name, ranks)))
        .map(|(name, ranks)| trial(format!("ranks_{ranks}/{name}"), why(name), move || launch::passes(name, ranks)))
        .collect();
    let no_program = || missing.clone().or_else(program::missing);
    trials.push(trial("ranks_3/program".to_owned(), no_program(), program::rows));
    trials.push(trial("ranks_2/program_refuses".to_owned(), no_program(), program::refused));
    trials.push(trial("ranks_2/in_a_thread".to_owned(), missing.clone(), || launch::passes("in_a_thread", 2)));
    for (name, message) in [
        ("killed", ""),
        ("panics", "rank 2 of 4: panicked; all ranks are ended"),
        ("fails", "rank 2 of 4: something of its own"),
        ("returns", "rank 2 of 4: left before its end; all ranks are ended"),
    ] {
        trials.push(trial(format!("ranks_4/{name}"), missing.clone(), move || launch::ends(name, 4, message)));
    }
    if let Some(reason) = missing.filter(|_| std::env::var("REQUIRE_MPI").is_ok_and(|value| value == "1")) {
        trials.push(Trial::test("mpirun_is_there", move || Err(Failed::from(format!("REQUIRE_MPI=1 and {reason}")))));
    }
    // every trial has all cores to itself
    let arguments = Arguments { test_threads: arguments.test_threads.or(Some(1)), ..arguments };
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn trial(name: String, missing: Option<String>, run: impl FnOnce() -> Result<(), String> + Send + 'static) -> Trial {
    Trial::ignorable_test(name, move || match missing {
        Some(reason) => Ok(Completion::ignored_with(reason)),
        None => run().map(|()| Completion::Completed).map_err(Failed::from),
    })
}

/// One rank of a scenario. What goes wrong ends all ranks.
fn rank(name: &str) -> std::process::ExitCode {
    launch::end_in_time();
    let level = if name == "in_a_thread" { Threading::Serialized } else { Threading::Single };
    let (universe, _) = mpi::initialize_with_threading(level).expect("MPI begins");
    let world = universe.world();
    if ["panics", "fails", "returns"].contains(&name) {
        return hostile::leaves(&world, name);
    }
    let number = world.rank();
    std::panic::set_hook(Box::new(move |info| {
        eprintln!("rank {number}: {info}");
        std::process::abort();
    }));
    if name == "killed" {
        return scenarios::killed(&world);
    }
    let played = match all().into_iter().find(|(of, ..)| *of == name) {
        Some((_, scenario, _)) => scenario(&world),
        None if name == "in_a_thread" => hostile::in_a_thread(),
        None => Err(format!("no scenario {name}")),
    };
    if let Err(message) = played {
        eprintln!("rank {number}: {message}");
        world.abort(1);
    }
    std::process::ExitCode::SUCCESS
}
