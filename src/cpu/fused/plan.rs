//! How an attention is cut up for the CPU: a strategy by shape, and the sizes of its blocks.

use crate::cpu::simd::shared::RowMap;
use crate::cpu::simd::{Exponents, SimdLevel};
use crate::problem::AttentionProblem;
use crate::tensor::Element;

/// How the rows of an attention are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CpuStrategy {
    /// Tiles of query rows along the vector lanes, online softmax over blocks of keys.
    ManyQueries,
    /// The same with all keys in one block: nothing is rescaled.
    FewKeys,
    /// Columns along the vector lanes; every key and value is read once for all rows that share it.
    FewQueries,
    /// Columns along the vector lanes; rows of queries and output are read and written where they lie, once.
    HandfulOfKeys,
}

/// What the CPU path will run for a problem, and why. The same problem and level give the same plan, whatever the
/// number of threads.
#[derive(Clone, Debug, PartialEq)]
pub struct CpuPlan {
    level: SimdLevel,
    strategy: CpuStrategy,
    pub(super) map: RowMap,
    /// Rows of a full tile.
    pub(super) tile_rows: usize,
    /// Tiles that a task computes on one read of keys and values.
    pub(super) tiles: usize,
    /// Keys of a block.
    pub(super) block_kv: usize,
    /// Parts that the keys are cut into, and the keys of each.
    pub(super) splits: usize,
    pub(super) split_kv: usize,
    /// How scores become weights.
    pub(super) exponents: Exponents,
    /// Whether it is too little for more than one thread.
    pub(super) serial: bool,
    pub(super) workspace_bytes: usize,
    pub(super) partial_bytes: usize,
}

/// Tasks that an attention is cut into where it can be: enough for a large machine, and for an even load.
const TASKS: usize = 32;
/// Most keys of a block.
const BLOCK_KV: usize = 128;
/// Most f32 of a block of keys that are not stored as such, where a few rows read it.
const CONVERTED: usize = 4096;
/// Most keys for which turning the queries costs more than it saves.
const HANDFUL: usize = 16;
/// Most rows of a tile whose rows are not turned.
const HANDFUL_ROWS: usize = 64;
/// Keys below which a split is not worth its merge.
const SPLIT_KV: usize = 512;
/// Multiplications below which waking another thread takes longer than the work.
const SERIAL: usize = 1 << 17;

impl CpuPlan {
    /// Plans a problem for a level.
    #[must_use]
    pub fn new(problem: &AttentionProblem, level: SimdLevel) -> Self {
        let (kv_len, width) = (problem.kv_len(), problem.head_dim().max(problem.v_head_dim()));
        let group_rows = RowMap::new(problem, 1).group_rows();
        // keys and values of a block are 128 KiB at most, and stay in the second cache
        let mut block_kv = (BLOCK_KV * 128 / width.max(128)).next_multiple_of(16).max(16);
        // what is converted for a few rows is read but once or twice: in blocks of 16 KiB it stays in the first cache
        let converted = problem.spec().key.element != Element::F32 || problem.spec().value.element != Element::F32;
        if converted && group_rows <= 2 * level.lanes() && kv_len > block_kv {
            block_kv = (CONVERTED / width.max(1) / 16 * 16).clamp(16, block_kv);
        }
        // below this, most lanes would be empty
        let few_queries = group_rows <= level.lanes() / 2;
        let strategy = if few_queries {
            CpuStrategy::FewQueries
        } else if kv_len <= HANDFUL {
            block_kv = kv_len.next_multiple_of(16).max(16);
            CpuStrategy::HandfulOfKeys
        } else if kv_len <= block_kv {
            CpuStrategy::FewKeys
        } else {
            CpuStrategy::ManyQueries
        };
        let most_vectors = match strategy {
            CpuStrategy::FewQueries => 1,
            CpuStrategy::HandfulOfKeys => HANDFUL_ROWS / level.lanes(),
            CpuStrategy::FewKeys | CpuStrategy::ManyQueries => level.tile_vectors(),
        };
        let vectors = group_rows.div_ceil(level.lanes()).clamp(1, most_vectors);
        let tile_rows = vectors * level.lanes();
        let mut tiles = if few_queries { 1 } else { group_rows.div_ceil(tile_rows).clamp(1, 256 / tile_rows) };
        let chunks = |tiles: usize| RowMap::new(problem, tiles * tile_rows).chunks().max(1);
        let split_kv = if few_queries { SPLIT_KV } else { 2 * SPLIT_KV };
        let mut splits = TASKS.div_ceil(chunks(tiles)).min(kv_len / split_kv).max(1);
        while tiles > 1 && chunks(tiles) * splits < TASKS {
            tiles /= 2;
            splits = TASKS.div_ceil(chunks(tiles)).min(kv_len / split_kv).max(1);
        }
        let split_kv = kv_len.div_ceil(splits).next_multiple_of(block_kv);
        let splits = kv_len.div_ceil(split_kv.max(1)).max(1);
        let map = RowMap::new(problem, tiles * tile_rows);
        let mut plan = Self {
            level,
            strategy,
            map,
            tile_rows,
            tiles,
            block_kv,
            splits,
            split_kv,
            exponents: Exponents { factor: problem.exponent_scale(), unit: unit(problem) },
            serial: problem.rows().saturating_mul(kv_len).saturating_mul(width) < SERIAL,
            workspace_bytes: 0,
            partial_bytes: 0,
        };
        plan.workspace_bytes = super::scratch::Scratch::bytes(&plan, problem);
        if splits > 1 {
            plan.partial_bytes = 4 * map.chunks() * splits * plan.partial_len(problem.v_head_dim());
        }
        plan
    }

