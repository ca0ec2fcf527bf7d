//! Workspace of a task: made once, used again by every task that follows.

use crate::problem::AttentionProblem;
use crate::tensor::{Element, TensorSpec};

use super::plan::{CpuPlan, CpuStrategy};

/// f32 on lines of the cache.
#[derive(Clone, Debug, Default)]
pub(super) struct Buffer(Vec<Line>);

#[derive(Clone, Copy, Debug, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Line([f32; 16]);

impl Buffer {
    pub(super) fn new(len: usize) -> Self {
        Self(vec![Line([0.0; 16]); len.div_ceil(16)])
    }
}

impl std::ops::Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        bytemuck::cast_slice(&self.0)
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
}

/// Workspace of a task. Tiles lie `tile_rows * width` apart, whatever rows the last one has.
#[derive(Debug)]
pub(super) struct Scratch {
    /// `[tile][head_dim][row]`; with few queries `[row][head_dim]`, with a handful of keys those of one tile.
    pub(super) query: Buffer,
    /// `[tile][v_head_dim][row]`; with few queries `[row][v_head_dim, padded]` until they are finished; with a
    /// handful of keys `[row][v_head_dim]` of one tile.
    pub(super) acc: Buffer,
    /// The padded rows of few queries, turned.
    pub(super) turned: Buffer,
    /// `[tile][row]`.
    pub(super) row_max: Buffer,
    pub(super) row_sum: Buffer,
    pub(super) rescale: Buffer,
    /// `[tile]`: nothing was accumulated yet.
    pub(super) fresh: Vec<bool>,
    /// `[key][row]`.
    pub(super) scores: Buffer,
    /// `[key][row]`: bias, negative infinity where masked.
    pub(super) extra: Buffer,
    /// `[key]`: which rows a boolean mask lets see it.
    pub(super) bits: Vec<u64>,
    /// `[tile][row]`: the keys of a row by its position.
    pub(super) keys: Vec<[usize; 2]>,
    /// Keys of a row within a block.
    pub(super) low: Buffer,
    pub(super) high: Buffer,
    /// ALiBi of a row.
    pub(super) slope: Buffer,
    pub(super) far: Buffer,
    pub(super) near: Buffer,
    /// Blocks of keys and values in f32, and a block of values without what is not finite.
    pub(super) key_block: Buffer,
    pub(super) value_block: Buffer,
    pub(super) clean_block: Buffer,
    /// Four rows of query or of bias, or a vector of rows of output.
    pub(super) lines: Buffer,
}

/// f32 of each buffer, in the order of the fields.
struct Sizes([usize; 16]);

impl Sizes {
    fn new(plan: &CpuPlan, problem: &AttentionProblem) -> Self {
        let spec = problem.spec();
        let (rows, tile) = (plan.chunk_rows(), plan.tile_rows);
        let (dim, v_dim) = (problem.head_dim(), problem.v_head_dim());
        let padded = v_dim.next_multiple_of(plan.level().lanes());
        let few = plan.strategy() == CpuStrategy::FewQueries;
        // with a handful of keys one tile at a time
        let held = if plan.strategy() == CpuStrategy::HandfulOfKeys { tile } else { rows };
        let block = plan.block_kv;
        let in_place = |tensor: &TensorSpec| borrowed(tensor) && spec.paged.is_none();
        let converted = |tensor: &TensorSpec, width: usize| if in_place(tensor) { 0 } else { block * width };
        let extra = spec.bias.is_some() || spec.mask.is_some();
        Self([
            held * dim,
            held * padded,
            if few { rows * padded } else { 0 },
            rows,
            rows,
            tile,
            block * tile,
            if extra { block * tile } else { 0 },
            tile,
            tile,
            if spec.alibi_slopes.is_some() { tile } else { 0 },
            if spec.alibi_slopes.is_some() { tile } else { 0 },
            if spec.alibi_slopes.is_some() { tile } else { 0 },
            converted(&spec.key, dim),
            converted(&spec.value, v_dim),
            if super::rows::may_hide(problem) { block * v_dim } else { 0 },
        ])
    }

    fn bits(plan: &CpuPlan, problem: &AttentionProblem) -> usize {
        if problem.spec().mask.is_some() { plan.block_kv } else { 0 }
    }

    fn lines(plan: &CpuPlan, problem: &AttentionProblem) -> usize {
        (4 * problem.head_dim().max(plan.block_kv)).max(plan.level().lanes() * problem.v_head_dim())
    }
}

/// Whether rows of a tensor are read where they lie.
pub(super) fn borrowed(tensor: &TensorSpec) -> bool {
    tensor.element == Element::F32 && (tensor.layout.strides[3] == 1 || tensor.layout.shape[3] == 1)
}

impl Scratch {
    pub(super) fn new(plan: &CpuPlan, problem: &AttentionProblem) -> Self {
        let Sizes(sizes) = Sizes::new(plan, problem);
        let [
            query,
            acc,
            turned,
            row_max,
            row_sum,
            rescale,
            scores,
            extra,
            low,
            high,
            slope,
            far,
            near,
            key,
            value,
            clean,
        ] = sizes.map(Buffer::new);
        Self {
            query,
            acc,
            turned,
            row_max,
            row_sum,
            rescale,
            fresh: vec![true; plan.tiles],
            scores,
            extra,
            bits: vec![0; Sizes::bits(plan, problem)],
            keys: vec![[0; 2]; plan.chunk_rows()],
            low,
            high,
            slope,
            far,
            near,
            key_block: key,
            value_block: value,
            clean_block: clean,
            lines: Buffer::new(Sizes::lines(plan, problem)),
        }
    }

    /// Bytes of a workspace.
    pub(super) fn bytes(plan: &CpuPlan, problem: &AttentionProblem) -> usize {
        let Sizes(sizes) = Sizes::new(plan, problem);
        let buffers: usize = sizes.into_iter().chain([Sizes::lines(plan, problem)]).map(|n| n.div_ceil(16) * 64).sum();
        buffers + 8 * Sizes::bits(plan, problem) + plan.chunk_rows() * size_of::<[usize; 2]>() + plan.tiles
    }
}
