//! The rows kernel (shaders/rows.wgsl): how rows and keys are laid over the lanes of a subgroup, limits, dispatch.

use super::{check_invocations, check_storage_buffers, check_workgroup_memory, combine, split, storage_buffers};
use crate::caps::{DeviceCaps, DeviceClass};
use crate::dispatch::{
    Bindings, Kernel, Needs, Params, Part, PlanChoice, Shader, Step, TileShape, Unsupported, Variant, ceil_div,
};
use crate::problem::AttentionProblem;

/// Query rows of one lane, at most.
const MAX_ROWS: usize = 4;
/// Lanes that share keys, at most.
const MAX_ROW_LANES: usize = 8;
/// vec4s of a lane's query rows, at most; the same of its outputs. They are written out, and compiled for each problem.
const MAX_VECS: usize = 64;
/// The same where compiling would take longer than computing.
const MAX_VECS_SMALL: usize = 16;
/// vec4s of long rows, which two lanes do not share unevenly.
const LONG_VECS: usize = 25;
/// Multiplications from which on a problem is not small.
const SMALL: usize = 1 << 23;
/// The widest row that is written out.
const MAX_DIM: usize = 512;
/// Workgroup memory: the span of keys.
const SPAN_BYTES: u64 = 16;
/// Sizes of a subgroup that the lanes can be laid over.
const SUBGROUPS: std::ops::RangeInclusive<u32> = 4..=128;
/// Keys of a lane whose sums are kept apart.
const BLOCK_KEYS: usize = 64;
/// Workgroups that keep the threads of a software driver busy.
const WANTED_WORKGROUPS: usize = 8;
/// Fewest keys that are worth a workgroup of their own.
const MIN_SPLIT: usize = 512;
/// Keys of a lane, at most: a software driver leaves loops after some number of iterations (`check_iterations`).
const MAX_LANE_KEYS: usize = 1 << 15;

/// How a problem is laid over subgroups. Parts of it are laid in the same way, so that cutting changes no bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiles {
    pub(crate) subgroup: usize,
    /// Query rows of one lane.
    pub(crate) rows: usize,
    /// Lanes that share keys.
    pub(crate) row_lanes: usize,
    /// Parts of the keys.
    pub(crate) splits: usize,
}

impl Tiles {
    /// Query rows of a workgroup.
    const fn block_q(&self) -> usize {
        self.rows * self.row_lanes
    }

    const fn key_lanes(&self) -> usize {
        self.subgroup / self.row_lanes
    }

    fn shape(&self) -> TileShape {
        TileShape::new(self.block_q(), self.key_lanes(), false)
    }

    /// Lanes are laid over subgroups of one size. A lane has the keys of whole blocks.
    fn needs(&self, part: &Part) -> Needs {
        let lanes = u32::try_from(self.subgroup).unwrap_or(u32::MAX);
        let blocks = part.keys.len().div_ceil(BLOCK_KEYS * self.key_lanes()).div_ceil(self.splits.max(1)).max(1);
        Needs::new(lanes, blocks * (BLOCK_KEYS + 1)).with_subgroups(lanes, lanes)
    }

    /// As a choice with nothing left open.
    pub(crate) fn choice(&self) -> PlanChoice {
        let num_splits = u32::try_from(self.splits).unwrap_or(u32::MAX);
        PlanChoice { tile: Some(self.shape()), num_splits: Some(num_splits), ..PlanChoice::of(Kernel::Rows) }
    }
}

fn subgroup(caps: &DeviceCaps) -> Result<u32, Unsupported> {
    match caps.subgroups {
        Some((min, max)) if min == max && min.is_power_of_two() && SUBGROUPS.contains(&min) => Ok(min),
        found => Err(Unsupported::Subgroups { found }),
    }
}

fn vecs(problem: &AttentionProblem) -> usize {
    problem.head_dim().max(problem.v_head_dim()).div_ceil(4)
}

/// Parts of the keys, at least.
fn min_splits(kv_len: usize, key_lanes: usize) -> usize {
    kv_len.div_ceil(MAX_LANE_KEYS * key_lanes).max(1)
}

