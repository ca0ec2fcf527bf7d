//! The flags of `shaders`.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ValueEnum, value_parser};
use cross_attention::{DeviceClass, DeviceRequest, KernelChoice};

use crate::shape::ProblemFlags;
use crate::translate::Target;

const EXAMPLE: &str = "\
Examples:
  cross-attention shaders --q-heads 8 --q-len 4096 --kv-len 77 --head-dim 40 --target hlsl -o shaders/
  cross-attention shaders --q-heads 8 --q-len 1 --kv-len 1500 --head-dim 64 --device-class discrete -o shaders/
  cross-attention shaders --all --kernel tiled --head-dim 64,128 --target spirv -o shaders/ --dry-run
  cross-attention shaders --all --target spirv -o shaders/";

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
    mut_arg("head_dim", |_| head_dims()),
)]
pub(crate) struct Args {
    /// The folder to write to, made if need be
    #[arg(short, long = "output", value_name = "FOLDER")]
    pub(super) output: PathBuf,
    /// What to write; several with commas between
    #[arg(long = "target", value_enum, value_delimiter = ',', default_value = "wgsl")]
    pub(super) targets: Vec<Target>,
    /// Every shader that plans choose over a grid of shapes, element types, layouts, terms and devices
    #[arg(long, conflicts_with_all = ONE_PROBLEM)]
    pub(super) all: bool,
    /// The shaders of the backward: the gradients of all inputs
    #[arg(long, conflicts_with_all = ["all", "kernel", "probs", "scores"])]
    pub(super) backward: bool,
    /// Write into a folder that is not empty, over files of the same names
    #[arg(long)]
    pub(super) force: bool,
    /// Say how many files and bytes it would be, and write nothing
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Threads to write with [default: one for each of the machine's]
    #[arg(long, value_name = "N", value_parser = value_parser!(u16).range(1..=1024))]
    pub(super) jobs: Option<u16>,
    /// The kernel to use, by name, and of --all the only one; auto lets the plan choose, and leaves all of --all
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub(super) kernel: KernelChoice,
    /// Plan for this adapter: gpu, its number, its backend, or part of its name
    #[arg(long, value_name = "DEVICE", conflicts_with_all = ["device_class", "workgroup_memory", "subgroup_size"])]
    pub(super) device: Option<DeviceRequest>,
    /// Plan for a device of this class that has WebGPU's default limits
    #[arg(long, value_enum, value_name = "CLASS", default_value = "unknown")]
    pub(super) device_class: ClassName,
    /// Workgroup memory of that device
    #[arg(long, value_name = "BYTES", default_value_t = 16384)]
    pub(super) workgroup_memory: u32,
    /// Subgroups of that device, a power of two from 4 to 128, if kernels may use them
    #[arg(long, value_name = "INVOCATIONS", value_parser = subgroup_size)]
    pub(super) subgroup_size: Option<u32>,
    // before the problem, which takes the first width for itself
    #[command(flatten)]
    pub(super) widths: Widths,
    #[command(flatten)]
    pub(super) problem: ProblemFlags,
}

/// Flags that say what one problem is, or for which device it is planned: all that `--all` has no use for.
const ONE_PROBLEM: [&str; 26] = [
    "pad_mask",
    "input",
    "batch",
    "q_heads",
    "kv_heads",
    "q_len",
    "kv_len",
    "v_head_dim",
    "element",
    "bias",
    "mask",
    "q_lens",
    "kv_lens",
    "row_ranges",
    "alibi",
    "sinks",
    "lse",
    "KvFlags",
    "OptionFlags",
    "device",
    "device_class",
    "workgroup_memory",
    "subgroup_size",
    "output_type",
    "probs",
    "scores",
];

/// `--head-dim`: of a shape one, of `--all` any number.
fn head_dims() -> Arg {
    Arg::new("head_dim")
        .long("head-dim")
        .value_name("N")
        .help("Width of a query or key row; of --all the only ones, several with commas between")
        .help_heading("Shape")
        .value_delimiter(',')
        .value_parser(value_parser!(usize))
        .action(ArgAction::Append)
        .required_unless_present_any(["input", "all"])
}

/// A size that subgroups of WebGPU may have.
fn subgroup_size(text: &str) -> Result<u32, &'static str> {
    let size: Option<u32> = text.trim().parse().ok();
    size.filter(|size| size.is_power_of_two() && (4..=128).contains(size)).ok_or("needs a power of two from 4 to 128")
}

/// Every `--head-dim`.
#[derive(Debug)]
pub(super) struct Widths(pub(super) Vec<usize>);

impl clap::FromArgMatches for Widths {
    fn from_arg_matches(matches: &clap::ArgMatches) -> Result<Self, clap::Error> {
        Ok(Self(matches.get_many("head_dim").into_iter().flatten().copied().collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &clap::ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl clap::Args for Widths {
    // the flag is that of the shape
    fn augment_args(command: clap::Command) -> clap::Command {
        command
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        command
    }
}

/// A class of device by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ClassName(pub(super) DeviceClass);

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

#[cfg(test)]
mod tests {
    use clap::{Command, CommandFactory, Parser};

    use super::*;

    #[derive(Debug, Parser)]
    struct Program {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn all_takes_no_flag_without_use() {
        const USED: [&str; 9] = ["output", "targets", "all", "force", "dry_run", "jobs", "kernel", "head_dim", "help"];
        let mut command: Command = Program::command();
        command.build();
        let of_id = |id: &str| command.get_arguments().find(|flag| flag.get_id() == id).unwrap();
        let refused = command.get_arg_conflicts_with(of_id("all"));
        for flag in command.get_arguments().filter(|flag| !USED.contains(&flag.get_id().as_str())) {
            let here = refused.iter().any(|other| other.get_id() == flag.get_id());
            let there = command.get_arg_conflicts_with(flag).iter().any(|other| other.get_id() == "all");
            assert!(here || there, "--all takes {flag} and has no use for it");
        }
    }

    #[test]
    fn widths_are_one_or_several() {
        let widths = |flags: &str| {
            let parsed = Program::try_parse_from(format!("shaders -o x {flags}").split_whitespace());
            parsed.map(|program| program.args.widths.0)
        };
        assert!(widths("--all").unwrap().is_empty());
        assert_eq!(widths("--all --head-dim 64,128 --head-dim 40").unwrap(), [64, 128, 40]);
        assert_eq!(widths("--q-heads 1 --q-len 1 --kv-len 1 --head-dim 64").unwrap(), [64]);
        assert!(widths("--q-heads 1 --q-len 1 --kv-len 1").is_err());
        for (size, possible) in [("32", true), ("4", true), ("128", true), ("3", false), ("0", false), ("256", false)] {
            let shape = format!("--q-heads 1 --q-len 1 --kv-len 1 --head-dim 64 --subgroup-size {size}");
            assert_eq!(widths(&shape).is_ok(), possible, "{size}");
        }
        assert!(widths("--all --q-heads 1").is_err() && widths("--all --jobs 0").is_err());
    }
}
