//! The split kernel (shaders/split.wgsl, combine.wgsl): how rows are folded, how keys are split, dispatch.

use super::{
    check_invocations, check_iterations, check_storage_buffers, check_workgroup_memory, combine, storage_buffers,
};
use crate::caps::{DeviceCaps, DeviceClass};
use crate::dispatch::{
    Bindings, Kernel, Needs, Params, Part, PlanChoice, Shader, Step, TileShape, Unsupported, Variant, ceil_div,
};
use crate::problem::AttentionProblem;

/// Invocations of a workgroup.
const LANES: usize = 64;
/// Keys of one invocation in a block.
const KEYS: usize = 2;
/// vec4s of a query row whose products with a key are summed apart.
const QUERY_CHUNK: usize = 16;
/// vec4s of the output that one invocation may hold in registers, twice.
const MAX_ACCUMULATORS: usize = 16;
/// Fewest keys that are worth a workgroup of their own.
const MIN_SPLIT: usize = 2 * KEYS * LANES;

/// Workgroups of a choice that is worth a try, at most, where keys are split.
const MAX_TRIED_WORKGROUPS: usize = 1024;

/// How a part of a problem is laid over workgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiles {
    /// Query heads taken together: those of a group, or all where all read the same keys and values.
    pub(crate) group: usize,
    /// Batch entries taken together: all where all read the same keys and values (beams, one context for the batch), else 1.
    pub(crate) entries: usize,
    /// Folded query rows of a workgroup.
    pub(crate) rows: usize,
    /// Workgroups that share the rows of a group.
    pub(crate) row_blocks: usize,
    /// Parts of the keys.
    pub(crate) splits: usize,
    pub(crate) column_lanes: usize,
    pub(crate) columns: usize,
    /// Workgroup memory, each variable rounded up to 16.
    pub(crate) workgroup_bytes: u64,
}

/// Workgroups that keep a device busy: some for each of its cores, whose number WebGPU does not tell.
const fn wanted_workgroups(class: DeviceClass) -> usize {
    match class {
        DeviceClass::Discrete | DeviceClass::Virtual => 256,
        DeviceClass::Integrated | DeviceClass::Unknown => 64,
        // a software driver runs workgroups one after another on a few threads
        DeviceClass::Software => 4,
    }
}

/// What was asked for of how parts are laid over workgroups; what was not is left to [`tiles`].
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tiling {
    rows: Option<usize>,
    splits: Option<usize>,
}

impl Tiling {
    pub(crate) fn choice(&self, problem: &AttentionProblem, caps: &DeviceCaps, part: &Part) -> PlanChoice {
        let tiles = tiles(problem, caps, part, self);
        PlanChoice {
            tile: Some(shape(tiles.rows)),
            num_splits: Some(u32::try_from(tiles.splits).unwrap_or(u32::MAX)),
            ..PlanChoice::of(Kernel::Split)
        }
    }
}

fn shape(rows: usize) -> TileShape {
    TileShape::new(rows, KEYS * LANES, true)
}

/// Parts of the keys, at most: each has a block of keys.
fn max_splits(keys: usize) -> usize {
    keys.div_ceil(KEYS * LANES).max(1)
}

/// Sums that make up a score.
fn query_chunks(problem: &AttentionProblem) -> usize {
    problem.head_dim().div_ceil(4 * QUERY_CHUNK)
}

/// Loop iterations of an invocation over this many keys, at most.
fn iterations(problem: &AttentionProblem, keys: usize, rows: usize, column_lanes: usize) -> usize {
    let values = (KEYS * LANES).div_ceil(LANES / column_lanes);
    let block = 2 + problem.head_dim().div_ceil(4) + query_chunks(problem) + values + KEYS * rows + LANES;
    keys.div_ceil(KEYS * LANES) * block + rows * problem.head_dim().div_ceil(4) + (rows + 1) * LANES
}

/// Parts of the keys, at least: as many as a software driver runs to their end.
fn min_splits(problem: &AttentionProblem, keys: usize, caps: &DeviceCaps, rows: usize, column_lanes: usize) -> usize {
    let fits = |splits: &usize| {
        let keys = keys.div_ceil(*splits);
        check_iterations(iterations(problem, keys, rows, column_lanes), caps).is_ok()
    };
    (0..usize::BITS).map(|power| 1usize << power).find(fits).unwrap_or(1)
}