/// Parts of the keys, at most: each has a block of keys.
fn max_splits(kv_len: usize, key_lanes: usize) -> usize {
    kv_len.div_ceil(BLOCK_KEYS * key_lanes).max(1)
}

/// The most rows a lane first, for whatever is loaded serves them all; then as many lanes as the rest of the rows need.
fn tiles(problem: &AttentionProblem, subgroup: usize) -> Tiles {
    let dims = problem.head_dim() + problem.v_head_dim();
    let small = problem.rows().saturating_mul(problem.kv_len()).saturating_mul(dims) < SMALL;
    let max_rows = (if small { MAX_VECS_SMALL } else { MAX_VECS } / vecs(problem)).clamp(1, MAX_ROWS);
    let row_count = (problem.group_size() * problem.q_len()).max(1);
    let row_lanes = row_count.div_ceil(max_rows).next_power_of_two().min(subgroup).min(MAX_ROW_LANES);
    let rows = row_count.div_ceil(row_lanes).min(max_rows);
    // a compiler of software drivers does not come to an end of two lanes whose last load reaches behind long rows
    let ragged = [problem.head_dim(), problem.v_head_dim()].iter().any(|dim| dim.div_ceil(4) % 2 == 1);
    let row_lanes = if row_lanes == 2 && ragged && vecs(problem) >= LONG_VECS { 1 } else { row_lanes };
    let workgroups = problem.batch() * problem.kv_heads() * row_count.div_ceil(rows * row_lanes);
    let splits = WANTED_WORKGROUPS.div_ceil(workgroups.max(1)).min(problem.kv_len() / MIN_SPLIT);
    let splits = splits.max(min_splits(problem.kv_len(), subgroup / row_lanes));
    Tiles { subgroup, rows, row_lanes, splits }
}

/// Every layout of rows over lanes that the shader can be built for, with the keys in as few parts as may be.
fn all(problem: &AttentionProblem, subgroup: usize) -> impl Iterator<Item = Tiles> + use<> {
    let max_rows = (MAX_VECS / vecs(problem)).clamp(1, MAX_ROWS);
    let kv_len = problem.kv_len();
    let of = move |row_lanes| {
        let splits = min_splits(kv_len, subgroup / row_lanes);
        (1..=max_rows).map(move |rows| Tiles { subgroup, rows, row_lanes, splits })
    };
    [1, 2, 4, MAX_ROW_LANES].into_iter().filter(move |lanes| *lanes <= subgroup).flat_map(of)
}

/// The preferred layout, one with half the rows a lane and one with more, each with the keys in the preferred number of
/// parts and in as few as may be; on software drivers only.
pub(crate) fn candidates(problem: &AttentionProblem, caps: &DeviceCaps) -> Vec<PlanChoice> {
    let Some(lanes) = subgroup(caps).ok().filter(|_| caps.class == DeviceClass::Software) else { return vec![] };
    let preferred = tiles(problem, lanes as usize);
    let wanted = [preferred.rows, preferred.rows / 2, preferred.rows * 2];
    let near = all(problem, lanes as usize).filter(|tiles| tiles.row_lanes == preferred.row_lanes);
    let near = near.filter(|tiles| wanted.contains(&tiles.rows));
    near.flat_map(|tiles| [Tiles { splits: preferred.splits, ..tiles }, tiles]).map(|tiles| tiles.choice()).collect()
}

