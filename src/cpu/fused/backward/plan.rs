//! How a backward is cut up for the CPU. By its shape and the vector unit alone, so that the bits do not depend on the threads.

use crate::backward::BackwardProblem;
use crate::cpu::fused::plan::CpuPlan;
use crate::cpu::simd::SimdLevel;
use crate::cpu::simd::shared::RowMap;
use crate::problem::AttentionProblem;
use crate::tensor::{Layout, TensorSpec};

/// Tasks that a backward is cut into where it can be.
const TASKS: usize = 32;
/// Keys below which a part is not worth its sum.
const PART_KV: usize = 256;

/// A task has a group's rows, or a part of them, and all keys or a part of them: never parts of both. What several tasks sum up,
/// each has for itself, and the sums are added in order.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct BackwardPlan {
    /// How scores are computed; its chunks are those of the rows.
    pub(super) scores: CpuPlan,
    /// Groups that a task computes one after another: several where they add to one row of the bias.
    pub(super) groups_per_task: Vec<Vec<usize>>,
    pub(super) row_parts: usize,
    pub(super) chunks_per_part: usize,
    pub(super) key_parts: usize,
    pub(super) part_kv: usize,
    pub(super) bias: Option<BiasSlab>,
}

/// The part of the bias that a task adds to, which has one entry of the batch, or the sum over several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BiasSlab {
    /// `[heads, q_len, keys]` of the task, of length 1 where the gradient is.
    pub(super) shape: [usize; 3],
}

impl BiasSlab {
    pub(super) fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

impl BackwardPlan {
    pub(super) fn new(problem: &BackwardProblem, level: SimdLevel) -> Self {
        let (spec, forward) = (problem.spec(), problem.forward());
        let summed = |gradient: &Option<TensorSpec>| gradient.is_none_or(|gradient| gradient.layout.shape[0] == 1);
        let one_context = RowMap::new(forward, 1).is_one_context()
            && spec.d_bias.is_none()
            && summed(&spec.d_key)
            && summed(&spec.d_value);
        let map = if one_context { RowMap::new(forward, 1) } else { RowMap::per_entry(forward) };
        let scores = CpuPlan::for_backward(forward, level, map);
        let (groups, kv_heads, batch) = (map.groups(), forward.kv_heads(), forward.batch());
        let bias = spec.d_bias.map(|bias| bias.layout.shape);
        // rows of the bias that several groups add to are those of one task
        let row_wise = bias.is_some_and(|[_, _, rows, _]| rows == forward.q_len() && rows > 1);
        let merge_batch = row_wise && bias.is_some_and(|shape| shape[0] == 1) && batch > 1;
        let merge_heads = row_wise && bias.is_some_and(|shape| shape[1] == 1) && kv_heads > 1;
        let groups_per_task: Vec<Vec<usize>> = match (merge_batch, merge_heads) {
            (false, false) => (0..groups).map(|group| vec![group]).collect(),
            (true, false) => (0..kv_heads).map(|head| (0..batch).map(|b| b * kv_heads + head).collect()).collect(),
            (false, true) => (0..batch).map(|b| (b * kv_heads..(b + 1) * kv_heads).collect()).collect(),
            (true, true) => vec![(0..groups).collect()],
        };
        let (kv_len, chunks) = (forward.kv_len(), scores.map.chunks_per_group());
        let wanted = TASKS.div_ceil(groups_per_task.len().max(1));
        // whichever of the two sums is the smaller one is taken several times
        let sums_of_keys = kv_len * (forward.head_dim() + forward.v_head_dim());
        let sums_of_rows = map.group_rows() * forward.head_dim();
        let by_rows = !row_wise && sums_of_keys <= sums_of_rows && chunks > 1;
        let (mut row_parts, mut key_parts) = (1, 1);
        if by_rows {
            row_parts = wanted.min(chunks).max(1);
        } else {
            key_parts = wanted.min(kv_len / PART_KV).max(1);
        }
        let chunks_per_part = chunks.div_ceil(row_parts).max(1);
        let row_parts = chunks.div_ceil(chunks_per_part).max(1);
        let part_kv = kv_len.max(1).div_ceil(key_parts).next_multiple_of(scores.block_kv);
        let key_parts = kv_len.div_ceil(part_kv).max(1);
        let bias = bias.map(|[_, heads, rows, keys]| BiasSlab {
            shape: [if heads == 1 { 1 } else { forward.group_size() }, rows, if keys == 1 { 1 } else { part_kv }],
        });
        Self { scores, groups_per_task, row_parts, chunks_per_part, key_parts, part_kv, bias }
    }

    pub(super) fn tasks(&self) -> usize {
        self.groups_per_task.len() * self.row_parts * self.key_parts
    }

    /// Heads whose rows are one group: several of a batch that shares its keys.
    pub(super) fn heads_of_group(&self, forward: &AttentionProblem) -> usize {
        let entries = if self.scores.map.is_one_context() { forward.batch() } else { 1 };
        entries * forward.group_size()
    }

    /// What the parts of a group have for head `[b, h]` in `sums`, `[row part, group, key part, head of the group]`.
    pub(super) fn of_head(&self, forward: &AttentionProblem, sums: &[f64], [b, h]: [usize; 2]) -> f64 {
        let (map, heads, group_size) = (&self.scores.map, self.heads_of_group(forward), forward.group_size());
        let (kv_head, in_group) = (h / group_size, h % group_size);
        let (group, local) = if map.is_one_context() {
            (kv_head, b * group_size + in_group)
        } else {
            (b * forward.kv_heads() + kv_head, in_group)
        };
        let parts = (0..self.row_parts).flat_map(|rows| (0..self.key_parts).map(move |keys| (rows, keys)));
        parts.map(|(rows, keys)| sums[((rows * map.groups() + group) * self.key_parts + keys) * heads + local]).sum()
    }

    /// Whether what the groups sum up for each key is what the gradient has, and nothing is left to add.
    pub(super) fn keys_are_final(&self, gradient: &TensorSpec) -> bool {
        let [batch, kv_heads, ..] = gradient.layout.shape;
        self.row_parts == 1 && self.scores.map.groups() == batch * kv_heads
    }
}

/// Whether a gradient is written where it goes: f32, side by side.
pub(super) fn is_plain(gradient: &TensorSpec) -> bool {
    gradient.element == crate::tensor::Element::F32 && gradient.layout == Layout::bhld(gradient.layout.shape)
}
