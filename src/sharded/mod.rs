//! Exact attention over keys that lie on several machines, by MPI (feature `mpi`).
//!
//! Each rank holds its keys and values, in host memory, on its device, or as a [context](crate::context), and attends to them; the
//! results, with maximum and sum of their rows, are merged into the attention over all keys ([`merge_states`](crate::cpu::merge_states)
//! says how). Keys are in rank order: those of rank 0 stand first, and all terms that count positions (causal masks, windows,
//! ALiBi, lengths, ranges) count over all of them. The crate brings no network of its own: MPI starts the processes, and
//! knows the cluster's links.
//!
//! | way | what is sent | result |
//! |---|---|---|
//! | [`Way::Gather`] | the states of all rows, to where the result is | the same bits for a number of ranks |
//! | [`Way::Tree`] | the same up a tree, merged on the way by an operation of MPI's | bits depend on MPI's tree |
//! | [`Way::Ring`] | each rank merges a block of rows | the same bits for a number of ranks |
//!
//! With [`Queries::Own`] every rank has rows of its own, which go round all ranks together with what was gathered for them; all
//! terms are there, along each rank's own diagonal. Where every machine has room for all keys and they are few, share the queries
//! out instead: each rank attends to its rows by itself and nothing is sent; [`costs`] and [`ShardedAttention::plan_text`] tell
//! what either costs.
//!
//! Every call is collective: all ranks call it, in the same order, and wait for it to its end. Before they wait for one another
//! they compare what they ask for, and where one refuses or fails (a device that is lost, memory that is not there), all get the
//! same [`ShardedError`]. A rank that is killed ends the others, which is MPI's doing. One that panics within a call, or drops
//! the call's future half-way, ends them too; one that does so between two calls, or returns from there by an error, would have them
//! wait for it: so let [`run_together`] run what the ranks do together, or have an [`EndTogether`] at the top of `main`. What was
//! made of a communicator is dropped before MPI ends.
//!
//! ```no_run
//! use cross_attention::sharded::{EndTogether, ShardInputs, ShardedAttention, ShardedSpec};
//! use cross_attention::{AttentionSpec, Device};
//!
//! let universe = mpi::initialize().ok_or("MPI was begun before")?;
//! let world = universe.world();
//! let together = EndTogether::new(&world);
//! // 8 heads, 32 query rows on every rank, 10 000 keys on this one
//! let spec = ShardedSpec::new(AttentionSpec::new([1, 8, 32, 64], [1, 8, 10_000, 64]));
//! let attention = ShardedAttention::new_blocking(&world, &Device::auto()?.device, spec)?;
//! let (query, key, value) = (vec![0.1f32; 8 * 32 * 64], vec![0.2f32; 8 * 10_000 * 64], vec![0.3f32; 8 * 10_000 * 64]);
//! let result = attention.attend_blocking(&ShardInputs::new(&query, &key, &value))?;
//! together.done();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod beside;
mod cost;
mod error;
mod exchange;
mod given;
mod local;
mod operator;
mod own;
mod spec;
mod state;
mod together;

use std::marker::PhantomData;

use mpi::topology::{Communicator, SimpleCommunicator};

pub use cost::{Cost, Load, Network, costs};
pub use error::ShardedError;
pub use exchange::{Traffic, traffic};
pub use spec::{Queries, Results, ShardInputs, ShardKeys, ShardedSpec, Way};
pub use together::{EndTogether, run_together};

use crate::context::{ContextInputs, ContextTensors};
use crate::cpu::{MergedStates, StatePart};
use crate::device::{Device, KernelChoice, PreparedAttention};
use crate::engine::{Inputs, Outputs, Recording, Tensor};
use crate::error::Error;
use crate::inputs::{AttentionOutput, RowState};
use crate::kept::Kept;
use crate::problem::{AttentionProblem, AttentionSpec};
use crate::tensor::{Layout, TensorData, TensorSpec};
use crate::terms::Terms;
use local::{Positions, Shard};

