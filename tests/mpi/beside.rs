//! Weights with keys counted over all ranks, and gradients, against the whole.

use cross_attention::backward::{BackwardInputs, BackwardProblem, BackwardSpec, Gradients};
use cross_attention::engine::Tensor;
use cross_attention::sharded::{Queries, Results, ShardInputs, ShardKeys, ShardedAttention, ShardedSpec};
use cross_attention::verify::{verify, verify_backward};
use cross_attention::weights::{HeadReduce, Keys, Select, WeightsSpec};
use cross_attention::{
    AttentionData, AttentionProblem, Device, Diagonal, Layout, ScoreStage, TensorData, TensorSpec, cpu,
};
use mpi::collective::{CommunicatorCollectives, SystemOperation};
use mpi::topology::{Communicator, SimpleCommunicator};

use super::common::case::Case;
use super::common::recipe::places;
use super::common::{cases, random, weights};
use super::scenarios::{WAYS, by_entry, number};
use super::shards::{Shard, cuts, drawn, sharded};

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Random cases, and a part of the table.
fn drawn_cases(random: u32, every: usize) -> Vec<Case> {
    let small = |case: &Case| case.problem().score_shape().iter().product::<usize>() < 20_000;
    let table = cases::all().into_iter().step_by(every);
    let all = random::drawn(&random::case(), random).into_iter().chain(table).filter(small);
    // along diagonals of entries there is no ALiBi
    all.filter(|case| !by_entry(&case.spec) || case.spec.alibi_slopes.is_none()).collect()
}

pub(crate) fn weights(comm: &SimpleCommunicator) -> Result<(), String> {
    let [rank, ranks] = number(comm);
    for (case, n) in drawn_cases(40, 9).into_iter().zip(0..) {
        let mut random = drawn(&case.name);
        let case = sharded(case, &mut random);
        let (data, cuts) = (case.data(), cuts(&case, ranks, &mut random));
        let shard = Shard::new(&case, &data, [cuts[rank], cuts[rank + 1]]);
        let named = |error: String| format!("{case}\nkeys cut at {cuts:?}\n{error}");
        let spec = ShardedSpec { way: WAYS[n % 3], ..ShardedSpec::new(shard.spec.clone()) };
        let attention = ShardedAttention::new(comm, &Device::Cpu, spec).map_err(text)?;
        let ask = |of: &WeightsSpec| {
            let got = attention.attend_with_weights_blocking(&shard.inputs(Some(&data.query)), of);
            got.map_err(|error| named(text(error))).map(|got| got.expect("all have it").weights)
        };
        let all = ask(&WeightsSpec::default())?;
        if n % ranks == rank {
            within_tolerance(&case, &data, &all).map_err(named)?;
        }
        for number in 1..4 {
            let chosen = weights::selection(&case.problem(), random.u64(1..1000) + number);
            let got = ask(&chosen)?;
            sums(&case, &all, &chosen, &got, ranks).map_err(named)?;
        }
    }
    Ok(())
}

/// Some weights over the keys of all ranks, against those of the whole: keys one by one, and segments across ranks.
pub(crate) fn chosen(
    attention: &ShardedAttention,
    inputs: &ShardInputs<'_>,
    whole: &AttentionProblem,
    data: &AttentionData,
) -> Result<(), String> {
    for number in 0..3 {
        let chosen = weights::selection(whole, number);
        let got = attention.attend_with_weights_blocking(inputs, &chosen).map_err(text)?.ok_or("no result")?;
        let want = Device::Oracle.attention_with_weights_blocking(whole, &data.as_inputs(), &chosen).map_err(text)?;
        // scores up to 40 in size, off by 8 of their last places or f16's of values in between; sums over 3 heads at most
        let near = |(got, want): (&f32, &f32)| (got - want).abs() <= 1e-4 * want.abs() + 1e-6;
        if got.shape != want.shape || !got.weights.iter().zip(&want.weights).all(near) {
            return Err(format!("{chosen:?}: {:?}, should be {:?}", got.weights, want.weights));
        }
    }
    Ok(())
}

