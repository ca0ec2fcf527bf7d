//! Queries of each rank's own, with every term, against the whole that each rank's rows see.

use cross_attention::context::{ContextSpec, PreparedContext};
use cross_attention::sharded::{Queries, ShardInputs, ShardKeys, ShardedAttention, ShardedSpec};
use cross_attention::weights::WeightsSpec;
use cross_attention::{
    AttentionData, AttentionSpec, Device, Diagonal, Layout, OwnedTerms, TensorData, TensorSpec, Terms,
};
use fastrand::Rng;
use mpi::topology::SimpleCommunicator;

use super::beside::{sums, within_tolerance};
use super::common::case::Case;
use super::common::recipe::places;
use super::common::{random, weights};
use super::scenarios::{by_entry, judged, number};
use super::shards::{Shard, cuts, drawn, sharded};

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Short cases with all terms.
pub(crate) fn random(comm: &SimpleCommunicator) -> Result<(), String> {
    for case in random::drawn(&random::case(), 40) {
        let mut random = drawn(&case.name);
        let case = sharded(case, &mut random);
        one(comm, &Device::Cpu, case, &mut random)?;
    }
    Ok(())
}

/// One case. Every rank draws the rows of all, so that bias and mask can lie with the keys.
pub(crate) fn one(comm: &SimpleCommunicator, device: &Device, case: Case, random: &mut Rng) -> Result<(), String> {
    let [rank, ranks] = number(comm);
    // what one rank's rows may not see another's do
    let mut own_case = case.clean();
    let diagonals = diagonals(&case.spec, ranks, random);
    let along = |spec: &mut AttentionSpec, rank: usize| {
        spec.causal = spec.causal.map(|_| diagonals[rank]);
        spec.offset = spec.offset.map(|_| diagonals[rank]);
    };
    along(&mut own_case.spec, rank);
    let whole = own_case.data();
    let of_rank = |rank: usize| {
        let mut data = own_case.recipe.data(&format!("{} {rank}", case.name), &own_case.spec, &own_case.problem());
        let mut random = drawn(&format!("{} rows of {rank}", case.name));
        for len in data.terms.q_lens.iter_mut().flatten() {
            *len = random.u32(0..=*len);
        }
        data
    };
    let mut all: Vec<AttentionData> = (0..ranks).map(of_rank).collect();
    // what belongs to no row is the same everywhere
    let one_row = [random.bool(), random.bool()];
    let (bias, mask) = (&all[0].terms.bias.clone(), &all[0].terms.mask.clone());
    for data in &mut all {
        (data.key, data.value) = (whole.key.clone(), whole.value.clone());
        data.terms = OwnedTerms {
            q_lens: data.terms.q_lens.take(),
            row_start: data.terms.row_start.take(),
            row_end: data.terms.row_end.take(),
            bias: data.terms.bias.take(),
            mask: data.terms.mask.take(),
            ..whole.terms.clone()
        };
        // one row of a layout is all ranks' rows
        if one_row[0] && own_case.spec.bias.is_some_and(|bias| bias.layout.shape[2] == 1) {
            data.terms.bias.clone_from(bias);
        }
        if one_row[1] && own_case.spec.mask.is_some_and(|mask| mask.shape[2] == 1) {
            data.terms.mask.clone_from(mask);
        }
    }
    let cuts = cuts(&own_case, ranks, random);
    let mut shard = Shard::new(&own_case, &all[rank], [cuts[rank], cuts[rank + 1]]);
    with_rows_of_all(&mut shard, &own_case, &all, one_row, [cuts[rank], cuts[rank + 1]]);
    let named = |error: String| format!("{own_case}\nkeys cut at {cuts:?}, queries of its own, {diagonals:?}\n{error}");
    let spec = ShardedSpec { queries: Queries::Own, ..ShardedSpec::new(shard.spec.clone()) };
    let attention = ShardedAttention::new(comm, device, spec);
    let refused = (0..ranks).any(|rank| {
        let mut spec = own_case.spec.clone();
        along(&mut spec, rank);
        by_entry(&spec) && spec.alibi_slopes.is_some()
    });
    if refused {
        let refused = attention.err().map(text).unwrap_or_default();
        return if refused.contains("alibi_slopes") { Ok(()) } else { Err(named(format!("not refused: {refused}"))) };
    }
    let attention = attention.map_err(|error| named(text(error)))?;
    let output = attention.attend_blocking(&shard.inputs(Some(&all[rank].query)));
    let output = output.map_err(|error| named(text(error)))?;
    judged(&own_case, &all[rank], &output.ok_or("every rank has a result")?).map_err(named)?;
    // weights are another way round
    if random.bool() || own_case.problem().score_shape().iter().product::<usize>() > 20_000 {
        return Ok(());
    }
    let chosen = weights::selection(&own_case.problem(), random.u64(1..1000));
    let ask = |chosen: &WeightsSpec| {
        let got = attention.attend_with_weights_blocking(&shard.inputs(Some(&all[rank].query)), chosen);
        got.map_err(|error| named(text(error))).map(|got| got.expect("every rank has them").weights)
    };
    let all_weights = ask(&WeightsSpec::default())?;
    within_tolerance(&own_case, &all[rank], &all_weights).map_err(named)?;
    sums(&own_case, &all_weights, &chosen, &ask(&chosen)?, ranks).map_err(named)
}

/// The diagonal of each rank's rows: that of the case, or any other.
fn diagonals(spec: &AttentionSpec, ranks: usize, random: &mut Rng) -> Vec<Diagonal> {
    let asked = spec.causal.or(spec.offset).unwrap_or_default();
    let each = random.bool();
    let mut draw = || match random.u8(0..4) {
        _ if !each => asked,
        0 => Diagonal::TopLeft,
        1 => Diagonal::BottomRight,
        _ => Diagonal::Fixed(random.i32(-20..60)),
    };
    (0..ranks).map(|_| draw()).collect()
}

