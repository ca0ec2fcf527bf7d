//! What a rank gives to a call, compared with the spec: what must be the same on all ranks, and the positions.

use std::hash::{DefaultHasher, Hash, Hasher};

use mpi::topology::Communicator;

use super::local::{Positions, Shard};
use super::{Queries, ShardInputs, ShardKeys, ShardedAttention, ShardedError, exchange, state};
use crate::engine::{PlaceError, Tensor};
use crate::error::Error;
use crate::inputs::InputError;
use crate::tensor::Layout;
use crate::terms::Terms;

/// What this rank gives to a call.
pub(super) struct Given {
    /// What must be the same on all ranks, by name.
    pub(super) lines: Vec<(String, String)>,
    /// The terms that count positions, over all keys.
    pub(super) whole: Positions,
    /// The same of this rank's keys.
    pub(super) own: Positions,
}

impl ShardedAttention {
    /// What this rank gives to a call that takes it, once all ranks have compared what they give. Collective.
    pub(super) fn agreed(
        &self,
        inputs: &ShardInputs<'_>,
        takes: impl FnOnce(Given) -> Result<Given, Error>,
    ) -> Result<Given, Error> {
        let given = self.checked(inputs).and_then(takes);
        let lines = given.as_ref().map(|given| &given.lines[..]).map_err(ToString::to_string);
        exchange::agree(&self.comm.0, lines)?;
        given
    }

    /// Compares what this rank gives with the spec.
    fn checked(&self, inputs: &ShardInputs<'_>) -> Result<Given, Error> {
        let rank = self.comm.0.rank();
        let has_query = match self.spec.queries {
            Queries::OnRoot(root) => root == rank,
            Queries::OnAll | Queries::Own => true,
        };
        match (&inputs.query, has_query) {
            (None, true) => {
                let problem = "is missing on this rank, which has it by the spec";
                return Err(ShardedError::Given { name: "query", problem }.into());
            }
            (Some(_), false) => {
                let problem = "is given on this rank, and another has it by the spec; give None here";
                return Err(ShardedError::Given { name: "query", problem }.into());
            }
            (Some(query), true) => crate::engine::reaches("query", query, &self.spec.attention.query)?,
            (None, false) => {}
        }
        self.check_room()?;
        let terms = &inputs.terms;
        let mut lines = vec![];
        if let (Queries::OnAll, Some(query)) = (self.spec.queries, &inputs.query) {
            lines.push(("data of query".to_owned(), digest_of(query, &self.spec.attention.query.layout)));
        }
        let asked = &self.spec.attention;
        for (name, term, wanted) in [
            ("q_lens", &terms.q_lens, asked.q_lens),
            ("kv_lens", &terms.kv_lens, asked.kv_lens),
            ("row_start", &terms.row_start, asked.row_ranges),
            ("row_end", &terms.row_end, asked.row_ranges),
            ("alibi_slopes", &terms.alibi_slopes, asked.alibi_slopes.is_some()),
            // not the terms of the shard: those that only one rank counts are to be given on all
            ("sinks", &terms.sinks, asked.sinks),
        ] {
            let Some(tensor) = term.as_ref().filter(|_| wanted) else {
                match (term, wanted) {
                    (None, true) => return Err(InputError::Missing { name }.into()),
                    (Some(_), false) => return Err(InputError::Unexpected { name }.into()),
                    _ => continue,
                }
            };
            let may_be_on_device = matches!(name, "alibi_slopes" | "sinks");
            if tensor.host().is_none() && !may_be_on_device {
                return Err(PlaceError::NeedsHost { name, reason: "ranks compare it, and cut it to their keys" }.into());
            }
            // what belongs to rows is each rank's own where they are
            let is_of_rows = matches!(name, "q_lens" | "row_start" | "row_end");
            if !(is_of_rows && self.spec.queries == Queries::Own) {
                lines.push((format!("data of {name}"), digest(tensor)));
            }
        }
        if let ShardKeys::Context(context, _) = &inputs.keys
            && context.has_lens()
            && self.all_rows.iter().chain([&self.shard]).any(Shard::ends_at_lens)
        {
            let reason =
                "along end_of_keys it would differ with the lengths of each rank's contexts; name it by fixed:N";
            return Err(ShardedError::NotSharded { name: "diagonal", reason }.into());
        }
        let whole = self.positions(terms)?;
        let own = self.shard.positions(&whole)?;
        Ok(Given { lines, whole, own })
    }

