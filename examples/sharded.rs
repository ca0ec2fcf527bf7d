//! Attention over keys that lie on several machines.
//!
//! Every rank has keys of its own, as long a list as the others or up to half longer; what all of them hold is attended to by
//! every way there is, compared with the whole on one rank, and timed beside what the cost model says. `--model` needs no MPI
//! run: it prints the model for 8 to 1024 machines.
//!
//!     cargo build --release --features mpi --example sharded
//!     mpirun -n 4 target/release/examples/sharded --device cpu
//!     target/release/examples/sharded --model

#[path = "common/flags.rs"]
mod flags;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use cross_attention::sharded::{
    Cost, EndTogether, Load, Network, Results, ShardInputs, ShardedAttention, ShardedSpec, Traffic, Way, costs, traffic,
};
use cross_attention::verify::verify_sample;
use cross_attention::{AttentionInputs, AttentionOutput, AttentionProblem, AttentionSpec, Device, TensorData};
use flags::{DeviceFlag, Failure, say};
use mpi::collective::{CommunicatorCollectives, SystemOperation};
use mpi::topology::{Communicator, SimpleCommunicator};

/// Keys over several ranks: every way of bringing them together, compared with the whole, beside the cost model
#[derive(Debug, Parser)]
struct Flags {
    #[command(flatten)]
    device: DeviceFlag,
    /// Query heads, and as many of keys
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=256))]
    heads: u16,
    /// Query rows of each head
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    rows: u16,
    /// Width of a row of queries, keys and values
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=1024))]
    width: u16,
    /// Keys of the rank with the fewest
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1 << 22))]
    keys: u32,
    /// Calls that are timed; the median counts
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u16).range(1..))]
    calls: u16,
    /// The result on every rank, and not on the first alone
    #[arg(long)]
    on_all: bool,
    /// One way only: gather, tree or ring
    #[arg(long, value_parser = ["gather", "tree", "ring"])]
    way: Option<String>,
    /// Print the model for 8 to 1024 machines and end
    #[arg(long)]
    model: bool,
    /// Of the model's network: microseconds that an empty message takes
    #[arg(long, default_value_t = 5.0, value_parser = positive)]
    latency_us: f64,
    /// Of the model's network: gigabytes a second of a machine's link
    #[arg(long, default_value_t = 12.5, value_parser = positive)]
    gb_per_s: f64,
    /// Of the model's machines: billions of floating point operations a second in an attention
    #[arg(long, default_value_t = 10_000.0, value_parser = positive)]
    gflops: f64,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 => Ok(number),
        _ => Err("needs a finite number above 0".to_owned()),
    }
}

impl Flags {
    fn network(&self) -> Network {
        let (latency_s, bytes_per_s) = (self.latency_us / 1e6, self.gb_per_s * 1e9);
        Network { latency_s, bytes_per_s, flops_per_s: self.gflops * 1e9, ..Network::default() }
    }

    fn load(&self, ranks: u64, most_keys: u64) -> Load {
        let rows = u64::from(self.heads) * u64::from(self.rows);
        let width = u64::from(self.width);
        Load { ranks, rows, head_dim: width, v_head_dim: width, most_keys, on_all: self.on_all, own_rows: false }
    }
}

const SHOWS: [&str; 2] = [
    "Every rank has keys and values of its own; one softmax over those of all ranks is brought together by each way there is,",
    "compared with the whole in f64, and timed beside what the cost model says of the same call.",
];

fn main() -> ExitCode {
    let flags = Flags::parse();
    if flags.model {
        model(&flags);
        return ExitCode::SUCCESS;
    }
    let Some(universe) = mpi::initialize() else { return flags::end(Err("MPI does not begin".into())) };
    let world = universe.world();
    // by a panic or an error of this rank all end, and none waits for it
    let together = EndTogether::new(&world);
    let result = run(&flags, &world);
    let went_well = result.is_ok();
    let code = flags::end(result);
    if went_well {
        together.done();
    }
    code
}

/// Keys and values of one rank, `[heads, keys, width]`.
struct Shard {
    keys: usize,
    key: Vec<f32>,
    value: Vec<f32>,
}

impl Shard {
    /// How many keys it has: not all ranks have as many.
    fn len(flags: &Flags, rank: usize) -> usize {
        let fewest = flags.keys as usize;
        fewest + fewest * (rank % 3) / 4
    }

