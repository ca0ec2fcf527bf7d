//! `shaders`: writes the shaders of a plan, or of every plan, in the language of a target, with a list of them.

mod all;
mod args;
mod list;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cross_attention::dispatch::{Step, Variant};
use cross_attention::files::{Ours, OutputFile};
use cross_attention::plan::{BackwardPlan, DeviceKind};
use cross_attention::{AttentionProblem, Device, DeviceCaps, KernelChoice, Plan};
use rayon::prelude::*;
use serde_json::{Value, json};

pub(crate) use self::args::Args;
use self::list::{listed, name};
use crate::error::Error;
use crate::interrupt::LastWords;
use crate::terminal::Terminal;
use crate::translate::{Source, Target};

/// The list of what was written, beside it.
const MANIFEST: &str = "manifest.json";

/// A shader to write.
struct Job {
    /// The kernel that it is part of; merging and selected weights are not part of any.
    kernel: &'static str,
    variant: Variant,
    step: Option<Step>,
    problem: Option<AttentionProblem>,
    chosen_for: Vec<DeviceKind>,
}

impl Job {
    /// Workgroup memory, in bytes.
    fn workgroup_bytes(&self) -> u64 {
        self.step.as_ref().map_or(0, |step| step.workgroup_bytes)
    }

    fn fits(&self, target: Target) -> bool {
        self.workgroup_bytes() <= target.max_workgroup_bytes()
    }
}

/// Writes the shaders and the list.
///
/// # Errors
/// A shape, file or device that is refused, a plan that can't be made, a folder that can't be written to. The error says
/// if some files were written before.
pub(crate) fn shaders(args: &Args, terminal: &mut Terminal) -> Result<(), Error> {
    let mut targets = args.targets.clone();
    targets.sort_unstable();
    targets.dedup();
    let jobs = if args.all { all::every_shader(args.kernel, &args.widths.0)? } else { planned(args, terminal)? };
    if !args.all {
        check_targets(&jobs, &targets)?;
    }
    let threads = rayon::ThreadPoolBuilder::new().num_threads(args.jobs.map_or(0, usize::from));
    let threads = threads.build().map_err(|error| Error::Threads { reason: error.to_string() })?;
    if args.all || args.dry_run {
        let much = threads.install(|| all::HowMuch::of(&jobs, &targets))?;
        let folder = args.output.display();
        terminal.line(format_args!("{} {folder}: {much}", if args.dry_run { "would write" } else { "writing" }))?;
        if args.dry_run {
            return Ok(());
        }
    }
    make_folder(&args.output, args.force)?;
    terminal.start_bar(jobs.len());
    let (done, bar) = (Arc::new(AtomicUsize::new(0)), terminal.bar());
    let (so_far, count, folder) = (Arc::clone(&done), jobs.len(), args.output.display().to_string());
    let interrupted = LastWords::new(move || {
        let written = so_far.load(Ordering::Relaxed);
        format!(
            "interrupted: {folder} holds {written} of {count} shaders, without {MANIFEST}; --force writes over them"
        )
    });
    let write = |job: &Job| {
        let listed = write_one(job, &targets, &args.output)?;
        done.fetch_add(1, Ordering::Relaxed);
        bar.inc(1);
        Ok(listed)
    };
    let listed: Result<Vec<Value>, Error> = threads.install(|| jobs.par_iter().map(write).collect());
    terminal.end_bar();
    let partly = |source: Error| {
        let (written, count) = (done.load(Ordering::Relaxed), jobs.len());
        Error::PartlyWritten { path: args.output.clone(), written, count, source: Box::new(source) }
    };
    // the list comes last: where it is, all that it lists is
    let manifest = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "targets": targets.iter().map(|target| target.name()).collect::<Vec<_>>(),
        "shaders": listed.map_err(partly)?,
    });
    OutputFile::write(&args.output.join(MANIFEST), Ours::ANYTHING, format!("{manifest:#}\n").as_bytes())
        .map_err(|error| partly(error.into()))?;
    drop(interrupted);
    let folder = args.output.display();
    terminal.line(format_args!("{folder}: {} shaders and {MANIFEST}", jobs.len()))?;
    for target in targets {
        let left_out = jobs.iter().filter(|job| !job.fits(target)).count();
        if left_out > 0 {
            let most = target.max_workgroup_bytes();
            terminal.line(format_args!(
                "{left_out} of them are not there as {target}: they need more than {most} bytes of workgroup memory"
            ))?;
        }
    }
    Ok(())
}

