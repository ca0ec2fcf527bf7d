//! What there is beside the output: chosen weights with keys counted over all ranks, and gradients.

use std::hash::{DefaultHasher, Hash, Hasher};

use super::local::{Positions, Shard};
use super::own::OfRank;
use super::{Queries, ShardInputs, ShardKeys, ShardedAttention, ShardedError, exchange, spec, state};
use crate::backward::{BackwardInputs, BackwardProblem, BackwardSpec, Gradients};
use crate::context::ContextInputs;
use crate::engine::{HostInputs, Inputs, Kind, Recording, Tensor};
use crate::error::Error;
use crate::inputs::RowState;
use crate::problem::{AttentionProblem, AttentionSpec};
use crate::tensor::TensorData;
use crate::terms::Terms;
use crate::weights::{AttentionWithWeights, Keys, Select, WeightsProblem, WeightsSpec};

/// Output and state over all keys, and what the rank computed them from.
struct Forward<'a> {
    query: Tensor<'a>,
    positions: Positions,
    output: Vec<f32>,
    state: RowState,
}

/// Rows whose weights are wanted, where some of the keys are.
struct Rows<'a> {
    shard: &'a Shard,
    query: &'a Tensor<'a>,
    positions: &'a Positions,
    /// Over all keys.
    state: &'a RowState,
}

impl ShardedAttention {
    /// The attention, and some of its weights: keys and segments of keys are counted over all ranks. Mass of passages that lie on
    /// several ranks are sums over segments. Collective; `None` where the result is another rank's.
    ///
    /// A second pass computes each rank's weights where its keys are, and they are added up in rank order; those of queries of each
    /// rank's own, from the rank on that has them.
    ///
    /// # Errors
    /// [`Error::Sharded`], the same on every rank; but for [`ShardedError::Thread`].
    pub async fn attend_with_weights(
        &self,
        inputs: &ShardInputs<'_>,
        weights: &WeightsSpec,
    ) -> Result<Option<AttentionWithWeights>, Error> {
        self.together(self.with_weights(inputs, weights)).await
    }

    async fn with_weights(
        &self,
        inputs: &ShardInputs<'_>,
        weights: &WeightsSpec,
    ) -> Result<Option<AttentionWithWeights>, Error> {
        let mut hasher = DefaultHasher::new();
        weights.hash(&mut hasher);
        let asked = self.chosen(weights).map(|wanted| {
            let digest = format!("{:016x} of {} weights", hasher.finish(), wanted.elements());
            [("chosen weights".to_owned(), digest)]
        });
        exchange::agree(&self.comm.0, asked.as_ref().map(|lines| &lines[..]).map_err(ToString::to_string))?;
        let shape = self.chosen(weights)?.shape();
        if self.spec.queries == Queries::Own {
            let given = self.agreed(inputs, Ok)?;
            let (output, state) = self.round(inputs, &given.whole).await?;
            let weights = self.weights_round(inputs, &given.whole, &state, weights, shape).await?;
            return Ok(Some(AttentionWithWeights { attention: self.finished(output, state), weights, shape }));
        }
        let forward = self.forward(inputs, self.agreed(inputs, Ok)?.own).await?;
        let (query, positions, state) = (&forward.query, &forward.positions, &forward.state);
        let own = self.own_weights(inputs, Rows { shard: &self.shard, query, positions, state }, weights, shape).await;
        self.settle(&own)?;
        let root = spec::root_of(self.spec.result);
        let all = exchange::sum(&self.comm.0, &own?, root);
        Ok(all.map(|weights| {
            let attention = self.finished(forward.output, forward.state);
            AttentionWithWeights { attention, weights, shape }
        }))
    }

    /// [`attend_with_weights`](Self::attend_with_weights), blocking.
    ///
    /// # Errors
    /// As [`attend_with_weights`](Self::attend_with_weights).
    pub fn attend_with_weights_blocking(
        &self,
        inputs: &ShardInputs<'_>,
        weights: &WeightsSpec,
    ) -> Result<Option<AttentionWithWeights>, Error> {
        self.device.block_on(self.attend_with_weights(inputs, weights))
    }

    /// The gradients of every input that has one, in f32 without gaps, as [`BackwardSpec::all`] gives them, and of the scale:
    /// given that of the output, `[batch, q_heads, q_len, v_head_dim]`, and of the log-sum-exp, `[batch, q_heads, q_len]`; the same
    /// on all ranks. Collective.
    ///
    /// Every rank gets those of query, scale, slopes and sinks over all keys, added up in rank order. Those of key, value and bias are
    /// of its own keys; of a bias that all keys share it is the share of these keys, to be added up by the caller.
    ///
    /// # Errors
    /// [`Error::Sharded`], the same on every rank: also for queries of each rank's own, and for keys elsewhere than in host memory;
    /// but for [`ShardedError::Thread`].
    pub async fn backward(
        &self,
        inputs: &ShardInputs<'_>,
        d_output: &[f32],
        d_lse: Option<&[f32]>,
    ) -> Result<Gradients, Error> {
        self.together(self.gradients(inputs, d_output, d_lse)).await
    }