/// Folded rows of a workgroup that registers allow.
fn max_rows(columns: usize, row_count: usize) -> usize {
    (MAX_ACCUMULATORS / columns).max(1).min(row_count.max(1))
}

pub(crate) fn tiles(problem: &AttentionProblem, caps: &DeviceCaps, part: &Part, forced: &Tiling) -> Tiles {
    let value_vecs = problem.v_head_dim().div_ceil(4);
    let query_vecs = problem.head_dim().div_ceil(4);
    let column_lanes = value_vecs.min(LANES);
    let columns = value_vecs.div_ceil(column_lanes);
    let spec = problem.spec();
    let scales = [spec.key_scale, spec.value_scale].into_iter().flatten();
    let all: Vec<_> = [spec.key, spec.value].into_iter().chain(scales).collect();
    let shared = |axis: usize| spec.paged.is_none() && all.iter().all(|of| of.layout.strides[axis] == 0);
    let group = if shared(1) { part.heads.len().max(1) } else { heads_together(problem, part) };
    let entries = if shared(0) { part.batch.len().max(1) } else { 1 };
    let row_count = entries * group * part.rows.len();
    let of = |rows: usize| {
        let words = [rows * query_vecs * 4, rows * KEYS * LANES, rows * (LANES / rows), LANES * 4, rows, 2];
        let workgroup_bytes = words.iter().map(|words| (*words as u64 * 4).next_multiple_of(16)).sum();
        let row_blocks = row_count.div_ceil(rows).max(1);
        let workgroups = part.heads.len() / group * (part.batch.len() / entries) * row_blocks;
        let wanted = wanted_workgroups(caps.class).div_ceil(workgroups.max(1));
        let splits = wanted.min(part.keys.len().div_ceil(MIN_SPLIT)).max(1);
        let splits = splits.max(min_splits(problem, part.keys.len(), caps, rows, column_lanes));
        // a range of the keys may have fewer blocks
        let splits = forced.splits.map_or(splits, |splits| splits.min(max_splits(part.keys.len())));
        Tiles { group, entries, rows, row_blocks, splits, column_lanes, columns, workgroup_bytes }
    };
    if let Some(rows) = forced.rows {
        // a part may have fewer
        return of(rows.min(row_count.max(1)));
    }
    let budget = u64::from(caps.max_compute_workgroup_storage_size);
    let rows = (1..=max_rows(columns, row_count)).rev().find(|rows| of(*rows).workgroup_bytes <= budget).unwrap_or(1);
    // the same number of blocks, evenly filled
    of(row_count.div_ceil(row_count.div_ceil(rows).max(1)).max(1))
}

/// Query heads of a group, whose rows are taken together where the part has whole ones.
pub(crate) fn heads_together(problem: &AttentionProblem, part: &Part) -> usize {
    let group = problem.group_size();
    let whole = part.heads.start.is_multiple_of(group) && part.heads.len().is_multiple_of(group);
    if whole { group } else { 1 }
}

/// What was asked for, or the kernel's rules, if it fits.
pub(crate) fn tiling(
    problem: &AttentionProblem,
    caps: &DeviceCaps,
    choice: &PlanChoice,
) -> Result<Tiling, Unsupported> {
    check_invocations(64, caps)?;
    check_storage_buffers(storage_buffers(problem), caps)?;
    let mut tiling = Tiling::default();
    if let Some(found) = choice.num_splits {
        let max = u32::try_from(max_splits(problem.kv_len())).unwrap_or(u32::MAX);
        if found == 0 || found > max {
            return Err(Unsupported::NumSplits { found, min: 1, max });
        }
        tiling.splits = Some(found as usize);
    }
    let preferred = tiles(problem, caps, &Part::whole(problem), &tiling);
    if let Some(found) = choice.tile {
        let most = max_rows(preferred.columns, preferred.entries * preferred.group * problem.q_len());
        let rows = (1..=most).find(|rows| shape(*rows) == found).ok_or_else(|| {
            let possible = format!("{}, block_q from 1 to {most}", shape(most));
            Unsupported::Tile { found, possible }
        })?;
        tiling.rows = Some(rows);
    }
    let tiles = tiles(problem, caps, &Part::whole(problem), &tiling);
    if tiles.rows * tiles.columns > MAX_ACCUMULATORS {
        let max = MAX_ACCUMULATORS * LANES * 4;
        return Err(Unsupported::Dim { name: "v_head_dim", found: problem.v_head_dim(), max });
    }
    check_workgroup_memory(tiles.workgroup_bytes, problem, caps)?;
    let keys = problem.kv_len().div_ceil(tiles.splits);
    check_iterations(iterations(problem, keys, tiles.rows, tiles.column_lanes), caps)?;
    Ok(tiling)
}

