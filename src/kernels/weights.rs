//! Selected attention weights (shaders/weights.wgsl): what is bound, limits, dispatch.

use std::ops::Range;

use super::{check_invocations, check_iterations, check_storage_buffers, check_workgroup_memory};
use crate::caps::DeviceCaps;
use crate::dispatch::{Bindings, Needs, Params, Part, Shader, Slot, Step, Unsupported, Variant, flat_grid, params};
use crate::tensor::Layout;
use crate::weights::{HeadReduce, KeyList, WeightsProblem};

/// Invocations of a workgroup.
const WIDTH: usize = 64;
/// Workgroup memory: a partial sum for each.
const PARTIAL_BYTES: u64 = 4 * WIDTH as u64;

/// Whether the kernel can compute them on such a device.
pub(crate) fn supports(problem: &WeightsProblem, caps: &DeviceCaps) -> Result<(), Unsupported> {
    let scores = problem.scores();
    params::supports(scores)?;
    check_invocations(64, caps)?;
    check_storage_buffers(8, caps)?;
    check_workgroup_memory(PARTIAL_BYTES, scores, caps)?;
    check_iterations(iterations(problem), caps)
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

/// The words at binding 10: the header, then heads, rows and keys.
pub(crate) fn selection(problem: &WeightsProblem, max_blocks_per_row: u32) -> Vec<u32> {
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

/// The dispatch over these batch entries.
pub(crate) fn step(problem: &WeightsProblem, caps: &DeviceCaps, batch: Range<usize>, selection_words: usize) -> Step {
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
    variant.query_vec(spec).key_vec(spec).terms(spec).snippets(&["q_lens", "keys", "score", "numerics"]);
    variant.key_overrides(scores).score_overrides(spec);
    variant.size("HEAD_DIM", scores.head_dim());
    variant.switch("SEGMENTS", matches!(problem.keys(), KeyList::Segments(_)));
    variant.switch("ONE_HEAD", problem.reduce() != HeadReduce::Each);
    let params = Params::new(scores, &part, &bindings);
    // the whole result was found to be countable
    let all = blocks(problem, (batch.len() * heads * rows * columns) as u64);
    let needs = Needs::new(64, iterations(problem));
    Step::new(variant, bindings, params, flat_grid(all, caps), PARTIAL_BYTES, needs)
}
