//! What one process finds out: the list of adapters, or one device. Each fact is a line of JSON as soon as it is known, so
//! that what was known before a crash is not lost.

use std::time::{Duration, Instant};

use cross_attention::cpu::{CpuKernel, CpuPlan, CpuStrategy, SimdLevel};
use cross_attention::{AttentionProblem, Device, DeviceRequest, Plan, gpu, workload};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::trials;
use crate::devices;
use crate::error::Error;
use crate::terminal::Terminal;

/// What a process looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) enum Part {
    Adapters,
    Cpu,
    /// By its number in the list.
    Adapter(usize),
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Adapters => f.write_str("adapters"),
            Self::Cpu => f.write_str("cpu"),
            Self::Adapter(number) => write!(f, "{number}"),
        }
    }
}

impl std::str::FromStr for Part {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "adapters" => Ok(Self::Adapters),
            "cpu" => Ok(Self::Cpu),
            number => number.parse().map(Self::Adapter).map_err(|_| "adapters, cpu, or the number of an adapter"),
        }
    }
}

/// A line of such a process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Line {
    /// The adapters, as `devices --json` has them.
    Adapters(Vec<Value>),
    /// What `--device auto` takes, and why.
    Auto(String),
    /// The device is open: what each typical problem would run.
    Kernels(Vec<Kernel>),
    /// What the device cannot do although it says that it can.
    Warning(String),
    /// A test begins.
    Begins(String),
    Ends(Trial),
    /// Tests for which there was no time.
    LeftOut(usize),
    /// The device failed.
    Fault(String),
}

/// What would run for a problem.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Kernel {
    pub(super) problem: String,
    /// The kernel's name, or why there is none.
    pub(super) kernel: String,
    /// How the kernel goes about it, where it has several ways.
    pub(super) strategy: Option<String>,
}

/// How a test went.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Trial {
    pub(super) name: String,
    /// The largest error, by what is allowed; nothing where the test failed before there was a result.
    pub(super) worst: Option<f64>,
    pub(super) millis: f64,
    /// What went wrong.
    pub(super) fault: Option<String>,
}

/// Problems for which the page names the kernel.
const TYPICAL: [&str; 8] = [
    "sd15_64",
    "whisper_decode",
    "whisper_prefill",
    "square_1k",
    "gqa",
    "fid_decode",
    "perceiver",
    "sam_image_to_token",
];

/// Finds out about one part, and says so line by line.
///
/// # Errors
/// Standard output that can't be written.
pub(super) fn probe(part: Part, budget: Duration, terminal: &mut Terminal) -> Result<(), Error> {
    let request = match part {
        Part::Adapters => {
            let adapters = gpu::adapters_blocking();
            let list = adapters.iter().enumerate().map(|(index, adapter)| devices::as_json(index, adapter)).collect();
            say(&Line::Adapters(list), terminal)?;
            let auto = match Device::auto() {
                Ok(choice) => choice.to_string(),
                Err(error) => format!("nothing: {error}"),
            };
            return say(&Line::Auto(auto), terminal);
        }
        Part::Cpu => DeviceRequest::Cpu,
        Part::Adapter(number) => DeviceRequest::Number(number),
    };
    let device = match Device::choose_blocking(&request) {
        Ok(choice) => choice.device,
        Err(error) => return say(&Line::Fault(error.to_string()), terminal),
    };
    let problems = TYPICAL.iter().filter_map(|name| workload::find(name));
    let kernels = problems.filter_map(|workload| {
        let problem = AttentionProblem::new(workload.spec).ok()?;
        let (kernel, strategy) = kernel(&device, &problem);
        Some(Kernel { problem: workload.name.to_owned(), kernel, strategy })
    });
    say(&Line::Kernels(kernels.collect()), terminal)?;
    if let Device::Gpu(gpu) = &device
        && let Some(fault) = &gpu.caps().subgroup_fault
    {
        say(&Line::Warning(format!("its subgroups are not used: {fault}")), terminal)?;
    }
    test(&device, budget, terminal)
}

/// Tests until the time is over, the first in any case.
fn test(device: &Device, budget: Duration, terminal: &mut Terminal) -> Result<(), Error> {
    let trials = trials::all();
    let began = Instant::now();
    for (n, trial) in trials.iter().enumerate() {
        if n > 0 && began.elapsed() >= budget {
            return say(&Line::LeftOut(trials.len() - n), terminal);
        }
        say(&Line::Begins(trial.name.to_owned()), terminal)?;
        let start = Instant::now();
        let result = trial.run(device);
        let (worst, fault) = match result {
            Ok(judged) => (Some(judged.worst), judged.fault),
            Err(error) => (None, Some(error.chain())),
        };
        let millis = start.elapsed().as_secs_f64() * 1e3;
        say(&Line::Ends(Trial { name: trial.name.to_owned(), worst, millis, fault }), terminal)?;
    }
    Ok(())
}

/// The kernel as `explain` names it and `--kernel` takes it, and its strategy.
fn kernel(device: &Device, problem: &AttentionProblem) -> (String, Option<String>) {
    match device {
        Device::Gpu(gpu) => match Plan::new(problem, gpu.caps(), None) {
            Ok(plan) => (plan.kernel().name().to_owned(), None),
            Err(error) => (format!("none: {error}"), None),
        },
        Device::Cpu | Device::Oracle => {
            let strategy = match CpuPlan::new(problem, SimdLevel::best()).strategy() {
                CpuStrategy::ManyQueries => "many_queries".to_owned(),
                CpuStrategy::FewKeys => "few_keys".to_owned(),
                CpuStrategy::FewQueries => "few_queries".to_owned(),
                CpuStrategy::HandfulOfKeys => "handful_of_keys".to_owned(),
                other => format!("{other:?}"),
            };
            (CpuKernel::default().name().to_owned(), Some(strategy))
        }
    }
}

fn say(line: &Line, terminal: &mut Terminal) -> Result<(), Error> {
    terminal.verbatim(format!("{}\n", json!(line)).as_bytes())
}
