//! What all ranks play together: attention over shards against the whole, which the oracle judges on one rank.

use cross_attention::context::{ContextSpec, PreparedContext};
use cross_attention::cpu::{self, StatePart};
use cross_attention::pool::{GroupQuery, PassagePool, PoolAttention, PoolSpec};
use cross_attention::sharded::{
    Queries, Results, ShardInputs, ShardKeys, ShardedAttention, ShardedError, ShardedSpec, Way, merge_over,
};
use cross_attention::{
    AlibiSlopes, AttentionData, AttentionOutput, AttentionProblem, AttentionSpec, Device, Diagonal, Element, Error,
    Layout, OwnedTerms, RowState, TensorData, TensorSpec,
};
use fastrand::Rng;
use mpi::collective::CommunicatorCollectives;
use mpi::topology::{Communicator, SimpleCommunicator};

use super::common::case::Case;
use super::common::{cases, check, random};
use super::shards::{Shard, cuts, drawn, sharded};
use super::{beside, own};

pub(crate) const WAYS: [Way; 3] = [Way::Gather, Way::Tree, Way::Ring];

pub(crate) fn number(comm: &SimpleCommunicator) -> [usize; 2] {
    [comm.rank(), comm.size()].map(|n| usize::try_from(n).expect("ranks are counted from 0"))
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Short cases with all terms, each by every way.
pub(crate) fn random(comm: &SimpleCommunicator) -> Result<(), String> {
    for case in random::drawn(&random::case(), 40) {
        let mut random = drawn(&case.name);
        let case = sharded(case, &mut random);
        for way in WAYS {
            one(comm, &Device::Cpu, &case, way, &mut random)?;
        }
    }
    Ok(())
}

/// Long cases.
pub(crate) fn long(comm: &SimpleCommunicator) -> Result<(), String> {
    for (case, n) in random::drawn(&random::long_case(), 9).into_iter().zip(0..) {
        let mut random = drawn(&case.name);
        let case = sharded(case, &mut random);
        one(comm, &Device::Cpu, &case, WAYS[n % 3], &mut random)?;
    }
    Ok(())
}

/// The cases of the table: infinite and NaN where they belong, extreme numbers, poison, layouts, pages.
pub(crate) fn table(comm: &SimpleCommunicator) -> Result<(), String> {
    let small = |case: &Case| case.problem().score_shape().iter().product::<usize>() < 50_000;
    for (case, n) in cases::all().into_iter().filter(small).zip(0..) {
        let mut random = drawn(&case.name);
        let case = sharded(case, &mut random);
        one(comm, &Device::Cpu, &case, WAYS[n % 3], &mut random)?;
    }
    Ok(())
}

/// One case, with queries and result anywhere.
pub(crate) fn one(
    comm: &SimpleCommunicator,
    device: &Device,
    case: &Case,
    way: Way,
    random: &mut Rng,
) -> Result<(), String> {
    let [rank, ranks] = number(comm);
    let data = case.data();
    let cuts = cuts(case, ranks, random);
    let root = |random: &mut Rng| i32::try_from(random.usize(0..ranks)).expect("few ranks");
    let [query_root, result_root] = [root(random), root(random)];
    let shard = Shard::new(case, &data, [cuts[rank], cuts[rank + 1]]);
    let mut spec = ShardedSpec { way, ..ShardedSpec::new(shard.spec.clone()) };
    (spec.queries, spec.result) = match random.u8(0..4) {
        0 => (Queries::OnAll, Results::OnAll),
        1 => (Queries::OnAll, Results::OnRoot(result_root)),
        2 => (Queries::OnRoot(query_root), Results::OnAll),
        _ => (Queries::OnRoot(query_root), Results::OnRoot(result_root)),
    };
    let has_query = spec.queries == Queries::OnAll || query_root == comm.rank();
    let has_result = spec.result == Results::OnAll || result_root == comm.rank();
    let named = |error: String| {
        format!("{case}\nkeys cut at {cuts:?}, {}, {:?}, {:?}\n{error}", way.name(), spec.queries, spec.result)
    };
    let attention = ShardedAttention::new(comm, device, spec.clone());
    if by_entry(&case.spec) && case.spec.alibi_slopes.is_some() {
        let refused = attention.err().map(text).unwrap_or_default();
        return if refused.contains("alibi_slopes") { Ok(()) } else { Err(named(format!("not refused: {refused}"))) };
    }
    let attention = attention.map_err(|error| named(text(error)))?;
    let output = attention.attend_blocking(&shard.inputs(has_query.then_some(&data.query)));
    let output = output.map_err(|error| named(text(error)))?;
    match (output, has_result) {
        (None, false) => Ok(()),
        (Some(output), true) => {
            if spec.result == Results::OnAll {
                alike(comm, &output).map_err(named)?;
            }
            // one rank is enough for what all have
            let judge = spec.result != Results::OnAll || rank == cuts[ranks] % ranks;
            if judge { judged(case, &data, &output).map_err(named) } else { Ok(()) }
        }
        (output, _) => Err(named(format!("a result is there: {}, should be: {has_result}", output.is_some()))),
    }
}

/// Within tolerance of the whole, and exact where a row sees nothing.
pub(crate) fn judged(case: &Case, data: &AttentionData, output: &AttentionOutput) -> Result<(), String> {
    let problem = case.problem();
    if output.lse.is_some() != case.spec.lse || output.row_state.is_some() != case.spec.row_state {
        return Err("lse or row_state is there and was not asked for, or the other way round".to_owned());
    }
    check::within_tolerance(&problem, data, output)?;
    check::empty_rows(&problem, &data.as_inputs(), output)
}

/// The same bits on all ranks.
fn alike(comm: &SimpleCommunicator, output: &AttentionOutput) -> Result<(), String> {
    let [_, ranks] = number(comm);
    let sum =
        check::bits(output).into_iter().fold(7u64, |sum, bits| sum.wrapping_mul(0x100_0000_01b3) ^ u64::from(bits));
    let mut sums = vec![0u64; ranks];
    comm.all_gather_into(&sum, &mut sums[..]);
    if sums.iter().all(|other| *other == sums[0]) { Ok(()) } else { Err("ranks have different bits".to_owned()) }
}

pub(crate) fn by_entry(spec: &AttentionSpec) -> bool {
    let diagonal = spec.causal.or(spec.offset).unwrap_or_default();
    let windows = spec.window_left.is_some() || spec.window_right.is_some();
    let used = spec.causal.is_some() || windows || spec.alibi_slopes.is_some();
    used && diagonal == Diagonal::EndOfKeys && (spec.q_lens || spec.kv_lens)
}

/// Gathered, or in a ring, 50 times the same bits, with a device for every call and with one for all.
pub(crate) fn same_bits(comm: &SimpleCommunicator) -> Result<(), String> {
    let [rank, ranks] = number(comm);
    let case =
        Case::new("same_bits", "the same bits each time", 2, [4, 2], [5, 203], [24, 20]).causal(Diagonal::EndOfKeys);
    let (data, cuts) = (case.data(), cuts(&case, ranks, &mut drawn("same_bits")));
    let shard = Shard::new(&case, &data, [cuts[rank], cuts[rank + 1]]);
    for way in [Way::Gather, Way::Ring] {
        let spec = ShardedSpec { way, ..ShardedSpec::new(shard.spec.clone()) };
        let attention = ShardedAttention::new(comm, &Device::Cpu, spec).map_err(text)?;
        let mut first = None;
        for _ in 0..50 {
            let output =
                attention.attend_blocking(&shard.inputs(Some(&data.query))).map_err(text)?.ok_or("no result")?;
            alike(comm, &output)?;
            check::same_bits(&output, first.get_or_insert_with(|| output.clone()))?;
        }
    }
    Ok(())
}

/// States that no attention of this crate made: with empty rows, common terms, NaN.
pub(crate) fn own_merges(comm: &SimpleCommunicator) -> Result<(), String> {
    const WIDTH: usize = 3;
    let [rank, ranks] = number(comm);
    for rows in [0usize, 1, 2, 7, 64] {
        let mut random = Rng::with_seed(rows as u64);
        let parts: Vec<(Vec<f32>, RowState)> = (0..ranks).map(|_| part(rows, WIDTH, &mut random)).collect();
        let whole: Vec<_> = parts.iter().map(|(output, state)| StatePart::new(output, state)).collect();
        let want = cpu::merge_states(&whole, WIDTH).map_err(text)?;
        for way in WAYS.into_iter().chain([Way::Auto]) {
            let root = i32::try_from(random.usize(0..ranks)).map_err(text)?;
            for result in [Results::OnAll, Results::OnRoot(root)] {
                let got = merge_over(comm, whole[rank], WIDTH, way, result).map_err(text)?;
                let here = result == Results::OnAll || comm.rank() == root;
                let Some(got) = got else {
                    if here {
                        return Err("the result is not there".to_owned());
                    }
                    continue;
                };
                // 3 merges of 7 roundings or an exponential's error each, twice over; values are below 1
                let slack = 42.0 * f32::EPSILON / 2.0;
                let near = |got: f32, want: f32, size: f32| {
                    (got.is_nan() && want.is_nan())
                        || got.to_bits() == want.to_bits()
                        || (got - want).abs() <= slack * size
                };
                let outputs = got.output.iter().zip(&want.output).all(|(got, want)| near(*got, *want, 1.0));
                let sums =
                    got.state.row_sum.iter().zip(&want.state.row_sum).all(|(got, want)| near(*got, *want, *want));
                let maxima =
                    got.state.row_max.iter().zip(&want.state.row_max).all(|(got, want)| near(*got, *want, 0.0));
                if !(here && outputs && sums && maxima) {
                    return Err(format!("{} of {rows} rows: {got:?}, should be {want:?}", way.name()));
                }
            }
        }
    }
    Ok(())
}

fn part(rows: usize, width: usize, random: &mut Rng) -> (Vec<f32>, RowState) {
    let mut state = RowState { row_max: vec![], row_sum: vec![] };
    let mut output = vec![];
    for row in 0..rows {
        let common = [0.0, -1e9, 1e4][row % 3];
        let (max, sum) = match (row % 7, random.u8(0..4)) {
            // on no rank, and on some not
            (6, _) | (_, 0) => (f32::NEG_INFINITY, 0.0),
            (5, 1) => (f32::NAN, f32::NAN),
            _ => (common + 8.0 * random.f32(), 1.0 + 100.0 * random.f32()),
        };
        state.row_max.push(max);
        state.row_sum.push(sum);
        let number = |random: &mut Rng| if sum == 0.0 || sum.is_nan() { f32::NAN } else { 2.0 * random.f32() - 1.0 };
        output.extend((0..width).map(|_| number(random)));
    }
    (output, state)
}

/// Keys and values as contexts of several lengths, which each rank keeps on its device.
pub(crate) fn contexts(comm: &SimpleCommunicator) -> Result<(), String> {
    contexts_on(comm, &Device::Cpu)?;
    own::contexts(comm, &Device::Cpu)
}

fn contexts_on(comm: &SimpleCommunicator, device: &Device) -> Result<(), String> {
    const INDEX: [usize; 3] = [1, 0, 1];
    let [rank, ranks] = number(comm);
    let lens: Vec<usize> = (0..ranks).map(|rank| [5, 0, 70, 9][rank]).collect();
    let total: usize = lens.iter().sum();
    let first: usize = lens[..rank].iter().sum();
    let mut random = drawn("contexts");
    let mut numbers = |len: usize| (0..len).map(|_| 4.0 * random.f32() - 2.0).collect::<Vec<f32>>();
    let (query, key, value) = (numbers(3 * 4 * 6 * 8), numbers(2 * 2 * total * 8), numbers(2 * 2 * total * 5));
    // [contexts, heads, keys, width]: those of the rank
    let own = |of: &[f32], width: usize| -> Vec<f32> {
        of.chunks(total * width).flat_map(|head| head[first * width..][..lens[rank] * width].to_vec()).collect()
    };
    // the second context is shorter by a third on each rank
    let short = |len: usize| [len, len - len / 3];
    let own_lens = short(lens[rank]).map(|len| u32::try_from(len).expect("short"));
    let of = ContextSpec { v_head_dim: 5, ..ContextSpec::new([2, 2, lens[rank], 8]) };
    let context = PreparedContext::new_blocking(device, of, &own(&key, 8), &own(&value, 5), Some(&own_lens));
    let context = context.map_err(text)?;
    let query_spec = TensorSpec::f32(Layout::bhld([3, 4, 6, 8]));
    let index = INDEX.map(|n| u32::try_from(n).expect("small"));
    let inputs = ShardInputs {
        query: Some((&query).into()),
        keys: ShardKeys::Context(&context, Some(&index)),
        terms: cross_attention::Terms::default(),
    };

    let mut spec = context.attention(query_spec);
    (spec.causal, spec.lse) = (Some(Diagonal::Fixed(3)), true);
    let gathered = |of: &[f32], width: usize| -> Vec<f32> {
        INDEX.iter().flat_map(|n| of[n * 2 * total * width..][..2 * total * width].to_vec()).collect()
    };
    let mut whole = AttentionSpec::new([3, 4, 6, 8], [3, 2, total, 8]);
    whole.value = TensorSpec::f32(Layout::bhld([3, 2, total, 5]));
    whole.output = TensorSpec::f32(Layout::bhld([3, 4, 6, 5]));
    (whole.causal, whole.lse) = (spec.causal, true);
    whole.mask = Some(Layout::bhld([3, 1, 1, total]));
    let of_rank = |n: usize| lens.iter().flat_map(move |&len| (0..len).map(move |j| j < short(len)[n]));
    let data = AttentionData {
        query: TensorData::F32(query.clone()),
        key: TensorData::F32(gathered(&key, 8)),
        value: TensorData::F32(gathered(&value, 5)),
        terms: OwnedTerms { mask: Some(INDEX.iter().flat_map(|&n| of_rank(n)).collect()), ..OwnedTerms::default() },
    };
    let problem = AttentionProblem::new(whole).map_err(text)?;
    for way in WAYS {
        let sharded = ShardedSpec { way, ..ShardedSpec::new(spec.clone()) };
        let attention = ShardedAttention::new(comm, device, sharded).map_err(text)?;
        let output = attention.attend_blocking(&inputs).map_err(text)?.ok_or("no result")?;
        alike(comm, &output)?;
        check::within_tolerance(&problem, &data, &output)?;
        if way == Way::Gather {
            beside::chosen(&attention, &inputs, &problem, &data)?;
        }
    }
    // the end of the keys is another in each
    spec.causal = Some(Diagonal::EndOfKeys);
    let attention = ShardedAttention::new(comm, device, ShardedSpec::new(spec)).map_err(text)?;
    let refused = attention.attend_blocking(&inputs).err().map(text).unwrap_or_default();
    if refused.contains("diagonal") { Ok(()) } else { Err(format!("not refused: {refused}")) }
}

/// A pool on every rank: one softmax over the passages of all, and the share of each.
pub(crate) fn pools(comm: &SimpleCommunicator) -> Result<(), String> {
    let [rank, ranks] = number(comm);
    let passages: Vec<Vec<usize>> = (0..ranks).map(|rank| [vec![3, 40], vec![], vec![17]][rank % 3].clone()).collect();
    let total: usize = passages.iter().flatten().sum();
    let mut random = drawn("pools");
    let mut numbers = |len: usize| (0..len).map(|_| 4.0 * random.f32() - 2.0).collect::<Vec<f32>>();
    let (query, key, value) = (numbers(4 * 3 * 8), numbers(total * 2 * 8), numbers(total * 2 * 8));
    // keys one by one, [keys, heads, width]
    let range = |of: &[f32], from: usize, len: usize| -> Vec<f32> {
        let head = |h: usize| (from..from + len).flat_map(move |j| of[(j * 2 + h) * 8..][..8].to_vec());
        head(0).chain(head(1)).collect()
    };
    let mut pool = PassagePool::new(&Device::Cpu, PoolSpec::new(2, 8)).map_err(text)?;
    let mut at: usize = passages[..rank].iter().flatten().sum();
    let (mut ids, mut places) = (vec![], vec![]);
    for &len in &passages[rank] {
        let [key, value] = [&key, &value].map(|of| TensorData::F32(range(of, at, len)));
        ids.push(pool.append_blocking(key.as_ref(), value.as_ref(), len).map_err(text)?);
        places.push(at..at + len);
        at += len;
    }
    let group = GroupQuery { query: (&query).into(), q_len: 3, passages: &ids };
    let of_rank = pool.attend_blocking(&[group], &PoolAttention::new(4)).map_err(text)?.remove(0);
    let row_sum = of_rank.lse.iter().map(|&lse| if lse == f32::NEG_INFINITY { 0.0 } else { 1.0 }).collect();
    let state = RowState { row_max: of_rank.lse.clone(), row_sum };

    let spec = AttentionSpec::new([1, 4, 3, 8], [1, 2, total, 8]);
    let problem = AttentionProblem::new(spec).map_err(text)?;
    let (key, value) = (range(&key, 0, total), range(&value, 0, total));
    let inputs = cross_attention::AttentionInputs::new(&query, &key, &value);
    let exact = cpu::reference::attention(&problem, &inputs).map_err(text)?;
    let weights = cross_attention::weights::WeightsSpec {
        keys: cross_attention::weights::Keys::Segments(places.clone()),
        ..cross_attention::weights::WeightsSpec::default()
    };
    let mass = match places.is_empty() {
        true => vec![],
        false => Device::Oracle.attention_with_weights_blocking(&problem, &inputs, &weights).map_err(text)?.weights,
    };
    for way in WAYS {
        let merged = merge_over(comm, StatePart::new(&of_rank.output, &state), 8, way, Results::OnAll).map_err(text)?;
        let merged = merged.ok_or("no result")?;
        let lse = merged.state.lse();
        // an lse is rounded, and there are 4 of at most 8 in size: 2^-24 * 8 each, and the roundings of sums of 60
        let slack = 1e-5;
        let off = merged.output.iter().zip(&exact.output).map(|(got, want)| (f64::from(*got) - want).abs());
        if !off.fold(0.0, f64::max).le(&slack) {
            return Err(format!("{}: {:?}, should be {:?}", way.name(), merged.output, exact.output));
        }
        for (row, want) in mass.chunks(places.len().max(1)).enumerate() {
            for (passage, want) in want.iter().enumerate() {
                let got = (of_rank.passage_lse[passage * 12 + row] - lse[row]).exp();
                if !check::is_near(f64::from(got), f64::from(*want), slack) {
                    return Err(format!("share of passage {passage} in row {row}: {got}, should be {want}"));
                }
            }
        }
    }
    Ok(())
}

/// Rank 0 on the first adapter, the others on the CPU.
pub(crate) fn on_a_gpu(comm: &SimpleCommunicator) -> Result<(), String> {
    let [rank, _] = number(comm);
    let device = match rank {
        0 => Device::Gpu(adapter()?.ok_or("no adapter")?),
        _ => Device::Cpu,
    };
    let new = |name| Case::new(name, "shards on several devices", 2, [4, 2], [5, 90], [16, 12]).sinks(1.0);
    let drawn_cases = [
        new("diagonal_of_entries").causal(Diagonal::EndOfKeys).kv_lens(&[61, 90]),
        new("alibi").spec(|spec| spec.alibi_slopes = Some(AlibiSlopes::PerHead)).mask("b1qk").f16(),
        new("poison").mask("11qk").blank_rows().poisoned(),
    ];
    for case in drawn_cases {
        for way in WAYS {
            one(comm, &device, &case, way, &mut drawn(way.name()))?;
        }
    }
    contexts_on(comm, &device)?;
    own::contexts(comm, &device)?;
    let own_case = new("own").mask("11qk").bias(Element::F32, "b1qk").kv_lens(&[61, 90]).causal(Diagonal::Fixed(9));
    own::one(comm, &device, own_case, &mut drawn("own"))?;
    beside::on_devices(comm, &device)?;
    lost(comm, &device)
}

/// A device that is lost on one rank is the same error on all, and the others can go on without it.
fn lost(comm: &SimpleCommunicator, device: &Device) -> Result<(), String> {
    let spec = ShardedSpec::new(AttentionSpec::new([1, 1, 4, 8], [1, 1, 16, 8]));
    let attention = ShardedAttention::new(comm, device, spec.clone()).map_err(text)?;
    let (query, keys) = (vec![0.5f32; 32], vec![0.5f32; 128]);
    let inputs = ShardInputs::new(&query, &keys, &keys);
    attention.attend_blocking(&inputs).map_err(text)?;
    if let Device::Gpu(gpu) = device {
        gpu.device().destroy();
    }
    match attention.attend_blocking(&inputs) {
        Err(Error::Sharded(ShardedError::Rank { rank: 0, .. })) => {}
        other => return Err(format!("{other:?}")),
    }
    let attention = ShardedAttention::new(comm, &Device::Cpu, spec).map_err(text)?;
    attention.attend_blocking(&inputs).map(drop).map_err(text)
}

/// The first adapter that is no GL.
pub(crate) fn adapter() -> Result<Option<cross_attention::gpu::Gpu>, String> {
    use cross_attention::gpu::{self, AdapterRequest};
    let Some(found) = gpu::adapters_blocking().into_iter().find(|found| found.info.backend != wgpu::Backend::Gl) else {
        return Ok(None);
    };
    let request = AdapterRequest::Named(found.info.name.clone());
    pollster::block_on(async { gpu::choose(&request).await?.open().await }).map(Some).map_err(text)
}

/// Why there is none, if so.
pub(crate) fn no_adapter() -> Option<String> {
    let is_there =
        cross_attention::gpu::adapters_blocking().iter().any(|found| found.info.backend != wgpu::Backend::Gl);
    (!is_there).then(|| "no adapter found".to_owned())
}

/// One rank dies between two calls; the others wait for it.
pub(crate) fn killed(comm: &SimpleCommunicator) -> std::process::ExitCode {
    let spec = ShardedSpec::new(AttentionSpec::new([1, 1, 4, 8], [1, 1, 16, 8]));
    let attention = ShardedAttention::new(comm, &Device::Cpu, spec).expect("all ask for the same");
    let (query, keys) = (vec![0.5f32; 32], vec![0.5f32; 128]);
    for call in 0..1_000_000 {
        if call == 20 && comm.rank() == 2 {
            std::process::abort();
        }
        attention.attend_blocking(&ShardInputs::new(&query, &keys, &keys)).expect("the ranks that are there agree");
    }
    eprintln!("went on");
    std::process::ExitCode::SUCCESS
}