/// An attention over the keys of all ranks, ready to be called on each.
#[derive(Debug)]
pub struct ShardedAttention {
    comm: Comm,
    device: Device,
    spec: ShardedSpec,
    shard: Shard,
    /// With queries of each rank's own, the shard as the rows of each rank see it, by rank.
    all_rows: Vec<Shard>,
    way: Way,
    /// Keys of each rank.
    lens: Vec<u64>,
    load: Load,
    kept: Kept<PreparedAttention>,
}

/// A communicator of its own, so that its messages meet no others. It stays on its thread, whatever an MPI's handles are made
/// of: calls of two threads would meet.
struct Comm(SimpleCommunicator, PhantomData<*const ()>);

impl std::fmt::Debug for Comm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of {}", self.0.rank(), self.0.size())
    }
}

impl ShardedAttention {
    /// Compares what all ranks ask for, and chooses a way. Collective.
    ///
    /// # Errors
    /// [`Error::Sharded`], the same on every rank; but for [`ShardedError::Thread`].
    pub fn new(comm: &impl Communicator, device: &Device, spec: ShardedSpec) -> Result<Self, Error> {
        together::check_thread()?;
        let together = EndTogether::new(comm);
        let made = Self::compared(comm.duplicate(), device, spec);
        together.done();
        made
    }

    fn compared(comm: SimpleCommunicator, device: &Device, spec: ShardedSpec) -> Result<Self, Error> {
        let [rank, ranks] = [comm.rank(), comm.size()].map(|n| usize::try_from(n).unwrap_or(0));
        let of = spec::refused(&spec, &comm).and_then(|()| own::of_rows(&spec, ranks, rank));
        let problem = of.map_err(Error::from).and_then(|of| Ok(AttentionProblem::new(of)?));
        let own = problem.as_ref().map(|problem| spec::described(&spec, problem)).map_err(ToString::to_string);
        let all = exchange::agree(&comm, own.as_deref().map_err(Clone::clone))?;
        // unreachable where all agreed; typed all the same
        let problem = problem?;
        let lens: Vec<u64> = all.iter().map(|lines| value_of(lines, ".kv_len").unwrap_or(0)).collect();
        let start: u64 = lens[..rank].iter().sum();
        let total = lens.iter().fold(0u64, |sum, len| sum.saturating_add(*len));
        let shard_of = |asked: &AttentionSpec| {
            let mut shard = Shard::new(asked, start..start + lens[rank], total, rank == 0)?;
            if spec.queries != Queries::OnAll {
                // it is sent without gaps
                shard.spec.query.layout = Layout::bhld(asked.query.layout.shape);
            }
            Ok(shard)
        };
        let shards = match spec.queries {
            Queries::Own => {
                let diagonals = |lines: &Vec<_>| [".causal", ".offset"].map(|name| value_of(lines, name));
                own::all_rows(&spec, &all.iter().map(diagonals).collect::<Vec<_>>(), shard_of)
            }
            Queries::OnAll | Queries::OnRoot(_) => {
                shard_of(&spec.attention).map(|shard| vec![shard]).map_err(Into::into)
            }
        };
        exchange::agree(&comm, shards.as_ref().map(|_| &[][..]).map_err(ToString::to_string))?;
        let mut all_rows = shards?;
        let shard = if spec.queries == Queries::Own { all_rows[rank].clone() } else { all_rows.remove(0) };
        let load = Load {
            ranks: lens.len() as u64,
            rows: problem.rows() as u64,
            head_dim: problem.head_dim() as u64,
            v_head_dim: problem.v_head_dim() as u64,
            most_keys: lens.iter().copied().max().unwrap_or(0),
            on_all: spec.result == Results::OnAll,
            own_rows: spec.queries == Queries::Own,
        };
        let way = match spec.way {
            Way::Auto => costs(&load, &spec.network)[0].way,
            way => way,
        };
        let (comm, device) = (Comm(comm, PhantomData), device.clone());
        Ok(Self { comm, device, spec, shard, all_rows, way, lens, load, kept: Kept::default() })
    }

