//! `shaders`: writes the shaders of a plan, or of every plan, in the language of a target, with a list of them.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::ValueEnum;
use cross_attention::backward::{BackwardProblem, BackwardSpec};
use cross_attention::dispatch::{Shader, Slot, Step, Variant};
use cross_attention::files::{Ours, OutputFile};
use cross_attention::plan::{BackwardPlan, CatalogEntry, DeviceKind, WeightsPlan, catalog};
use cross_attention::weights::{HeadReduce, Keys, WeightsProblem, WeightsSpec};
use cross_attention::{AttentionProblem, Device, DeviceCaps, DeviceClass, DeviceRequest, KernelChoice, Plan};
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::error::Error;
use crate::explain::terms;
use crate::run::shape;
use crate::shape::ProblemFlags;
use crate::terminal::Terminal;
use crate::translate::{Source, Target};

const EXAMPLE: &str = "\
Examples:
  cross-attention shaders --q-heads 8 --q-len 4096 --kv-len 77 --head-dim 40 --target hlsl -o shaders/
  cross-attention shaders --q-heads 8 --q-len 1 --kv-len 1500 --head-dim 64 --device-class discrete -o shaders/
  cross-attention shaders --all --target spirv -o shaders/";

/// The list of what was written, beside it.
const MANIFEST: &str = "manifest.json";

/// Write the shaders that would run for a shape or an input file, or all of them, with a list
///
/// The shaders are those for a device of the class and workgroup memory given, or for the adapter that --device names.
/// They have the checks that wgpu puts in by default: indices of local and workgroup arrays are held in bounds and
/// loops are bounded; buffer accesses are held in bounds in MSL, and left to robustBufferAccess2 in SPIR-V.
///
/// manifest.json lists the files: entry point, bindings, workgroup size and memory (bytes), values of overrides,
/// what the plan was made for, and the devices for which a plan chooses the shader.
#[derive(Debug, clap::Args)]
#[command(
    after_help = EXAMPLE,
    mut_arg("q_heads", |flag| flag.required_unless_present("all")),
    mut_arg("q_len", |flag| flag.required_unless_present("all")),
    mut_arg("kv_len", |flag| flag.required_unless_present("all")),
    mut_arg("head_dim", |flag| flag.required_unless_present("all")),
)]
pub(crate) struct Args {
    /// The folder to write to, made if need be
    #[arg(short, long = "output", value_name = "FOLDER")]
    output: PathBuf,
    /// What to write; several with commas between
    #[arg(long = "target", value_enum, value_delimiter = ',', default_value = "wgsl")]
    targets: Vec<Target>,
    /// Every shader that plans choose over a grid of shapes, element types, layouts, terms and devices
    #[arg(long, conflicts_with_all = [
        "input", "shape", "KvFlags", "OptionFlags", "kernel", "device", "device_class", "workgroup_memory", "subgroup_size",
        "output_type", "probs",
    ])]
    all: bool,
    /// The shaders of the backward: the gradients of all inputs
    #[arg(long, conflicts_with_all = ["all", "kernel"])]
    backward: bool,
    /// Write into a folder that is not empty, over files of the same names
    #[arg(long)]
    force: bool,
    /// The kernel to use, by name; auto lets the plan choose
    #[arg(long, value_name = "NAME", default_value = "auto")]
    kernel: KernelChoice,
    /// Plan for this adapter: gpu, its number, its backend, or part of its name
    #[arg(long, value_name = "DEVICE", conflicts_with_all = ["device_class", "workgroup_memory", "subgroup_size"])]
    device: Option<DeviceRequest>,
    /// Plan for a device of this class that has WebGPU's default limits
    #[arg(long, value_enum, value_name = "CLASS", default_value = "unknown")]
    device_class: ClassName,
    /// Workgroup memory of that device
    #[arg(long, value_name = "BYTES", default_value_t = 16384)]
    workgroup_memory: u32,
    /// Subgroups of that device, if kernels may use them
    #[arg(long, value_name = "INVOCATIONS")]
    subgroup_size: Option<u32>,
    #[command(flatten)]
    problem: ProblemFlags,
}

/// A class of device by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ClassName(DeviceClass);

const CLASSES: [ClassName; DeviceClass::ALL.len()] = {
    let mut classes = [ClassName(DeviceClass::Unknown); DeviceClass::ALL.len()];
    let mut n = 0;
    while n < classes.len() {
        classes[n] = ClassName(DeviceClass::ALL[n]);
        n += 1;
    }
    classes
};

impl ValueEnum for ClassName {
    fn value_variants<'a>() -> &'a [Self] {
        &CLASSES
    }

    fn to_possible_value(&self) -> Option<clap::builder::PossibleValue> {
        Some(clap::builder::PossibleValue::new(self.0.name()))
    }
}

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
    let jobs = if args.all { every_shader() } else { planned(args, terminal)? };
    let mut targets = args.targets.clone();
    targets.sort_unstable();
    targets.dedup();
    if !args.all {
        check_targets(&jobs, &targets)?;
    }
    make_folder(&args.output, args.force)?;
    terminal.start_bar(jobs.len());
    let (done, bar) = (AtomicUsize::new(0), terminal.bar());
    let listed: Result<Vec<Value>, Error> = jobs
        .par_iter()
        .map(|job| {
            let listed = write_one(job, &targets, &args.output)?;
            done.fetch_add(1, Ordering::Relaxed);
            bar.inc(1);
            Ok(listed)
        })
        .collect();
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

