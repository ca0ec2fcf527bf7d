//! The split kernel (shaders/split.wgsl, combine.wgsl): how rows are folded, how keys are split, dispatch.

use super::params::Params;
use super::{
    Kernel, Shader, Slot, Unsupported, check_invocations, check_iterations, check_storage_buffers,
    check_workgroup_memory, storage_buffers,
};
use crate::caps::{DeviceCaps, DeviceClass};
use crate::plan::bindings::Bindings;
use crate::plan::split::Part;
use crate::plan::variant::Variant;
use crate::plan::{PlanChoice, Step, TileShape, ceil_div};
use crate::problem::AttentionProblem;

/// Invocations of a workgroup.
const LANES: usize = 64;
/// Keys of one invocation in a block.
const KEYS: usize = 2;
/// vec4s of the output that one invocation may hold in registers, twice.
const MAX_ACCUMULATORS: usize = 16;
/// Fewest keys that are worth a workgroup of their own.
const MIN_SPLIT: usize = 2 * KEYS * LANES;

/// Workgroups of a choice that is worth a try, at most, where keys are split.
const MAX_TRIED_WORKGROUPS: usize = 1024;

/// How a part of a problem is laid over workgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiles {
    /// Query heads taken together.
    pub(crate) group: usize,
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
fn max_splits(problem: &AttentionProblem) -> usize {
    problem.kv_len().div_ceil(KEYS * LANES).max(1)
}

/// Loop iterations of an invocation over this many keys, at most.
fn iterations(problem: &AttentionProblem, keys: usize, rows: usize, column_lanes: usize) -> usize {
    let values = (KEYS * LANES).div_ceil(LANES / column_lanes);
    let block = 2 + problem.head_dim().div_ceil(4) + values + KEYS * rows + LANES;
    keys.div_ceil(KEYS * LANES) * block + rows * problem.head_dim().div_ceil(4) + (rows + 1) * LANES
}

