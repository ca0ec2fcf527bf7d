//! What every example does alike: the device it takes, its first lines, and how it ends.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use cross_attention::{Choice, Device, DeviceRequest};

pub(crate) type Failure = Box<dyn std::error::Error>;

/// Where to compute.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct DeviceFlag {
    /// Where to compute: auto (a hardware GPU, else the CPU), cpu, oracle (f64, slow), gpu, the number of an adapter as
    /// `cross-attention devices` lists it, a backend (vulkan, metal, dx12, gl), or part of an adapter's name
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub(crate) device: DeviceRequest,
}

impl DeviceFlag {
    /// Opens the device, after two lines that say what the example shows.
    pub(crate) fn begin(&self, shows: [&str; 2]) -> Result<Device, Failure> {
        shows.iter().for_each(|shows| say!("{shows}"));
        let Choice { device, reason } = Device::choose_blocking(&self.device)?;
        say!("device: {}: {reason}\n", device.name());
        Ok(device)
    }
}

/// Runs an example; what goes wrong is a sentence on standard error, and exit code 1.
pub(crate) fn end(result: Result<(), Failure>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        if !text.contains(&message) {
            text = format!("{text}: {message}");
        }
        cause = error.source();
    }
    fail(format_args!("{text}"))
}

/// A line on standard output. Where its reader has gone away (`| head`) it is dropped without a word.
pub(crate) fn line(line: Arguments<'_>) {
    match writeln!(std::io::stdout().lock(), "{line}") {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            fail(format_args!("cannot write to standard output: {error}"));
            std::process::exit(1);
        }
        _ => {}
    }
}

fn fail(text: Arguments<'_>) -> ExitCode {
    // there is nobody to tell if this fails
    let _ = writeln!(std::io::stderr().lock(), "error: {text}");
    ExitCode::FAILURE
}

/// `println!`, which does not panic where nobody listens.
macro_rules! say {
    () => { $crate::flags::line(format_args!("")) };
    ($($line:tt)*) => { $crate::flags::line(format_args!($($line)*)) };
}
pub(crate) use say;