/// What was asked for, or the kernel's rules, if it fits.
pub(crate) fn tiling(problem: &AttentionProblem, caps: &DeviceCaps, choice: &PlanChoice) -> Result<Tiles, Unsupported> {
    let lanes = subgroup(caps)?;
    check_invocations(lanes, caps)?;
    check_storage_buffers(storage_buffers(problem), caps)?;
    check_workgroup_memory(SPAN_BYTES, problem, caps)?;
    for (name, found) in [("head_dim", problem.head_dim()), ("v_head_dim", problem.v_head_dim())] {
        if found > MAX_DIM {
            return Err(Unsupported::Dim { name, found, max: MAX_DIM });
        }
    }
    let mut tiles = tiles(problem, lanes as usize);
    if let Some(found) = choice.tile {
        let splits = tiles.splits;
        let forced = all(problem, lanes as usize).find(|tiles| tiles.shape() == found).ok_or_else(|| {
            let possible: Vec<_> = all(problem, lanes as usize).map(|tiles| tiles.shape().to_string()).collect();
            Unsupported::Tile { found, possible: possible.join("; ") }
        })?;
        tiles = Tiles { splits: splits.max(forced.splits), ..forced };
    }
    if let Some(found) = choice.num_splits {
        let possible = [min_splits, max_splits].map(|splits| splits(problem.kv_len(), tiles.key_lanes()));
        let [min, max] = possible.map(|splits| u32::try_from(splits).unwrap_or(u32::MAX));
        if !(min..=max).contains(&found) {
            return Err(Unsupported::NumSplits { found, min, max });
        }
        tiles.splits = found as usize;
    }
    Ok(tiles)
}

/// The parts of the keys, and their merge where there is more than one and this part is not itself one of several.
pub(crate) fn steps(problem: &AttentionProblem, caps: &DeviceCaps, part: &Part, tiles: &Tiles) -> Vec<Step> {
    let spec = problem.spec();
    let split = tiles.splits > 1;
    let mut bindings = Bindings::new(problem, part, caps);
    bindings.read_inputs();
    let mut variant = Variant::new(Shader::Rows);
    combine::write_ends(problem, part, tiles.splits, &mut bindings, &mut variant);
    variant.query_vec(spec).key_vec(spec).value_vec(spec).terms(spec);
    variant.snippets(&["q_lens", "keys", "score", "row_end", "numerics"]);
    variant.key_overrides(problem).score_overrides(spec).sink_override(spec).row_masks_override(spec, false);
    let (key_vecs, value_vecs) = (problem.head_dim().div_ceil(4), problem.v_head_dim().div_ceil(4));
    variant.constant("SUBGROUP", tiles.subgroup).constant("ROWS", tiles.rows).constant("ROW_LANES", tiles.row_lanes);
    variant.constant("KEY_LANES", tiles.key_lanes()).constant("KEY_LEVELS", tiles.key_lanes().ilog2() as usize);
    variant.constant("KEY_VECS", key_vecs).constant("KEY_LOADS", key_vecs.div_ceil(tiles.row_lanes));
    variant.constant("VALUE_VECS", value_vecs).constant("VALUE_LOADS", value_vecs.div_ceil(tiles.row_lanes));
    variant.constant("BLOCK_KV", BLOCK_KEYS * tiles.key_lanes());
    let group = split::heads_together(problem, part);
    variant.constant("GROUP", group);
    variant.size("HEAD_DIM", problem.head_dim()).size("V_HEAD_DIM", problem.v_head_dim());
    let params = Params::new(problem, part, &bindings).with_splits(tiles.splits);
    let kv_heads = part.heads.len() / group;
    let grid =
        [ceil_div(group * part.rows.len(), tiles.block_q()), (kv_heads * tiles.splits) as u64, part.batch.len() as u64];
    let mut steps = vec![Step::new(variant, bindings, params, grid, SPAN_BYTES, tiles.needs(part))];
    if split && part.states.is_none() {
        steps.push(combine::step(problem, caps, part, tiles.splits));
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::AttentionSpec;

    /// The compiler of a software driver does not come to an end of two lanes that share 25, 27, ... vec4s.
    #[test]
    fn two_lanes_share_long_rows_evenly() {
        let lanes = |dim: usize, v_dim: usize| {
            let mut spec = AttentionSpec::new([1, 2, 1, dim], [1, 1, 40, dim]);
            spec.value.layout.shape[3] = v_dim;
            spec.output.layout = crate::tensor::Layout::bhld([1, 2, 1, v_dim]);
            tiles(&AttentionProblem::new(spec).unwrap(), 4).row_lanes
        };
        assert_eq!([68, 96, 104, 152].map(|dim| lanes(dim, dim)), [2; 4]);
        assert_eq!([100, 108, 124, 132, 156].map(|dim| lanes(dim, dim)), [1; 5]);
        assert_eq!((lanes(128, 100), lanes(100, 128), lanes(40, 100)), (1, 1, 1));
    }
}
