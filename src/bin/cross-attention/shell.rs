//! `completions` and `man`: what a shell and `man` want to know of this program, made of its own flags and help texts.

use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use cross_attention::files::{Ours, OutputFile};

use crate::Program;
use crate::error::Error;
use crate::terminal::Terminal;
use crate::text::{nearest, shown};

const COMPLETIONS: &str = "\
Examples:
  cross-attention completions bash > ~/.local/share/bash-completion/completions/cross-attention
  cross-attention completions fish > ~/.config/fish/completions/cross-attention.fish
  source <(cross-attention completions zsh)";

/// Print what makes a shell complete this program's flags and names
#[derive(Debug, clap::Args)]
#[command(after_help = COMPLETIONS)]
pub(crate) struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

const MAN: &str = "\
Examples:
  cross-attention man | man -l -
  cross-attention man bench | man -l -
  cross-attention man -o ~/.local/share/man/man1";

/// Print the manual page of this program or of a subcommand, or write all of them into a folder
#[derive(Debug, clap::Args)]
#[command(after_help = MAN)]
pub(crate) struct ManArgs {
    /// The subcommand; without one, the page of the program
    #[arg(value_name = "SUBCOMMAND", conflicts_with = "output")]
    name: Option<String>,
    /// Write every page into this folder, made if need be, over those of the same names
    #[arg(short, long, value_name = "FOLDER")]
    output: Option<PathBuf>,
}

/// Prints the completions of a shell.
///
/// # Errors
/// Standard output that can't be written.
pub(crate) fn completions(args: &CompletionsArgs, terminal: &mut Terminal) -> Result<(), Error> {
    let mut script = vec![];
    clap_complete::generate(args.shell, &mut Program::command(), NAME, &mut script);
    if args.shell == Shell::Bash {
        // its functions for subcommands are looked for under another name than they are given, where the program's has a hyphen
        let text = String::from_utf8_lossy(&script).replace("cross__subcmd__attention", "cross__attention");
        return terminal.verbatim(text.as_bytes());
    }
    terminal.verbatim(&script)
}

/// Prints one page, or writes all of them.
///
/// # Errors
/// A subcommand that is not there, a folder or standard output that can't be written.
pub(crate) fn man(args: &ManArgs, terminal: &mut Terminal) -> Result<(), Error> {
    let mut program = Program::command().disable_help_subcommand(true);
    program.build();
    let subcommands: Vec<&Command> = program.get_subcommands().filter(|command| !command.is_hide_set()).collect();
    if let Some(folder) = &args.output {
        std::fs::create_dir_all(folder).map_err(|source| Error::folder(folder, source))?;
        for command in subcommands.iter().copied().chain([&program]) {
            write(command, folder)?;
        }
        let (shown, count) = (folder.display(), subcommands.len() + 1);
        return terminal.line(format_args!("{shown}: {count} pages, {NAME}.1 and one for each subcommand"));
    }
    let page = match &args.name {
        None => &program,
        Some(name) => subcommands.iter().copied().find(|command| command.get_name() == name).ok_or_else(|| {
            let names: Vec<&str> = subcommands.iter().map(|command| command.get_name()).collect();
            let meant = nearest(name, &names).map(|name| format!("; is {name} meant?")).unwrap_or_default();
            Error::NoPage { name: shown(name), possible: names.join(", "), meant }
        })?,
    };
    terminal.verbatim(&render(&Man::new(page.clone()))?)
}

/// The program's name, as it is typed.
const NAME: &str = "cross-attention";

fn write(command: &Command, folder: &Path) -> Result<(), Error> {
    let page = Man::new(command.clone());
    OutputFile::write(&folder.join(page.get_filename()), Ours::ANYTHING, &render(&page)?)?;
    Ok(())
}

fn render(page: &Man) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![];
    page.render(&mut bytes).map_err(|source| Error::Stdout { source })?;
    Ok(bytes)
}
