//! A case cut into shards: the same buffers, read from the shard's first key on.

use cross_attention::sharded::{ShardInputs, ShardKeys};
use cross_attention::{AttentionData, AttentionSpec, Layout, Terms};
use fastrand::Rng;

use super::common::case::Case;

/// Random numbers that are the same on all ranks.
pub(crate) fn drawn(name: &str) -> Rng {
    Rng::with_seed(name.bytes().fold(11u64, |seed, byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte))))
}

/// A case without what no shard returns.
pub(crate) fn sharded(mut case: Case, random: &mut Rng) -> Case {
    (case.spec.scores, case.spec.row_state) = (None, random.bool());
    case
}

/// First keys of all ranks, and the end of the last: uneven, with ranks that have none.
pub(crate) fn cuts(case: &Case, ranks: usize, random: &mut Rng) -> Vec<usize> {
    let total = case.problem().kv_len();
    // pages are not cut
    let step = if case.spec.paged.is_some() { case.spec.key.layout.shape[2] } else { 1 };
    let mut cuts: Vec<usize> = (1..ranks).map(|_| random.usize(0..=total) / step * step).collect();
    match random.u8(0..6) {
        0 => cuts.fill(0),
        1 => cuts.fill(total / step * step),
        _ => {}
    }
    cuts.extend([0, total]);
    cuts.sort_unstable();
    cuts
}

/// What one rank has of a case.
pub(crate) struct Shard {
    pub(crate) spec: AttentionSpec,
    pub(crate) data: AttentionData,
}

impl Shard {
    pub(crate) fn new(case: &Case, data: &AttentionData, [from, to]: [usize; 2]) -> Self {
        let problem = case.problem();
        let (mut spec, mut data) = (problem.spec().clone(), data.clone());
        let along = |layout: &mut Layout, axis: usize| {
            layout.offset += from * layout.strides[axis];
            layout.shape[axis] = to - from;
        };
        match &mut spec.paged {
            Some(paged) => {
                let (page, of_whole) = (spec.key.layout.shape[2], paged.table_len);
                (paged.kv_len, paged.table_len) = (to - from, (to - from).div_ceil(page).max(1));
                let (first, len) = ((from / page).min(of_whole - 1), paged.table_len);
                let table = data.terms.block_table.iter().flat_map(|table| table.chunks(of_whole));
                data.terms.block_table = Some(table.flat_map(|row| row[first..][..len].to_vec()).collect());
            }
            None => {
                along(&mut spec.key.layout, 2);
                along(&mut spec.value.layout, 2);
                for scale in [&mut spec.key_scale, &mut spec.value_scale].into_iter().flatten() {
                    along(&mut scale.layout, 2);
                }
            }
        }
        let of_scores = spec.bias.as_mut().map(|bias| &mut bias.layout).into_iter().chain(&mut spec.mask);
        of_scores.for_each(|layout| along(layout, 3));
        Self { spec, data }
    }

    /// What the rank gives to a call; the query, where it has it.
    pub(crate) fn inputs<'a>(&'a self, query: Option<&'a cross_attention::TensorData>) -> ShardInputs<'a> {
        let (data, terms) = (&self.data, &self.data.terms);
        ShardInputs {
            query: query.map(Into::into),
            keys: ShardKeys::Tensors { key: (&data.key).into(), value: (&data.value).into() },
            terms: Terms {
                bias: terms.bias.as_ref().map(Into::into),
                mask: terms.mask.as_ref().map(Into::into),
                key_scale: terms.key_scale.as_ref().map(Into::into),
                value_scale: terms.value_scale.as_ref().map(Into::into),
                q_lens: terms.q_lens.as_ref().map(Into::into),
                kv_lens: terms.kv_lens.as_ref().map(Into::into),
                row_start: terms.row_start.as_ref().map(Into::into),
                row_end: terms.row_end.as_ref().map(Into::into),
                alibi_slopes: terms.alibi_slopes.as_ref().map(Into::into),
                sinks: terms.sinks.as_ref().map(Into::into),
                block_table: terms.block_table.as_ref().map(Into::into),
            },
        }
    }
}
