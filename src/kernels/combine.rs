//! The merge of partial states into the attention over all keys (shaders/combine.wgsl).

use crate::caps::DeviceCaps;
use crate::dispatch::{Bindings, Needs, Params, Part, Shader, Slot, States, Step, Variant};
use crate::problem::AttentionProblem;

/// Binds what a kernel writes that makes `splits` states of the keys: them, or the outputs where there is one.
pub(crate) fn write_ends(
    problem: &AttentionProblem,
    part: &Part,
    splits: usize,
    bindings: &mut Bindings<'_>,
    variant: &mut Variant,
) {
    if splits > 1 {
        let all = States { first: 0, count: splits };
        bindings.states(part.states.unwrap_or(all)).write(Slot::States);
        variant.snippets(&["split_end_partial", "part_state"]);
    } else {
        bindings.write_outputs();
        let spec = problem.spec();
        variant.snippets(&["split_end_whole"]).output_vec(spec).lse(spec);
    }
}

/// Merges `count` states of a part's rows, and adds the sink.
pub(crate) fn step(problem: &AttentionProblem, caps: &DeviceCaps, part: &Part, count: usize) -> Step {
    let spec = problem.spec();
    let mut bindings = Bindings::new(problem, part, caps);
    if spec.sinks {
        bindings.read(&[Slot::RowData]);
    }
    bindings.states(States { first: 0, count }).write(Slot::States).write_outputs();
    let mut variant = Variant::new(Shader::Combine);
    variant.output(spec).row_data(spec.sinks).lse(spec).snippets(&["q_lens", "row_end", "numerics", "part_state"]);
    // a row without keys ends as one behind the query length, but for the sink
    variant.q_lens_override(spec.q_lens && spec.sinks);
    variant.sink_override(spec).size("V_HEAD_DIM", problem.v_head_dim());
    let params = Params::new(problem, part, &bindings).with_splits(count);
    let needs = Needs::new(64, (2 + problem.v_head_dim().div_ceil(64)).saturating_mul(count + 1));
    Step::new(variant, bindings, params, part.grid_of_rows(), 0, needs)
}
