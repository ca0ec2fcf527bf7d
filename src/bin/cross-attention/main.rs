//! The command line program: attention over files, plans, devices and timings.

#![expect(clippy::doc_markdown, reason = "doc comments of flags are help texts, read on a terminal")]

mod backward;
mod bench;
mod convert;
mod devices;
mod draw;
mod error;
mod explain;
mod file;
mod input;
mod interrupt;
mod map;
mod open;
mod options;
mod results;
mod run;
mod shaders;
mod shape;
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

use clap::{Parser, Subcommand};

use terminal::Terminal;

/// Attention where queries and keys come from different sequences, on any GPU and on the CPU
#[derive(Debug, Parser)]
#[command(version, max_term_width = 110)]
struct Program {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Devices(devices::Args),
    Run(Box<run::Args>),
    Map(Box<map::Args>),
    Convert(convert::Args),
    Explain(Box<explain::Args>),
    Bench(bench::Args),
    Tune(Box<tune::Args>),
    Shaders(Box<shaders::Args>),
}

fn main() -> ExitCode {
    system::quiet_libraries();
    let started = Instant::now();
    let program = Program::parse();
    interrupt::watch();
    let mut terminal = Terminal::new();
    let all_well = match &program.command {
        Command::Devices(args) => devices::devices(args, &mut terminal).map(|()| true),
        Command::Run(args) => run::run(args, &mut terminal),
        Command::Map(args) => map::map(args, &mut terminal).map(|()| true),
        Command::Convert(args) => convert::convert(args, &mut terminal).map(|()| true),
        Command::Explain(args) => explain::explain(args, &mut terminal).map(|()| true),
        Command::Bench(args) => bench::bench(args, started, &mut terminal),
        Command::Tune(args) => tune::tune(args, &mut terminal),
        Command::Shaders(args) => shaders::shaders(args, &mut terminal).map(|()| true),
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

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Program::command().debug_assert();
    }
}
