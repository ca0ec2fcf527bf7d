//! Problems, devices and comparisons as JSON, the same in every subcommand.

use cross_attention::verify::{BackwardReport, Report};
use cross_attention::{AttentionProblem, Device, Paged};
use serde_json::{Value, json};

use crate::explain::terms;

/// What the shape of a problem consists of, by name.
pub(crate) fn extents(problem: &AttentionProblem) -> [(&'static str, usize); 7] {
    [
        ("batch", problem.batch()),
        ("q_heads", problem.q_heads()),
        ("kv_heads", problem.kv_heads()),
        ("q_len", problem.q_len()),
        ("kv_len", problem.kv_len()),
        ("head_dim", problem.head_dim()),
        ("v_head_dim", problem.v_head_dim()),
    ]
}

/// The shape of a problem, and what else is said of it.
pub(crate) fn with_shape<const N: usize>(problem: &AttentionProblem, rest: [(&'static str, Value); N]) -> Value {
    extents(problem).map(|(name, n)| (name, n.into())).into_iter().chain(rest).collect()
}

/// A problem: its shape, its element types, and what it has besides query, key, value and output.
pub(crate) fn problem(problem: &AttentionProblem) -> Value {
    let spec = problem.spec();
    let page_len = spec.paged.map(|Paged { .. }| spec.key.layout.shape[2]);
    with_shape(
        problem,
        [
            ("page_len", page_len.into()),
            ("query", spec.query.element.name().into()),
            ("key", spec.key.element.name().into()),
            ("value", spec.value.element.name().into()),
            ("output", spec.output.element.name().into()),
            ("scale", problem.scale().into()),
            ("terms", terms(problem).into()),
        ],
    )
}

/// A device.
pub(crate) fn device(device: &Device) -> Value {
    json!({ "name": device.name(), "driver": device.driver(), "backend": device.backend() })
}

/// What the oracle says of a result. Numbers that are not finite are null.
pub(crate) fn report(report: &Report) -> Value {
    json!({
        "passed": report.passed(),
        "rows": report.rows,
        "max_abs_error": report.max_abs_error,
        "max_lse_error": report.max_lse_error,
        "max_score_error": report.max_score_error,
        "max_state_error": report.max_state_error,
        "worst_ratio": report.worst_ratio,
        "failures": report.failures,
        "beyond_f32": report.beyond_f32,
    })
}

/// The same of gradients.
pub(crate) fn gradients(report: &BackwardReport) -> Value {
    json!({
        "passed": report.passed(),
        "elements": report.elements,
        "max_abs_error": report.max_abs_error,
        "worst_ratio": report.worst_ratio,
        "failures": report.failures,
        "beyond_f32": report.beyond_f32,
    })
}
