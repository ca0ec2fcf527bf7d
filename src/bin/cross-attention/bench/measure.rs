//! One case: verified, warmed up, timed.

use std::hint::black_box;
use std::time::{Duration, Instant};

use cross_attention::backward::{BackwardInputs, BackwardProblem, BackwardSpec};
use cross_attention::gpu::{HostCost, KernelTiming};
use cross_attention::plan::BackwardPlan;
use cross_attention::{
    AttentionInputs, AttentionProblem, Device, KernelChoice, Plan, PreparedAttention, Timing, TimingSource, cpu,
    verify, workload,
};

use super::Common;
use super::cases::Case;
use super::error::BenchError;
use super::stats::{self, Spread, WarmUp};
use crate::backward::Backward;
use crate::error::Error;
use crate::file::Opened;
use crate::input::Source;
use crate::terminal::Terminal;
use crate::text::shown;
use crate::tuned::Tuned;

/// Work of a backward, by that of the forward: five products where that has two.
const BACKWARD_FLOPS: f64 = 2.5;

/// Rounds timed even where the time is up before.
pub(super) const MIN_ROUNDS: usize = 5;

/// Rounds of host times, and of the times of single shaders.
const HOST_ROUNDS: usize = 100;
const KERNEL_ROUNDS: usize = 10;

/// Query rows compared with the oracle before timing.
pub(super) const VERIFIED_ROWS: usize = 64;

/// What was measured of one case.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) kernel: &'static str,
    /// The gradients that were computed, by name; `None` for an attention.
    pub(super) gradients: Option<Vec<&'static str>>,
    pub(super) max_abs_error: f64,
    /// Plan and pipelines, in milliseconds.
    pub(super) prepare_ms: f64,
    /// Pipelines that were made for it; others were there.
    pub(super) pipelines: usize,
    /// Upload, run and read back, in milliseconds.
    pub(super) first_run_ms: f64,
    pub(super) warm_up: WarmUp,
    pub(super) timing: Timing,
    pub(super) spread: Spread,
    pub(super) flops: f64,
    pub(super) bytes: f64,
    /// NaN where a plan is not made by itself.
    pub(super) plan_us: f64,
    /// On a device of wgpu.
    pub(super) gpu: Option<GpuRow>,
}

/// What was measured besides on a device of wgpu.
#[derive(Debug)]
pub(super) struct GpuRow {
    pub(super) host: HostCost,
    /// Where the device has a clock.
    pub(super) kernels: Option<Vec<KernelTiming>>,
}

/// What it took until the first results were there.
pub(super) struct Made {
    prepare_ms: f64,
    pipelines: usize,
    first_run_ms: f64,
}

impl Made {
    /// Prepares, and calls once.
    pub(super) fn by<P, R>(
        device: &Device,
        prepare: impl FnOnce() -> Result<P, Error>,
        run: impl FnOnce(&P) -> Result<R, cross_attention::Error>,
    ) -> Result<(P, R, Self), Error> {
        let made_before = pipelines(device);
        let start = Instant::now();
        let prepared = prepare()?;
        let prepare_ms = super::millis(start);
        let start = Instant::now();
        let results = run(&prepared)?;
        let first_run_ms = super::millis(start);
        let made = Self { prepare_ms, pipelines: pipelines(device) - made_before, first_run_ms };
        Ok((prepared, results, made))
    }

    /// The row of an attention on the host.
    pub(super) fn row(
        self,
        kernel: &'static str,
        max_abs_error: f64,
        (warm_up, timing): (WarmUp, Timing),
        [flops, bytes]: [f64; 2],
        plan_us: f64,
    ) -> Row {
        let Self { prepare_ms, pipelines, first_run_ms } = self;
        Row {
            kernel,
            gradients: None,
            max_abs_error,
            prepare_ms,
            pipelines,
            first_run_ms,
            warm_up,
            spread: Spread::of(&timing),
            timing,
            flops,
            bytes,
            plan_us,
            gpu: None,
        }
    }
}

