//! `explain`: what would run for a shape or a file, and why, without running it.

use std::path::PathBuf;

use cross_attention::gpu::Context;
use cross_attention::{
    AttentionProblem, AttentionSpec, Device, Kernel, KernelChoice, Layout, Plan, ScoreStage, TensorSpec,
};

use crate::error::Error;
use crate::file::{self, Wish};
use crate::options::{DeviceFlags, ElementName, Metadata, OptionFlags};
use crate::run::shape;
use crate::terminal::Terminal;

const EXAMPLE: &str = "\
Examples:
  cross-attention explain --q-heads 8 --q-len 4096 --kv-len 77 --head-dim 40
  cross-attention explain capture.safetensors --device cpu";

/// Print the plan for a shape or an input file, without running it
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// A safetensors file as `run` takes it; without one, the shape is given by flags
    #[arg(value_name = "INPUT", conflicts_with = "shape")]
    input: Option<PathBuf>,
    #[command(flatten)]
    shape: ShapeFlags,
    /// Element type of the output
    #[arg(long, value_enum, value_name = "TYPE", default_value_t)]
    output_type: ElementName,
    /// Return the attention weights too
    #[arg(long)]
    probs: bool,
    #[command(flatten)]
    device: DeviceFlags,
    #[command(flatten)]
    options: OptionFlags,
}

#[derive(Debug, clap::Args)]
#[group(id = "shape", multiple = true)]
#[command(next_help_heading = "Shape")]
struct ShapeFlags {
    /// Entries of the batch [default: 1]
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Heads of the query
    #[arg(long, value_name = "N", required_unless_present = "input")]
    q_heads: Option<usize>,
    /// Heads of key and value [default: those of the query]
    #[arg(long, value_name = "N")]
    kv_heads: Option<usize>,
    /// Length of the query, in tokens
    #[arg(long, value_name = "TOKENS", required_unless_present = "input")]
    q_len: Option<usize>,
    /// Length of key and value, in tokens
    #[arg(long, value_name = "TOKENS", required_unless_present = "input")]
    kv_len: Option<usize>,
    /// Width of a query or key row
    #[arg(long, value_name = "N", required_unless_present = "input")]
    head_dim: Option<usize>,
    /// Width of a value row [default: that of a key row]
    #[arg(long, value_name = "N")]
    v_head_dim: Option<usize>,
    /// Element type of query, key and value [default: f32]
    #[arg(long, value_enum, value_name = "TYPE")]
    element: Option<ElementName>,
    /// With an additive bias [batch, q_heads, q_len, kv_len]
    #[arg(long)]
    bias: bool,
    /// With a boolean mask [batch, q_heads, q_len, kv_len]
    #[arg(long)]
    mask: bool,
    /// With key lengths [batch]
    #[arg(long)]
    kv_lens: bool,
    /// With a range of keys for each row
    #[arg(long)]
    row_ranges: bool,
    /// With ALiBi slopes
    #[arg(long)]
    alibi: bool,
    /// With attention sinks
    #[arg(long)]
    sinks: bool,
    /// Return the log-sum-exp too (`run` always does)
    #[arg(long)]
    lse: bool,
}

/// Prints the plan.
///
/// # Errors
/// A shape or file that is refused, a device that is not there, a plan that can't be made.
pub(crate) fn explain(args: &Args, terminal: &mut Terminal) -> Result<(), Error> {
    let problem = match &args.input {
        Some(path) => {
            let wish = Wish { output: args.output_type.into(), probs: args.probs };
            file::read(path, &args.options, wish)?.problem
        }
        None => args.problem()?,
    };
    let choice = Device::choose_blocking(&args.device.device)?;
    let text = match (&choice.device, args.device.kernel) {
        (Device::Gpu(context), KernelChoice::Auto) => plan(&problem, context, None)?,
        (Device::Gpu(context), KernelChoice::Gpu(kernel)) => plan(&problem, context, Some(kernel))?,
        (device, kernel) => {
            let prepared = device.prepare_blocking(&problem, kernel)?;
            format!("problem    {}, {}\n{}", shape(&problem), extras(&problem), prepared.plan_text())
        }
    };
    terminal.line(format_args!("chosen     {choice}"))?;
    terminal.line(format_args!("{}", text.trim_end()))
}

/// A GPU's plan, without making the pipelines.
fn plan(problem: &AttentionProblem, context: &Context, kernel: Option<Kernel>) -> Result<String, Error> {
    Ok(Plan::new(problem, context.caps(), kernel).map_err(cross_attention::Error::from)?.to_string())
}

