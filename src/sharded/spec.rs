//! What is asked of an attention over shards, and what a rank gives to a call.

use mpi::topology::{Communicator, Rank, SimpleCommunicator};

use super::{Network, ShardedError};
use crate::context::PreparedContext;
use crate::engine::Tensor;
use crate::problem::{AttentionProblem, AttentionSpec, Diagonal};
use crate::terms::Terms;

/// Where the queries are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Queries {
    /// Every rank is given the same.
    #[default]
    OnAll,
    /// One rank is given them, and sends them to the others.
    OnRoot(Rank),
    /// Every rank has rows of its own, in equal numbers, and gets their results. What belongs to rows (`q_lens`, `row_start`,
    /// `row_end`) is each rank's own and goes round with them, and so is the diagonal: along [`Diagonal::Fixed`] the rows of a rank may
    /// stand anywhere. `kv_lens`, slopes, sinks and window widths are the same on every rank. Bias and mask lie with the keys: in
    /// the spec they have 1 row, which is all rows', or the rows of all ranks, in rank order.
    ///
    /// [`Diagonal::Fixed`]: crate::Diagonal::Fixed
    Own,
}

/// Who gets the result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Results {
    /// Every rank.
    #[default]
    OnAll,
    /// One rank.
    OnRoot(Rank),
}

/// How states are brought together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Way {
    /// The cheapest, by [`costs`](super::costs).
    #[default]
    Auto,
    /// All states go to where the result is, and are merged there in rank order.
    Gather,
    /// A reduction of MPI's.
    Tree,
    /// Blocks of rows go round, and each rank merges one.
    Ring,
}

impl Way {
    /// `auto`, `gather`, `tree`, `ring`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Gather => "gather",
            Self::Tree => "tree",
            Self::Ring => "ring",
        }
    }
}

/// What is asked of an attention over shards. Plain data; all but the number of keys is the same on every rank.
#[derive(Clone, Debug, PartialEq)]
pub struct ShardedSpec {
    /// The attention as this rank sees it: `key`, `value`, `bias` and `mask` have its own keys, 0 or more. Terms that count
    /// positions count over all ranks. `scores` must be `None`. How keys and values are stored may differ from rank to rank, as may
    /// the output.
    pub attention: AttentionSpec,
    /// Where the queries are.
    pub queries: Queries,
    /// Who gets the result; with [`Queries::Own`] each rank its own.
    pub result: Results,
    /// How states are brought together.
    pub way: Way,
    /// What [`Way::Auto`] goes by.
    pub network: Network,
}

impl ShardedSpec {
    /// Queries on all ranks, the result on all, by the cheapest way.
    #[must_use]
    pub fn new(attention: AttentionSpec) -> Self {
        Self {
            attention,
            queries: Queries::default(),
            result: Results::default(),
            way: Way::default(),
            network: Network::default(),
        }
    }
}

/// The keys and values of a rank.
#[derive(Clone, Debug)]
pub enum ShardKeys<'a> {
    /// As the spec lays them out.
    Tensors {
        /// `[batch, kv_heads, kv_len, head_dim]`.
        key: Tensor<'a>,
        /// `[batch, kv_heads, kv_len, v_head_dim]`.
        value: Tensor<'a>,
    },
    /// A context on this rank's device, and which of its contexts each entry of the batch has
    /// ([`context_index`](crate::context::ContextInputs::context_index)). The spec is the context's [`attention`](PreparedContext::attention).
    Context(&'a PreparedContext, Option<&'a [u32]>),
}

/// What one rank gives to a call.
#[derive(Clone, Debug)]
pub struct ShardInputs<'a> {
    /// `[batch, q_heads, q_len, head_dim]`; `None` where another rank has it.
    pub query: Option<Tensor<'a>>,
    /// Its keys and values.
    pub keys: ShardKeys<'a>,
    /// The rest. `bias`, `mask` and scales have the rank's own keys; `q_lens`, `kv_lens`, `row_start` and `row_end` are of all keys,
    /// in host memory, and the same on every rank, but for what belongs to the rows of [`Queries::Own`].
    pub terms: Terms<Tensor<'a>>,
}

