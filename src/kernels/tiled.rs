//! The tiled kernel (shaders/tiled.wgsl): tiles, limits, dispatch.

use super::{check_invocations, check_iterations, check_storage_buffers, check_workgroup_memory, storage_buffers};
use crate::caps::{DeviceCaps, DeviceClass};
use crate::dispatch::{
    Bindings, Kernel, Needs, Params, Part, PlanChoice, Shader, Step, TileShape, Unsupported, Variant, ceil_div,
};
use crate::problem::AttentionProblem;

/// Keys of one invocation: a vec4 of probabilities.
const KEYS: usize = 4;
/// Invocations of a workgroup, at most.
const INVOCATIONS: usize = 64;
/// vec4s of a chunk of a row, at most: the loops over them are written out.
const MAX_CHUNK: usize = 16;
/// vec4s of values whose products are written out one after another, at most: more would not fit an instruction cache of
/// 32 KiB.
const MAX_WRITTEN_OUT: usize = 128;
/// The same of one chunk, for compilers with few registers: they keep more of them than there is room for, and spill.
const MAX_WRITTEN_OUT_FEW_REGISTERS: usize = 32;
/// vec4s of values that an invocation loads at once, at most: a compiler keeps all of them in registers.
const MAX_LOADS: usize = 8;
/// Columns whose share of a block is summed at a time, at most: their sums take registers beside the output.
const MAX_COLUMN_GROUP: usize = 2;
/// vec4s of the output that one invocation may hold in registers, at most.
const MAX_ACCUMULATORS: usize = 48;

/// The same for tiles that are worth a try.
const MAX_TRIED_ACCUMULATORS: usize = 24;
/// Query rows of one invocation, as the shader is made for them.
const ROWS: [usize; 3] = [4, 2, 1];
const MIN_KEY_LANES: usize = 4;
const MAX_KEY_LANES: usize = 16;

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
    /// Passes over the lanes whose values are weighted; divides keys and lanes.
    pub(crate) lane_passes: usize,
    /// Whether values of two keys are weighted in turn, which takes some registers more.
    pub(crate) turned: bool,
    /// Whether the query rows of a block stay in workgroup memory.
    pub(crate) query_resident: bool,
    /// Whether the lanes of a row exchange what they have by shuffles.
    pub(crate) subgroups: bool,
    /// Whether blocks of keys that a boolean mask leaves to no row are left out.
    pub(crate) mask_tiles: bool,
    /// Workgroup memory, each variable rounded up to 16.
    pub(crate) workgroup_bytes: u64,
}

impl Tiles {
    const NONE: Self = Self {
        rows: 1,
        row_lanes: 1,
        key_lanes: 1,
        key_chunk: 0,
        key_chunks: 0,
        value_chunk: 0,
        value_chunks: 0,
        lane_passes: 1,
        turned: false,
        query_resident: false,
        subgroups: false,
        mask_tiles: false,
        workgroup_bytes: 0,
    };

    /// Query rows of a workgroup.
    pub(crate) const fn block_q(&self) -> usize {
        self.rows * self.row_lanes
    }

    const fn block_kv(&self) -> usize {
        KEYS * self.key_lanes
    }

    pub(crate) fn shape(&self) -> TileShape {
        let shape = TileShape::new(self.block_q(), self.block_kv(), self.query_resident);
        TileShape { paired_keys: self.turned, ..shape }
    }

    /// Loop iterations of an invocation, at most: values that are infinite or NaN are weighted key by key.
    const fn iterations(&self, problem: &AttentionProblem) -> usize {
        let block = 1 + self.key_chunks + self.value_chunks * self.columns() * (2 + 2 * self.key_lanes);
        problem.kv_len().div_ceil(self.block_kv()) * block + self.block_q()
    }

    /// Shuffles reach over the key lanes of a row, which are neighbours within a subgroup of at least as many.
    fn needs(&self, problem: &AttentionProblem) -> Needs {
        let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let needs = Needs::new(narrow(self.row_lanes * self.key_lanes), self.iterations(problem));
        if self.subgroups { needs.with_subgroups(narrow(self.key_lanes), u32::MAX) } else { needs }
    }

    /// Value columns of one invocation in a chunk.
    const fn columns(&self) -> usize {
        self.value_chunk.div_ceil(self.key_lanes)
    }

    /// vec4s of the output that one invocation holds.
    const fn accumulators(&self) -> usize {
        self.rows * self.columns() * self.value_chunks
    }

