//! Selected attention weights (shaders/weights.wgsl): what is bound, limits, parts, dispatches.

use std::ops::Range;

use super::params::{self, Params};
use super::{Shader, Slot, check_invocations, check_iterations, check_storage_buffers, check_workgroup_memory};
use crate::caps::DeviceCaps;
use crate::plan::bindings::{Bindings, RowDataMap};
use crate::plan::split::Part;
use crate::plan::variant::Variant;
use crate::plan::{Needs, PlanError, Rejection, Step, check_steps};
use crate::tensor::Layout;
use crate::weights::{HeadReduce, KeyList, WeightsProblem};

/// Invocations of a workgroup.
const WIDTH: usize = 64;
/// Workgroup memory: a partial sum for each.
const PARTIAL_BYTES: u64 = 4 * WIDTH as u64;

/// What a device runs for selected weights: plain data.
///
/// Where not all fits into one binding, batch entries go one after another.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightsPlan {
    problem: WeightsProblem,
    steps: Vec<Step>,
    selection: Vec<u32>,
    row_data_words: u32,
}

impl WeightsPlan {
    /// Plans selected weights for a device.
    ///
    /// # Errors
    /// A [`Rejection`] names the limit that one batch entry does not fit.
    pub fn new(problem: &WeightsProblem, caps: &DeviceCaps) -> Result<Self, Rejection> {
        let scores = problem.scores();
        let row_data_words = RowDataMap::new(scores).words;
        if problem.elements() == 0 {
            return Ok(Self { problem: problem.clone(), steps: vec![], selection: vec![], row_data_words });
        }
        params::supports(scores)?;
        check_invocations(64, caps)?;
        check_storage_buffers(8, caps)?;
        check_workgroup_memory(PARTIAL_BYTES, scores, caps)?;
        check_iterations(iterations(problem), caps)?;
        let mut per_part = scores.batch();
        loop {
            let limit = caps.max_compute_workgroups_per_dimension;
            let selection = selection(problem, limit);
            let parts = (0..scores.batch()).step_by(per_part);
            let ranges = parts.map(|start| start..(start + per_part).min(scores.batch()));
            let steps: Vec<_> = ranges.map(|batch| step(problem, caps, batch, selection.len())).collect();
            match steps.iter().find_map(|step| reason_against(step, caps)) {
                None => return Ok(Self { problem: problem.clone(), steps, selection, row_data_words }),
                Some(reason) if per_part == 1 => return Err(reason),
                Some(_) => per_part = per_part.div_ceil(2),
            }
        }
    }

    /// What was planned.
    #[must_use]
    pub const fn problem(&self) -> &WeightsProblem {
        &self.problem
    }

    /// The dispatches, in order. None where nothing is returned.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Whether a device with `caps` can run the plan, which may have been made for another.
    ///
    /// # Errors
    /// [`PlanError::OtherDevice`] with the first thing that the device does not have.
    pub fn check(&self, caps: &DeviceCaps) -> Result<(), PlanError> {
        check_steps(&self.steps, caps)
    }

    /// The words at binding 10.
    pub(crate) fn selection(&self) -> &[u32] {
        &self.selection
    }

    pub(crate) const fn row_data_words(&self) -> u32 {
        self.row_data_words
    }
}

/// All loops of an invocation together, at most.
fn iterations(problem: &WeightsProblem) -> usize {
    // vec4s of a row, and the chunks in which they are summed
    let vecs = problem.scores().head_dim().div_ceil(4);
    let chunks = vecs + vecs.div_ceil(16);
    let heads = if problem.reduce() == HeadReduce::Each { 1 } else { problem.heads().len() };
    let keys = match problem.keys() {
        KeyList::Each(_) => 1,
        KeyList::Segments(segments) => {
            let longest = segments.iter().map(|[from, to]| (to - from) as usize).max().unwrap_or(0);
            longest.div_ceil(WIDTH)
        }
    };
    heads.saturating_mul(1 + keys.saturating_mul(1 + chunks)).saturating_add(6)
}

/// Workgroups for so many elements of the result.
fn blocks(problem: &WeightsProblem, elements: u64) -> u64 {
    match problem.keys() {
        KeyList::Each(_) => elements.div_ceil(WIDTH as u64),
        KeyList::Segments(_) => elements,
    }
}

/// The header, then heads, rows and keys.
fn selection(problem: &WeightsProblem, max_blocks_per_row: u32) -> Vec<u32> {
    let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let factor = match problem.reduce() {
        HeadReduce::Each | HeadReduce::Sum => 1.0,
        HeadReduce::Mean => 1.0 / problem.heads().len() as f32,
    };
    let counts = [problem.heads().len(), problem.rows().len(), problem.keys().len()].map(narrow);
    let mut words = counts.to_vec();
    words.extend([max_blocks_per_row, factor.to_bits()]);
    words.extend(problem.heads());
    words.extend(problem.rows());
    match problem.keys() {
        KeyList::Each(keys) => words.extend(keys),
        KeyList::Segments(segments) => words.extend(segments.as_flattened()),
    }
    words
}

fn step(problem: &WeightsProblem, caps: &DeviceCaps, batch: Range<usize>, selection_words: usize) -> Step {
    let scores = problem.scores();
    let spec = scores.spec();
    let shape @ [_, heads, rows, columns] = problem.shape();
    let part = Part { batch: batch.clone(), ..Part::whole(scores) };
    let mut bindings = Bindings::new(scores, &part, caps);
    bindings.read(&[Slot::Query, Slot::Key]).read_terms().read(&[Slot::Lse]);
    bindings.push(Slot::Selection, false, Layout::bhld([1, 1, 1, selection_words]));
    let whole = Layout::bhld(shape);
    let returned = Layout { shape: [batch.len(), heads, rows, columns], ..whole };
    bindings.push(Slot::Weights, true, returned.with_offset(whole.index([batch.start, 0, 0, 0])));
    let mut variant = Variant::new(Shader::Weights);
    variant.query_vec(spec).key_vec(spec).terms(spec).snippets(&["keys", "score", "numerics"]);
    variant.key_overrides(scores).score_overrides(spec);
    variant.size("HEAD_DIM", scores.head_dim());
    variant.switch("SEGMENTS", matches!(problem.keys(), KeyList::Segments(_)));
    variant.switch("ONE_HEAD", problem.reduce() != HeadReduce::Each);
    let params = Params::new(scores, &part, &bindings);
    // the whole result was found to be countable
    let all = blocks(problem, (batch.len() * heads * rows * columns) as u64);
    let limit = u64::from(caps.max_compute_workgroups_per_dimension).max(1);
    let needs = Needs::new(64, iterations(problem));
    Step::new(variant, bindings, params, [all.min(limit), all.div_ceil(limit), 1], PARTIAL_BYTES, needs)
}

/// The limit of the device that a dispatch does not fit.
fn reason_against(step: &Step, caps: &DeviceCaps) -> Option<Rejection> {
    let found = caps.max_storage_buffer_binding_size.min(caps.max_buffer_size);
    let large = step.bindings.iter().find(|binding| binding.size_bytes > found);
    if let Some(binding) = large {
        return Some(Rejection::Binding { slot: binding.slot, needed: binding.size_bytes, found });
    }
    let needed = u64::from(step.grid[1]);
    let found = u64::from(caps.max_compute_workgroups_per_dimension);
    if needed > found {
        return Some(Rejection::Grid { needed, found });
    }
    step.check(caps).err().map(|unmet| Rejection::Unsupported(unmet.into()))
}