impl<'a> ShardInputs<'a> {
    /// Query, key and value, and nothing else.
    pub fn new(query: impl Into<Tensor<'a>>, key: impl Into<Tensor<'a>>, value: impl Into<Tensor<'a>>) -> Self {
        let keys = ShardKeys::Tensors { key: key.into(), value: value.into() };
        Self { query: Some(query.into()), keys, terms: Terms::default() }
    }
}

/// The rank that alone gets a result.
pub(super) const fn root_of(result: Results) -> Option<Rank> {
    match result {
        Results::OnAll => None,
        Results::OnRoot(rank) => Some(rank),
    }
}

/// Whether it is there.
pub(super) fn check_root(result: Results, comm: &SimpleCommunicator) -> Result<(), ShardedError> {
    root_of(result).map_or(Ok(()), |rank| check_rank(rank, comm))
}

fn check_rank(rank: Rank, comm: &SimpleCommunicator) -> Result<(), ShardedError> {
    let last = comm.size() - 1;
    if (0..=last).contains(&rank) { Ok(()) } else { Err(ShardedError::NoRank { rank, last }) }
}

/// What no way over shards computes.
pub(super) fn refused(spec: &ShardedSpec, comm: &SimpleCommunicator) -> Result<(), ShardedError> {
    if let Queries::OnRoot(rank) = spec.queries {
        check_rank(rank, comm)?;
    }
    check_root(spec.result, comm)?;
    if spec.queries != Queries::Own {
        return Ok(());
    }
    if !matches!(spec.way, Way::Auto | Way::Ring) {
        let (way, what) = (spec.way.name(), "queries of each rank's own");
        return Err(ShardedError::Way { way, what, reason: "they go round in a ring; ask for ring or auto" });
    }
    if let Results::OnRoot(_) = spec.result {
        let (way, what) = ("ring", "a result on one rank");
        return Err(ShardedError::Way { way, what, reason: "each rank gets the results of its own queries" });
    }
    Ok(())
}

/// What must be the same on all ranks, by name; what begins with a dot need not.
pub(super) fn described(spec: &ShardedSpec, problem: &AttentionProblem) -> Vec<(String, String)> {
    let of = problem.spec();
    let text = |diagonal: &Option<Diagonal>| diagonal.map_or("none".to_owned(), |diagonal| diagonal.to_string());
    let (mut causal, mut offset) = (text(&of.causal), text(&of.offset));
    let own = [(".causal", causal.clone()), (".offset", offset.clone())];
    if spec.queries == Queries::Own {
        // along which diagonal is a matter of a rank's rows
        (causal, offset) = (of.causal.is_some().to_string(), of.offset.is_some().to_string());
    }
    [
        ("batch, heads, length and width of the query", format!("{:?}", of.query.layout.shape)),
        ("element of the query", format!("{}", of.query.element)),
        ("key heads", format!("{}", problem.kv_heads())),
        ("v_head_dim", format!("{}", problem.v_head_dim())),
        ("scale", format!("{:?}", problem.scale())),
        ("softcap", format!("{:?}", of.softcap)),
        ("causal", causal),
        ("window_left", format!("{:?}", of.window_left)),
        ("window_right", format!("{:?}", of.window_right)),
        ("offset", offset),
        ("bias", format!("{}", of.bias.is_some())),
        ("mask", format!("{}", of.mask.is_some())),
        ("q_lens", format!("{}", of.q_lens)),
        ("kv_lens", format!("{}", of.kv_lens)),
        ("row_ranges", format!("{}", of.row_ranges)),
        ("alibi_slopes", format!("{:?}", of.alibi_slopes)),
        ("sinks", format!("{}", of.sinks)),
        ("lse", format!("{}", of.lse)),
        ("row_state", format!("{}", of.row_state)),
        ("queries", format!("{:?}", spec.queries)),
        ("result", format!("{:?}", spec.result)),
        ("way", spec.way.name().to_owned()),
        ("network", format!("{:?}", spec.network)),
        (".kv_len", format!("{}", problem.kv_len())),
    ]
    .into_iter()
    .chain(own)
    .map(|(name, value)| (name.to_owned(), value))
    .collect()
}