    /// Passes over the lanes whose values are weighted: the fewest that leave each short enough. At most four lanes are
    /// always short enough; none where the lanes cannot be cut that way.
    fn passes(&self) -> Option<usize> {
        let lanes = self.key_lanes;
        let most = if self.turned { MAX_WRITTEN_OUT } else { MAX_WRITTEN_OUT_FEW_REGISTERS };
        let short = |passes: usize| {
            let chunk = KEYS * (lanes / passes) * self.columns();
            chunk <= most && chunk * self.value_chunks <= MAX_WRITTEN_OUT
        };
        let whole = || [1, 2, KEYS].into_iter().filter(|passes| lanes.is_multiple_of(*passes));
        whole().find(|passes| short(*passes)).or_else(|| whole().find(|passes| lanes / passes <= 4))
    }

    /// vec4s of a row of the key and value tile, an odd number.
    fn tile_row(&self) -> usize {
        let key = KEYS / self.lane_passes * self.key_chunk;
        let value = self.block_kv() / self.lane_passes * self.columns();
        key.max(value) | 1
    }

    /// vec4s of a row of the query tile, an odd number.
    const fn query_row(&self) -> usize {
        (self.rows * self.key_chunk) | 1
    }

    fn bytes(&self, query_resident: bool) -> u64 {
        let vec4s = |n: usize| n as u64 * 16;
        let kv_tile = vec4s(self.lane_passes * self.key_lanes * self.tile_row());
        let prob_tile = vec4s(self.block_q() * (self.key_lanes + 1));
        let row_parts = (self.block_q() as u64 * self.key_lanes as u64 * 4).next_multiple_of(16);
        let row_parts = if self.subgroups { 0 } else { row_parts };
        let query_tile = vec4s(self.row_lanes * self.key_chunks * self.query_row());
        let flags = if self.mask_tiles { 64 } else { 32 };
        kv_tile + prob_tile + row_parts + flags + if query_resident { query_tile } else { 0 }
    }
}

/// The tiles for a problem on a device: the largest register tile that registers and workgroup memory allow.
///
/// Registers: 16 accumulators (vec4s) and values of two keys at once where a GPU has plenty, 8 and of one on others; Mesa 26.2
/// spills 76 registers on an Apple M1 at `head_dim` 64 with the former, none with the latter.
pub(crate) fn tiles(problem: &AttentionProblem, caps: &DeviceCaps) -> Tiles {
    let plenty = has_plenty_of_registers(caps);
    let columns = if plenty { 4 } else { 2 };
    let value_vecs = problem.v_head_dim().div_ceil(4);
    let mut last = None;
    for rows in ROWS {
        for lanes in key_lanes(value_vecs, columns) {
            let Some(tiles) = sized(problem, caps, rows, lanes, plenty) else { continue };
            let fits = tiles.workgroup_bytes <= u64::from(caps.max_compute_workgroup_storage_size);
            if fits && tiles.accumulators() <= MAX_ACCUMULATORS {
                return tiles;
            }
            last = Some(tiles);
        }
    }
    // too large, as `supports` will say
    last.unwrap_or(Tiles::NONE)
}

const fn has_plenty_of_registers(caps: &DeviceCaps) -> bool {
    matches!(caps.class, DeviceClass::Discrete | DeviceClass::Virtual)
}

/// Tiles of this shape, with the longest chunks that fit; none where the lanes cannot be cut into short enough passes.
fn sized(problem: &AttentionProblem, caps: &DeviceCaps, rows: usize, key_lanes: usize, plenty: bool) -> Option<Tiles> {
    let budget = u64::from(caps.max_compute_workgroup_storage_size);
    let row_lanes = INVOCATIONS / key_lanes;
    let mask_tiles = problem.spec().mask.is_some();
    let mut tiles = Tiles { rows, row_lanes, key_lanes, turned: plenty, mask_tiles, ..Tiles::NONE };
    // as its needs are compared
    tiles.subgroups = caps.subgroups.is_some_and(|(smallest, largest)| {
        let sizes = [key_lanes as u64, u64::from(smallest), u64::from(largest)];
        sizes.iter().all(|size| size.is_power_of_two()) && sizes[0] <= sizes[1]
    });
    for max_chunk in (1..=MAX_CHUNK).rev() {
        (tiles.key_chunk, tiles.key_chunks) = chunks(problem.head_dim().div_ceil(4), max_chunk);
        // a chunk of a value row has a column for each lane
        let max_chunk = (max_chunk / key_lanes).max(1) * key_lanes;
        (tiles.value_chunk, tiles.value_chunks) = chunks(problem.v_head_dim().div_ceil(4), max_chunk);
        tiles.lane_passes = tiles.passes()?;
        tiles.workgroup_bytes = tiles.bytes(false);
        if tiles.workgroup_bytes <= budget {
            break;
        }
    }
    if tiles.bytes(true) <= budget {
        tiles.query_resident = true;
        tiles.workgroup_bytes = tiles.bytes(true);
    }
    Some(tiles)
}

