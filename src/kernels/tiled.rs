//! The tiled kernel (shaders/tiled.wgsl): tiles, limits, dispatch.

use super::params::Params;
use super::{
    Shader, Slot, Unsupported, check_invocations, check_storage_buffers, check_workgroup_memory, storage_buffers,
};
use crate::caps::{DeviceCaps, DeviceClass};
use crate::plan::bindings::Bindings;
use crate::plan::split::Part;
use crate::plan::variant::Variant;
use crate::plan::{Step, ceil_div};
use crate::problem::AttentionProblem;

/// Keys of one invocation: a vec4 of probabilities.
const KEYS: usize = 4;
/// Invocations of a workgroup, at most.
const INVOCATIONS: usize = 64;
/// vec4s of a chunk of a row, at most: the loops over them are written out.
const MAX_CHUNK: usize = 16;
/// Key lanes whose values are written out one after another, at most: more would not fit an instruction cache of 32 KiB.
const MAX_LANES_AT_ONCE: usize = 7;
/// Columns whose share of a block is summed at a time, at most: their sums take registers beside the output.
const MAX_COLUMN_GROUP: usize = 2;
/// vec4s of the output that one invocation may hold in registers, at most.
const MAX_ACCUMULATORS: usize = 48;

/// Tile sizes for a problem on a device. Widths and chunks are in vec4s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiles {
    /// Query rows of one invocation.
    pub(crate) rows: usize,
    /// Invocations that share the query rows of a block.
    pub(crate) row_lanes: usize,
    /// Invocations that share the keys of a block.
    pub(crate) key_lanes: usize,
    pub(crate) key_chunk: usize,
    pub(crate) key_chunks: usize,
    pub(crate) value_chunk: usize,
    pub(crate) value_chunks: usize,
    /// Whether the query rows of a block stay in workgroup memory.
    pub(crate) query_resident: bool,
    /// Workgroup memory, each variable rounded up to 16.
    pub(crate) workgroup_bytes: u64,
}

impl Tiles {
    /// Query rows of a workgroup.
    pub(crate) const fn block_q(&self) -> usize {
        self.rows * self.row_lanes
    }

    const fn block_kv(&self) -> usize {
        KEYS * self.key_lanes
    }

    /// Value columns of one invocation in a chunk.
    const fn columns(&self) -> usize {
        self.value_chunk.div_ceil(self.key_lanes)
    }

    /// vec4s of the output that one invocation holds.
    const fn accumulators(&self) -> usize {
        self.rows * self.columns() * self.value_chunks
    }

    const fn tile_width(&self) -> usize {
        let (key, value) = (self.key_chunk, self.value_chunk);
        (if key > value { key } else { value }) + 1
    }

    fn bytes(&self, query_resident: bool) -> u64 {
        let vec4s = |n: usize| n as u64 * 16;
        let kv_tile = vec4s(self.block_kv() * self.tile_width());
        let prob_tile = vec4s(self.block_q() * (self.key_lanes + 1));
        let partial = (self.block_q() as u64 * self.key_lanes as u64 * 4).next_multiple_of(16);
        let query_tile = vec4s(self.block_q() * self.key_chunks * (self.key_chunk + 1));
        kv_tile + prob_tile + partial + 32 + if query_resident { query_tile } else { 0 }
    }
}

/// The tiles for a problem on a device: the largest register tile that registers and workgroup memory allow.
///
/// Registers: 16 accumulators (vec4s) where a GPU has plenty, 8 on others; Mesa 26.2 spills 51 registers on an Apple M1 at
/// `head_dim` 64 with 16 of them, none with 8.
pub(crate) fn tiles(problem: &AttentionProblem, caps: &DeviceCaps) -> Tiles {
    let accumulators = match caps.class {
        DeviceClass::Discrete | DeviceClass::Virtual => 16,
        DeviceClass::Integrated | DeviceClass::Software | DeviceClass::Unknown => 8,
    };
    let value_vecs = problem.v_head_dim().div_ceil(4);
    let preferred = key_lanes(value_vecs, accumulators / 4);
    let mut last = None;
    for rows in [4, 2, 1] {
        // fewer lanes make smaller blocks of keys, with more columns each
        for lanes in (4..=preferred).rev() {
            let tiles = sized(problem, caps, rows, lanes);
            let fits = tiles.workgroup_bytes <= u64::from(caps.max_compute_workgroup_storage_size);
            if fits && tiles.accumulators() <= MAX_ACCUMULATORS {
                return tiles;
            }
            last = Some(tiles);
        }
    }
    last.unwrap_or_else(|| sized(problem, caps, 1, 4))
}

/// Tiles of this shape, with the longest chunks that fit.
fn sized(problem: &AttentionProblem, caps: &DeviceCaps, rows: usize, key_lanes: usize) -> Tiles {
    let budget = u64::from(caps.max_compute_workgroup_storage_size);
    let mut tiles = Tiles {
        rows,
        row_lanes: INVOCATIONS / key_lanes,
        key_lanes,
        key_chunk: 0,
        key_chunks: 0,
        value_chunk: 0,
        value_chunks: 0,
        query_resident: false,
        workgroup_bytes: 0,
    };
    for max_chunk in (1..=MAX_CHUNK).rev() {
        (tiles.key_chunk, tiles.key_chunks) = chunks(problem.head_dim().div_ceil(4), max_chunk);
        // a chunk of a value row has a column for each lane
        let max_chunk = (max_chunk / key_lanes).max(1) * key_lanes;
        (tiles.value_chunk, tiles.value_chunks) = chunks(problem.v_head_dim().div_ceil(4), max_chunk);
        tiles.workgroup_bytes = tiles.bytes(false);
        if tiles.workgroup_bytes <= budget {
            break;
        }
    }
    if tiles.bytes(true) <= budget {
        tiles.query_resident = true;
        tiles.workgroup_bytes = tiles.bytes(true);
    }
    tiles
}

