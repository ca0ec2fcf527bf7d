//! The calls that all ranks make together.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::time::{Duration, Instant};

use cross_attention::sharded::{
    Cost, EndTogether, Load, Network, Results, ShardInputs, ShardedAttention, ShardedSpec, Traffic, Way, costs, traffic,
};
use cross_attention::{
    AttentionData, AttentionOutput, AttentionProblem, AttentionSpec, Device, KernelChoice, PreparedAttention, Timing,
    TimingSource, verify, workload,
};
use mpi::collective::{CommunicatorCollectives, Root, SystemOperation};
use mpi::topology::{Communicator, SimpleCommunicator};

use super::flags::{RankFlags, WayFlag};
use super::report::{Ranks, Rows};
use super::shard;
use crate::bench::cases::{self, Asked, Case};
use crate::bench::error::BenchError;
use crate::bench::format::Format;
use crate::bench::measure::{self, MIN_ROUNDS, Made, Row, VERIFIED_ROWS};
use crate::bench::stats::{self, WarmUp};
use crate::bench::{Args, Common, millis};
use crate::error::Error;
use crate::host::Cpu;
use crate::open;
use crate::terminal::Terminal;
use crate::text::shown;

/// All ranks of the run. What is asked of it all of them ask, in the same order.
struct World(SimpleCommunicator);

impl World {
    fn rank(&self) -> usize {
        usize::try_from(self.0.rank()).unwrap_or(0)
    }

    fn ranks(&self) -> usize {
        usize::try_from(self.0.size()).unwrap_or(1)
    }

    fn is_first(&self) -> bool {
        self.0.rank() == 0
    }

    fn largest(&self, own: f64) -> f64 {
        let mut largest = own;
        self.0.all_reduce_into(&own, &mut largest, SystemOperation::max());
        largest
    }

    fn sum(&self, own: u64) -> u64 {
        let mut sum = own;
        self.0.all_reduce_into(&own, &mut sum, SystemOperation::sum());
        sum
    }

    /// The first rank's number, so that all ranks decide alike.
    fn of_first(&self, own: f64) -> f64 {
        let mut number = own;
        self.0.process_at_rank(0).broadcast_into(&mut number);
        number
    }

    /// Lets all ranks fail where one did, for none may wait for another that has left.
    fn settle<T>(&self, own: Result<T, Error>) -> Result<T, Error> {
        let all_well = self.largest(if own.is_ok() { 0.0 } else { 1.0 }) < 0.5;
        own.and_then(|own| if all_well { Ok(own) } else { Err(BenchError::OtherRank.into()) })
    }
}

/// Does what `bench --mpi` asks for, on every rank; whether all went well. The first rank alone prints and saves.
///
/// # Errors
/// What kept all of it from running, on this rank or on another.
pub(in crate::bench) fn bench(args: &Args, started: Instant, terminal: &mut Terminal) -> Result<bool, Error> {
    let universe = mpi::initialize().ok_or(BenchError::NoMpiRun)?;
    let world = World(universe.world());
    // should this rank panic
    let together = EndTogether::new(&world.0);
    let all_well = all_cases(args, started, &world, terminal);
    if let Err(error) = &all_well
        && world.ranks() > 1
    {
        if matches!(error, Error::Bench(BenchError::OtherRank)) {
            // which ends this one too, once it has said why
            world.0.barrier();
        }
        terminal.note(format_args!("error: rank {}: {}", world.rank(), error.chain()));
        // the others may wait for this one
        world.0.abort(1);
    }
    together.done();
    all_well
}

fn all_cases(args: &Args, started: Instant, world: &World, terminal: &mut Terminal) -> Result<bool, Error> {
    let cases = world.settle(cases_of(args, terminal))?;
    world.settle(same_on_all(&cases, world))?;
    let format = if args.json { Format::Json } else { args.format };
    let save = args.save.as_deref().filter(|_| world.is_first());
    let mut rows = world.settle(Rows::open(format, save))?;
    let choice = world.settle(open::open(&args.device, &args.cache, terminal))?;
    let device = &choice.device;
    let common = Common { args, device, cpu: Cpu::of_this_machine(), device_ms: millis(started), roofline: None };
    if world.is_first() {
        rows.about(&choice, world.ranks(), terminal)?;
        terminal.start_bar(cases.len() * args.runs as usize);
    }
    let mut failed = false;
    for (run, (case, problem)) in (1..=args.runs).flat_map(|run| cases.iter().map(move |case| (run, case))) {
        terminal.doing(&case.name);
        let measured = match problem {
            Ok(problem) => measured(case, problem, &common, world),
            Err(reason) => Err(BenchError::Refused { reason: reason.clone() }.into()),
        };
        failed |= measured.is_err();
        if let (false, Err(error)) = (world.is_first(), &measured)
            && !matches!(error, Error::Bench(BenchError::OtherRank))
        {
            terminal.note(format_args!("error: rank {}: {}: {}", world.rank(), shown(&case.name), error.chain()));
        }
        if world.is_first() {
            rows.add(case, &common, measured, run, terminal)?;
            terminal.bar().inc(1);
        }
        // nobody reads any more
        if world.of_first(f64::from(u8::from(terminal.closed() && save.is_none()))) > 0.0 {
            break;
        }
    }
    terminal.end_bar();
    open::close(device)?;
    let saved = if world.is_first() { rows.finish(terminal)? } else { true };
    Ok(!failed && saved)
}