    /// The way that states are brought together.
    #[must_use]
    pub const fn way(&self) -> Way {
        self.way
    }

    /// Keys of each rank, by rank.
    #[must_use]
    pub fn lens(&self) -> &[u64] {
        &self.lens
    }

    /// What the ways cost by the spec's network, and which was chosen; a line each.
    #[must_use]
    pub fn plan_text(&self) -> String {
        let Load { ranks, rows, most_keys, .. } = self.load;
        let chosen = if self.spec.way == Way::Auto { "cheapest on paper" } else { "asked for" };
        let mut text = format!(
            "ranks      {ranks}, keys {:?}, at most {most_keys}\nrows       {rows}{}\nway        {}, {chosen}\n",
            self.lens,
            if self.load.own_rows { " on each rank" } else { "" },
            self.way.name(),
        );
        for cost in costs(&self.load, &self.spec.network) {
            text += &format!(
                "{:<10} {:.3e} s, of which attention {:.3e} s; {:.3e} bytes in {} messages; bound by {}\n",
                cost.way.name(),
                cost.seconds,
                cost.compute_s,
                cost.bytes,
                cost.messages,
                cost.limit(&self.load, &self.spec.network),
            );
        }
        // each rank would need all keys, and sends nothing but results
        let all_keys = self.lens.iter().sum::<u64>() as f64;
        let key_bytes = all_keys * (self.load.head_dim + self.load.v_head_dim) as f64 * 4.0;
        text + &format!("no shards  {key_bytes:.3e} bytes of keys and values a head on every rank, and nothing sent\n")
    }

    /// Attends to the keys of all ranks. Collective. `None` where the result is another rank's.
    ///
    /// # Errors
    /// [`Error::Sharded`], the same on every rank; but for [`ShardedError::Thread`].
    pub async fn attend(&self, inputs: &ShardInputs<'_>) -> Result<Option<AttentionOutput>, Error> {
        let call = async {
            let merged = self.merged(inputs).await?;
            Ok(merged.map(|(output, state)| self.finished(output, state)))
        };
        self.together(call).await
    }

    /// [`attend`](Self::attend), blocking.
    ///
    /// # Errors
    /// As [`attend`](Self::attend).
    pub fn attend_blocking(&self, inputs: &ShardInputs<'_>) -> Result<Option<AttentionOutput>, Error> {
        self.device.block_on(self.attend(inputs))
    }