    /// Numbers that every rank can draw for any.
    fn new(flags: &Flags, rank: usize) -> Self {
        let keys = Self::len(flags, rank);
        let mut random = fastrand::Rng::with_seed(rank as u64 + 1);
        let len = usize::from(flags.heads) * keys * usize::from(flags.width);
        let mut numbers = || (0..len).map(|_| 4.0 * random.f32() - 2.0).collect();
        Self { keys, key: numbers(), value: numbers() }
    }
}

fn run(flags: &Flags, world: &SimpleCommunicator) -> Result<(), Failure> {
    let [rank, ranks] = [usize::try_from(world.rank())?, usize::try_from(world.size())?];
    let device = match rank {
        0 => flags.device.begin(SHOWS)?,
        _ => Device::choose_blocking(&flags.device.device)?.device,
    };
    let [heads, rows, width] = [flags.heads, flags.rows, flags.width].map(usize::from);
    let query: Vec<f32> = {
        let mut random = fastrand::Rng::with_seed(0);
        (0..heads * rows * width).map(|_| 4.0 * random.f32() - 2.0).collect()
    };
    let own = Shard::new(flags, rank);
    let spec = AttentionSpec::new([1, heads, rows, width], [1, heads, own.keys, width]);

    // what an attention to the rank's keys takes, while all ranks are at it
    let problem = AttentionProblem::new(spec.clone())?;
    let given = AttentionInputs::new(&query, &own.key, &own.value);
    let compute_s = timed(world, flags.calls, || Ok(device.attention_blocking(&problem, &given).map(drop)?))?;
    let most_keys = (0..ranks).map(|rank| Shard::len(flags, rank)).max().unwrap_or(0) as u64;
    let load = flags.load(ranks as u64, most_keys);
    let flops = 4.0 * load.rows as f64 * load.most_keys as f64 * load.head_dim as f64;
    let network = Network { flops_per_s: flops / compute_s, ..flags.network() };

    let mut table = vec![];
    for way in [Way::Gather, Way::Tree, Way::Ring] {
        if flags.way.as_ref().is_some_and(|only| only != way.name()) {
            continue;
        }
        let mut asked = ShardedSpec { way, network, ..ShardedSpec::new(spec.clone()) };
        asked.result = if flags.on_all { Results::OnAll } else { Results::OnRoot(0) };
        let attention = ShardedAttention::new(world, &device, asked)?;
        let inputs = ShardInputs::new(&query, &own.key, &own.value);
        let mut result = attention.attend_blocking(&inputs)?;
        let before = traffic();
        let seconds = timed(world, flags.calls, || {
            result = attention.attend_blocking(&inputs)?;
            Ok(())
        })?;
        let after = traffic();
        let calls = u64::from(flags.calls);
        let of_call = |after: u64, before: u64| sum(world, (after - before) / calls);
        let given = Traffic { calls: of_call(after.calls, before.calls), bytes: of_call(after.bytes, before.bytes) };
        table.push((way, seconds, given, result));
    }
    if rank > 0 {
        return Ok(());
    }
    let keys: Vec<usize> = (0..ranks).map(|rank| Shard::len(flags, rank)).collect();
    say!(
        "{heads} heads of {rows} rows, width {width}; keys of each rank: {keys:?}; result on {}",
        match flags.on_all {
            true => "every rank",
            false => "the first rank",
        }
    );
    say!("attention to a rank's own keys, all ranks at once: {:.3} ms\n", compute_s * 1e3);
    say!(
        "{:<8}{:>11}{:>9}{:>12}  | model: {:>9}{:>10}{:>12}  {:<10}| of what is allowed",
        "way",
        "time",
        "calls",
        "bytes",
        "time",
        "messages",
        "bytes",
        "bound by"
    );
    let model = costs(&load, &network);
    for (way, seconds, Traffic { calls, bytes }, result) in &table {
        let output = result.as_ref().ok_or("the first rank has no result")?;
        let ratio = off(flags, &keys, &query, output)?;
        let Some(cost) = model.iter().find(|cost| cost.way == *way) else { continue };
        say!(
            "{:<8}{:>8.3} ms{calls:>9}{bytes:>12}  |        {:>6.3} ms{:>10}{:>12}  {:<10}| {ratio:.3}",
            way.name(),
            seconds * 1e3,
            cost.seconds * 1e3,
            cost.messages,
            cost.bytes,
            cost.limit(&load, &network),
        );
    }
    say!(
        "\ncalls and bytes are what all ranks gave to MPI in one call, 4 calls a rank of them to agree; a collective counts once,"
    );
    say!("however MPI passes it on. The model has the attention as measured, and the network that the flags describe.");
    Ok(())
}

