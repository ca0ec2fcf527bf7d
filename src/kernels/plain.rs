//! The plain kernel: `scores.wgsl`, `softmax.wgsl` and `weighted_sum.wgsl` as three dispatches.

use super::{check_invocations, check_iterations, check_storage_buffers, check_workgroup_memory};
use crate::caps::DeviceCaps;
use crate::dispatch::{Bindings, Needs, Params, Part, Shader, Slot, Step, TileShape, Unsupported, Variant, ceil_div};
use crate::problem::{AttentionProblem, ScoreStage};

/// Side of the square tiles of scores and weighted sum.
const TILE: usize = 16;
/// Invocations that share a row of the softmax.
const SOFTMAX_WIDTH: usize = 64;
/// Workgroup memory of scores and weighted sum: two tiles.
const TILES_BYTES: u64 = 2 * 4 * (TILE * TILE) as u64;

pub(crate) fn tiling(
    problem: &AttentionProblem,
    caps: &DeviceCaps,
    shape: Option<TileShape>,
) -> Result<(), Unsupported> {
    match shape {
        None => supports(problem, caps),
        Some(found) => Err(Unsupported::Tile { found, possible: "none, its tiles are fixed".to_owned() }),
    }
}

pub(crate) fn supports(problem: &AttentionProblem, caps: &DeviceCaps) -> Result<(), Unsupported> {
    check_invocations(256, caps)?;
    check_storage_buffers(6, caps)?;
    check_workgroup_memory(TILES_BYTES, problem, caps)?;
    // of the weighted sum, which has the most of them
    check_iterations(tile_iterations(problem.kv_len().max(problem.head_dim())), caps)
}

/// Iterations of the passes that take a tile of so many elements after another.
const fn tile_iterations(elements: usize) -> usize {
    elements.div_ceil(TILE) * (TILE + 1)
}

const fn tile_needs(elements: usize) -> Needs {
    Needs::new(256, tile_iterations(elements))
}

/// The three passes. Probabilities that are asked for are computed where they are returned, else in the workspace.
pub(crate) fn steps(problem: &AttentionProblem, caps: &DeviceCaps, part: &Part) -> Vec<Step> {
    let returned = problem.spec().scores;
    let place = if returned == Some(ScoreStage::Probs) { Slot::Scores } else { Slot::Workspace };
    let mut steps = vec![];
    if let Some(stage) = returned.filter(|stage| *stage != ScoreStage::Probs) {
        steps.push(scores(problem, caps, part, Slot::Scores, stage));
    }
    steps.push(scores(problem, caps, part, place, ScoreStage::Masked));
    steps.push(softmax(problem, caps, part, place, true));
    steps.push(weighted_sum(problem, caps, part, place));
    steps
}

/// The pass that returns scores beside a kernel that does not hold any, of some of the keys; probabilities are the masked
/// scores until [`returned_softmax`].
pub(crate) fn returned_scores(problem: &AttentionProblem, caps: &DeviceCaps, part: &Part) -> Option<Step> {
    let stage = problem.spec().scores?;
    Some(scores(problem, caps, part, Slot::Scores, stage))
}

/// The pass that turns returned scores into probabilities, where those are asked for; the part has all keys.
pub(crate) fn returned_softmax(problem: &AttentionProblem, caps: &DeviceCaps, part: &Part) -> Option<Step> {
    let wanted = problem.spec().scores == Some(ScoreStage::Probs);
    wanted.then(|| softmax(problem, caps, part, Slot::Scores, false))
}

fn scores(problem: &AttentionProblem, caps: &DeviceCaps, part: &Part, place: Slot, stage: ScoreStage) -> Step {
    let spec = problem.spec();
    let masked = !matches!(stage, ScoreStage::Scaled | ScoreStage::Capped);
    let mut bindings = Bindings::new(problem, part, caps);
    bindings.read(&[Slot::Query, Slot::Key]);
    let mut variant = Variant::new(Shader::Scores);
    variant.query(spec).key(spec);
    if masked {
        bindings.read_terms();
        variant.terms(spec);
    } else {
        bindings.read_table();
        variant.snippets(&["bias_none", "mask_none"]).row_data(spec.paged.is_some());
    }
    bindings.write(place);
    variant.snippets(&["q_lens", "keys", "score", "numerics"]);
    variant.key_overrides(problem).score_overrides(spec);
    variant.size("HEAD_DIM", problem.head_dim()).size("HEADS", part.heads.len());
    let stage = match stage {
        ScoreStage::Scaled => 0,
        ScoreStage::Capped => 1,
        ScoreStage::Masked | ScoreStage::Probs => 2,
    };
    variant.size("STAGE", stage);
    let params = Params::new(problem, part, &bindings);
    let grid = [ceil_div(part.keys.len(), TILE), ceil_div(part.rows.len(), TILE), part.planes()];
    Step::new(variant, bindings, params, grid, TILES_BYTES, tile_needs(problem.head_dim()))
}

fn softmax(problem: &AttentionProblem, caps: &DeviceCaps, part: &Part, place: Slot, lse: bool) -> Step {
    let spec = problem.spec();
    let mut bindings = Bindings::new(problem, part, caps);
    if spec.sinks {
        bindings.read(&[Slot::RowData]);
    }
    let mut variant = Variant::new(Shader::Softmax);
    if lse {
        bindings.write_lse();
        variant.lse(spec);
    } else {
        variant.no_lse();
    }
    bindings.write(place);
    variant.row_data(spec.sinks).snippets(&["q_lens", "row_end", "numerics"]).sink_override(spec);
    // a row without keys ends as one behind the query length, but for the sink
    variant.q_lens_override(spec.q_lens && spec.sinks);
    let params = Params::new(problem, part, &bindings);
    let needs = Needs::new(64, 3 * part.keys.len().div_ceil(SOFTMAX_WIDTH) + 12);
    Step::new(variant, bindings, params, part.grid_of_rows(), 4 * SOFTMAX_WIDTH as u64, needs)
}

fn weighted_sum(problem: &AttentionProblem, caps: &DeviceCaps, part: &Part, place: Slot) -> Step {
    let spec = problem.spec();
    let mut bindings = Bindings::new(problem, part, caps);
    bindings.read(&[Slot::Value]);
    bindings.read_terms();
    bindings.read(&[place]);
    bindings.write(Slot::Output);
    let mut variant = Variant::new(Shader::WeightedSum);
    variant.value(spec).output(spec).terms(spec).snippets(&["q_lens", "keys", "numerics"]);
    variant.key_overrides(problem);
    variant.size("V_HEAD_DIM", problem.v_head_dim()).size("HEADS", part.heads.len());
    let params = Params::new(problem, part, &bindings);
    let needs = tile_needs(part.keys.len());
    let grid = [ceil_div(problem.v_head_dim(), TILE), ceil_div(part.rows.len(), TILE), part.planes()];
    Step::new(variant, bindings, params, grid, TILES_BYTES, needs)
}