/// Weights of rank 0's keys on its device, in host memory and on the device, with terms.
pub(crate) fn on_devices(comm: &SimpleCommunicator, device: &Device) -> Result<(), String> {
    let [rank, ranks] = number(comm);
    let case = Case::new("weights", "weights on several devices", 2, [4, 2], [5, 60], [16, 12])
        .sinks(1.0)
        .mask("11qk")
        .causal(Diagonal::EndOfKeys)
        .kv_lens(&[41, 60]);
    let (data, cuts) = (case.data(), cuts(&case, ranks, &mut drawn("not at an end")));
    let shard = Shard::new(&case, &data, [cuts[rank], cuts[rank + 1]]);
    let attention = ShardedAttention::new(comm, device, ShardedSpec::new(shard.spec.clone())).map_err(text)?;
    let inputs = shard.inputs(Some(&data.query));
    chosen(&attention, &inputs, &case.problem(), &data)?;
    let mut placed = inputs.clone();
    if let (Device::Gpu(gpu), ShardKeys::Tensors { key, value }) = (device, &mut placed.keys) {
        for (tensor, of) in [(key, &shard.data.key), (value, &shard.data.value)] {
            let buffer = gpu.upload_blocking("placed", of.as_ref().as_bytes()).map_err(text)?;
            *tensor = Tensor::on_device(gpu, buffer.slice(..), tensor.kind(), tensor.len()).map_err(text)?;
        }
    }
    chosen(&attention, &placed, &case.problem(), &data)?;
    // gradients are computed on the host, and say so on every rank
    let refused = attention.backward_blocking(&placed, &vec![0.0; 2 * 4 * 5 * 12], None).err().map(text);
    let refused = refused.unwrap_or_default();
    if refused.starts_with("rank 0") && refused.contains("key") { Ok(()) } else { Err(refused) }
}

/// All weights, against the whole.
pub(crate) fn within_tolerance(case: &Case, data: &AttentionData, all: &[f32]) -> Result<(), String> {
    // as scores of this stage the tolerance knows them
    let whole = case.clone().spec(|spec| spec.scores = Some(ScoreStage::Probs));
    let mut output = cpu::attention(&case.problem(), &data.as_inputs()).map_err(text)?;
    output.scores = Some(all.to_vec());
    let report = verify(&whole.problem(), &data.as_inputs(), &output).map_err(text)?;
    if report.passed() { Ok(()) } else { Err(report.to_string()) }
}

/// Chosen weights are sums of all.
pub(crate) fn sums(case: &Case, all: &[f32], chosen: &WeightsSpec, got: &[f32], ranks: usize) -> Result<(), String> {
    let [batch, q_heads, q_len, kv_len] = case.problem().score_shape();
    let list = |select: &Select, len: usize| match select {
        Select::All => (0..len).collect::<Vec<_>>(),
        Select::Range(range) => range.clone().collect(),
        Select::List(list) => list.clone(),
    };
    let (heads, rows) = (list(&chosen.heads, q_heads), list(&chosen.rows, q_len));
    let columns: Vec<Vec<usize>> = match &chosen.keys {
        Keys::Each(keys) => list(keys, kv_len).into_iter().map(|key| vec![key]).collect(),
        Keys::Segments(segments) => segments.iter().map(|keys| keys.clone().collect()).collect(),
    };
    let (shown, divisor) = match chosen.reduce {
        HeadReduce::Each => (heads.into_iter().map(|h| vec![h]).collect(), 1),
        HeadReduce::Mean => (vec![heads.clone()], heads.len()),
        HeadReduce::Sum => (vec![heads], 1),
    };
    let mut got = got.iter();
    for b in 0..batch {
        for heads in &shown {
            for &i in &rows {
                for keys in &columns {
                    let at = |h: usize, j: usize| f64::from(all[((b * q_heads + h) * q_len + i) * kv_len + j]);
                    let sum: f64 = heads.iter().flat_map(|&h| keys.iter().map(move |&j| at(h, j))).sum();
                    let want = sum / divisor as f64;
                    // each of all was rounded once, and so is each rank's sum, the mean, and each addition of a rank's
                    let slack =
                        (ranks + 4) as f64 * f64::from(f32::EPSILON) / 2.0 * want + f64::from(f32::MIN_POSITIVE);
                    let got = f64::from(*got.next().ok_or("too few weights")?);
                    if !((got - want).abs() <= slack || (got.is_nan() && want.is_nan())) {
                        return Err(format!("{chosen:?}: [{b}, {heads:?}, {i}] of {keys:?}: {got}, should be {want}"));
                    }
                }
            }
        }
    }
    if got.next().is_some() { Err("too many weights".to_owned()) } else { Ok(()) }
}

