//! `explain`: what would run for a shape or a file, and why, without running it.

use cross_attention::cpu::CpuKernel;
use cross_attention::dispatch::Step;
use cross_attention::{AttentionProblem, Choice, Device, KernelChoice, Plan, workload};
use serde_json::{Value, json};

use crate::error::Error;
use crate::options::DeviceFlags;
use crate::record;
use crate::results::scores_name;
use crate::run::shape;
use crate::shape::ProblemFlags;
use crate::terminal::Terminal;
use crate::tuned::{TuneFlag, Tuned};

const EXAMPLE: &str = "\
Examples:
  cross-attention explain --q-heads 8 --q-len 4096 --kv-len 77 --head-dim 40
  cross-attention explain capture.safetensors --device cpu";

/// Print the plan for a shape or an input file, without running it
///
/// --json prints device, reason (why this one), problem, kernel, why, rejected (other kernels, each with its reason), choice,
/// workspace_bytes, steps (shader and workgroups of each dispatch), kv_bytes, and plan, the text. What only plans of GPUs have
/// is null elsewhere; of a backward there are device, reason, problem and plan.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    #[command(flatten)]
    problem: ProblemFlags,
    /// Print the plan of the backward: the gradients of all inputs
    #[arg(long, conflicts_with_all = ["kernel", "tune_cache", "probs", "scores"])]
    backward: bool,
    /// Print one JSON object instead
    #[arg(long)]
    json: bool,
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
    if args.backward {
        let backward = args.problem.backward(terminal)?;
        let problem = backward.forward();
        let choice = Device::choose_blocking(&args.device.device)?;
        let plan = choice.device.prepare_backward_blocking(&backward)?.plan_text();
        if args.json {
            let record = json!({
                "device": record::device(&choice.device), "reason": choice.reason, "problem": record::problem(problem),
                "backward": true, "plan": plan.trim_end(),
            });
            return terminal.line(format_args!("{record}"));
        }
        terminal.line(format_args!("chosen     {choice}"))?;
        if !matches!(choice.device, Device::Gpu(_)) {
            terminal.line(format_args!("problem    {}, {}", shape(problem), extras(problem)))?;
        }
        return terminal.line(format_args!("{}", plan.trim_end()));
    }
    let problem = args.problem.problem(terminal)?;
    let choice = Device::choose_blocking(&args.device.device)?;
    let tuned = Tuned::load(&args.tuned, &choice.device, false, terminal);
    let (plan, text) = match (&choice.device, &tuned) {
        (Device::Gpu(context), Some(tuned)) => {
            let plan = tuned.plan(context, &problem, terminal)?;
            let text = plan.to_string();
            (Some(plan), text)
        }
        (device, _) => {
            let text = device.explain(&problem, args.device.kernel)?;
            let plan = match (device, args.device.kernel) {
                (Device::Gpu(context), KernelChoice::Auto) => Some(Plan::new(&problem, context.caps(), None)),
                (Device::Gpu(context), KernelChoice::Gpu(kernel)) => {
                    Some(Plan::new(&problem, context.caps(), Some(kernel)))
                }
                _ => None,
            };
            (plan.transpose().map_err(cross_attention::Error::from)?, text)
        }
    };
    let bytes = workload::kv_bytes(&problem);
    if args.json {
        return terminal
            .line(format_args!("{}", as_json((&choice, args.device.kernel), &problem, plan.as_ref(), &text, bytes)));
    }
    terminal.line(format_args!("chosen     {choice}"))?;
    if plan.is_none() {
        terminal.line(format_args!("problem    {}, {}", shape(&problem), extras(&problem)))?;
    }
    terminal.line(format_args!("{}", text.trim_end()))?;
    terminal.line(format_args!("kv_bytes   {bytes:.0} bytes of keys and values, as they are stored, to be read"))
}

fn as_json(
    (choice, asked): (&Choice, KernelChoice),
    problem: &AttentionProblem,
    plan: Option<&Plan>,
    text: &str,
    kv_bytes: f64,
) -> Value {
    let kernel = match (&choice.device, plan, asked) {
        (_, Some(plan), _) => plan.kernel().name(),
        (Device::Oracle, ..) => "oracle",
        (_, None, KernelChoice::Cpu(kernel)) => kernel.name(),
        _ => CpuKernel::default().name(),
    };
    let rejected = |plan: &Plan| -> Vec<Value> {
        plan.rejected().iter().map(|(kernel, reason)| json!({ "kernel": kernel.name(), "reason": reason })).collect()
    };
    let steps = |plan: &Plan| -> Vec<Value> {
        let step = |step: &Step| {
            json!({
                "shader": step.variant.shader.name(), "workgroups": step.grid, "workgroup_memory_bytes": step.workgroup_bytes,
            })
        };
        plan.steps().iter().map(step).collect()
    };
    json!({
        "device": record::device(&choice.device),
        "reason": choice.reason,
        "problem": record::problem(problem),
        "backward": false,
        "kernel": kernel,
        "why": plan.map(Plan::why),
        "rejected": plan.map(rejected),
        "choice": plan.map(Plan::choice),
        "workspace_bytes": plan.map(Plan::workspace_bytes),
        "steps": plan.map(steps),
        "kv_bytes": kv_bytes,
        "plan": text.trim_end(),
    })
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
    words.extend(spec.lse.then(|| "returns lse".to_owned()));
    words.extend(spec.scores.map(|stage| format!("returns {}", scores_name(stage))));
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
        assert!(parse("x.safetensors --q-heads 8 --pad-mask").is_ok(), "how to read three axes");
        assert!(parse("x.safetensors --q-len 8").is_err());
        assert!(parse("--q-heads 8 --q-len 3 --kv-len 77 --head-dim 40 --pad-mask").is_err());
        assert!(parse("x.safetensors --kv bf16").is_err());
        assert!(parse("--q-heads 8 --q-len 3 --kv-len 77").unwrap_err().to_string().contains("--head-dim"));
        assert!(parse("").is_err());
    }
}