fn every_shader() -> Vec<Job> {
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
    let entries = catalog();
    let weights = weights(&entries);
    entries.into_iter().map(of).chain(beside).chain(weights).collect()
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

/// The shaders of one plan, each once.
fn planned(args: &Args, terminal: &Terminal) -> Result<Vec<Job>, Error> {
    let problem = args.problem.problem(terminal)?;
    let caps = caps(args)?;
    let kind = DeviceKind {
        class: caps.class,
        workgroup_memory: caps.max_compute_workgroup_storage_size,
        subgroups: caps.subgroups,
    };
    if args.backward {
        let mut attention = problem.spec().clone();
        attention.scores = None;
        let backward = BackwardProblem::new(BackwardSpec::all(attention))?;
        let plan =
            BackwardPlan::new(&backward, &caps).map_err(|reason| cross_attention::Error::BackwardPlan { reason })?;
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

/// A name that is the same in every run: what the shader is for, and a hash of all that it is made of.
fn name(job: &Job) -> String {
    let mut name = job.variant.shader.name().to_owned();
    if job.variant.shader.name() != job.kernel {
        name = format!("{}_{name}", job.kernel);
    }
    let value = |wanted: &str| job.variant.overrides.iter().find(|(name, _)| *name == wanted).map(|(_, value)| *value);
    // writing to a String cannot fail
    for (width, letter) in [("HEAD_DIM", 'd'), ("V_HEAD_DIM", 'v')] {
        if let Some(value) = value(width) {
            let _ = write!(name, "_{letter}{value}");
        }
    }
    let mut elements: Vec<&str> = element_types(job).into_iter().map(|(_, element)| element).collect();
    elements.dedup();
    for element in elements {
        let _ = write!(name, "_{element}");
    }
    let text = format!("{} {:?}", job.variant.wgsl(), job.variant.overrides);
    let _ = write!(name, "_{:08x}", crc32fast::hash(text.as_bytes()));
    name
}

/// Element types of the problem's tensors that the shader binds.
fn element_types(job: &Job) -> Vec<(&'static str, &'static str)> {
    let (Some(step), Some(problem)) = (&job.step, &job.problem) else { return vec![] };
    let spec = problem.spec();
    let element = |slot: Slot| match slot {
        Slot::Query => Some(spec.query.element),
        Slot::Key => Some(spec.key.element),
        Slot::Value => Some(spec.value.element),
        Slot::Bias => spec.bias.map(|bias| bias.element),
        Slot::KeyScale => spec.key_scale.map(|scale| scale.element),
        Slot::ValueScale => spec.value_scale.map(|scale| scale.element),
        Slot::Output => Some(spec.output.element),
        Slot::Mask | Slot::RowData | Slot::Lse => None,
        Slot::Scores | Slot::Workspace | Slot::States | Slot::PartOutput | Slot::PartRowState => None,
        Slot::Selection | Slot::Weights | Slot::Gradients | Slot::DOutput | Slot::DLse | Slot::DWeights => None,
        Slot::DQuery | Slot::DKey | Slot::DValue | Slot::DBias => None,
        Slot::DAlibiSlopes | Slot::DSinks | Slot::DScale => None,
    };
    let slots = step.bindings.iter().map(|binding| binding.slot);
    slots.filter_map(|slot| Some((slot.name(), element(slot)?.name()))).collect()
}

/// What the list says of a shader.
fn listed(job: &Job, source: &Source<'_>, files: &[Value]) -> Value {
    let pairs = |pairs: &[(&'static str, u32)]| -> serde_json::Map<String, Value> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect()
    };
    let elements: serde_json::Map<String, Value> =
        element_types(job).into_iter().map(|(name, element)| (name.to_owned(), json!(element))).collect();
    let buffers: Vec<Value> = source
        .buffers
        .iter()
        .map(|buffer| {
            json!({
                "name": buffer.name,
                "binding": buffer.binding,
                "space": buffer.space.name(),
                "hlsl": buffer.register,
                "msl": format!("buffer({})", buffer.slot),
            })
        })
        .collect();
    let devices: Vec<Value> = job
        .chosen_for
        .iter()
        .map(|kind| {
            json!({
                "class": kind.class.name(),
                "workgroup_memory": kind.workgroup_memory,
                "subgroups": kind.subgroups.map(|(smallest, largest)| [smallest, largest]),
            })
        })
        .collect();
    json!({
        "files": files,
        "kernel": job.kernel,
        "shader": job.variant.shader.name(),
        "variant": job.variant.snippets,
        "constants": pairs(&job.variant.constants),
        "overrides": pairs(&job.variant.overrides),
        "buffers": buffers,
        "workgroup_size": source.workgroup_size,
        "workgroup_bytes": job.workgroup_bytes(),
        "elements": elements,
        "head_dim": job.problem.as_ref().map(AttentionProblem::head_dim),
        "v_head_dim": job.problem.as_ref().map(AttentionProblem::v_head_dim),
        "terms": job.problem.as_ref().map(terms),
        "problem": job.problem.as_ref().map(shape),
        "chosen_for": devices,
    })
}

/// Makes the folder, and sees whether it may be written to.
fn make_folder(folder: &Path, force: bool) -> Result<(), Error> {
    let failed = |source| Error::Folder { path: folder.to_owned(), source };
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