/// Numbers of invocations across a value row, the best first: where `columns` vec4s each hold the row, few idle columns
/// and small blocks of keys, for staging a block costs in proportion to the lanes; then those where the row does not fit.
fn key_lanes(value_vecs: usize, columns: usize) -> Vec<usize> {
    let mut lanes: Vec<usize> = (MIN_KEY_LANES..=MAX_KEY_LANES).collect();
    lanes.sort_by_key(|&lanes| {
        let held = value_vecs.div_ceil(lanes);
        // weighted sums are half of the work, and a lane more costs 1/128 of it
        let idle = (held * lanes - value_vecs) * 64 / value_vecs.max(1);
        let wide = held > columns && lanes < 16;
        (wide, if wide { 16 - lanes } else { idle + lanes })
    });
    lanes
}

/// A row of `vecs` in equal chunks of at most `max`: as few as leave little empty.
fn chunks(vecs: usize, max: usize) -> (usize, usize) {
    let least = vecs.div_ceil(max);
    let waste = |count: &usize| vecs.div_ceil(*count) * count - vecs;
    let count = (least..=least + 1).min_by_key(waste).unwrap_or(least);
    (vecs.div_ceil(count), count)
}

/// The tiles of a shape that was asked for.
fn forced(problem: &AttentionProblem, caps: &DeviceCaps, shape: TileShape) -> Result<Tiles, Unsupported> {
    let (block_q, block_kv) = (shape.block_q as usize, shape.block_kv as usize);
    let key_lanes = block_kv / KEYS;
    let lanes_fit = (MIN_KEY_LANES..=MAX_KEY_LANES).contains(&key_lanes) && key_lanes * KEYS == block_kv;
    let rows = ROWS.into_iter().find(|rows| lanes_fit && rows * (INVOCATIONS / key_lanes) == block_q);
    let tiles = rows.and_then(|rows| sized(problem, caps, rows, key_lanes, shape.paired_keys));
    let mut tiles = tiles.ok_or_else(|| {
        let all = (MIN_KEY_LANES..=MAX_KEY_LANES).filter(|lanes| sized(problem, caps, 1, *lanes, false).is_some());
        let pairs = all.map(|lanes| format!("{} with {}", INVOCATIONS / lanes, lanes * KEYS));
        let possible = format!("block_q of 1, 2 or 4 times {}, of block_kv", pairs.collect::<Vec<_>>().join(", "));
        Unsupported::Tile { found: shape, possible }
    })?;
    tiles.query_resident = shape.query_resident;
    tiles.workgroup_bytes = tiles.bytes(shape.query_resident);
    Ok(tiles)
}

/// Tiles worth a try: register tiles of 4 and 2 rows, of 1 where that is enough for all rows, with every number of columns
/// that registers hold, over the key lanes that leave the fewest idle; query rows in workgroup memory and not; keys paired
/// and not.
pub(crate) fn candidates(problem: &AttentionProblem, caps: &DeviceCaps) -> Vec<PlanChoice> {
    let plenty = has_plenty_of_registers(caps);
    let budget = u64::from(caps.max_compute_workgroup_storage_size);
    let value_vecs = problem.v_head_dim().div_ceil(4);
    let mut choices = vec![];
    for rows in ROWS {
        let mut columns_seen = vec![];
        let mut lanes: Vec<_> = (MIN_KEY_LANES..=MAX_KEY_LANES).collect();
        lanes.sort_by_key(|lanes| value_vecs.div_ceil(*lanes) * lanes - value_vecs);
        for lanes in lanes {
            let Some(tiles) = sized(problem, caps, rows, lanes, plenty) else { continue };
            let columns = tiles.accumulators() / rows;
            // half the rows would hold them all
            let too_many_rows = rows > 1 && problem.q_len() <= rows / 2 * tiles.row_lanes;
            let too_few_rows = rows == 1 && problem.q_len() > tiles.row_lanes;
            let fits = tiles.workgroup_bytes <= budget && tiles.accumulators() <= MAX_TRIED_ACCUMULATORS;
            if too_many_rows || too_few_rows || !fits || columns_seen.contains(&columns) {
                continue;
            }
            columns_seen.push(columns);
            // resident where it fits
            let shape = tiles.shape();
            for shape in [
                shape,
                TileShape { query_resident: false, ..shape },
                TileShape { paired_keys: !shape.paired_keys, ..shape },
            ] {
                choices.push(PlanChoice { tile: Some(shape), ..PlanChoice::of(Kernel::Tiled) });
            }
        }
    }
    choices
}

