//! Every shader of the catalog: which they are, and how much that is.

use std::collections::HashSet;

use cross_attention::DeviceCaps;
use cross_attention::KernelChoice;
use cross_attention::dispatch::{Shader, Variant};
use cross_attention::plan::{CatalogEntry, DeviceKind, WeightsPlan, catalog_of, catalog_widths};
use cross_attention::weights::{HeadReduce, Keys, WeightsProblem, WeightsSpec};
use rayon::prelude::*;

use super::Job;
use super::list::listed;
use crate::error::Error;
use crate::translate::{Source, Target};

/// Every shader of the catalog, or those of one kernel and some widths.
///
/// # Errors
/// A kernel or a width that the catalog does not have.
pub(super) fn every_shader(kernel: KernelChoice, widths: &[usize]) -> Result<Vec<Job>, Error> {
    let known = catalog_widths();
    if let Some(&found) = widths.iter().find(|width| !known.contains(width)) {
        let possible = known.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        return Err(Error::CatalogWidth { found, possible });
    }
    let only = match kernel {
        KernelChoice::Auto => None,
        KernelChoice::Gpu(kernel) => Some(kernel.name()),
        KernelChoice::Cpu(kernel) => return Err(Error::NoShaders { what: kernel.name() }),
    };
    let of = |CatalogEntry { kernel, step, problem, chosen_for }| Job {
        kernel: kernel.name(),
        variant: step.variant.clone(),
        step: Some(step),
        problem: Some(problem),
        chosen_for,
    };
    let beside = Variant::beside_plans().into_iter().map(|variant| Job {
        kernel: variant.shader.name(),
        variant,
        step: None,
        problem: None,
        // what comes before and after attentions runs on every device
        chosen_for: DeviceKind::all(),
    });
    let entries = catalog_of(widths);
    let weights = weights(&entries);
    let all = entries.into_iter().map(of).chain(beside).chain(weights);
    let jobs: Vec<Job> = all.filter(|job| only.is_none_or(|kernel| job.kernel == kernel)).collect();
    if let (Some(kernel), true) = (only, jobs.is_empty()) {
        return Err(Error::NotInCatalog { kernel });
    }
    Ok(jobs)
}

/// The shaders of selected weights for the problems of the catalog, each once; they fit every device.
fn weights(entries: &[CatalogEntry]) -> Vec<Job> {
    let mut seen = HashSet::new();
    let mut jobs = vec![];
    for CatalogEntry { problem, .. } in entries {
        for reduce in [HeadReduce::Each, HeadReduce::Mean] {
            for keys in [Keys::default(), Keys::Segments(std::iter::once(0..problem.kv_len()).collect())] {
                let spec = WeightsSpec { reduce, keys, ..WeightsSpec::default() };
                let Ok(wanted) = WeightsProblem::new(problem, &spec) else { continue };
                let Ok(plan) = WeightsPlan::new(&wanted, &DeviceCaps::webgpu_defaults()) else { continue };
                for step in plan.steps().iter().filter(|step| seen.insert(step.variant.clone())) {
                    jobs.push(Job {
                        kernel: Shader::Weights.name(),
                        variant: step.variant.clone(),
                        step: Some(step.clone()),
                        problem: Some(problem.clone()),
                        chosen_for: DeviceKind::all(),
                    });
                }
            }
        }
    }
    jobs
}

/// How many files a set of shaders makes, which is exact, and how many bytes, which is not.
#[derive(Debug)]
pub(super) struct HowMuch {
    shaders: usize,
    files: usize,
    /// By the sizes of some, and of how many.
    bytes: f64,
    measured: usize,
}

/// Shaders that are translated to learn how large they become.
const MEASURED: usize = 64;

impl HowMuch {
    /// Translates some of the shaders, spread over all of them.
    ///
    /// # Errors
    /// A shader that cannot be translated.
    pub(super) fn of(jobs: &[Job], targets: &[Target]) -> Result<Self, Error> {
        let files = jobs.iter().map(|job| targets.iter().filter(|target| job.fits(**target)).count()).sum();
        let measured = jobs.len().min(MEASURED);
        let some: Vec<&Job> = (0..measured).map(|n| &jobs[n * jobs.len() / measured]).collect();
        let bytes: Result<Vec<usize>, Error> = some.par_iter().map(|job| bytes(job, targets)).collect();
        let bytes: usize = bytes?.iter().sum();
        let bytes = bytes as f64 * jobs.len() as f64 / measured.max(1) as f64;
        Ok(Self { shaders: jobs.len(), files, bytes, measured })
    }
}

impl std::fmt::Display for HowMuch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { shaders, files, bytes, measured } = self;
        let (about, how) = match measured < shaders {
            true => ("about ", format!(" (by the sizes of {measured} of them)")),
            false => ("", String::new()),
        };
        write!(f, "{shaders} shaders in {files} files and {}, {about}{:.1} MB{how}", super::MANIFEST, bytes / 1e6)
    }
}

/// What a shader adds to the folder: its files, and its entry in the list.
fn bytes(job: &Job, targets: &[Target]) -> Result<usize, Error> {
    let source = Source::new(&job.variant)?;
    let mut bytes = 0;
    for &target in targets.iter().filter(|target| job.fits(**target)) {
        bytes += source.write(target)?.0.len();
    }
    // deeper in the list by two steps of two columns a line
    let entry = format!("{:#}", listed(job, &source, &[]));
    Ok(bytes + entry.len() + 4 * entry.lines().count())
}
