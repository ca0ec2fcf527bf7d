//! The attention of one shard: what the terms that count positions are, seen from its first key.

use std::ops::Range;

use super::ShardedError;
use crate::problem::{AttentionProblem, AttentionSpec, Diagonal, MAX_LEN, ProblemError};
use crate::tensor::{Layout, TensorSpec};

/// Terms in host memory that count positions over all keys.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Positions {
    pub(super) q_lens: Option<Vec<u32>>,
    pub(super) kv_lens: Option<Vec<u32>>,
    pub(super) row_start: Option<Vec<i32>>,
    pub(super) row_end: Option<Vec<i32>>,
}

/// How one shard's attention is asked for.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Shard {
    /// Its keys among those of all ranks.
    pub(super) keys: Range<u64>,
    pub(super) total: u64,
    /// The spec of the shard as its rank gave it: its keys, the whole's terms.
    asked: AttentionSpec,
    /// Whether the diagonal differs from entry to entry of the batch, so that causal mask and windows become ranges of keys.
    by_entry: bool,
    /// What the shard computes: an f32 output without gaps, maximum and sum of the rows.
    pub(super) spec: AttentionSpec,
}

impl Shard {
    /// `asked` has the shard's own keys; the first rank counts the sinks.
    pub(super) fn new(
        asked: &AttentionSpec,
        keys: Range<u64>,
        total: u64,
        is_first: bool,
    ) -> Result<Self, ShardedError> {
        if asked.scores.is_some() {
            let reason = "they are as long as all keys; ask for chosen weights";
            return Err(ShardedError::NotSharded { name: "scores", reason });
        }
        let uses_diagonal = uses_diagonal(asked);
        let counts = uses_diagonal || asked.kv_lens || asked.row_ranges;
        if counts && total > MAX_LEN as u64 {
            let what = if uses_diagonal { "a diagonal" } else { "a length or a range of keys" };
            return Err(ShardedError::TooMany { what, found: total, max: MAX_LEN as u64 });
        }
        let diagonal = asked.causal.or(asked.offset).unwrap_or_default();
        let by_entry = uses_diagonal && diagonal == Diagonal::EndOfKeys && (asked.kv_lens || asked.q_lens);
        if by_entry && asked.alibi_slopes.is_some() {
            let reason = "alibi_slopes along end_of_keys with lengths have another offset in each entry; \
                          attend to the entries one by one, along fixed:N";
            return Err(ShardedError::NotSharded { name: "alibi_slopes", reason });
        }
        let mut spec = asked.clone();
        let [batch, heads, q_len, _] = asked.query.layout.shape;
        let width = asked.value.layout.shape[3];
        spec.output = TensorSpec::f32(Layout::bhld([batch, heads, q_len, width]));
        (spec.lse, spec.row_state) = (false, true);
        spec.sinks = asked.sinks && is_first;
        if by_entry {
            (spec.causal, spec.offset, spec.window_left, spec.window_right) = (None, None, None, None);
            spec.row_ranges = true;
        } else if uses_diagonal {
            let before = i64::try_from(keys.start).unwrap_or(i64::MAX);
            let total = i64::try_from(total).unwrap_or(i64::MAX);
            let whole = match diagonal {
                Diagonal::TopLeft => 0,
                Diagonal::BottomRight | Diagonal::EndOfKeys => total - i64::try_from(q_len).unwrap_or(i64::MAX),
                Diagonal::Fixed(offset) => i64::from(offset),
            };
            let Ok(offset) = i32::try_from(whole - before) else {
                let reason = "its offset from the shard's first key is no number of 32 bits";
                return Err(ShardedError::NotSharded { name: "diagonal", reason });
            };
            let own = Diagonal::Fixed(offset);
            spec.causal = asked.causal.map(|_| own);
            spec.offset = asked.causal.is_none().then_some(own);
        }
        Ok(Self { keys, total, asked: asked.clone(), by_entry, spec })
    }

    /// Whether a diagonal is counted from the last key of each entry.
    pub(super) fn ends_at_lens(&self) -> bool {
        let diagonal = self.asked.causal.or(self.asked.offset).unwrap_or_default();
        uses_diagonal(&self.asked) && diagonal == Diagonal::EndOfKeys
    }

