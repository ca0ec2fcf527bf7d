//! What ranks refuse: every rank gets the same error, nobody waits for ever, and the next call works.

use cross_attention::sharded::{Queries, Results, ShardInputs, ShardedAttention, ShardedError, ShardedSpec, Way};
use cross_attention::{AttentionSpec, Device, Diagonal, Error, Layout, MAX_LEN, TensorSpec};
use mpi::collective::CommunicatorCollectives;
use mpi::topology::{Communicator, SimpleCommunicator};

use super::scenarios::number;

/// A change that one rank makes.
type Change = fn(&mut ShardedSpec);

/// The same of what it gives.
type Given = fn(&mut ShardInputs<'static>);

fn spec() -> ShardedSpec {
    let mut of = AttentionSpec::new([2, 2, 3, 4], [2, 1, 5, 4]);
    (of.kv_lens, of.sinks) = (true, true);
    of.bias = Some(TensorSpec::f32(Layout::bhld([1, 1, 3, 5])));
    ShardedSpec::new(of)
}

struct Data {
    query: Vec<f32>,
    key: Vec<f32>,
    bias: Vec<f32>,
    kv_lens: Vec<u32>,
    sinks: Vec<f32>,
}

impl Data {
    fn new() -> Self {
        let numbers = |len: usize| (0..len).map(|n| (n % 7) as f32 / 7.0).collect::<Vec<f32>>();
        Self { query: numbers(48), key: numbers(40), bias: numbers(15), kv_lens: vec![3, 5], sinks: numbers(2) }
    }

    fn inputs(&self) -> ShardInputs<'_> {
        let mut inputs = ShardInputs::new(&self.query, &self.key, &self.key);
        (inputs.terms.bias, inputs.terms.kv_lens) = (Some((&self.bias).into()), Some((&self.kv_lens).into()));
        inputs.terms.sinks = Some((&self.sinks).into());
        inputs
    }
}

/// The last rank asks for something else, or gives something else.
pub(crate) fn disagree(comm: &SimpleCommunicator) -> Result<(), String> {
    let [rank, ranks] = number(comm);
    let (is_last, last) = (rank + 1 == ranks, comm.size() - 1);
    let changes: [(&str, Change); 13] = [
        ("batch, heads, length and width of the query", |spec| {
            let changed = AttentionSpec::new([2, 2, 4, 4], [2, 1, 5, 4]);
            (spec.attention.query, spec.attention.output) = (changed.query, changed.output);
            spec.attention.bias = None;
        }),
        ("element of the query", |spec| spec.attention.query.element = cross_attention::Element::F16),
        ("scale", |spec| spec.attention.scale = Some(2.0)),
        ("softcap", |spec| spec.attention.softcap = Some(2.0)),
        ("causal", |spec| spec.attention.causal = Some(Diagonal::TopLeft)),
        ("window_left", |spec| spec.attention.window_left = Some(7)),
        ("kv_lens", |spec| spec.attention.kv_lens = false),
        ("sinks", |spec| spec.attention.sinks = false),
        ("lse", |spec| spec.attention.lse = true),
        ("bias", |spec| spec.attention.bias = None),
        ("mask", |spec| spec.attention.mask = Some(Layout::bhld([1, 1, 1, 5]))),
        ("queries", |spec| spec.queries = Queries::OnRoot(0)),
        ("way", |spec| spec.way = Way::Ring),
    ];
    for (name, change) in changes {
        let mut asked = spec();
        if is_last && ranks > 1 {
            change(&mut asked);
        }
        let found = ShardedAttention::new(comm, &Device::Cpu, asked).err();
        match &found {
            None if ranks == 1 => {}
            Some(Error::Sharded(ShardedError::Disagree { what, rank, .. })) if what == name && *rank == last => {}
            _ => return Err(format!("{name}: {found:?}")),
        }
        same(comm, &found)?;
    }
    // one rank's own spec is not sound
    let mut asked = spec();
    if is_last {
        asked.attention.value.layout.shape[3] = 0;
    }
    let found = ShardedAttention::new(comm, &Device::Cpu, asked).err();
    of_rank(&found, last, "v_head_dim")?;
    same(comm, &found)?;

    let attention = ShardedAttention::new(comm, &Device::Cpu, spec()).map_err(|error| error.to_string())?;
    let given: [(&str, Given); 7] = [
        ("query", |inputs| inputs.query = None),
        ("data of query", |inputs| inputs.query = Some((&[9.0f32; 48]).into())),
        ("data of kv_lens", |inputs| inputs.terms.kv_lens = Some((&[1u32, 1]).into())),
        ("kv_lens", |inputs| inputs.terms.kv_lens = Some((&[1u32, u32::MAX]).into())),
        ("sinks", |inputs| inputs.terms.sinks = None),
        ("alibi_slopes", |inputs| inputs.terms.alibi_slopes = Some((&[1.0f32, 1.0]).into())),
        // found when it is computed
        ("bias", |inputs| inputs.terms.bias = Some((&[1.0f32; 14]).into())),
    ];
    let data: &'static Data = Box::leak(Box::new(Data::new()));
    let good = attention.attend_blocking(&data.inputs()).map_err(|error| error.to_string())?;
    for (name, change) in given {
        let mut inputs = data.inputs();
        if is_last {
            change(&mut inputs);
        }
        let found = attention.attend_blocking(&inputs).err();
        match (&found, name.starts_with("data")) {
            (None, true) if ranks == 1 => {}
            (Some(Error::Sharded(ShardedError::Disagree { what, rank, .. })), true)
                if what == name && *rank == last => {}
            (_, false) => of_rank(&found, last, name)?,
            _ => return Err(format!("{name}: {found:?}")),
        }
        same(comm, &found)?;
        let again = attention.attend_blocking(&data.inputs()).map_err(|error| error.to_string())?;
        if again != good {
            return Err(format!("after {name} was refused another result: {again:?}, was {good:?}"));
        }
    }
    own_rows(comm, data)
}