pub(crate) fn gradients(comm: &SimpleCommunicator) -> Result<(), String> {
    let [rank, ranks] = number(comm);
    for (case, n) in drawn_cases(40, 7).into_iter().zip(0..) {
        let mut random = drawn(&case.name);
        let case = sharded(case, &mut random).spec(|spec| {
            // what is sharded gives f32 without gaps
            spec.output = TensorSpec::f32(Layout::bhld(spec.output.layout.shape));
        });
        let (data, cuts) = (case.data(), cuts(&case, ranks, &mut random));
        let range = [cuts[rank], cuts[rank + 1]];
        let shard = Shard::new(&case, &data, range);
        let named = |error: String| format!("{case}\nkeys cut at {cuts:?}\n{error}");
        let root = i32::try_from(random.usize(0..ranks)).map_err(text)?;
        let queries = if random.bool() { Queries::OnAll } else { Queries::OnRoot(root) };
        let has_query = queries == Queries::OnAll || comm.rank() == root;
        let spec = ShardedSpec {
            way: WAYS[n % 3],
            queries,
            result: Results::OnRoot(root),
            ..ShardedSpec::new(shard.spec.clone())
        };
        let attention = ShardedAttention::new(comm, &Device::Cpu, spec).map_err(text)?;

        let mut backward = BackwardSpec::all(case.problem().spec().clone());
        (backward.d_lse, backward.d_scale) = (random.bool(), true);
        let problem = BackwardProblem::new(backward).map_err(|error| named(text(error)))?;
        let mut numbers = |len: usize| (0..len).map(|_| 2.0 * random.f32() - 1.0).collect::<Vec<f32>>();
        let d_output = numbers(problem.forward().rows() * problem.forward().v_head_dim());
        let d_lse = problem.spec().d_lse.then(|| numbers(problem.forward().rows()));
        let own =
            attention.backward_blocking(&shard.inputs(has_query.then_some(&data.query)), &d_output, d_lse.as_deref());
        let own = own.map_err(|error| named(text(error)))?;
        let whole = Gradients {
            d_key: brought_together(comm, &own.d_key, problem.spec().d_key, 2, range),
            d_value: brought_together(comm, &own.d_value, problem.spec().d_value, 2, range),
            d_bias: brought_together(comm, &own.d_bias, problem.spec().d_bias, 3, range),
            ..own
        };
        if n % ranks != rank {
            continue;
        }
        let forward = cpu::attention(problem.forward(), &data.as_inputs()).map_err(text)?;
        let mut inputs = BackwardInputs::new(data.as_inputs(), &forward, &d_output).map_err(text)?;
        inputs.d_lse = d_lse.as_deref();
        let report = verify_backward(&problem, &inputs, &whole).map_err(|error| named(text(error)))?;
        if !report.passed() {
            return Err(named(report.to_string()));
        }
    }
    Ok(())
}

/// Each rank's part in its place of the whole.
fn brought_together(
    comm: &SimpleCommunicator,
    own: &Option<TensorData>,
    whole: Option<TensorSpec>,
    axis: usize,
    [from, to]: [usize; 2],
) -> Option<TensorData> {
    let layout = whole?.layout;
    let mut numbers = vec![0.0f32; layout.extent().unwrap_or(0)];
    let own = own.as_ref().map(TensorData::to_f32).unwrap_or_default();
    let mut shape = layout.shape;
    shape[axis] = to - from;
    for (mut at, x) in places(shape).zip(own) {
        at[axis] += from;
        numbers[layout.index(at)] += x;
    }
    let mut all = vec![0.0f32; numbers.len()];
    // nothing else is added to a number but zeros
    comm.all_reduce_into(&numbers[..], &mut all[..], SystemOperation::sum());
    Some(TensorData::F32(all))
}

/// What cannot be computed is refused, and all ranks hear of it.
pub(crate) fn neither(comm: &SimpleCommunicator) -> Result<(), String> {
    let case = Case::new("neither", "queries of each rank's own", 1, [2, 1], [3, 8], [4, 4]);
    let data = case.data();
    let shard = Shard::new(&case, &data, [0, 8]);
    let spec = ShardedSpec { queries: Queries::Own, ..ShardedSpec::new(shard.spec.clone()) };
    let attention = ShardedAttention::new(comm, &Device::Cpu, spec).map_err(text)?;
    let inputs = shard.inputs(Some(&data.query));
    let refused = attention.backward_blocking(&inputs, &[0.0; 24], None).err().map(text).unwrap_or_default();
    if !refused.contains("a gradient is not there over shards") {
        return Err(refused);
    }
    let attention = ShardedAttention::new(comm, &Device::Cpu, ShardedSpec::new(shard.spec.clone())).map_err(text)?;
    // keys are counted over all ranks, and there is none behind the last
    let total = 8 * number(comm)[1];
    let keys = |last| WeightsSpec { keys: Keys::Each(Select::List(vec![last])), ..WeightsSpec::default() };
    attention.attend_with_weights_blocking(&inputs, &keys(total - 1)).map_err(text)?;
    let error = attention.attend_with_weights_blocking(&inputs, &keys(total)).err().map(text).unwrap_or_default();
    let wrong = [0.0f32; 23];
    let short = attention.backward_blocking(&inputs, &wrong, None).err().map(text).unwrap_or_default();
    if error.contains("keys[0]") && short.contains("d_output") { Ok(()) } else { Err(format!("{error}; {short}")) }
}
