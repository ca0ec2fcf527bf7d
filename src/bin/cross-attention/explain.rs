//! `explain`: what would run for a shape or a file, and why, without running it.

use cross_attention::backward::{BackwardProblem, BackwardSpec};
use cross_attention::{AttentionProblem, Device, workload};

use crate::error::Error;
use crate::options::DeviceFlags;
use crate::run::shape;
use crate::shape::ProblemFlags;
use crate::terminal::Terminal;
use crate::tuned::{TuneFlag, Tuned};

const EXAMPLE: &str = "\
Examples:
  cross-attention explain --q-heads 8 --q-len 4096 --kv-len 77 --head-dim 40
  cross-attention explain capture.safetensors --device cpu";

/// Print the plan for a shape or an input file, without running it
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    #[command(flatten)]
    problem: ProblemFlags,
    /// Print the plan of the backward: the gradients of all inputs
    #[arg(long, conflicts_with_all = ["kernel", "tune_cache"])]
    backward: bool,
    #[command(flatten)]
    device: DeviceFlags,
    #[command(flatten)]
    tuned: TuneFlag,
}

/// Prints the plan.
///
/// # Errors
/// A shape or file that is refused, a device that is not there, a plan that can't be made.
pub(crate) fn explain(args: &Args, terminal: &mut Terminal) -> Result<(), Error> {
    let problem = args.problem.problem(terminal)?;
    let choice = Device::choose_blocking(&args.device.device)?;
    if args.backward {
        // the attention as it would be trained: what it returns beside its output has no gradient
        let mut attention = problem.spec().clone();
        attention.scores = None;
        let backward = BackwardProblem::new(BackwardSpec::all(attention))?;
        let plan = choice.device.prepare_backward_blocking(&backward)?.plan_text();
        terminal.line(format_args!("chosen     {choice}"))?;
        if !matches!(choice.device, Device::Gpu(_)) {
            terminal.line(format_args!("problem    {}, {}", shape(&problem), extras(&problem)))?;
        }
        return terminal.line(format_args!("{}", plan.trim_end()));
    }
    let tuned = Tuned::load(&args.tuned, &choice.device, false, terminal);
    let text = match (&choice.device, &tuned) {
        (Device::Gpu(context), Some(tuned)) => tuned.plan(context, &problem, terminal)?.to_string(),
        (device @ Device::Gpu(_), None) => device.explain(&problem, args.device.kernel)?,
        (device, _) => {
            let plan = device.explain(&problem, args.device.kernel)?;
            format!("problem    {}, {}\n{plan}", shape(&problem), extras(&problem))
        }
    };
    terminal.line(format_args!("chosen     {choice}"))?;
    terminal.line(format_args!("{}", text.trim_end()))?;
    let bytes = workload::kv_bytes(&problem);
    terminal.line(format_args!("kv_bytes   {bytes:.0} bytes of keys and values, as they are stored, to be read"))
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
    words.extend(terms(problem));
    words.join(", ")
}

/// What the problem has besides query, key, value and output.
pub(crate) fn terms(problem: &AttentionProblem) -> Vec<String> {
    let spec = problem.spec();
    let mut words = vec![];
    words.extend(spec.softcap.map(|softcap| format!("softcap {softcap}")));
    words.extend(spec.causal.map(|diagonal| format!("causal {diagonal}")));
    words.extend(spec.window_left.map(|tokens| format!("window_left {tokens}")));
    words.extend(spec.window_right.map(|tokens| format!("window_right {tokens}")));
    if spec.causal.is_none()
        && (spec.window_left.is_some()
            || spec.window_right.is_some()
            || spec.alibi_slopes.is_some()
            || spec.offset.is_some())
    {
        words.push(format!("offset {}", problem.diagonal()));
    }
    words.extend(spec.term_names());
    for (given, word) in [(spec.lse, "returns lse"), (spec.scores.is_some(), "returns probs")] {
        if given {
            words.push(word.to_owned());
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use cross_attention::Layout;

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
        let args = parse(flags).unwrap();
        let problem = args.problem.problem(&Terminal::new()).unwrap();
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
        assert!(parse("x.safetensors --kv bf16").is_err());
        assert!(parse("--q-heads 8 --q-len 3 --kv-len 77").unwrap_err().to_string().contains("--head-dim"));
        assert!(parse("").is_err());
    }
}
