//! The merge of partial states into the attention over all keys (shaders/combine.wgsl).

use super::params::Params;
use super::{Shader, Slot};
use crate::caps::DeviceCaps;
use crate::plan::Step;
use crate::plan::bindings::Bindings;
use crate::plan::split::{Part, States};
use crate::plan::variant::Variant;
use crate::problem::AttentionProblem;

/// A workgroup for each row.
pub(crate) fn grid(part: &Part) -> [u64; 3] {
    [part.rows.len() as u64, part.heads.len() as u64, part.batch.len() as u64]
}

/// Merges `count` states of a part's rows, and adds the sink.
pub(crate) fn step(problem: &AttentionProblem, caps: &DeviceCaps, part: &Part, count: usize) -> Step {
    let spec = problem.spec();
    let mut bindings = Bindings::new(problem, part, caps);
    if spec.sinks {
        bindings.read(&[Slot::RowData]);
    }
    bindings.states(States { first: 0, count }).write(Slot::States).write(Slot::Output);
    if spec.lse {
        bindings.write(Slot::Lse);
    }
    let mut variant = Variant::new(Shader::Combine);
    variant.output(spec).row_data(spec.sinks).lse(spec.lse).snippets(&["row_end", "numerics", "part_state"]);
    variant.sink_override(spec).constant("SPLITS", count).size("V_HEAD_DIM", problem.v_head_dim());
    let params = Params::new(problem, part, &bindings);
    Step::new(variant, bindings, params, grid(part), 0)
}