/// Whether every target can take the shaders of a plan. Of all shaders, those that do not fit are left out, and said to be.
fn check_targets(jobs: &[Job], targets: &[Target]) -> Result<(), Error> {
    for job in jobs {
        if let Some(target) = targets.iter().find(|target| !job.fits(**target)) {
            let (needed, found) = (job.workgroup_bytes(), target.max_workgroup_bytes());
            return Err(Error::TargetMemory { shader: name(job), target: target.name(), needed, found });
        }
    }
    Ok(())
}

/// Writes one shader for every target that can take it; its entry in the list.
fn write_one(job: &Job, targets: &[Target], folder: &Path) -> Result<Value, Error> {
    let name = name(job);
    let source = Source::new(&job.variant)?;
    let mut files = vec![];
    for &target in targets.iter().filter(|target| job.fits(**target)) {
        let (bytes, entry_point) = source.write(target)?;
        let file = format!("{name}.{}", target.extension());
        // with --force, over whatever has the name
        OutputFile::write(&folder.join(&file), Ours::ANYTHING, &bytes)?;
        files.push(json!({ "target": target.name(), "file": file, "entry_point": entry_point }));
    }
    Ok(listed(job, &source, &files))
}

/// The shaders of one plan, each once.
fn planned(args: &Args, terminal: &mut Terminal) -> Result<Vec<Job>, Error> {
    if let [_, _, ..] = args.widths.0[..] {
        return Err(Error::SeveralWidths { found: args.widths.0.clone() });
    }
    let backward = if args.backward { Some(args.problem.backward(terminal)?) } else { None };
    let problem = match &backward {
        Some(backward) => backward.forward().clone(),
        None => args.problem.problem(terminal)?,
    };
    let caps = caps(args)?;
    let kind = DeviceKind {
        class: caps.class,
        workgroup_memory: caps.max_compute_workgroup_storage_size,
        subgroups: caps.subgroups,
    };
    if let Some(backward) = &backward {
        let plan =
            BackwardPlan::new(backward, &caps).map_err(|reason| cross_attention::Error::BackwardPlan { reason })?;
        return Ok(once(plan.steps(), "backward", &problem, &[kind]));
    }
    let kernel = match args.kernel {
        KernelChoice::Auto => None,
        KernelChoice::Gpu(kernel) => Some(kernel),
        KernelChoice::Cpu(kernel) => return Err(Error::NoShaders { what: kernel.name() }),
    };
    let plan = Plan::new(&problem, &caps, kernel).map_err(cross_attention::Error::from)?;
    let chosen = kernel.is_none() || Plan::new(&problem, &caps, None).is_ok_and(|own| own.kernel() == plan.kernel());
    let chosen_for: &[DeviceKind] = if chosen { &[kind] } else { &[] };
    Ok(once(plan.steps(), plan.kernel().name(), &problem, chosen_for))
}

/// The shaders of steps, each once.
fn once(steps: &[Step], kernel: &'static str, problem: &AttentionProblem, chosen_for: &[DeviceKind]) -> Vec<Job> {
    let mut seen = HashSet::new();
    let jobs = steps.iter().filter(|step| seen.insert(step.variant.clone())).map(|step| Job {
        kernel,
        variant: step.variant.clone(),
        step: Some(step.clone()),
        problem: Some(problem.clone()),
        chosen_for: chosen_for.to_vec(),
    });
    jobs.collect()
}

fn caps(args: &Args) -> Result<DeviceCaps, Error> {
    let Some(request) = &args.device else {
        let kind = DeviceKind {
            class: args.device_class.0,
            workgroup_memory: args.workgroup_memory,
            subgroups: args.subgroup_size.map(|size| (size, size)),
        };
        return Ok(kind.caps());
    };
    match Device::choose_blocking(request)?.device {
        Device::Gpu(context) => Ok(context.caps().clone()),
        Device::Cpu => Err(Error::NoShaders { what: "cpu" }),
        Device::Oracle => Err(Error::NoShaders { what: "oracle" }),
    }
}

/// Makes the folder, and sees whether it may be written to.
fn make_folder(folder: &Path, force: bool) -> Result<(), Error> {
    let failed = |source| Error::folder(folder, source);
    std::fs::create_dir_all(folder).map_err(failed)?;
    if !force && std::fs::read_dir(folder).map_err(failed)?.next().is_some() {
        return Err(Error::NotEmpty { path: folder.to_owned() });
    }
    let manifest = folder.join(MANIFEST);
    OutputFile::check(&manifest, Ours::ANYTHING)?;
    // what an older list says will no longer be so
    match std::fs::remove_file(manifest) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(failed(error)),
        _ => Ok(()),
    }
}