    /// [`new`](Self::new): it waits for other ranks, and for nothing else.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn new_blocking(comm: &impl Communicator, device: &Device, spec: ShardedSpec) -> Result<Self, Error> {
        Self::new(comm, device, spec)
    }

    /// A call that the other ranks wait for: if it panics, or is dropped before it is done, all end.
    async fn together<T>(&self, call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        together::check_thread()?;
        let together = EndTogether::new(&self.comm.0);
        let result = call.await;
        together.done();
        result
    }

    fn v_head_dim(&self) -> usize {
        self.spec.attention.value.layout.shape[3]
    }

    /// Output and state of all rows over all keys, where the result is.
    async fn merged(&self, inputs: &ShardInputs<'_>) -> Result<Option<(Vec<f32>, RowState)>, Error> {
        let width = self.v_head_dim();
        let given = self.agreed(inputs, Ok)?;
        if self.spec.queries == Queries::Own {
            return self.round(inputs, &given.whole).await.map(Some);
        }
        let query = self.query_of_all(inputs).await?;
        let own = self.local(&self.shard, &query, inputs, &given.own).await;
        self.settle(&own)?;
        let (output, state) = own?;
        let packed = state::pack(&output, &state, width);
        let merged = exchange::merge(&self.comm.0, &packed, width, self.way, spec::root_of(self.spec.result))?;
        Ok(merged.map(|packed| state::unpack(&packed, width)))
    }

    /// Lets all ranks fail where one did.
    fn settle<T>(&self, own: &Result<T, Error>) -> Result<(), ShardedError> {
        exchange::agree(&self.comm.0, own.as_ref().map(|_| &[][..]).map_err(ToString::to_string)).map(drop)
    }

    /// The query without gaps; nothing where another rank has it.
    async fn dense_query(&self, inputs: &ShardInputs<'_>) -> Result<Vec<f32>, Error> {
        let Some(query) = &inputs.query else { return Ok(vec![]) };
        let numbers = query.read("query").await?.into_f32();
        let layout = &self.spec.attention.query.layout;
        let mut dense = state::room(layout.elements().unwrap_or(usize::MAX))?;
        dense.extend(state::places(layout.shape).map(|at| numbers[layout.index(at)]));
        Ok(dense)
    }

    fn held_query(&self, numbers: Vec<f32>) -> Tensor<'static> {
        Tensor::held(TensorData::from_f32(self.spec.attention.query.element, numbers))
    }

    /// The query, wherever it was given.
    async fn query_of_all<'a>(&self, inputs: &ShardInputs<'a>) -> Result<Tensor<'a>, Error> {
        if let (Queries::OnAll, Some(query)) = (self.spec.queries, &inputs.query) {
            return Ok(query.clone());
        }
        let Queries::OnRoot(root) = self.spec.queries else {
            return Err(ShardedError::Given { name: "query", problem: "is missing on this rank" }.into());
        };
        let query = self.dense_query(inputs).await;
        self.settle(&query)?;
        let mut numbers = query?;
        numbers.resize(self.shard.spec.query.layout.extent().unwrap_or(0), 0.0);
        exchange::broadcast(&self.comm.0, root, &mut numbers);
        Ok(self.held_query(numbers))
    }

    /// The attention to this rank's keys, of rows that see them as this shard.
    async fn local(
        &self,
        shard: &Shard,
        query: &Tensor<'_>,
        inputs: &ShardInputs<'_>,
        positions: &Positions,
    ) -> Result<(Vec<f32>, RowState), Error> {
        let terms = self.own_terms(&inputs.terms, positions);
        let mut recording = Recording::new(&self.device);
        let tensors = match &inputs.keys {
            ShardKeys::Context(context, context_index) => {
                let given = ContextInputs { query: query.clone(), context_index: *context_index, terms };
                context.record(&mut recording, &shard.spec, &given).await?
            }
            ShardKeys::Tensors { key, value } => {
                let problem = AttentionProblem::new(shard.spec.clone())?;
                let given = Inputs { query: query.clone(), key: key.clone(), value: value.clone(), terms };
                given.check(&problem)?;
                let prepared = self.kept.get(&problem, self.device.prepare(&problem, KernelChoice::Auto)).await?;
                let to = ContextTensors::new(&recording, &problem).await?;
                let placed = Inputs {
                    query: recording.place("query", &given.query).await?,
                    key: recording.place("key", &given.key).await?,
                    value: recording.place("value", &given.value).await?,
                    terms: recording.place_terms(&given.terms).await?,
                };
                let outputs = Outputs { output: to.output.clone(), rows: to.rows.clone(), scores: None };
                recording.attend(&prepared, &placed, &outputs)?;
                to
            }
        };
        recording.submit().await?;
        let output = tensors.output.read_f32("output").await?;
        let rows = match &tensors.rows {
            Some(rows) => rows.read_f32("row_state").await?,
            None => vec![],
        };
        Ok((output, RowState::from_pairs(&rows)))
    }

    /// The terms of this rank's attention.
    fn own_terms<'t>(&self, given: &Terms<Tensor<'t>>, positions: &'t Positions) -> Terms<Tensor<'t>> {
        Terms {
            q_lens: positions.q_lens.as_ref().map(Tensor::from),
            kv_lens: positions.kv_lens.as_ref().map(Tensor::from),
            row_start: positions.row_start.as_ref().map(Tensor::from),
            row_end: positions.row_end.as_ref().map(Tensor::from),
            // the first rank counts them
            sinks: given.sinks.clone().filter(|_| self.shard.spec.sinks),
            ..given.clone()
        }
    }

    /// The result as the spec asks for it.
    fn finished(&self, output: Vec<f32>, state: RowState) -> AttentionOutput {
        let spec = &self.spec.attention;
        let TensorSpec { element, layout } = spec.output;
        let placed = if layout == Layout::bhld(layout.shape) {
            output
        } else {
            let mut placed = vec![0.0f32; layout.extent().unwrap_or(0)];
            state::places(layout.shape).zip(output).for_each(|(at, x)| placed[layout.index(at)] = x);
            placed
        };
        AttentionOutput {
            output: TensorData::from_f32(element, placed),
            lse: spec.lse.then(|| state.lse()),
            row_state: spec.row_state.then_some(state),
            scores: None,
        }
    }
}

