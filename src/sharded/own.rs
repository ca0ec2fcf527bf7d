//! Queries of each rank's own: what the rows of one rank ask of the keys of another, and how they go round.

use mpi::topology::Communicator;

use super::local::{Positions, Shard};
use super::{Queries, ShardInputs, ShardKeys, ShardedAttention, ShardedError, ShardedSpec, exchange, state};
use crate::engine::{Recording, Tensor};
use crate::error::Error;
use crate::inputs::RowState;
use crate::problem::{AttentionProblem, AttentionSpec, Diagonal};
use crate::tensor::Layout;
use crate::terms::Terms;

/// The spec that the rows of one rank are attended with, at the keys of the rank whose spec it is: of bias and mask, which lie
/// with the keys for the rows of all ranks, the rows of that rank. With any other queries it is the spec as it stands.
pub(super) fn of_rows(spec: &ShardedSpec, ranks: usize, rank: usize) -> Result<AttentionSpec, ShardedError> {
    let mut of = spec.attention.clone();
    if spec.queries != Queries::Own {
        return Ok(of);
    }
    let q_len = of.query.layout.shape[2];
    if let Some(bias) = &mut of.bias {
        cut_rows("bias", &mut bias.layout, q_len, [rank, ranks])?;
    }
    if let Some(mask) = &mut of.mask {
        cut_rows("mask", mask, q_len, [rank, ranks])?;
    }
    Ok(of)
}

/// Of a layout with rows of all ranks, those of one; a single row is all ranks'.
fn cut_rows(
    name: &'static str,
    layout: &mut Layout,
    q_len: usize,
    [rank, ranks]: [usize; 2],
) -> Result<(), ShardedError> {
    let (found, wanted) = (layout.shape[2], q_len.saturating_mul(ranks));
    if found == wanted {
        layout.offset = layout.offset.saturating_add((rank * q_len).saturating_mul(layout.strides[2]));
        layout.shape[2] = q_len;
        return Ok(());
    }
    if found == 1 { Ok(()) } else { Err(ShardedError::Rows { name, found, wanted }) }
}

/// The rows of every rank as the keys here see them, by rank: the diagonals of each are its own, and were sent.
pub(super) fn all_rows(
    spec: &ShardedSpec,
    diagonals: &[[Option<Diagonal>; 2]],
    shard: impl Fn(&AttentionSpec) -> Result<Shard, ShardedError>,
) -> Result<Vec<Shard>, Error> {
    let of_rank = |(rank, [causal, offset]): (usize, &[Option<Diagonal>; 2])| {
        let mut of = of_rows(spec, diagonals.len(), rank)?;
        (of.causal, of.offset) = (*causal, *offset);
        AttentionProblem::new(of.clone())?;
        Ok(shard(&of)?)
    };
    diagonals.iter().enumerate().map(of_rank).collect()
}

/// Rows of one rank, where the keys of another are.
pub(super) struct OfRank<'a> {
    /// The keys, as these rows see them.
    pub(super) shard: &'a Shard,
    pub(super) query: Tensor<'a>,
    pub(super) positions: Positions,
    /// Of this rank, where it computes.
    pub(super) inputs: &'a ShardInputs<'a>,
}

impl Positions {
    /// What goes along with the rows; lengths of keys are the same everywhere.
    fn of_rows(&self) -> Vec<i32> {
        let q_lens = self.q_lens.iter().flatten().map(|len| len.cast_signed());
        q_lens.chain(self.row_start.iter().chain(&self.row_end).flatten().copied()).collect()
    }

    /// The same with what came along with rows of another rank, which has as many.
    fn with_rows(&self, rows: &[i32]) -> Self {
        let mut rows = rows.iter().copied();
        let q_lens = self.q_lens.as_ref().map(|own| rows.by_ref().take(own.len()).map(i32::cast_unsigned).collect());
        let mut next =
            |own: &Option<Vec<i32>>| own.as_ref().map(|own| rows.by_ref().take(own.len()).collect::<Vec<_>>());
        let (row_start, row_end) = (next(&self.row_start), next(&self.row_end));
        Self { q_lens, kv_lens: self.kv_lens.clone(), row_start, row_end }
    }
}