/// The attention of a case, or its gradients.
///
/// # Errors
/// Whatever the device says, and results that are off.
pub(super) fn measure(
    case: &Case,
    problem: &AttentionProblem,
    common: &Common<'_>,
    tuned: Option<&Tuned>,
    terminal: &mut Terminal,
) -> Result<Row, Error> {
    let args = common.args;
    if let Some(path) = &case.file {
        let source = Source::File(path.clone());
        let opened = Opened::open(&source, &args.reading(), args.wish(), terminal)?;
        let operands = opened.operands()?;
        if args.backward {
            let backward = Backward::new(&opened)?;
            let inputs = operands.as_inputs();
            check_memory(backward.problem.forward(), 0.0)?;
            let results = common
                .device
                .prepare_blocking(backward.problem.forward(), KernelChoice::Auto)?
                .run_blocking(&inputs)?;
            return gradients(case, &backward.problem, &backward.inputs(inputs, &results)?, common, terminal);
        }
        let problem = &opened.request.problem;
        check_memory(problem, 0.0)?;
        return attention(case, problem, &operands.as_inputs(), common, tuned, terminal);
    }
    if args.backward {
        return seeded_gradients(case, problem, common, terminal);
    }
    check_memory(problem, seeded_bytes(problem))?;
    let data = workload::inputs(problem, &case.name);
    attention(case, problem, &data.as_inputs(), common, tuned, terminal)
}

fn attention(
    case: &Case,
    problem: &AttentionProblem,
    inputs: &AttentionInputs<'_>,
    common: &Common<'_>,
    tuned: Option<&Tuned>,
    terminal: &Terminal,
) -> Result<Row, Error> {
    let Common { args, device, .. } = common;
    let prepare = || Tuned::prepare(tuned, device, problem, args.device.kernel, terminal);
    let (prepared, results, made) = Made::by(device, prepare, |prepared| prepared.run_blocking(inputs))?;
    let report = verify::verify_sample(problem, inputs, &results, VERIFIED_ROWS)?;
    if !report.passed() {
        return Err(Error::Verify { report: report.to_string() });
    }
    let (times, gpu);
    if let PreparedAttention::Gpu(prepared) = &prepared {
        let library = cross_attention::Error::from;
        let tensors = prepared.upload_blocking(inputs)?;
        let bound = prepared.bind(&tensors.buffers()).map_err(library)?;
        times = timed(case, common, terminal, |rounds, budget, on_round| {
            prepared.time_blocking(&bound, rounds, budget, on_round).map_err(library)
        })?;
        let host = prepared.time_host(&tensors.buffers(), HOST_ROUNDS).map_err(library)?;
        let kernels = prepared.time_kernels_blocking(&bound, KERNEL_ROUNDS).map_err(library)?;
        gpu = Some(GpuRow { host, kernels });
    } else {
        times = timed(case, common, terminal, |rounds, budget, on_round| {
            prepared.time_blocking(inputs, rounds, budget, on_round)
        })?;
        gpu = None;
    }
    let work = [workload::flops(problem, inputs), workload::bytes(problem)];
    let plan_us = plan_us(problem, device, args.device.kernel);
    Ok(Row { gpu, ..made.row(prepared.kernel_name(), report.max_abs_error, times, work, plan_us) })
}

/// The gradients of query, key and value, given numbers like those of an output.
fn seeded_gradients(
    case: &Case,
    problem: &AttentionProblem,
    common: &Common<'_>,
    terminal: &Terminal,
) -> Result<Row, Error> {
    let problem = BackwardProblem::new(BackwardSpec::new(problem.spec().clone()))?;
    let forward = problem.forward();
    // those of the attention, that of the output, and the gradients
    check_memory(forward, 3.0 * seeded_bytes(forward))?;
    let data = workload::inputs(forward, &case.name);
    let inputs = data.as_inputs();
    let results = common.device.prepare_blocking(forward, KernelChoice::Auto)?.run_blocking(&inputs)?;
    let d_output = workload::inputs(forward, "the gradient of the output").query.to_f32();
    let len = problem.spec().d_output.layout.extent().unwrap_or(0);
    let d_output: Vec<f32> = d_output.iter().copied().cycle().take(len).collect();
    let inputs = BackwardInputs::new(inputs, &results, &d_output).map_err(cross_attention::Error::from)?;
    gradients(case, &problem, &inputs, common, terminal)
}

