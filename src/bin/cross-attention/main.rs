//! The command line program: attention over files, plans, devices and timings.

#![expect(clippy::doc_markdown, reason = "doc comments of flags are help texts, read on a terminal")]

mod about;
mod backward;
mod bench;
mod convert;
mod devices;
mod doctor;
mod draw;
mod error;
mod explain;
mod file;
mod host;
mod input;
mod interrupt;
mod map;
mod merge;
mod numpy;
mod open;
mod options;
mod output;
mod record;
mod results;
mod run;
mod shaders;
mod shape;
mod shell;
mod show;
mod system;
mod table;
mod terminal;
mod text;
mod translate;
mod tune;
mod tuned;

use std::process::ExitCode;
use std::time::Instant;

use clap::{Arg, Parser, Subcommand};

use terminal::Terminal;

/// Attention where queries and keys come from different sequences, on any GPU and on the CPU
#[derive(Debug, Parser)]
#[command(version, long_version = about::long_version(), max_term_width = 110)]
#[command(mut_subcommands(|command| command.mut_args(negative)))]
struct Program {
    #[command(subcommand)]
    command: Command,
}

/// A flag that has values: -1 is one of them, so that what is wrong with it is told, and not that it is no flag.
fn negative(flag: Arg) -> Arg {
    if flag.get_action().takes_values() && !flag.is_positional() { flag.allow_negative_numbers(true) } else { flag }
}

#[derive(Debug, Subcommand)]
enum Command {
    Devices(devices::Args),
    Run(Box<run::Args>),
    Map(Box<map::Args>),
    Convert(convert::Args),
    Merge(merge::Args),
    Explain(Box<explain::Args>),
    Bench(Box<bench::Args>),
    Tune(Box<tune::Args>),
    Shaders(Box<shaders::Args>),
    Doctor(doctor::Args),
    Completions(shell::CompletionsArgs),
    Man(shell::ManArgs),
}

fn main() -> ExitCode {
    system::quiet_libraries();
    let started = Instant::now();
    let program = match Program::try_parse() {
        Ok(program) => program,
        Err(told) => return tell(&told),
    };
    interrupt::watch();
    let mut terminal = Terminal::new();
    // at their first use, threads that do not start would be a panic
    if let Err(error) = rayon::ThreadPoolBuilder::new().build_global() {
        terminal
            .note(format_args!("error: threads to compute on do not start: {error}; RAYON_NUM_THREADS asks for fewer"));
        return ExitCode::FAILURE;
    }
    let all_well = match &program.command {
        Command::Devices(args) => devices::devices(args, &mut terminal).map(|()| true),
        Command::Run(args) => run::run(args, &mut terminal),
        Command::Map(args) => map::map(args, &mut terminal).map(|()| true),
        Command::Convert(args) => convert::convert(args, &mut terminal).map(|()| true),
        Command::Merge(args) => merge::merge(args, &mut terminal).map(|()| true),
        Command::Explain(args) => explain::explain(args, &mut terminal).map(|()| true),
        Command::Bench(args) => bench::bench(args, started, &mut terminal),
        Command::Tune(args) => tune::tune(args, &mut terminal),
        Command::Shaders(args) => shaders::shaders(args, &mut terminal).map(|()| true),
        Command::Doctor(args) => doctor::doctor(args, &mut terminal),
        Command::Completions(args) => shell::completions(args, &mut terminal).map(|()| true),
        Command::Man(args) => shell::man(args, &mut terminal).map(|()| true),
    };
    terminal.end_bar();
    match all_well {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            terminal.note(format_args!("error: {}", error.chain()));
            ExitCode::FAILURE
        }
    }
}

/// Prints a help text, the version, or what is wrong with the call.
fn tell(told: &clap::Error) -> ExitCode {
    match told.print() {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Terminal::new().note(format_args!("error: {}", error::Error::Stdout { source: error }.chain()));
            ExitCode::FAILURE
        }
        _ => u8::try_from(told.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Program::command().debug_assert();
    }
}