    async fn gradients(
        &self,
        inputs: &ShardInputs<'_>,
        d_output: &[f32],
        d_lse: Option<&[f32]>,
    ) -> Result<Gradients, Error> {
        let digest = |numbers: &[f32]| {
            let mut hasher = DefaultHasher::new();
            numbers.iter().for_each(|x| x.to_bits().hash(&mut hasher));
            format!("{:016x} of {} elements", hasher.finish(), numbers.len())
        };
        let lines = [
            ("data of d_output".to_owned(), digest(d_output)),
            ("data of d_lse".to_owned(), d_lse.map_or("not there".to_owned(), digest)),
        ];
        exchange::agree(&self.comm.0, Ok(&lines))?;
        let given = self.agreed(inputs, |given| match (self.spec.queries, &inputs.keys) {
            (Queries::Own, _) => Err(no_gradients("each rank has queries of its own; give all ranks the queries")),
            (_, ShardKeys::Context(..)) => Err(of_contexts()),
            (_, ShardKeys::Tensors { key, value }) if key.host().is_none() || value.host().is_none() => {
                Err(no_gradients("keys and values are on a device; give them in host memory"))
            }
            (_, ShardKeys::Tensors { .. }) => Ok(given),
        })?;
        let forward = self.forward(inputs, given.own).await?;
        let own = self.own_gradients(inputs, &forward, d_output, d_lse).await;
        self.settle(&own)?;
        let mut gradients = own?;
        let summed = |own: Vec<f32>| exchange::sum(&self.comm.0, &own, None).unwrap_or_default();
        gradients.d_query = gradients.d_query.map(|own| TensorData::F32(summed(own.into_f32())));
        gradients.d_scale = gradients.d_scale.and_then(|own| summed(vec![own]).first().copied());
        gradients.d_alibi_slopes = gradients.d_alibi_slopes.map(summed);
        if self.spec.attention.sinks {
            // the first rank alone counts them
            let none = || vec![0.0; self.spec.attention.query.layout.shape[1]];
            gradients.d_sinks = Some(summed(gradients.d_sinks.unwrap_or_else(none)));
        }
        Ok(gradients)
    }

    /// [`backward`](Self::backward), blocking.
    ///
    /// # Errors
    /// As [`backward`](Self::backward).
    pub fn backward_blocking(
        &self,
        inputs: &ShardInputs<'_>,
        d_output: &[f32],
        d_lse: Option<&[f32]>,
    ) -> Result<Gradients, Error> {
        self.device.block_on(self.backward(inputs, d_output, d_lse))
    }