/// The cases that the flags ask for.
fn cases_of(args: &Args, terminal: &Terminal) -> Result<Vec<Asked>, Error> {
    if args.shapes.as_deref() == Some(Path::new("-")) {
        return Err(BenchError::StdinOfRanks.into());
    }
    let mut cases = cases::cases(args, terminal)?;
    for (_, problem) in &mut cases {
        if problem.as_ref().is_ok_and(|problem| problem.spec().paged.is_some()) {
            *problem = Err("keys in pages are not shared out over ranks; leave pages out".to_owned());
        }
    }
    Ok(cases)
}

/// Whether all ranks have the same cases: a file of shapes may be another one on another machine.
fn same_on_all(cases: &[Asked], world: &World) -> Result<(), Error> {
    let mut hasher = DefaultHasher::new();
    format!("{cases:?}").hash(&mut hasher);
    // as many bits as a number holds exactly
    let own = f64::from((hasher.finish() >> 32) as u32);
    let same = world.largest(own) - own == 0.0 && world.largest(-own) + own == 0.0;
    if same { Ok(()) } else { Err(BenchError::OtherCases.into()) }
}

/// A case by every way that is asked for. On all ranks it fails alike.
fn measured(
    case: &Case,
    problem: &AttentionProblem,
    common: &Common<'_>,
    world: &World,
) -> Result<Vec<(Row, Ranks)>, Error> {
    world.settle(measure::check_memory(problem, measure::seeded_bytes(problem)))?;
    let data = workload::inputs(problem, &case.name);
    let device = common.device;
    let keys = shard::keys_of(problem.kv_len(), world.rank(), world.ranks());
    let spec = shard::spec_of(problem, &keys);
    let budget = common.args.seconds;

    let (kernel, own_ms) = own_keys(&spec, &data, device, budget, world)?;
    let inputs = world.settle(shard::inputs(device, &data))?;
    let load = Load {
        ranks: world.ranks() as u64,
        rows: problem.rows() as u64,
        head_dim: problem.head_dim() as u64,
        v_head_dim: problem.v_head_dim() as u64,
        most_keys: problem.kv_len().div_ceil(world.ranks()) as u64,
        on_all: common.args.ranks.on_all,
        own_rows: false,
    };
    let network = network(&common.args.ranks, &load, own_ms);
    let one = |way: Way| -> Result<(Row, Ranks), Error> {
        let asked = ShardedSpec {
            way,
            network,
            result: if load.on_all { Results::OnAll } else { Results::OnRoot(0) },
            ..ShardedSpec::new(spec.clone())
        };
        let new = || Ok(ShardedAttention::new_blocking(&world.0, device, asked)?);
        let (attention, output, made) = Made::by(device, new, |attention| attention.attend_blocking(&inputs))?;
        let max_abs_error = world.settle(checked(problem, &data, output.as_ref()))?;
        let (rounds, sent) = timed(device, &attention, &inputs, budget, world)?;
        let work = [workload::flops(problem, &data.as_inputs()), workload::bytes(problem)];
        let row = made.row(kernel, max_abs_error, rounds, work, f64::NAN);
        let cost = costs(&load, &network).into_iter().find(|cost: &Cost| cost.way == way);
        let lens = attention.lens().to_vec();
        Ok((
            row,
            Ranks {
                way,
                on_all: load.on_all,
                lens,
                own_ms,
                sent,
                limit: cost.map(|cost| cost.limit(&load, &network)),
                cost,
            },
        ))
    };
    ways(&common.args.ranks).into_iter().map(one).collect()
}