    /// Whether there is memory for the query and the states of all rows, sent without gaps, and for the output as it is laid out.
    fn check_room(&self) -> Result<(), Error> {
        let spec = &self.spec.attention;
        let rows = usize::try_from(self.load.rows).unwrap_or(usize::MAX);
        let numbers = [
            spec.query.layout.elements().unwrap_or(usize::MAX),
            rows.saturating_mul(state::HEAD + self.v_head_dim()),
            spec.output.layout.extent().unwrap_or(usize::MAX),
        ];
        state::room(numbers.into_iter().fold(0, usize::saturating_add)).map(drop)
    }

    /// The terms that count positions, over all keys, with lengths that fit.
    fn positions(&self, terms: &Terms<Tensor<'_>>) -> Result<Positions, Error> {
        let [batch, _, q_len, _] = self.spec.attention.query.layout.shape;
        let u32s = |name: &'static str, tensor: &Option<Tensor<'_>>, most: u64| -> Result<Option<Vec<u32>>, Error> {
            let Some(tensor) = tensor else { return Ok(None) };
            crate::engine::is_a(name, tensor, crate::slice::Kind::U32)?;
            let data = tensor.host().map(|read| read.u32().to_vec()).unwrap_or_default();
            if data.len() != batch || data.iter().any(|len| u64::from(*len) > most) {
                let problem =
                    "needs a length for each entry of the batch, none above that of the sequence over all ranks";
                return Err(ShardedError::Given { name, problem }.into());
            }
            Ok(Some(data))
        };
        let i32s = |name: &'static str, tensor: &Option<Tensor<'_>>| -> Result<Option<Vec<i32>>, Error> {
            let Some(tensor) = tensor else { return Ok(None) };
            crate::engine::is_a(name, tensor, crate::slice::Kind::I32)?;
            let data = tensor.host().map(|read| read.i32().to_vec()).unwrap_or_default();
            if data.len() != batch * q_len {
                return Err(ShardedError::Given { name, problem: "needs a number for each entry and row" }.into());
            }
            Ok(Some(data))
        };
        Ok(Positions {
            q_lens: u32s("q_lens", &terms.q_lens, q_len as u64)?,
            kv_lens: u32s("kv_lens", &terms.kv_lens, self.shard.total)?,
            row_start: i32s("row_start", &terms.row_start)?,
            row_end: i32s("row_end", &terms.row_end)?,
        })
    }
}

/// A number that tells data apart. Of what is on a device none is made: its line is empty, and not compared.
fn digest(tensor: &Tensor<'_>) -> String {
    let Some(read) = tensor.host() else { return String::new() };
    let mut hasher = DefaultHasher::new();
    read.slice().bytes().hash(&mut hasher);
    format!("{:016x} of {} elements", hasher.finish(), tensor.len())
}

/// The same of what a layout reads: gaps may hold anything.
fn digest_of(tensor: &Tensor<'_>, layout: &Layout) -> String {
    let Some(read) = tensor.host() else { return String::new() };
    let (data, mut hasher) = (read.tensor(), DefaultHasher::new());
    let (width, step) = (layout.shape[3], layout.strides[3]);
    // a row at a time: a number by itself takes ten times as long
    let mut line = Vec::with_capacity(width);
    for [b, h, i] in state::rows(layout.shape) {
        let start = layout.index([b, h, i, 0]);
        line.clear();
        line.extend((0..width).map(|d| data.get(start + d * step)));
        hasher.write(bytemuck::cast_slice(&line));
    }
    format!("{:016x} of {} elements", hasher.finish(), layout.elements().unwrap_or(0))
}
