//! Tuned choices from a file, for the subcommands that run or explain an attention.

use std::path::PathBuf;

use cross_attention::gpu::Gpu;
use cross_attention::tune::{DeviceKey, Lookup, TuneCache};
use cross_attention::{AttentionProblem, Device, KernelChoice, Plan, PreparedAttention};

use crate::error::Error;
use crate::terminal::Terminal;

/// Where tuned choices are.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct TuneFlag {
    /// Use the choices that `tune` found and wrote to this file, on the device they were found on
    #[arg(long, value_name = "FILE", conflicts_with = "kernel")]
    tune_cache: Option<PathBuf>,
}

impl TuneFlag {
    /// Whether a file is named.
    pub(crate) const fn is_given(&self) -> bool {
        self.tune_cache.is_some()
    }
}

/// Tuned choices for a device.
#[derive(Debug)]
pub(crate) struct Tuned {
    cache: TuneCache,
    quiet: bool,
}

impl Tuned {
    /// Reads the file, if one is named; what is wrong with it, or that the device has no use for it, is told.
    pub(crate) fn load(flag: &TuneFlag, device: &Device, quiet: bool, terminal: &Terminal) -> Option<Self> {
        let path = flag.tune_cache.as_ref()?;
        let Device::Gpu(context) = device else {
            if !quiet {
                terminal.note(format_args!("warning: {} has no choices to tune, {path:?} is ignored", device.name()));
            }
            return None;
        };
        let (cache, warnings) = TuneCache::load(path, &DeviceKey::of(context.info()));
        for warning in warnings.iter().filter(|_| !quiet) {
            terminal.note(format_args!("warning: {warning}"));
        }
        Some(Self { cache, quiet })
    }

    /// The plan with the tuned choice, else by the rules; which of them is told.
    pub(crate) fn plan(&self, context: &Gpu, problem: &AttentionProblem, terminal: &Terminal) -> Result<Plan, Error> {
        let (plan, lookup) = context.plan_tuned(problem, &self.cache).map_err(cross_attention::Error::from)?;
        match lookup {
            _ if self.quiet => {}
            Lookup::Tuned(entry) => terminal.note(format_args!("{}, {}", entry.choice, entry.why())),
            Lookup::Untuned => terminal.note(format_args!("no tuned choice for this problem; the plan's own is used")),
            Lookup::Ignored(warning) => terminal.note(format_args!("warning: {warning}")),
        }
        Ok(plan)
    }

    /// Prepares a problem with its tuned choice where there is a cache, else with the kernel that was asked for.
    pub(crate) fn prepare(
        tuned: Option<&Self>,
        device: &Device,
        problem: &AttentionProblem,
        kernel: KernelChoice,
        terminal: &Terminal,
    ) -> Result<PreparedAttention, Error> {
        match (device, tuned) {
            (Device::Gpu(context), Some(tuned)) => {
                let plan = tuned.plan(context, problem, terminal)?;
                Ok(PreparedAttention::Gpu(Box::new(context.prepare_plan_blocking(plan)?)))
            }
            _ => Ok(device.prepare_blocking(problem, kernel)?),
        }
    }
}