/// The preferred rows and half of them, each with the keys in 1, 2, 4, … parts, as long as the workgroups are not far more
/// than keep a device busy.
pub(crate) fn candidates(problem: &AttentionProblem, caps: &DeviceCaps) -> Vec<PlanChoice> {
    let preferred = tiles(problem, caps, &Part::whole(problem), &Tiling::default()).rows;
    let mut choices = vec![];
    for rows in [preferred, preferred.div_ceil(2)] {
        let tiling = Tiling { rows: Some(rows), splits: Some(1) };
        let tiles = tiles(problem, caps, &Part::whole(problem), &tiling);
        let workgroups = problem.q_heads() / tiles.group * (problem.batch() / tiles.entries) * tiles.row_blocks;
        let mut splits = 1;
        while splits <= max_splits(problem.kv_len()) && (splits == 1 || workgroups * splits <= MAX_TRIED_WORKGROUPS) {
            let tiling = Tiling { rows: Some(rows), splits: Some(splits) };
            choices.push(tiling.choice(problem, caps, &Part::whole(problem)));
            splits *= 2;
        }
    }
    choices
}

/// The parts of the keys, and their merge where there is more than one and this part is not itself one of several.
pub(crate) fn steps(problem: &AttentionProblem, caps: &DeviceCaps, part: &Part, tiling: &Tiling) -> Vec<Step> {
    let spec = problem.spec();
    let tiles = tiles(problem, caps, part, tiling);
    let split = tiles.splits > 1;

    let mut bindings = Bindings::new(problem, part, caps);
    bindings.read_inputs();
    let mut variant = Variant::new(Shader::Split);
    combine::write_ends(problem, part, tiles.splits, &mut bindings, &mut variant);
    variant.query_vec(spec);
    let key_step = variant.key_wide(spec);
    variant.value_vec(spec).terms(spec);
    variant.snippets(&["q_lens", "keys", "score", "row_end", "numerics"]);
    variant.key_overrides(problem).score_overrides(spec).sink_override(spec);
    // entries of the batch with key lengths of their own are rows that see different keys
    variant.row_masks_override(spec, spec.kv_lens && tiles.entries > 1);
    variant.constant("ROWS", tiles.rows).constant("ROW_BLOCKS", tiles.row_blocks).constant("GROUP", tiles.group);
    variant.constant("KEYS", KEYS).constant("QUERY_VECS", problem.head_dim().div_ceil(4));
    variant
        .constant("KEY_STEP", key_step)
        .constant("QUERY_CHUNK", QUERY_CHUNK)
        .constant("QUERY_CHUNKS", query_chunks(problem));
    variant.constant("COLUMN_LANES", tiles.column_lanes).constant("COLUMNS", tiles.columns);
    variant.size("HEAD_DIM", problem.head_dim()).size("V_HEAD_DIM", problem.v_head_dim());
    variant.switch("SHARED_BATCH", tiles.entries > 1);
    let params = Params::new(problem, part, &bindings).with_splits(tiles.splits);
    let keys = part.keys.len().div_ceil(tiles.splits);
    let needs = Needs::new(64, iterations(problem, keys, tiles.rows, tiles.column_lanes));
    let kv_heads = ceil_div(part.heads.len(), tiles.group);
    let grid = [tiles.splits as u64, kv_heads * tiles.row_blocks as u64, ceil_div(part.batch.len(), tiles.entries)];
    let mut steps = vec![Step::new(variant, bindings, params, grid, tiles.workgroup_bytes, needs)];
    if split && part.states.is_none() {
        steps.push(combine::step(problem, caps, part, tiles.splits));
    }
    steps
}