/// Rows of each rank's own: their lengths and diagonals are theirs, those of keys are the same everywhere.
fn own_rows(comm: &SimpleCommunicator, data: &'static Data) -> Result<(), String> {
    let [rank, ranks] = number(comm);
    let is_last = rank + 1 == ranks;
    let mut asked = ShardedSpec { queries: Queries::Own, ..spec() };
    (asked.attention.bias, asked.attention.q_lens) = (None, true);
    let mut causal = asked.clone();
    causal.attention.causal = (!is_last).then_some(Diagonal::TopLeft);
    let found = ShardedAttention::new(comm, &Device::Cpu, causal.clone()).err();
    disagrees(&found, "causal", ranks)?;
    same(comm, &found)?;
    causal.attention.causal = Some(if is_last { Diagonal::Fixed(4) } else { Diagonal::TopLeft });
    let attention = ShardedAttention::new(comm, &Device::Cpu, causal).map_err(|error| error.to_string())?;
    let mut inputs = data.inputs();
    let q_lens = [3, if is_last { 1u32 } else { 2 }];
    (inputs.terms.bias, inputs.terms.q_lens) = (None, Some((&q_lens).into()));
    attention.attend_blocking(&inputs).map_err(|error| error.to_string())?;
    let kv_lens = [3, if is_last { 1u32 } else { 2 }];
    inputs.terms.kv_lens = Some((&kv_lens).into());
    let found = attention.attend_blocking(&inputs).err();
    disagrees(&found, "data of kv_lens", ranks)?;
    same(comm, &found)
}

/// Whether the last rank is told to differ.
fn disagrees(found: &Option<Error>, name: &str, ranks: usize) -> Result<(), String> {
    match found {
        None if ranks == 1 => Ok(()),
        Some(Error::Sharded(ShardedError::Disagree { what, rank, .. }))
            if what == name && usize::try_from(*rank).is_ok_and(|rank| rank + 1 == ranks) =>
        {
            Ok(())
        }
        _ => Err(format!("{name}: {found:?}")),
    }
}

/// An error of one rank's own, which all get.
fn of_rank(found: &Option<Error>, last: i32, word: &str) -> Result<(), String> {
    match found {
        Some(Error::Sharded(ShardedError::Rank { rank, message })) if *rank == last && message.contains(word) => Ok(()),
        _ => Err(format!("{word}: {found:?}")),
    }
}

/// What all ranks got is the same.
fn same(comm: &SimpleCommunicator, found: &Option<Error>) -> Result<(), String> {
    let text = format!("{found:?}");
    let sum = text.bytes().fold(7u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(byte)));
    let mut sums = vec![0u64; number(comm)[1]];
    comm.all_gather_into(&sum, &mut sums[..]);
    if sums.iter().all(|other| *other == sum) { Ok(()) } else { Err(format!("others got another error than {text}")) }
}

/// What no rank gets.
pub(crate) fn refused(comm: &SimpleCommunicator) -> Result<(), String> {
    let changes: [(&str, Change); 7] = [
        ("there is no rank 99", |spec| spec.result = Results::OnRoot(99)),
        ("there is no rank -1", |spec| spec.queries = Queries::OnRoot(-1)),
        ("way tree does not go with", |spec| (spec.queries, spec.way) = (Queries::Own, Way::Tree)),
        ("bias has 4 rows; with queries of each rank's own", |spec| {
            spec.queries = Queries::Own;
            spec.attention.bias = Some(TensorSpec::f32(Layout::bhld([1, 1, 4, 5])));
        }),
        ("scores is not there over shards", |spec| {
            spec.attention.scores = Some(cross_attention::ScoreStage::Probs);
        }),
        ("alibi_slopes is not there over shards", |spec| {
            spec.attention.alibi_slopes = Some(cross_attention::AlibiSlopes::PerHead);
            spec.attention.offset = Some(Diagonal::EndOfKeys);
        }),
        ("keys in all", |spec| {
            // nobody has that many, and nobody needs to
            spec.attention = AttentionSpec::new([1, 1, 1, 1], [1, 1, MAX_LEN, 1]);
            spec.attention.causal = Some(Diagonal::TopLeft);
        }),
    ];
    for (message, change) in changes {
        let mut asked = spec();
        change(&mut asked);
        let found = ShardedAttention::new(comm, &Device::Cpu, asked).err();
        same(comm, &found)?;
        let enough = message != "keys in all" || comm.size() > 1;
        if enough != found.as_ref().is_some_and(|error| error.to_string().contains(message)) {
            return Err(format!("{message}: {found:?}"));
        }
    }
    Ok(())
}
