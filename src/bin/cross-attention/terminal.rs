//! What the program says: results on standard output, everything else on standard error.

use std::fmt::Arguments;
use std::io::{ErrorKind, IsTerminal, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::error::Error;

/// Standard output and standard error, with a progress bar that never gets between the lines.
#[derive(Debug)]
pub(crate) struct Terminal {
    bar: ProgressBar,
    closed: bool,
}

impl Terminal {
    pub(crate) fn new() -> Self {
        Self { bar: ProgressBar::hidden(), closed: false }
    }

    /// Writes one line of results. When the reader has gone away (`| head`) it is dropped without a word.
    pub(crate) fn line(&mut self, line: Arguments<'_>) -> Result<(), Error> {
        if self.closed {
            return Ok(());
        }
        let written = self.bar.suspend(|| {
            let mut stdout = std::io::stdout().lock();
            writeln!(stdout, "{line}").and_then(|()| stdout.flush())
        });
        match written {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.closed = true;
                Ok(())
            }
            written => written.map_err(|source| Error::Stdout { source }),
        }
    }

    /// Whether nobody reads the results any more.
    pub(crate) const fn closed(&self) -> bool {
        self.closed
    }

    /// Writes one line for the person at the terminal. There is nobody to tell if that fails.
    pub(crate) fn note(&self, line: Arguments<'_>) {
        self.bar.suspend(|| {
            let _ = writeln!(std::io::stderr().lock(), "{line}");
        });
    }

    /// Shows a progress bar of `steps` steps, if standard error is a terminal.
    pub(crate) fn start_bar(&mut self, steps: usize) {
        if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {wide_msg} {elapsed}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            self.bar =
                ProgressBar::with_draw_target(Some(steps as u64), ProgressDrawTarget::stderr()).with_style(style);
        }
    }

    /// The bar; hidden where none was started.
    pub(crate) const fn bar(&self) -> &ProgressBar {
        &self.bar
    }

    /// Takes the bar off the screen.
    pub(crate) fn end_bar(&mut self) {
        self.bar.finish_and_clear();
        self.bar = ProgressBar::hidden();
    }
}