fn gradients(
    case: &Case,
    problem: &BackwardProblem,
    inputs: &BackwardInputs<'_>,
    common: &Common<'_>,
    terminal: &Terminal,
) -> Result<Row, Error> {
    let (device, forward) = (common.device, problem.forward());
    let prepare = || Ok(device.prepare_backward_blocking(problem)?);
    let (prepared, gradients, made) = Made::by(device, prepare, |prepared| prepared.run_blocking(inputs))?;
    let spec = problem.spec();
    // one head says nothing of what all heads add to
    let whole = case.file.is_some() || forward.kv_heads() == 0;
    let report = if whole {
        verify::verify_backward(problem, inputs, &gradients)
    } else {
        verify::verify_backward_head(problem, inputs, &gradients, 0)
    };
    let report = report.map_err(cross_attention::Error::from)?;
    if !report.passed() {
        return Err(Error::Verify { report: report.to_string() });
    }
    let times = timed(case, common, terminal, |rounds, budget, on_round| {
        prepared.time_blocking(inputs, rounds, budget, on_round)
    })?;
    let wanted = [
        ("d_query", spec.d_query.is_some()),
        ("d_key", spec.d_key.is_some()),
        ("d_value", spec.d_value.is_some()),
        ("d_bias", spec.d_bias.is_some()),
        ("d_alibi_slopes", spec.d_alibi_slopes),
        ("d_sinks", spec.d_sinks),
        ("d_scale", spec.d_scale),
    ];
    let named = wanted.into_iter().filter(|(_, wanted)| *wanted).map(|(name, _)| name).collect();
    let work = [BACKWARD_FLOPS * workload::flops(forward, &inputs.attention), 2.0 * workload::bytes(forward)];
    // that of the CPU is made together with its memory
    let plan_us = match device {
        Device::Gpu(context) => median_us(|| drop(black_box(BackwardPlan::new(problem, context.caps())))),
        Device::Cpu | Device::Oracle => f64::NAN,
    };
    Ok(Row { gradients: Some(named), ..made.row(prepared.kernel_name(), report.max_abs_error, times, work, plan_us) })
}

/// The warm-up, and the rounds after it.
fn timed(
    case: &Case,
    common: &Common<'_>,
    terminal: &Terminal,
    mut time: impl FnMut(usize, Duration, &mut dyn FnMut()) -> Result<Timing, cross_attention::Error>,
) -> Result<(WarmUp, Timing), Error> {
    let budget = common.args.seconds;
    let bar = terminal.bar();
    let warm_up = match common.device {
        // it keeps nothing between calls, and they are long
        Device::Oracle => WarmUp::default(),
        _ => {
            bar.set_message(format!("{}, warming up", shown(&case.name)));
            stats::warm_up(budget, |rounds, part| Ok(time(rounds, part, &mut || {})?))?
        }
    };
    let mut rounds = 0usize;
    let mut on_round = || {
        rounds += 1;
        bar.set_message(format!("{}, round {rounds}", shown(&case.name)));
    };
    let timing = time(MIN_ROUNDS, budget, &mut on_round)?;
    Ok((warm_up, timing))
}

/// Bytes of inputs that are made, which are numbers of 32 bits before they are what a problem asks for.
pub(super) fn seeded_bytes(problem: &AttentionProblem) -> f64 {
    let spec = problem.spec();
    let tensors = [Some(&spec.query), Some(&spec.key), Some(&spec.value), spec.bias.as_ref()];
    let bytes = |extent: Option<usize>, each: usize| extent.map_or(f64::INFINITY, |extent| (extent * each) as f64);
    let floats =
        tensors.into_iter().flatten().map(|tensor| bytes(tensor.layout.extent(), 4 + tensor.element.size_bytes()));
    floats.sum::<f64>() + spec.mask.map_or(0.0, |mask| bytes(mask.extent(), 1))
}

/// Whether inputs of so many bytes and the results fit in memory; where they don't, allocating them would end the process.
pub(super) fn check_memory(problem: &AttentionProblem, inputs: f64) -> Result<(), Error> {
    let spec = problem.spec();
    let output = spec.output.layout.extent().map_or(f64::INFINITY, |extent| extent as f64);
    let scores = if spec.scores.is_some() { problem.rows() as f64 * problem.kv_len() as f64 } else { 0.0 };
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "not negative; what is too much stays too much"
    )]
    let bytes = (inputs + output * spec.output.element.size_bytes() as f64 + 4.0 * scores) as u128;
    let mut room = Vec::<u8>::new();
    let reserved = usize::try_from(bytes).is_ok_and(|bytes| room.try_reserve_exact(bytes).is_ok());
    if reserved { Ok(()) } else { Err(BenchError::Memory { bytes }.into()) }
}

/// Microseconds of making a plan, the median of many.
fn plan_us(problem: &AttentionProblem, device: &Device, kernel: KernelChoice) -> f64 {
    let forced = if let KernelChoice::Gpu(kernel) = kernel { Some(kernel) } else { None };
    median_us(|| match device {
        Device::Gpu(context) => drop(black_box(Plan::new(problem, context.caps(), forced))),
        Device::Cpu | Device::Oracle => drop(black_box(cpu::prepare(problem))),
    })
}

fn median_us(plan: impl Fn()) -> f64 {
    let rounds = (0..HOST_ROUNDS).map(|_| {
        let start = Instant::now();
        plan();
        super::millis(start)
    });
    Timing { millis: rounds.collect(), source: TimingSource::Cpu }.quantile(0.5) * 1e3
}

fn pipelines(device: &Device) -> usize {
    if let Device::Gpu(context) = device { context.pipelines() } else { 0 }
}
