//! Another process of this program that looks at one part, and how long it may take.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use super::probe::{Kernel, Line, Part, Trial};
use crate::error::Error;

/// Beyond its share of the time for tests, a process may take this long: software drivers compile for seconds where the
/// machine is busy. Then it counts as hanging.
const PATIENCE: Duration = Duration::from_secs(60);

/// What there is, and what would be taken of it.
#[derive(Debug, Default)]
pub(super) struct Adapters {
    pub(super) list: Vec<Value>,
    pub(super) auto: Option<String>,
}

/// What is known of a device.
#[derive(Debug, Serialize)]
pub(super) struct Examined {
    pub(super) part: Part,
    pub(super) kernels: Vec<Kernel>,
    pub(super) warnings: Vec<String>,
    pub(super) trials: Vec<Trial>,
    /// Tests for which there was no time.
    pub(super) left_out: usize,
    /// Why it was not looked at to the end.
    pub(super) fault: Option<String>,
}

impl Examined {
    /// The time that its tests took.
    pub(super) fn spent(&self) -> Duration {
        Duration::from_secs_f64(self.trials.iter().map(|trial| trial.millis.max(0.0)).sum::<f64>() / 1e3)
    }

    pub(super) fn passed(&self) -> bool {
        self.fault.is_none() && self.trials.iter().all(|trial| trial.fault.is_none())
    }
}

/// The adapters, and what went wrong in finding them.
///
/// # Errors
/// A program that can't start itself.
pub(super) fn adapters() -> Result<(Adapters, Option<String>), Error> {
    let mut adapters = Adapters::default();
    let fault = follow(Part::Adapters, Duration::ZERO, |line| match line {
        Line::Adapters(list) => adapters.list = list,
        Line::Auto(auto) => adapters.auto = Some(auto),
        _ => {}
    })?;
    Ok((adapters, fault))
}

/// Looks at a device, spending about `share` on its tests.
///
/// # Errors
/// A program that can't start itself.
pub(super) fn examine(part: Part, share: Duration) -> Result<Examined, Error> {
    let mut found = Examined { part, kernels: vec![], warnings: vec![], trials: vec![], left_out: 0, fault: None };
    let (mut running, mut told) = (None, None);
    let fault = follow(part, share, |line| match line {
        Line::Kernels(kernels) => found.kernels = kernels,
        Line::Warning(warning) => found.warnings.push(warning),
        Line::Begins(name) => running = Some(name),
        Line::Ends(trial) => {
            running = None;
            found.trials.push(trial);
        }
        Line::LeftOut(count) => found.left_out = count,
        Line::Fault(fault) => told = Some(fault),
        Line::Adapters(_) | Line::Auto(_) => {}
    })?;
    let place = running.map_or_else(String::new, |name| format!(" in the test of {name}"));
    found.fault = told.or_else(|| fault.map(|fault| format!("{fault}{place}")));
    Ok(found)
}

/// Runs such a process and hears its lines; why it did not end well, if so.
fn follow(part: Part, share: Duration, mut hear: impl FnMut(Line)) -> Result<Option<String>, Error> {
    let failed = |source| Error::Probe { source };
    let program = std::env::current_exe().map_err(failed)?;
    let mut child = Command::new(program)
        .args(["doctor", "--part", &part.to_string(), "--seconds", &share.as_secs_f64().to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let (lines, complaints) = (read_lines(&mut child), read_complaints(&mut child));
    let deadline = Instant::now() + share + PATIENCE;
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            // what a driver writes to standard output is not for us
            Ok(line) => serde_json::from_str(&line).map_or((), &mut hear),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => return Ok(Some(end(&mut child))),
        }
    }
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().map_err(failed)? {
            let last = complaints.recv_timeout(Duration::from_millis(100)).unwrap_or_default();
            return Ok((!status.success()).then(|| format!("{}{last}", ended(status))));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(Some(end(&mut child)))
}

/// Ends a process that hangs.
fn end(child: &mut Child) -> String {
    // one that ended by itself meanwhile is as good
    let _ = child.kill();
    let _ = child.wait();
    format!("it did not answer for more than {} s", PATIENCE.as_secs())
}

fn ended(status: ExitStatus) -> String {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        return format!("its process was ended by signal {signal}");
    }
    match status.code() {
        Some(code) => format!("its process ended with exit code {code}"),
        None => "its process was ended".to_owned(),
    }
}

/// Lines of standard output, read on a thread of their own.
fn read_lines(child: &mut Child) -> Receiver<String> {
    let (sender, receiver) = channel();
    if let Some(stdout) = child.stdout.take() {
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
    }
    receiver
}

/// The last line that it said on standard error, once that is closed.
fn read_complaints(child: &mut Child) -> Receiver<String> {
    const MOST: u64 = 64 << 10;
    let (sender, receiver) = channel();
    if let Some(stderr) = child.stderr.take() {
        std::thread::spawn(move || {
            let mut bytes = vec![];
            let mut stderr = stderr.take(MOST);
            let _ = stderr.read_to_end(&mut bytes);
            // the rest is read too, so that nobody waits for a full pipe
            let _ = std::io::copy(&mut stderr.into_inner(), &mut std::io::sink());
            let text = String::from_utf8_lossy(&bytes);
            let last = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
            let _ = sender.send(if last.is_empty() { String::new() } else { format!(": {last}") });
        });
    }
    receiver
}