/// The tiles that were asked for, or the preferred ones, if they fit.
pub(crate) fn tiling(
    problem: &AttentionProblem,
    caps: &DeviceCaps,
    shape: Option<TileShape>,
) -> Result<Tiles, Unsupported> {
    check_invocations(64, caps)?;
    check_storage_buffers(storage_buffers(problem), caps)?;
    let tiles = match shape {
        None => tiles(problem, caps),
        Some(shape) => forced(problem, caps, shape)?,
    };
    if tiles.accumulators() > MAX_ACCUMULATORS {
        let max = MAX_ACCUMULATORS / tiles.rows * tiles.key_lanes * 4;
        return Err(Unsupported::Dim { name: "v_head_dim", found: problem.v_head_dim(), max });
    }
    check_workgroup_memory(tiles.workgroup_bytes, problem, caps)?;
    check_iterations(tiles.iterations(problem), caps)?;
    Ok(tiles)
}

pub(crate) fn steps(problem: &AttentionProblem, caps: &DeviceCaps, part: &Part, tiles: &Tiles) -> Vec<Step> {
    let spec = problem.spec();
    let mut bindings = Bindings::new(problem, part, caps);
    bindings.read_inputs().write_outputs();
    let mut variant = Variant::new(Shader::Tiled);
    variant.query_vec(spec).key_vec(spec).value_vec(spec).output_vec(spec).terms(spec).lse(spec);
    variant.snippets(&["q_lens", "keys", "score", "exponent", "row_end", "numerics"]);
    variant.snippets(&[if tiles.query_resident { "tile_query_workgroup" } else { "tile_query_storage" }]);
    variant.snippets(&[if tiles.mask_tiles { "tile_mask_bytes" } else { "tile_mask_none" }]);
    variant.key_overrides(problem).score_overrides(spec).sink_override(spec);
    variant.row_masks_override(spec, false).raw_scores_override(problem);
    variant.constant("ROWS", tiles.rows).constant("KEYS", KEYS);
    variant.constant("ROW_LANES", tiles.row_lanes).constant("KEY_LANES", tiles.key_lanes);
    variant.constant("LANE_PASSES", tiles.lane_passes).constant("LANES_AT_ONCE", tiles.key_lanes / tiles.lane_passes);
    variant.constant("PASS_KEYS", KEYS / tiles.lane_passes);
    variant.snippets(&[if tiles.subgroups { "row_parts_subgroup" } else { "row_parts_workgroup" }]);
    if tiles.subgroups {
        variant.constant("LANE_BITS", tiles.key_lanes.ilog2() as usize);
    }
    variant.switch("TURNED", tiles.turned);
    variant.constant("KEY_CHUNK", tiles.key_chunk).constant("KEY_CHUNKS", tiles.key_chunks);
    variant.constant("VALUE_CHUNK", tiles.value_chunk).constant("VALUE_CHUNKS", tiles.value_chunks);
    variant.constant("KEY_LOADS", tiles.key_chunk.div_ceil(tiles.row_lanes));
    let value_loads = tiles.block_kv().div_ceil(tiles.row_lanes);
    let turns = (value_loads * tiles.columns()).div_ceil(MAX_LOADS).min(value_loads);
    variant.constant("VALUE_TURNS", turns).constant("VALUE_LOADS", value_loads.div_ceil(turns));
    variant.switch("KEY_RAGGED", tiles.key_chunk * tiles.key_chunks * 4 > problem.head_dim().next_multiple_of(4));
    variant
        .switch("VALUE_RAGGED", tiles.value_chunk * tiles.value_chunks * 4 > problem.v_head_dim().next_multiple_of(4));
    let group = (1..=MAX_COLUMN_GROUP).rev().find(|group| tiles.columns().is_multiple_of(*group)).unwrap_or(1);
    variant.constant("COLUMN_GROUP", group).constant("COLUMN_GROUPS", tiles.columns() / group);
    variant.constant("COLUMNS", tiles.columns());
    variant.constant("TILE_ROW", tiles.tile_row()).constant("QUERY_ROW", tiles.query_row());
    variant.size("HEAD_DIM", problem.head_dim()).size("V_HEAD_DIM", problem.v_head_dim());
    let params = Params::new(problem, part, &bindings);
    let grid = [ceil_div(part.rows.len(), tiles.block_q()), part.heads.len() as u64, part.batch.len() as u64];
    vec![Step::new(variant, bindings, params, grid, tiles.workgroup_bytes, tiles.needs(problem))]
}