/// Invocations across a value row: as few as hold it in registers, and then the number that leaves the fewest idle.
fn key_lanes(value_vecs: usize, columns: usize) -> usize {
    let columns = columns.max(1);
    let least = value_vecs.div_ceil(columns).clamp(4, 16);
    let waste = |lanes: &usize| value_vecs.div_ceil(*lanes) * lanes - value_vecs;
    (least..=(least + 2).min(16)).min_by_key(waste).unwrap_or(least)
}

/// A row of `vecs` in equal chunks of at most `max`: as few as leave little empty.
fn chunks(vecs: usize, max: usize) -> (usize, usize) {
    let least = vecs.div_ceil(max);
    let waste = |count: &usize| vecs.div_ceil(*count) * count - vecs;
    let count = (least..=least + 1).min_by_key(waste).unwrap_or(least);
    (vecs.div_ceil(count), count)
}

pub(crate) fn supports(problem: &AttentionProblem, caps: &DeviceCaps) -> Result<(), Unsupported> {
    check_invocations(64, caps)?;
    check_storage_buffers(storage_buffers(problem), caps)?;
    let tiles = tiles(problem, caps);
    if tiles.accumulators() > MAX_ACCUMULATORS {
        let max = MAX_ACCUMULATORS * tiles.key_lanes * 4;
        return Err(Unsupported::Dim { name: "v_head_dim", found: problem.v_head_dim(), max });
    }
    check_workgroup_memory(tiles.workgroup_bytes, problem, caps)
}

pub(crate) fn grid(problem: &AttentionProblem, caps: &DeviceCaps, part: &Part) -> [u64; 3] {
    let block_q = tiles(problem, caps).block_q();
    [ceil_div(part.rows.len(), block_q), part.heads.len() as u64, part.batch.len() as u64]
}

pub(crate) fn steps(problem: &AttentionProblem, caps: &DeviceCaps, part: &Part) -> Vec<Step> {
    let spec = problem.spec();
    let tiles = tiles(problem, caps);
    let mut bindings = Bindings::new(problem, part, caps);
    bindings.read(&[Slot::Query, Slot::Key, Slot::Value]);
    bindings.read_terms();
    bindings.write(Slot::Output);
    if spec.lse {
        bindings.write(Slot::Lse);
    }
    let mut variant = Variant::new(Shader::Tiled);
    variant.query_vec(spec).key_vec(spec).value_vec(spec).output_vec(spec).terms(spec).lse(spec.lse);
    variant.snippets(&["keys", "score", "row_end", "numerics"]);
    variant.snippets(&[if tiles.query_resident { "tile_query_workgroup" } else { "tile_query_storage" }]);
    variant.key_overrides(problem).score_overrides(spec).sink_override(spec);
    variant.row_masks_override(spec);
    variant.constant("ROWS", tiles.rows).constant("KEYS", KEYS);
    variant.constant("ROW_LANES", tiles.row_lanes).constant("KEY_LANES", tiles.key_lanes);
    let at_once = (1..=MAX_LANES_AT_ONCE).rev().find(|n| tiles.key_lanes.is_multiple_of(*n)).unwrap_or(1);
    variant.constant("LANES_AT_ONCE", at_once);
    variant.constant("KEY_CHUNK", tiles.key_chunk).constant("KEY_CHUNKS", tiles.key_chunks);
    variant.constant("VALUE_CHUNK", tiles.value_chunk).constant("VALUE_CHUNKS", tiles.value_chunks);
    let loads = |chunk: usize| tiles.block_kv().div_ceil(tiles.row_lanes * tiles.key_lanes / chunk);
    variant.constant("KEY_LOADS", loads(tiles.key_chunk)).constant("VALUE_LOADS", loads(tiles.value_chunk));
    variant.switch("KEY_RAGGED", tiles.key_chunk * tiles.key_chunks * 4 > problem.head_dim().next_multiple_of(4));
    variant
        .switch("VALUE_RAGGED", tiles.value_chunk * tiles.value_chunks * 4 > problem.v_head_dim().next_multiple_of(4));
    let group = (1..=MAX_COLUMN_GROUP).rev().find(|group| tiles.columns().is_multiple_of(*group)).unwrap_or(1);
    variant.constant("COLUMN_GROUP", group).constant("COLUMN_GROUPS", tiles.columns() / group);
    variant.constant("COLUMNS", tiles.columns()).constant("TILE_WIDTH", tiles.tile_width());
    variant.size("HEAD_DIM", problem.head_dim()).size("V_HEAD_DIM", problem.v_head_dim());
    let params = Params::new(problem, part, &bindings);
    vec![Step::new(variant, bindings, params, grid(problem, caps, part), tiles.workgroup_bytes)]
}
