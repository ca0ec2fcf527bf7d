//! What the program says: results on standard output, everything else on standard error.

use std::fmt::Arguments;
use std::io::{ErrorKind, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::error::Error;
use crate::text::{harmless, shown, wrap};

/// Standard output and standard error, with a progress bar that never gets between the lines.
#[derive(Debug)]
pub(crate) struct Terminal {
    bar: ProgressBar,
    closed: bool,
    /// Results go to standard output as bytes, so that lines go to standard error.
    taken: bool,
    width: Option<usize>,
}

impl Terminal {
    pub(crate) fn new() -> Self {
        let width = comfy_table::Table::new().width().map(usize::from).filter(|&width| width > 20);
        Self { bar: ProgressBar::hidden(), closed: false, taken: false, width }
    }

    /// Columns of the terminal that results go to; `None` where they go elsewhere.
    pub(crate) const fn width(&self) -> Option<usize> {
        self.width
    }

    /// Leaves standard output to the bytes of a file.
    pub(crate) const fn leave_stdout(&mut self) {
        self.taken = true;
    }

    /// Writes one line of results. When the reader has gone away (`| head`) it is dropped without a word.
    pub(crate) fn line(&mut self, line: Arguments<'_>) -> Result<(), Error> {
        if self.closed {
            return Ok(());
        }
        if self.taken {
            self.note(line);
            return Ok(());
        }
        let text = harmless(&line.to_string());
        let text = self.width.map_or(text.clone(), |width| wrap(&text, width));
        self.verbatim(format!("{text}\n").as_bytes())
    }

    /// Writes bytes that are for another program, as they are. When the reader has gone away they are dropped without a word.
    pub(crate) fn verbatim(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let written = self.bar.suspend(|| {
            let mut stdout = std::io::stdout().lock();
            stdout.write_all(bytes).and_then(|()| stdout.flush())
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
        let text = harmless(&line.to_string());
        let text =
            self.width.filter(|_| std::io::stderr().is_terminal()).map_or(text.clone(), |width| wrap(&text, width));
        self.bar.suspend(|| {
            let _ = writeln!(std::io::stderr().lock(), "{text}");
        });
    }

    /// Shows a progress bar of `steps` steps, if standard error is a terminal.
    pub(crate) fn start_bar(&mut self, steps: usize) {
        if std::io::stderr().is_terminal() {
            self.bar = bar(steps as u64, "{bar:30} {pos}/{len} {wide_msg} {elapsed}");
        }
    }

    /// Shows what is being done where nobody knows how long it takes, and for how long it has been.
    pub(crate) fn start_work(&mut self, what: &str) -> ProgressBar {
        let bar = self.start(0, "{spinner} {wide_msg} {elapsed}", what);
        if !bar.is_hidden() {
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        bar
    }

    /// Shows how many of some bytes are done.
    pub(crate) fn start_bytes(&mut self, what: &str, bytes: u64) -> ProgressBar {
        self.start(bytes, "{bar:30} {bytes}/{total_bytes} {wide_msg} {elapsed}", what)
    }

    /// A bar in place of the last one, unless that counts files.
    fn start(&mut self, len: u64, template: &str, what: &str) -> ProgressBar {
        // a bar that is seen counts files: it stays, and says what is done with one of them
        if !self.bar.is_hidden() && !self.bar.is_finished() && self.bar.length().unwrap_or(0) > 1 {
            return ProgressBar::hidden();
        }
        if std::io::stderr().is_terminal() {
            self.bar = bar(len, template);
            self.bar.set_message(what.to_owned());
        }
        self.bar.clone()
    }

    /// Says at the bar what is being done.
    pub(crate) fn doing(&self, what: &str) {
        self.bar.set_message(shown(what));
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

fn bar(len: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(Some(len), ProgressDrawTarget::stderr()).with_style(style)
}