/// Bias and mask of the shard's keys, for the rows of all ranks, or one row for all.
fn with_rows_of_all(shard: &mut Shard, case: &Case, all: &[AttentionData], one_row: [bool; 2], [from, to]: [usize; 2]) {
    let spec = case.problem().spec().clone();
    let [_, _, q_len, _] = spec.query.layout.shape;
    // without gaps, expanded along every other axis
    let stacked = |of: Layout, one_row: bool| {
        let [batch, heads, _, keys] = of.shape;
        let layout = Layout::bhld([batch, heads, if one_row { 1 } else { q_len * all.len() }, keys]);
        let sources: Vec<(usize, usize)> = places(layout.shape)
            .map(|[b, h, i, j]| {
                let (rank, row) = if one_row { (0, 0) } else { (i / q_len, i % q_len) };
                (rank, of.index([b, h, row, j]))
            })
            .collect();
        let mut of_shard = layout;
        (of_shard.offset, of_shard.shape[3]) = (from, to - from);
        (of_shard, sources)
    };
    // a row that is all rows' is one of the raw layout; without a row there is none to be all rows'
    let is_one = |layout: Layout, one_row: bool| one_row && layout.shape[2] == 1 && q_len > 0;
    if let (Some(raw), Some(of)) = (case.spec.bias, spec.bias) {
        let (layout, sources) = stacked(of.layout, is_one(raw.layout, one_row[0]));
        let numbers: Vec<Vec<f32>> =
            all.iter().map(|data| data.terms.bias.as_ref().map(TensorData::to_f32).unwrap_or_default()).collect();
        let numbers = sources.into_iter().map(|(rank, at)| numbers[rank][at]).collect();
        shard.data.terms.bias = Some(TensorData::from_f32(of.element, numbers));
        shard.spec.bias = Some(TensorSpec { element: of.element, layout });
    }
    if let (Some(raw), Some(of)) = (case.spec.mask, spec.mask) {
        let (layout, sources) = stacked(of, is_one(raw, one_row[1]));
        let of_rank = |rank: usize, at: usize| all[rank].terms.mask.as_ref().is_some_and(|mask| mask[at]);
        shard.data.terms.mask = Some(sources.into_iter().map(|(rank, at)| of_rank(rank, at)).collect());
        shard.spec.mask = Some(layout);
    }
}

/// Contexts on each rank, rows and a mask of each rank's own that stand behind those of the ranks before.
pub(crate) fn contexts(comm: &SimpleCommunicator, device: &Device) -> Result<(), String> {
    const ROWS: usize = 3;
    let [rank, ranks] = number(comm);
    let lens: Vec<usize> = (0..ranks).map(|rank| [7, 0, 12, 1][rank]).collect();
    let (total, first): (usize, usize) = (lens.iter().sum(), lens[..rank].iter().sum());
    let mut random = drawn("contexts of each rank's own queries");
    let mut numbers = |len: usize| (0..len).map(|_| 4.0 * random.f32() - 2.0).collect::<Vec<f32>>();
    let (queries, key, value) = (numbers(ranks * 2 * 2 * ROWS * 8), numbers(2 * total * 8), numbers(2 * total * 8));
    let all_rows: Vec<bool> = numbers(ranks * ROWS * total).iter().map(|x| *x > -1.0).collect();
    let own = |of: &[f32]| -> Vec<f32> {
        of.chunks(total * 8).flat_map(|head| head[first * 8..][..lens[rank] * 8].to_vec()).collect()
    };
    let of = ContextSpec::new([1, 2, lens[rank], 8]);
    let context = PreparedContext::new_blocking(device, of, &own(&key), &own(&value), None).map_err(text)?;
    let mut spec = context.attention(TensorSpec::f32(Layout::bhld([2, 2, ROWS, 8])));
    let offset = i32::try_from(rank * ROWS + 2).map_err(text)?;
    spec.causal = Some(Diagonal::Fixed(offset));
    let mut layout = Layout::bhld([1, 1, ranks * ROWS, total]);
    (layout.offset, layout.shape[3]) = (first, lens[rank]);
    spec.mask = Some(layout);
    let sharded = ShardedSpec { queries: Queries::Own, ..ShardedSpec::new(spec) };
    let attention = ShardedAttention::new(comm, device, sharded).map_err(text)?;
    let query = &queries[rank * 2 * 2 * ROWS * 8..][..2 * 2 * ROWS * 8];
    let inputs = ShardInputs {
        query: Some(query.into()),
        keys: ShardKeys::Context(&context, None),
        terms: Terms { mask: Some((&all_rows).into()), ..Terms::default() },
    };
    let output = attention.attend_blocking(&inputs).map_err(text)?.ok_or("every rank has a result")?;

    let mut whole = AttentionSpec::new([2, 2, ROWS, 8], [1, 2, total, 8]);
    (whole.causal, whole.mask) = (Some(Diagonal::Fixed(offset)), Some(Layout::bhld([1, 1, ROWS, total])));
    let case = Case { spec: whole, ..Case::new("own_contexts", "rows go round contexts", 1, [1, 1], [1, 1], [1, 1]) };
    let data = AttentionData {
        query: TensorData::F32(query.to_vec()),
        key: TensorData::F32(key.clone()),
        value: TensorData::F32(value.clone()),
        terms: OwnedTerms {
            mask: Some(all_rows[rank * ROWS * total..][..ROWS * total].to_vec()),
            ..OwnedTerms::default()
        },
    };
    judged(&case, &data, &output)
}