/// The median time of a call, of the rank that took longest.
fn timed(
    world: &SimpleCommunicator,
    calls: u16,
    mut call: impl FnMut() -> Result<(), Failure>,
) -> Result<f64, Failure> {
    let mut times = vec![];
    for _ in 0..calls {
        world.barrier();
        let began = Instant::now();
        call()?;
        let own = began.elapsed().as_secs_f64();
        let mut longest = 0.0f64;
        world.all_reduce_into(&own, &mut longest, SystemOperation::max());
        times.push(longest);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn sum(world: &SimpleCommunicator, own: u64) -> u64 {
    let mut all = 0u64;
    world.all_reduce_into(&own, &mut all, SystemOperation::sum());
    all
}

/// How far off a result is, of what the tolerance allows; rows are sampled.
fn off(flags: &Flags, keys: &[usize], query: &[f32], output: &AttentionOutput) -> Result<f64, Failure> {
    let [heads, rows, width] = [flags.heads, flags.rows, flags.width].map(usize::from);
    let shards: Vec<Shard> = (0..keys.len()).map(|rank| Shard::new(flags, rank)).collect();
    let whole = |of: fn(&Shard) -> &Vec<f32>| -> TensorData {
        let head = |h: usize| {
            let rows = move |shard: &Shard| of(shard)[h * shard.keys * width..][..shard.keys * width].to_vec();
            shards.iter().flat_map(rows)
        };
        TensorData::F32((0..heads).flat_map(head).collect())
    };
    let (key, value) = (whole(|shard| &shard.key), whole(|shard| &shard.value));
    let total = keys.iter().sum();
    let problem = AttentionProblem::new(AttentionSpec::new([1, heads, rows, width], [1, heads, total, width]))?;
    let report = verify_sample(&problem, &AttentionInputs::new(query, &key, &value), output, 16)?;
    if report.passed() { Ok(report.worst_ratio) } else { Err(report.to_string().into()) }
}

/// The model alone, for pools of a million to a thousand million keys on 8 to 1024 machines.
fn model(flags: &Flags) {
    let network = flags.network();
    let Load { rows, head_dim, .. } = flags.load(1, 0);
    say!(
        "{rows} query rows of width {head_dim}, f32; on each machine an attention of {} GFLOP/s; messages take {} us and",
        flags.gflops,
        flags.latency_us
    );
    say!(
        "{} GB/s; states are merged at {} GB/s. Not measured: a model.\n",
        flags.gb_per_s,
        network.merge_bytes_per_s / 1e9
    );
    say!(
        "{:>11}{:>10}{:>12}{:>15}{:>15}{:>15}{:>15}  best, bound by",
        "keys",
        "machines",
        "GB/machine",
        "attention",
        "gather",
        "tree",
        "ring"
    );
    for exponent in 6..=9 {
        let keys = 10u64.pow(exponent);
        for machines in [8u64, 32, 128, 512, 1024] {
            let load = flags.load(machines, keys.div_ceil(machines));
            let costs = costs(&load, &network);
            let of =
                |way| costs.iter().find(|cost: &&Cost| cost.way == way).map_or(f64::NAN, |cost| cost.seconds * 1e3);
            let (best, heads) = (&costs[0], f64::from(flags.heads));
            let bytes = load.most_keys as f64 * heads * 2.0 * head_dim as f64 * 4.0;
            say!(
                "{keys:>11}{machines:>10}{:>12.3}{:>12.3} ms{:>12.3} ms{:>12.3} ms{:>12.3} ms  {}, {}",
                bytes / 1e9,
                best.compute_s * 1e3,
                of(Way::Gather),
                of(Way::Tree),
                of(Way::Ring),
                best.way.name(),
                best.limit(&load, &network),
            );
        }
    }
    say!("\nrows from which the ring beats the tree:");
    for machines in [8u64, 32, 128, 512, 1024] {
        let ring_wins = |rows: &u64| {
            let costs = costs(&Load { rows: *rows, ..flags.load(machines, 1) }, &network);
            let at = |way| costs.iter().position(|cost| cost.way == way);
            at(Way::Ring) < at(Way::Tree)
        };
        match (0..40).map(|n| 1u64 << n).find(ring_wins) {
            Some(rows) => say!("{machines:>6} machines: {rows}"),
            None => say!("{machines:>6} machines: never"),
        }
    }
}