/// Parts of the keys, at least: as many as a software driver runs to their end.
fn min_splits(problem: &AttentionProblem, caps: &DeviceCaps, rows: usize, column_lanes: usize) -> usize {
    let fits = |splits: &usize| {
        let keys = problem.kv_len().div_ceil(*splits);
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
    let group = heads_together(problem, part);
    let row_count = group * part.rows.len();
    let of = |rows: usize| {
        let words = [rows * query_vecs * 4, rows * KEYS * LANES, rows * (LANES / rows), LANES * 4, rows, 2];
        let workgroup_bytes = words.iter().map(|words| (*words as u64 * 4).next_multiple_of(16)).sum();
        let row_blocks = row_count.div_ceil(rows).max(1);
        let workgroups = part.heads.len() / group * part.batch.len() * row_blocks;
        let wanted = wanted_workgroups(caps.class).div_ceil(workgroups.max(1));
        let splits = wanted.min(problem.kv_len().div_ceil(MIN_SPLIT)).max(1);
        let splits = splits.max(min_splits(problem, caps, rows, column_lanes));
        let splits = forced.splits.unwrap_or(splits);
        Tiles { group, rows, row_blocks, splits, column_lanes, columns, workgroup_bytes }
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

/// Query heads whose rows are taken together: those of a group, where the part has whole ones.
pub(crate) fn heads_together(problem: &AttentionProblem, part: &Part) -> usize {
    let group = problem.group_size();
    let whole = part.heads.start.is_multiple_of(group) && part.heads.len().is_multiple_of(group);
    if whole { group } else { 1 }
}

fn whole(problem: &AttentionProblem) -> Part {
    Part { batch: 0..problem.batch(), heads: 0..problem.q_heads(), rows: 0..problem.q_len() }
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
        let max = u32::try_from(max_splits(problem)).unwrap_or(u32::MAX);
        if found == 0 || found > max {
            return Err(Unsupported::NumSplits { found, min: 1, max });
        }
        tiling.splits = Some(found as usize);
    }
    let preferred = tiles(problem, caps, &whole(problem), &tiling);
    if let Some(found) = choice.tile {
        let most = max_rows(preferred.columns, preferred.group * problem.q_len());
        let rows = (1..=most).find(|rows| shape(*rows) == found).ok_or_else(|| {
            let possible = format!("{}, block_q from 1 to {most}", shape(most));
            Unsupported::Tile { found, possible }
        })?;
        tiling.rows = Some(rows);
    }
    let tiles = tiles(problem, caps, &whole(problem), &tiling);
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
    let preferred = tiles(problem, caps, &whole(problem), &Tiling::default()).rows;
    let mut choices = vec![];
    for rows in [preferred, preferred.div_ceil(2)] {
        let tiling = Tiling { rows: Some(rows), splits: Some(1) };
        let tiles = tiles(problem, caps, &whole(problem), &tiling);
        let workgroups = problem.q_heads() / tiles.group * problem.batch() * tiles.row_blocks;
        let mut splits = 1;
        while splits <= max_splits(problem) && (splits == 1 || workgroups * splits <= MAX_TRIED_WORKGROUPS) {
            let tiling = Tiling { rows: Some(rows), splits: Some(splits) };
            choices.push(tiling.choice(problem, caps, &whole(problem)));
            splits *= 2;
        }
    }
    choices
}

pub(crate) fn grids(problem: &AttentionProblem, caps: &DeviceCaps, part: &Part, tiling: &Tiling) -> Vec<[u64; 3]> {
    let tiles = tiles(problem, caps, part, tiling);
    let mut grids = vec![split_grid(&tiles, part)];
    if tiles.splits > 1 {
        grids.push(combine_grid(part));
    }
    grids
}

fn split_grid(tiles: &Tiles, part: &Part) -> [u64; 3] {
    let kv_heads = ceil_div(part.heads.len(), tiles.group);
    [tiles.splits as u64, kv_heads * tiles.row_blocks as u64, part.batch.len() as u64]
}

pub(crate) fn combine_grid(part: &Part) -> [u64; 3] {
    [part.rows.len() as u64, part.heads.len() as u64, part.batch.len() as u64]
}

/// The parts of the keys, and their merge where there is more than one.
pub(crate) fn steps(problem: &AttentionProblem, caps: &DeviceCaps, part: &Part, tiling: &Tiling) -> Vec<Step> {
    let spec = problem.spec();
    let tiles = tiles(problem, caps, part, tiling);
    let split = tiles.splits > 1;

    let mut bindings = Bindings::new(problem, part, caps);
    bindings.read(&[Slot::Query, Slot::Key, Slot::Value]).read_terms();
    let mut variant = Variant::new(Shader::Split);
    variant.query_vec(spec).key_vec(spec).value_vec(spec).terms(spec);
    variant.snippets(&["keys", "score", "row_end", "numerics"]);
    if split {
        bindings.workspace(state_words(problem, part, tiles.splits)).write(Slot::Workspace);
        variant.snippets(&["split_end_partial", "part_state"]);
    } else {
        bindings.write(Slot::Output);
        if spec.lse {
            bindings.write(Slot::Lse);
        }
        variant.snippets(&["split_end_whole"]).output_vec(spec).lse(spec.lse);
    }
    variant.key_overrides(problem).score_overrides(spec).sink_override(spec).row_masks_override(spec);
    variant.constant("ROWS", tiles.rows).constant("ROW_BLOCKS", tiles.row_blocks).constant("GROUP", tiles.group);
    variant.constant("KEYS", KEYS).constant("QUERY_VECS", problem.head_dim().div_ceil(4));
    variant.constant("COLUMN_LANES", tiles.column_lanes).constant("COLUMNS", tiles.columns);
    variant.constant("SPLITS", tiles.splits);
    variant.size("HEAD_DIM", problem.head_dim()).size("V_HEAD_DIM", problem.v_head_dim());
    let mut params = Params::new(problem, part, &bindings);
    if split {
        params = with_states(params, part);
    }
    let mut steps = vec![Step::new(variant, bindings, params, split_grid(&tiles, part), tiles.workgroup_bytes)];
    if split {
        steps.push(combine(problem, caps, part, tiles.splits));
    }
    steps
}

/// The merge of the states of the parts of the keys.
pub(crate) fn combine(problem: &AttentionProblem, caps: &DeviceCaps, part: &Part, splits: usize) -> Step {
    let spec = problem.spec();
    let mut bindings = Bindings::new(problem, part, caps);
    if spec.sinks {
        bindings.read(&[Slot::RowData]);
    }
    bindings.workspace(state_words(problem, part, splits)).write(Slot::Workspace).write(Slot::Output);
    if spec.lse {
        bindings.write(Slot::Lse);
    }
    let mut variant = Variant::new(Shader::Combine);
    variant.output(spec).row_data(spec.sinks).lse(spec.lse).snippets(&["row_end", "numerics", "part_state"]);
    variant.sink_override(spec).constant("SPLITS", splits).size("V_HEAD_DIM", problem.v_head_dim());
    let params = with_states(Params::new(problem, part, &bindings), part);
    Step::new(variant, bindings, params, combine_grid(part), 0)
}

fn row_count(part: &Part) -> usize {
    part.batch.len() * part.heads.len() * part.rows.len()
}

/// Words that the states take: an output and a log-sum-exp for each row and part of the keys.
pub(crate) fn state_words(problem: &AttentionProblem, part: &Part, splits: usize) -> usize {
    splits.saturating_mul(row_count(part)).saturating_mul(problem.v_head_dim() + 1)
}

/// The parameters with the places of the states.
pub(crate) fn with_states(mut params: Params, part: &Part) -> Params {
    let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let (heads, len) = (part.heads.len(), part.rows.len());
    params.scores_strides = [narrow(heads * len), narrow(len), 1, 0];
    params.scores_offset = narrow(row_count(part));
    params
}