    /// The plan by which a backward scores: by the forward's strategy, and in blocks that leave room in the first cache for the
    /// gradients beside the scores.
    pub(super) fn for_backward(problem: &AttentionProblem, level: SimdLevel, map: RowMap) -> Self {
        /// Keys of a block.
        const BLOCK: usize = 64;
        /// Rows that read keys and values together, at most.
        const CHUNK_ROWS: usize = 256;
        let mut plan = Self::new(problem, level);
        let group_rows = map.group_rows();
        // dot products are summed as the forward sums them, whose maximum and sum make weights of them: where scores are in the
        // thousands another order would spoil these
        if plan.strategy == CpuStrategy::FewKeys {
            plan.strategy = CpuStrategy::ManyQueries;
        }
        let few = plan.strategy == CpuStrategy::FewQueries;
        let most = if few { 1 } else { level.tile_vectors() };
        plan.tile_rows = group_rows.div_ceil(level.lanes()).clamp(1, most) * level.lanes();
        let most = if few { 1 } else { (CHUNK_ROWS / plan.tile_rows).max(1) };
        plan.tiles = group_rows.div_ceil(plan.tile_rows).clamp(1, most);
        plan.block_kv = BLOCK;
        plan.map = map.with_chunks(plan.tiles * plan.tile_rows);
        (plan.splits, plan.split_kv) = (1, problem.kv_len().max(1).next_multiple_of(BLOCK));
        // of five products where the forward has two
        plan.serial = problem.rows().saturating_mul(problem.kv_len()).saturating_mul(problem.head_dim()) < SERIAL / 2;
        plan.workspace_bytes = super::scratch::Scratch::bytes(&plan, problem);
        plan.partial_bytes = 0;
        plan
    }

    /// Which instructions.
    #[must_use]
    pub const fn level(&self) -> SimdLevel {
        self.level
    }

    /// How rows are computed.
    #[must_use]
    pub const fn strategy(&self) -> CpuStrategy {
        self.strategy
    }

    /// Bytes of workspace of each thread.
    #[must_use]
    pub const fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }

    /// Bytes that all threads share: results of parts of the keys, before they are merged.
    #[must_use]
    pub const fn partial_bytes(&self) -> usize {
        self.partial_bytes
    }

    /// Rows of a task at most.
    pub(super) const fn chunk_rows(&self) -> usize {
        self.tiles * self.tile_rows
    }

    /// f32 that the state of a task takes: sums of values, then maxima and sums of weights.
    pub(super) const fn partial_len(&self, v_head_dim: usize) -> usize {
        self.chunk_rows() * (v_head_dim + 2)
    }
}

/// What all weights are multiplied by: the inverse of no less than the number of keys, so that no sum of weighted values
/// leaves the range of f32 where the mean does not. Values in f16 are far from its end.
fn unit(problem: &AttentionProblem) -> f32 {
    /// What weights may lose below 2^-126 is then below 2^-126 of the largest, as it is in sums of normalised weights.
    const SMALLEST: u32 = 24;
    match problem.spec().value.element {
        Element::F32 | Element::Bf16 | Element::I8 => {
            0.5f32.powi(problem.kv_len().max(1).next_power_of_two().ilog2().min(SMALLEST).cast_signed())
        }
        Element::F16 => 1.0,
    }
}

impl std::fmt::Display for CpuPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rows = self.map.group_rows();
        let (strategy, why) = match self.strategy {
            CpuStrategy::ManyQueries => ("many queries", format!("{rows} rows share their keys and values")),
            CpuStrategy::FewKeys => ("few keys", "all keys fit a block".to_owned()),
            CpuStrategy::HandfulOfKeys => ("a handful of keys", "too few to turn the queries for".to_owned()),
            CpuStrategy::FewQueries => ("few queries", format!("only {rows} rows share their keys and values")),
        };
        writeln!(f, "kernel     cpu_fused, {strategy}: {why}")?;
        writeln!(f, "simd       {}, {} lanes", self.level, self.level.lanes())?;
        writeln!(
            f,
            "blocks     {} rows a tile, {} tiles a task, {} keys a block; keys in {} {}",
            self.tile_rows,
            self.tiles,
            self.block_kv,
            self.splits,
            if self.splits == 1 { "part" } else { "parts" }
        )?;
        let tasks = self.map.chunks() * self.splits;
        writeln!(
            f,
            "tasks      {tasks}{}",
            if self.serial { ", one after another: too little for threads" } else { "" }
        )?;
        writeln!(f, "workspace  {} bytes a thread, {} bytes shared", self.workspace_bytes, self.partial_bytes)
    }
}