    /// The terms of the shard's attention.
    pub(super) fn positions(&self, whole: &Positions) -> Result<Positions, ProblemError> {
        let len = self.keys.end - self.keys.start;
        let cut = |n: u64| u32::try_from(n.saturating_sub(self.keys.start).min(len)).unwrap_or(u32::MAX);
        let kv_lens = whole.kv_lens.as_ref().map(|lens| lens.iter().map(|&n| cut(u64::from(n))).collect());
        // positions may be any numbers; what lies outside of the shard may be cut to its ends
        let at = |n: i64| {
            let inside = n.saturating_sub_unsigned(self.keys.start).clamp(0, i64::try_from(len).unwrap_or(i64::MAX));
            i32::try_from(inside).unwrap_or(i32::MAX)
        };
        let shifted =
            |list: &Option<Vec<i32>>| list.as_ref().map(|list| list.iter().map(|&n| at(i64::from(n))).collect());
        let (mut row_start, mut row_end) = (shifted(&whole.row_start), shifted(&whole.row_end));
        if self.by_entry {
            let ranges = self.ranges_by_entry(whole)?;
            let of_row = |n: usize, given: &Option<Vec<i32>>| given.as_ref().map(|given| given[n]);
            let starts: Vec<i32> = ranges.iter().map(|range| at(range.start)).collect();
            let ends: Vec<i32> = ranges.iter().map(|range| at(range.end)).collect();
            row_start =
                Some((0..starts.len()).map(|n| starts[n].max(of_row(n, &row_start).unwrap_or(i32::MIN))).collect());
            row_end = Some((0..ends.len()).map(|n| ends[n].min(of_row(n, &row_end).unwrap_or(i32::MAX))).collect());
        }
        Ok(Positions { q_lens: whole.q_lens.clone(), kv_lens, row_start, row_end })
    }

    /// For each entry and row the keys that causal mask and windows leave, over all ranks.
    fn ranges_by_entry(&self, whole: &Positions) -> Result<Vec<Range<i64>>, ProblemError> {
        // the same rule as that of one machine, asked of a problem that has all keys and no data
        let [batch, heads, q_len, head_dim] = self.asked.query.layout.shape;
        let kv_heads = self.asked.key.layout.shape[1];
        let total = usize::try_from(self.total).unwrap_or(usize::MAX);
        let mut spec = AttentionSpec::new([batch, heads, q_len, head_dim], [1, kv_heads, total, head_dim]);
        (spec.causal, spec.offset) = (self.asked.causal, self.asked.offset);
        (spec.window_left, spec.window_right) = (self.asked.window_left, self.asked.window_right);
        let problem = AttentionProblem::new(spec)?;
        let mut ranges = Vec::with_capacity(batch * q_len);
        for b in 0..batch {
            let rows = whole.q_lens.as_ref().map_or(q_len, |lens| lens[b] as usize);
            let keys = whole.kv_lens.as_ref().map_or(total, |lens| lens[b] as usize);
            ranges.extend((0..q_len).map(|i| {
                let Range { start, end } = problem.row_keys(i, rows, keys);
                i64::try_from(start).unwrap_or(i64::MAX)..i64::try_from(end).unwrap_or(i64::MAX)
            }));
        }
        Ok(ranges)
    }
}

fn uses_diagonal(spec: &AttentionSpec) -> bool {
    let windows = spec.window_left.is_some() || spec.window_right.is_some();
    spec.causal.is_some() || windows || spec.alibi_slopes.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn causal(diagonal: Diagonal) -> AttentionSpec {
        AttentionSpec { causal: Some(diagonal), ..AttentionSpec::new([1, 1, 4, 2], [1, 1, 3, 2]) }
    }

    #[test]
    fn a_diagonal_counts_from_the_shards_first_key() {
        for (diagonal, offset) in
            [(Diagonal::TopLeft, -5), (Diagonal::BottomRight, 1), (Diagonal::EndOfKeys, 1), (Diagonal::Fixed(7), 2)]
        {
            let shard = Shard::new(&causal(diagonal), 5..8, 10, false).unwrap();
            assert_eq!(shard.spec.causal, Some(Diagonal::Fixed(offset)), "{diagonal}");
        }
    }

    #[test]
    fn lengths_and_ranges_are_cut_to_the_shard() {
        let mut spec = AttentionSpec::new([2, 1, 1, 2], [2, 1, 3, 2]);
        (spec.kv_lens, spec.row_ranges, spec.sinks) = (true, true, true);
        let shard = Shard::new(&spec, 5..8, 10, false).unwrap();
        assert!(!shard.spec.sinks);
        let whole = Positions {
            kv_lens: Some(vec![6, 10]),
            row_start: Some(vec![-3, 7]),
            row_end: Some(vec![i32::MAX, 2]),
            ..Positions::default()
        };
        let own = shard.positions(&whole).unwrap();
        assert_eq!(own.kv_lens, Some(vec![1, 3]));
        assert_eq!((own.row_start, own.row_end), (Some(vec![0, 2]), Some(vec![3, 0])));
    }

    #[test]
    fn a_diagonal_of_each_entry_becomes_ranges() {
        let mut spec = AttentionSpec::new([2, 1, 2, 2], [2, 1, 3, 2]);
        (spec.causal, spec.kv_lens, spec.window_left) = (Some(Diagonal::EndOfKeys), true, Some(1));
        let shard = Shard::new(&spec, 3..6, 6, false).unwrap();
        assert_eq!((shard.spec.causal, shard.spec.window_left, shard.spec.row_ranges), (None, None, true));
        // offsets 4 - 2 and 6 - 2: rows see keys 1..3, 2..4 and 3..5, 4..6
        let own = shard.positions(&Positions { kv_lens: Some(vec![4, 6]), ..Positions::default() }).unwrap();
        assert_eq!(own.row_start, Some(vec![0, 0, 0, 1]));
        assert_eq!(own.row_end, Some(vec![0, 1, 2, 3]));
    }
}