/// The ways that are asked for.
fn ways(flags: &RankFlags) -> Vec<Way> {
    let named = [(WayFlag::Gather, Way::Gather), (WayFlag::Tree, Way::Tree), (WayFlag::Ring, Way::Ring)];
    let asked = |flag: &WayFlag| flags.way.is_empty() || flags.way.contains(flag);
    named.into_iter().filter(|(flag, _)| asked(flag)).map(|(_, way)| way).collect()
}

/// The model's network, with the arithmetic of this machine.
fn network(flags: &RankFlags, load: &Load, own_ms: f64) -> Network {
    let default = Network::default();
    let flops = 2.0 * load.rows as f64 * load.most_keys as f64 * (load.head_dim + load.v_head_dim) as f64;
    let flops_per_s = flops / (own_ms / 1e3);
    Network {
        latency_s: flags.latency_us.map_or(default.latency_s, |us| us / 1e6),
        bytes_per_s: flags.gb_per_s.map_or(default.bytes_per_s, |gb| gb * 1e9),
        flops_per_s: if flops_per_s > 0.0 && flops_per_s.is_finite() { flops_per_s } else { default.flops_per_s },
        ..default
    }
}

/// What the attention to its own keys takes a rank, while all are at it: the kernel, and the median of the slowest rank.
fn own_keys(
    spec: &AttentionSpec,
    data: &AttentionData,
    device: &Device,
    budget: Duration,
    world: &World,
) -> Result<(&'static str, f64), Error> {
    let library = cross_attention::Error::from;
    let inputs = shard::inputs_alone(data);
    let prepare = || -> Result<_, Error> {
        let problem = AttentionProblem::new(shard::alone(spec))?;
        let prepared = device.prepare_blocking(&problem, KernelChoice::Auto)?;
        // pipelines and pages of memory are there before the clock runs
        prepared.run_blocking(&inputs)?;
        Ok(prepared)
    };
    let prepared = world.settle(prepare())?;
    let time = || -> Result<Timing, Error> {
        if let PreparedAttention::Gpu(prepared) = &prepared {
            let tensors = prepared.upload_blocking(&inputs)?;
            let bound = prepared.bind(&tensors.buffers()).map_err(library)?;
            return Ok(prepared.time_blocking(&bound, MIN_ROUNDS, budget, &mut || {}).map_err(library)?);
        }
        Ok(prepared.time_blocking(&inputs, MIN_ROUNDS, budget, &mut || {})?)
    };
    world.0.barrier();
    let timing = world.settle(time())?;
    Ok((prepared.kernel_name(), world.largest(timing.quantile(0.5))))
}

/// How far off the result is, where this rank has one: the largest error.
fn checked(problem: &AttentionProblem, data: &AttentionData, output: Option<&AttentionOutput>) -> Result<f64, Error> {
    let Some(output) = output else { return Ok(0.0) };
    let report = verify::verify_sample(problem, &data.as_inputs(), output, VERIFIED_ROWS)?;
    if report.passed() { Ok(report.max_abs_error) } else { Err(Error::Verify { report: report.to_string() }) }
}

/// Times calls of all ranks, each by the rank that took longest, and what all ranks gave to MPI in one of them.
fn timed(
    device: &Device,
    attention: &ShardedAttention,
    inputs: &ShardInputs<'_>,
    budget: Duration,
    world: &World,
) -> Result<((WarmUp, Timing), Traffic), Error> {
    let call = || -> Result<f64, Error> {
        world.0.barrier();
        let start = Instant::now();
        // of one rank's own, a refusal is that of all
        attention.attend_blocking(inputs)?;
        Ok(world.largest(millis(start)))
    };
    let rounds = |least: usize, budget: Duration| -> Result<Timing, Error> {
        let start = Instant::now();
        let mut times = vec![];
        while times.len() < least || world.of_first(start.elapsed().as_secs_f64()) < budget.as_secs_f64() {
            times.push(call()?);
        }
        Ok(Timing { millis: times, source: TimingSource::Wall })
    };
    let began = Instant::now();
    let elapsed = || Duration::from_secs_f64(world.of_first(began.elapsed().as_secs_f64()));
    let warm_up = match device {
        // it is long, and keeps nothing between calls
        Device::Oracle => WarmUp::default(),
        _ => stats::warm_up_by(budget, elapsed, rounds)?,
    };
    let before = traffic();
    let timing = rounds(MIN_ROUNDS, budget)?;
    let (after, calls) = (traffic(), timing.millis.len() as u64);
    let of_call = |after: u64, before: u64| world.sum((after - before) / calls);
    let sent = Traffic { calls: of_call(after.calls, before.calls), bytes: of_call(after.bytes, before.bytes) };
    Ok(((warm_up, timing), sent))
}