impl ShardedAttention {
    /// The rows of every rank go round all ranks, and attend to the keys of each.
    pub(super) async fn round(
        &self,
        inputs: &ShardInputs<'_>,
        whole: &Positions,
    ) -> Result<(Vec<f32>, RowState), Error> {
        let (width, rows) = (self.v_head_dim(), usize::try_from(self.load.rows).unwrap_or(0));
        let begun = state::zeros(rows.saturating_mul(width)).map(|output| {
            let none = RowState { row_max: vec![f32::NEG_INFINITY; rows], row_sum: vec![0.0; rows] };
            state::pack(&output, &none, width)
        });
        let gather = async |of: OfRank<'_>, gathered: Vec<f32>| {
            let (output, state) = self.local(of.shard, &of.query, of.inputs, &of.positions).await?;
            let mut later = state::pack(&output, &state, width);
            state::merge_into(&gathered, &mut later, width);
            Ok(later)
        };
        let gathered = self.go_round(inputs, whole, begun, gather).await?;
        Ok(state::unpack(&gathered, width))
    }

    /// The rows of every rank go round, with what belongs to them and what is gathered for them: at every rank `gather` adds its keys'
    /// share. They come back with those of all.
    pub(super) async fn go_round(
        &self,
        inputs: &ShardInputs<'_>,
        whole: &Positions,
        gathered: Result<Vec<f32>, Error>,
        gather: impl AsyncFn(OfRank<'_>, Vec<f32>) -> Result<Vec<f32>, Error>,
    ) -> Result<Vec<f32>, Error> {
        let begun = async { Ok((gathered?, self.dense_query(inputs).await?, self.placed(inputs).await?)) };
        let begun = begun.await;
        self.settle(&begun)?;
        let (mut gathered, mut query, placed) = begun?;
        let mut rows = whole.of_rows();
        let rank = usize::try_from(self.comm.0.rank()).unwrap_or(0);
        for turn in 0..self.all_rows.len() {
            let shard = &self.all_rows[(rank + self.all_rows.len() - turn) % self.all_rows.len()];
            let own = async {
                let positions = shard.positions(&whole.with_rows(&rows))?;
                let query = self.held_query(query.clone());
                gather(OfRank { shard, query, positions, inputs: &placed }, gathered).await
            };
            let own = own.await;
            self.settle(&own)?;
            gathered = exchange::pass_round(&self.comm.0, &own?);
            query = exchange::pass_round(&self.comm.0, &query);
            rows = exchange::pass_round(&self.comm.0, &rows);
        }
        Ok(gathered)
    }

    /// Keys, and what lies with them, where this rank computes: once for the rows of all ranks.
    async fn placed<'a>(&self, inputs: &ShardInputs<'a>) -> Result<ShardInputs<'a>, Error> {
        let recording = Recording::new(&self.device);
        let mut placed = inputs.clone();
        if let ShardKeys::Tensors { key, value } = &mut placed.keys {
            *key = recording.place("key", key).await?;
            *value = recording.place("value", value).await?;
        }
        // the rest belongs to rows, or to keys in all
        let Terms { bias, mask, key_scale, value_scale, .. } = &mut placed.terms;
        for (name, term) in [("bias", bias), ("mask", mask), ("key_scale", key_scale), ("value_scale", value_scale)] {
            if let Some(term) = term {
                *term = recording.place(name, term).await?;
            }
        }
        Ok(placed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::TensorSpec;

    #[test]
    fn a_bias_lies_with_the_keys_for_the_rows_of_all_ranks() {
        let mut of = AttentionSpec::new([1, 1, 4, 2], [1, 1, 3, 2]);
        of.bias = Some(TensorSpec::f32(Layout::bhld([1, 1, 12, 3])));
        of.mask = Some(Layout::bhld([1, 1, 1, 3]));
        let mut spec = ShardedSpec { queries: Queries::Own, ..ShardedSpec::new(of) };
        let last = of_rows(&spec, 3, 2).unwrap();
        assert_eq!(last.bias.map(|bias| (bias.layout.shape, bias.layout.offset)), Some(([1, 1, 4, 3], 24)));
        assert_eq!(last.mask, spec.attention.mask);
        let refused = of_rows(&spec, 2, 0).unwrap_err();
        assert_eq!(refused, ShardedError::Rows { name: "bias", found: 12, wanted: 8 });
        spec.queries = Queries::OnAll;
        assert_eq!(of_rows(&spec, 2, 0).unwrap(), spec.attention);
    }

    #[test]
    fn what_goes_along_with_rows_comes_out_as_it_went_in() {
        let own = Positions {
            q_lens: Some(vec![3, u32::MAX]),
            kv_lens: Some(vec![7, 8]),
            row_start: Some(vec![-1, 2, 3, 4]),
            row_end: Some(vec![i32::MIN, i32::MAX, 5, 6]),
        };
        assert_eq!(own.with_rows(&own.of_rows()), own);
        let ranges = Positions { q_lens: None, kv_lens: None, ..own };
        assert_eq!(ranges.with_rows(&ranges.of_rows()), ranges);
        assert!(Positions::default().of_rows().is_empty());
    }
}