    /// Weights of each rank's own rows, which go round with what they are divided by.
    async fn weights_round(
        &self,
        inputs: &ShardInputs<'_>,
        whole: &Positions,
        state: &RowState,
        weights: &WeightsSpec,
        shape: [usize; 4],
    ) -> Result<Vec<f32>, Error> {
        let pairs = state.to_pairs();
        let begun = state::zeros(shape.iter().product::<usize>().saturating_add(pairs.len())).map(|mut gathered| {
            gathered[..pairs.len()].copy_from_slice(&pairs);
            gathered
        });
        let gather = async |of: OfRank<'_>, mut gathered: Vec<f32>| {
            let (of_rows, sums) = gathered.split_at_mut(pairs.len());
            let state = &RowState::from_pairs(of_rows);
            let rows = Rows { shard: of.shard, query: &of.query, positions: &of.positions, state };
            let own = self.own_weights(of.inputs, rows, weights, shape).await?;
            sums.iter_mut().zip(own).for_each(|(sum, x)| *sum += x);
            Ok(gathered)
        };
        let mut gathered = self.go_round(inputs, whole, begun, gather).await?;
        Ok(gathered.split_off(pairs.len()))
    }

    /// Output and state over all keys, on every rank.
    async fn forward<'a>(&self, inputs: &ShardInputs<'a>, positions: Positions) -> Result<Forward<'a>, Error> {
        let query = self.query_of_all(inputs).await?;
        let own = self.local(&self.shard, &query, inputs, &positions).await;
        self.settle(&own)?;
        let (output, state) = own?;
        let width = self.v_head_dim();
        let packed = state::pack(&output, &state, width);
        let merged = exchange::merge(&self.comm.0, &packed, width, self.way, None)?.unwrap_or_default();
        let (output, state) = state::unpack(&merged, width);
        Ok(Forward { query, positions, output, state })
    }

    /// Which weights are wanted, of an attention to all keys.
    fn chosen(&self, weights: &WeightsSpec) -> Result<WeightsProblem, Error> {
        let [batch, heads, q_len, width] = self.spec.attention.query.layout.shape;
        let kv_heads = self.spec.attention.key.layout.shape[1];
        let total = usize::try_from(self.shard.total).unwrap_or(usize::MAX);
        let whole = AttentionSpec::new([batch, heads, q_len, width], [1, kv_heads, total, width]);
        Ok(WeightsProblem::new(&AttentionProblem::new(whole)?, weights)?)
    }

    /// This rank's part of the weights, in an array of all.
    async fn own_weights(
        &self,
        inputs: &ShardInputs<'_>,
        rows: Rows<'_>,
        weights: &WeightsSpec,
        shape: [usize; 4],
    ) -> Result<Vec<f32>, Error> {
        // positions that a problem counts
        let [start, end] =
            [self.shard.keys.start, self.shard.keys.end].map(|key| usize::try_from(key).unwrap_or(usize::MAX));
        // of the rank's own keys, those that are asked for, and where in the result each goes
        let (keys, columns): (Keys, Vec<usize>) = match &weights.keys {
            Keys::Segments(segments) => {
                let cut = |key: usize| key.clamp(start, end) - start;
                let own = segments.iter().map(|keys| cut(keys.start)..cut(keys.end)).collect();
                (Keys::Segments(own), (0..shape[3]).collect())
            }
            Keys::Each(select) => {
                let asked: Vec<usize> = match select {
                    Select::All => (0..shape[3]).collect(),
                    Select::Range(keys) => keys.clone().collect(),
                    Select::List(keys) => keys.clone(),
                };
                let of_rank = asked.iter().enumerate().filter(|(_, key)| (start..end).contains(*key));
                let (own, columns) = of_rank.map(|(column, key)| (key - start, column)).unzip();
                (Keys::Each(Select::List(own)), columns)
            }
        };
        let mut all = state::zeros(shape.iter().product())?;
        if columns.is_empty() || all.is_empty() || start == end {
            return Ok(all);
        }
        let wanted = WeightsSpec { keys, ..weights.clone() };
        let own = self.weights_here(inputs, rows, &wanted).await?;
        for (row, own) in all.chunks_exact_mut(shape[3]).zip(own.chunks_exact(columns.len())) {
            columns.iter().zip(own).for_each(|(&column, weight)| row[column] = *weight);
        }
        Ok(all)
    }

    /// Weights of this rank's keys, counted from its first, computed where they are.
    async fn weights_here(
        &self,
        inputs: &ShardInputs<'_>,
        Rows { shard, query, positions, state }: Rows<'_>,
        wanted: &WeightsSpec,
    ) -> Result<Vec<f32>, Error> {
        let terms = self.own_terms(&inputs.terms, positions);
        let key = match &inputs.keys {
            ShardKeys::Tensors { key, .. } => key,
            ShardKeys::Context(context, context_index) => {
                let given = ContextInputs { query: query.clone(), context_index: *context_index, terms };
                return context.weights(&shard.spec, &given, wanted, state).await;
            }
        };
        let problem = WeightsProblem::new(&AttentionProblem::new(shard.spec.clone())?, wanted)?;
        let mut recording = Recording::new(&self.device);
        let key = recording.place("key", key).await?;
        let given = Inputs {
            query: recording.place("query", query).await?,
            // nobody looks at it
            value: key.clone(),
            key,
            // nor at these
            terms: recording.place_terms(&Terms { sinks: None, value_scale: None, ..terms }).await?,
        };
        let state = Tensor::held(TensorData::F32(state.to_pairs()));
        let row_state = recording.place("row_state", &state).await?;
        let weights = recording.allocate("weights", Kind::F32, problem.elements()).await?;
        recording.weights(&problem, &given, &row_state, &weights).await?;
        recording.submit().await?;
        weights.read_f32("weights").await
    }

    /// What this rank's keys give to the gradients.
    async fn own_gradients(
        &self,
        inputs: &ShardInputs<'_>,
        forward: &Forward<'_>,
        d_output: &[f32],
        d_lse: Option<&[f32]>,
    ) -> Result<Gradients, Error> {
        let mut spec = BackwardSpec::all(self.shard.spec.clone());
        (spec.d_lse, spec.d_scale) = (d_lse.is_some(), true);
        let problem = BackwardProblem::new(spec)?;
        let ShardKeys::Tensors { key, value } = &inputs.keys else { return Err(of_contexts()) };
        let terms = self.own_terms(&inputs.terms, &forward.positions);
        let attended = Inputs { query: forward.query.clone(), key: key.clone(), value: value.clone(), terms };
        let held = HostInputs::new(&attended, "the CPU")?;
        let given = BackwardInputs {
            attention: held.get(),
            output: (&forward.output).into(),
            row_state: &forward.state,
            d_output: d_output.into(),
            d_lse,
            d_weights: None,
        };
        self.device.backward(&problem, &given).await
    }
}

fn of_contexts() -> Error {
    no_gradients("they are computed from tensors in host memory; give the keys as such, and no context")
}

fn no_gradients(reason: &'static str) -> Error {
    ShardedError::NotSharded { name: "a gradient", reason }.into()
}