/// Merges attentions of all ranks to keys of their own, as [`merge_states`](crate::cpu::merge_states) does on one machine: of a
/// [pool](crate::pool), of [sources](crate::sources), or of kernels of the caller's. `output` is `[rows, v_head_dim]`. Collective.
///
/// A pool gives an `lse`: with it as the maximum, and a sum of 1, or 0 where it is negative infinity, every rank's passages are
/// merged, and `exp(passage_lse - lse)` with the `lse` of the result is each passage's share among those of all ranks.
///
/// # Errors
/// [`Error::Sharded`], the same on every rank.
pub fn merge_over(
    comm: &impl Communicator,
    part: StatePart<'_>,
    v_head_dim: usize,
    way: Way,
    result: Results,
) -> Result<Option<MergedStates>, Error> {
    together::check_thread()?;
    let together = EndTogether::new(comm);
    // its messages meet no others
    let merged = merged_over(&comm.duplicate(), part, v_head_dim, way, result);
    together.done();
    merged
}

fn merged_over(
    comm: &SimpleCommunicator,
    part: StatePart<'_>,
    v_head_dim: usize,
    way: Way,
    result: Results,
) -> Result<Option<MergedStates>, Error> {
    let own = crate::cpu::check_state_parts(&[part], v_head_dim).map_err(|error| error.to_string());
    let own = own.and_then(|rows| {
        spec::check_root(result, comm).map_err(|error| error.to_string())?;
        let lines = [
            ("rows", rows.to_string()),
            ("v_head_dim", v_head_dim.to_string()),
            ("way", way.name().to_owned()),
            ("result", format!("{result:?}")),
        ];
        Ok(lines.map(|(name, value)| (name.to_owned(), value)))
    });
    exchange::agree(comm, own.as_ref().map(|lines| &lines[..]).map_err(Clone::clone))?;
    let way = match way {
        Way::Auto => {
            let load = Load {
                ranks: u64::try_from(comm.size()).unwrap_or(1),
                rows: part.row_max.len() as u64,
                head_dim: 0,
                v_head_dim: v_head_dim as u64,
                most_keys: 0,
                on_all: result == Results::OnAll,
                own_rows: false,
            };
            costs(&load, &Network::default())[0].way
        }
        way => way,
    };
    let state = RowState { row_max: part.row_max.to_vec(), row_sum: part.row_sum.to_vec() };
    let packed = state::pack(part.output, &state, v_head_dim);
    let merged = exchange::merge(comm, &packed, v_head_dim, way, spec::root_of(result))?;
    Ok(merged.map(|packed| {
        let (output, state) = state::unpack(&packed, v_head_dim);
        MergedStates { output, state }
    }))
}

fn value_of<T: std::str::FromStr>(lines: &[(String, String)], name: &str) -> Option<T> {
    lines.iter().find(|(of, _)| of == name).and_then(|(_, value)| value.parse().ok())
}
