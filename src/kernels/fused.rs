//! The fused kernel (shaders/fused.wgsl): tiles, limits, dispatch.

use super::params::Params;
use super::{
    Shader, Slot, Unsupported, check_invocations, check_storage_buffers, check_workgroup_memory, storage_buffers,
};
use crate::caps::DeviceCaps;
use crate::plan::bindings::Bindings;
use crate::plan::split::Part;
use crate::plan::variant::Variant;
use crate::plan::{Step, ceil_div};
use crate::problem::AttentionProblem;

/// Keys of a block, and invocations of a workgroup.
const BLOCK_KV: usize = 64;
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

/// The most rows that registers and workgroup memory allow, but no more than there are: every key and value that is
/// loaded serves all of them.
pub(crate) fn tiles(problem: &AttentionProblem, caps: &DeviceCaps) -> Tiles {
    let dims_per_lane = problem.v_head_dim().div_ceil(BLOCK_KV);
    let of = |rows: usize| {
        let variables = [rows * problem.head_dim(), BLOCK_KV * rows, BLOCK_KV, rows, rows, 2];
        let workgroup_bytes = variables.iter().map(|words| (*words as u64 * 4).next_multiple_of(16)).sum();
        Tiles { rows, dims_per_lane, workgroup_bytes }
    };
    let wanted = match problem.q_len() {
        0 | 1 => 1,
        2..=4 => 4,
        _ => 8,
    };
    let fits = |tiles: &Tiles| {
        tiles.rows <= wanted
            && tiles.rows * dims_per_lane <= MAX_ACCUMULATORS
            && tiles.workgroup_bytes <= u64::from(caps.max_compute_workgroup_storage_size)
    };
    [8, 4, 1].map(of).into_iter().find(fits).unwrap_or_else(|| of(1))
}

pub(crate) fn supports(problem: &AttentionProblem, caps: &DeviceCaps) -> Result<(), Unsupported> {
    check_invocations(64, caps)?;
    check_storage_buffers(storage_buffers(problem), caps)?;
    if problem.v_head_dim() > MAX_V_HEAD_DIM {
        return Err(Unsupported::Dim { name: "v_head_dim", found: problem.v_head_dim(), max: MAX_V_HEAD_DIM });
    }
    check_workgroup_memory(tiles(problem, caps).workgroup_bytes, problem, caps)
}

pub(crate) fn grid(problem: &AttentionProblem, caps: &DeviceCaps, part: &Part) -> [u64; 3] {
    let rows = tiles(problem, caps).rows;
    [ceil_div(part.rows.len(), rows), part.heads.len() as u64, part.batch.len() as u64]
}

pub(crate) fn steps(problem: &AttentionProblem, caps: &DeviceCaps, part: &Part) -> Vec<Step> {
    let spec = problem.spec();
    let Tiles { rows, dims_per_lane, workgroup_bytes } = tiles(problem, caps);
    let mut bindings = Bindings::new(problem, part, caps);
    bindings.read(&[Slot::Query, Slot::Key, Slot::Value]);
    bindings.read_terms();
    bindings.write(Slot::Output);
    if spec.lse {
        bindings.write(Slot::Lse);
    }
    let mut variant = Variant::new(Shader::Fused);
    variant.query(spec).key(spec).value(spec).output(spec).terms(spec).lse(spec.lse);
    variant.snippets(&["keys", "score", "row_end", "numerics"]);
    variant.key_overrides(problem).score_overrides(spec).sink_override(spec);
    variant.constant("ROWS", rows).constant("DIMS_PER_LANE", dims_per_lane);
    variant.size("BLOCK_KV", BLOCK_KV).size("HEAD_DIM", problem.head_dim()).size("V_HEAD_DIM", problem.v_head_dim());
    variant.size("QUERY_TILE", rows * problem.head_dim()).size("PROB_TILE", rows * BLOCK_KV);
    let params = Params::new(problem, part, &bindings);
    vec![Step::new(variant, bindings, params, grid(problem, caps, part), workgroup_bytes)]
}
