//! The fused kernel (shaders/fused.wgsl): tiles, limits, dispatch.

use super::{check_invocations, check_iterations, check_storage_buffers, check_workgroup_memory, storage_buffers};
use crate::caps::DeviceCaps;
use crate::dispatch::{
    Bindings, Kernel, Needs, Params, Part, PlanChoice, Shader, Step, TileShape, Unsupported, Variant, ceil_div,
};
use crate::problem::AttentionProblem;

/// Keys of a block, and invocations of a workgroup.
const BLOCK_KV: usize = 64;
/// Query rows of a workgroup.
const ROWS: [usize; 3] = [8, 4, 1];
/// Floats of the output that one invocation may hold in registers.
const MAX_ACCUMULATORS: usize = 40;
/// The widest value row: 32 floats an invocation, with one query row.
const MAX_V_HEAD_DIM: usize = 32 * BLOCK_KV;

/// Tile sizes for a problem on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiles {
    /// Query rows of a workgroup.
    pub(crate) rows: usize,
    /// Value dimensions of one invocation.
    pub(crate) dims_per_lane: usize,
    /// Workgroup memory, each variable rounded up to 16.
    pub(crate) workgroup_bytes: u64,
}

impl Tiles {
    fn of(problem: &AttentionProblem, rows: usize) -> Self {
        let variables = [rows * problem.head_dim(), BLOCK_KV * rows, BLOCK_KV, rows, rows, 2];
        let workgroup_bytes = variables.iter().map(|words| (*words as u64 * 4).next_multiple_of(16)).sum();
        Self { rows, dims_per_lane: problem.v_head_dim().div_ceil(BLOCK_KV), workgroup_bytes }
    }

    fn fits(&self, caps: &DeviceCaps) -> bool {
        self.rows * self.dims_per_lane <= MAX_ACCUMULATORS
            && self.workgroup_bytes <= u64::from(caps.max_compute_workgroup_storage_size)
    }

    pub(crate) fn shape(&self) -> TileShape {
        TileShape::new(self.rows, BLOCK_KV, true)
    }

    /// Loop iterations of an invocation, but for those over rows and value dimensions, which every driver writes out.
    fn iterations(&self, problem: &AttentionProblem) -> usize {
        // a row's products are summed in chunks of 32
        let dims = problem.head_dim() + problem.head_dim().div_ceil(32) * (2 * self.rows + 1);
        let block = 2 + dims + BLOCK_KV + BLOCK_KV / self.rows;
        let once = self.rows * problem.head_dim().div_ceil(BLOCK_KV) + BLOCK_KV;
        problem.kv_len().div_ceil(BLOCK_KV) * block + once
    }
}

/// The most rows that registers and workgroup memory allow, but no more than there are: every key and value that is
/// loaded serves all of them.
fn tiles(problem: &AttentionProblem, caps: &DeviceCaps) -> Tiles {
    let wanted = match problem.q_len() {
        0 | 1 => 1,
        2..=4 => 4,
        _ => 8,
    };
    let all = ROWS.map(|rows| Tiles::of(problem, rows));
    all.into_iter().find(|tiles| tiles.rows <= wanted && tiles.fits(caps)).unwrap_or_else(|| Tiles::of(problem, 1))
}

/// The preferred rows, and the next fewer.
pub(crate) fn candidates(problem: &AttentionProblem, caps: &DeviceCaps) -> Vec<PlanChoice> {
    let preferred = tiles(problem, caps).rows;
    let rows = ROWS.into_iter().filter(|rows| *rows <= preferred).take(2);
    rows.map(|rows| PlanChoice { tile: Some(Tiles::of(problem, rows).shape()), ..PlanChoice::of(Kernel::Fused) })
        .collect()
}

/// The tiles that were asked for, or the preferred ones, if they fit.
pub(crate) fn tiling(
    problem: &AttentionProblem,
    caps: &DeviceCaps,
    shape: Option<TileShape>,
) -> Result<Tiles, Unsupported> {
    check_invocations(64, caps)?;
    check_storage_buffers(storage_buffers(problem), caps)?;
    if problem.v_head_dim() > MAX_V_HEAD_DIM {
        return Err(Unsupported::Dim { name: "v_head_dim", found: problem.v_head_dim(), max: MAX_V_HEAD_DIM });
    }
    let tiles = match shape {
        None => tiles(problem, caps),
        Some(found) => {
            let all = ROWS.map(|rows| Tiles::of(problem, rows));
            let rows_fit = |tiles: &Tiles| tiles.shape() == found && (tiles.rows == 1 || tiles.fits(caps));
            all.into_iter().find(rows_fit).ok_or_else(|| {
                let fitting = all.iter().filter(|tiles| tiles.rows == 1 || tiles.fits(caps));
                let possible: Vec<_> = fitting.map(|tiles| tiles.shape().to_string()).collect();
                Unsupported::Tile { found, possible: possible.join("; ") }
            })?
        }
    };
    check_workgroup_memory(tiles.workgroup_bytes, problem, caps)?;
    check_iterations(tiles.iterations(problem), caps)?;
    Ok(tiles)
}

pub(crate) fn steps(problem: &AttentionProblem, caps: &DeviceCaps, part: &Part, tiles: &Tiles) -> Vec<Step> {
    let spec = problem.spec();
    let &Tiles { rows, dims_per_lane, workgroup_bytes } = tiles;
    let mut bindings = Bindings::new(problem, part, caps);
    bindings.read_inputs().write_outputs();
    let mut variant = Variant::new(Shader::Fused);
    variant.query(spec).key(spec).value(spec).output(spec).terms(spec).lse(spec);
    variant.snippets(&["q_lens", "keys", "score", "row_end", "numerics"]);
    variant.key_overrides(problem).score_overrides(spec).sink_override(spec);
    variant.constant("ROWS", rows).constant("DIMS_PER_LANE", dims_per_lane);
    variant.size("BLOCK_KV", BLOCK_KV).size("HEAD_DIM", problem.head_dim()).size("V_HEAD_DIM", problem.v_head_dim());
    variant.size("QUERY_TILE", rows * problem.head_dim()).size("PROB_TILE", rows * BLOCK_KV);
    let params = Params::new(problem, part, &bindings);
    let needs = Needs::new(64, tiles.iterations(problem));
    let grid = [ceil_div(part.rows.len(), tiles.rows), part.heads.len() as u64, part.batch.len() as u64];
    vec![Step::new(variant, bindings, params, grid, workgroup_bytes, needs)]
}