impl Args {
    /// The problem that the flags describe.
    fn problem(&self) -> Result<AttentionProblem, Error> {
        let flags = &self.shape;
        // clap has seen to it that what has no default is given
        let [q_heads, q_len, kv_len, head_dim] =
            [flags.q_heads, flags.q_len, flags.kv_len, flags.head_dim].map(Option::unwrap_or_default);
        let batch = flags.batch.unwrap_or(1);
        let kv_heads = flags.kv_heads.unwrap_or(q_heads);
        let options = self.options.over(&Metadata::new())?;
        let element = flags.element.unwrap_or_default().into();
        let tensor = |axes| TensorSpec { element, layout: options.layout.layout(axes) };
        let mut spec = AttentionSpec::from_tensors(
            tensor([batch, q_heads, q_len, head_dim]),
            tensor([batch, kv_heads, kv_len, head_dim]),
            tensor([batch, kv_heads, kv_len, flags.v_head_dim.unwrap_or(head_dim)]),
        );
        let output = options.layout.layout(spec.output.layout.shape);
        spec.output = TensorSpec { element: self.output_type.into(), layout: output };
        options.apply(&mut spec);
        let scores = Layout::bhld([batch, q_heads, q_len, kv_len]);
        spec.bias = flags.bias.then_some(TensorSpec::f32(scores));
        spec.mask = flags.mask.then_some(scores);
        spec.kv_lens = flags.kv_lens;
        spec.row_ranges = flags.row_ranges;
        spec.alibi_slopes = flags.alibi;
        spec.sinks = flags.sinks;
        spec.lse = flags.lse;
        spec.scores = self.probs.then_some(ScoreStage::Probs);
        Ok(AttentionProblem::new(spec)?)
    }
}

/// Element types, options, extra inputs and results of a problem, on one line.
fn extras(problem: &AttentionProblem) -> String {
    let spec = problem.spec();
    let mut words = vec![
        format!(
            "query {}, key {}, value {}, output {}",
            spec.query.element, spec.key.element, spec.value.element, spec.output.element
        ),
        format!("scale {}", problem.scale()),
    ];
    words.extend(spec.softcap.map(|softcap| format!("softcap {softcap}")));
    words.extend(spec.causal.map(|diagonal| format!("causal {diagonal}")));
    words.extend(spec.window_left.map(|tokens| format!("window_left {tokens}")));
    words.extend(spec.window_right.map(|tokens| format!("window_right {tokens}")));
    if spec.causal.is_none()
        && (spec.window_left.is_some() || spec.window_right.is_some() || spec.alibi_slopes || spec.offset.is_some())
    {
        words.push(format!("offset {}", problem.diagonal()));
    }
    words.extend(spec.bias.map(|bias| format!("bias {}", bias.element)));
    for (given, word) in [
        (spec.mask.is_some(), "mask"),
        (spec.kv_lens, "kv_lens"),
        (spec.row_ranges, "row ranges"),
        (spec.alibi_slopes, "ALiBi"),
        (spec.sinks, "sinks"),
        (spec.lse, "returns lse"),
        (spec.scores.is_some(), "returns probs"),
    ] {
        if given {
            words.push(word.to_owned());
        }
    }
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Program {
        #[command(flatten)]
        args: Args,
    }

    fn parse(flags: &str) -> Result<Args, clap::Error> {
        Program::try_parse_from(format!("explain {flags}").split_whitespace()).map(|program| program.args)
    }

    #[test]
    fn a_shape_is_made_of_flags() {
        let flags = "--q-heads 8 --kv-heads 2 --q-len 3 --kv-len 77 --head-dim 40 --v-head-dim 20 --element f16 \
                     --causal bottom_right --window-left 9 --mask --bias --sinks --lse --layout blhd";
        let problem = parse(flags).unwrap().problem().unwrap();
        assert_eq!(problem.spec().value.layout, Layout::blhd([1, 2, 77, 20]));
        assert_eq!(
            extras(&problem),
            "query f16, key f16, value f16, output f32, scale 0.15811388, causal bottom_right, window_left 9, \
             bias f32, mask, sinks, returns lse"
        );
    }

    #[test]
    fn a_file_or_a_shape_but_not_both_and_not_neither() {
        assert!(parse("x.safetensors --causal top_left --output-type f16").is_ok());
        assert!(parse("x.safetensors --q-heads 8").is_err());
        assert!(parse("--q-heads 8 --q-len 3 --kv-len 77").unwrap_err().to_string().contains("--head-dim"));
        assert!(parse("").is_err());
    }
}
