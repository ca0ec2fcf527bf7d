//! The results of an attention, as tensors of a file.

use cross_attention::files::Ours;
use cross_attention::{AttentionOutput, AttentionProblem, ScoreStage, TensorRef};
use serde_json::{Map, Value};

use crate::error::Error;
use crate::file::{Form, Operands, Request};
use crate::output::Stored;

/// What a file must be that is replaced.
pub(crate) const RESULT: Ours = Ours { what: "a result of this program", is: is_result };

/// What a result may hold beside output and lse.
const MORE: [&str; 14] = [
    "probs",
    "scores_scaled",
    "scores_capped",
    "scores_masked",
    "row_max",
    "row_sum",
    "present_key",
    "present_value",
    "d_query",
    "d_key",
    "d_value",
    "d_bias",
    "d_alibi_slopes",
    "d_sinks",
];

/// The name of a score matrix in a file.
pub(crate) fn scores_name(stage: ScoreStage) -> String {
    if stage == ScoreStage::Probs { "probs".to_owned() } else { format!("scores_{stage}") }
}

/// Whether a file starts as one of results.
fn is_result(head: &[u8]) -> bool {
    let Some((len, rest)) = head.split_first_chunk::<8>() else { return false };
    let header = usize::try_from(u64::from_le_bytes(*len)).ok().and_then(|len| rest.get(..len));
    let header: Option<Map<String, Value>> = header.and_then(|header| serde_json::from_slice(header).ok());
    header.is_some_and(|header| {
        let names = ["__metadata__", "output", "lse"];
        names.iter().all(|name| header.contains_key(*name))
            && header.keys().all(|name| names.contains(&name.as_str()) || MORE.contains(&name.as_str()))
    })
}

/// Output, log-sum-exp, and maximum and sum of each row where they are asked for.
///
/// # Errors
/// [`Error::NotReturned`].
pub(crate) fn stored<'a>(
    problem: &AttentionProblem,
    form: Form,
    results: &'a AttentionOutput,
    row_state: bool,
) -> Result<Vec<Stored<'a>>, Error> {
    let lse = results.lse.as_deref().ok_or(Error::NotReturned { name: "lse" })?;
    let rows = vec![problem.batch(), problem.q_heads(), problem.q_len()];
    let output = form.shape(problem.spec().output.layout.shape);
    let mut tensors = vec![
        Stored::of("lse", TensorRef::F32(lse), rows.clone()),
        Stored::of("output", results.output.as_ref(), output),
    ];
    if row_state {
        let state = results.row_state.as_ref().ok_or(Error::NotReturned { name: "row_state" })?;
        tensors.push(Stored::of("row_max", TensorRef::F32(&state.row_max), rows.clone()));
        tensors.push(Stored::of("row_sum", TensorRef::F32(&state.row_sum), rows));
    }
    Ok(tensors)
}

/// A score matrix.
pub(crate) fn scores<'a>(problem: &AttentionProblem, stage: ScoreStage, scores: &'a [f32]) -> Stored<'a> {
    Stored::of(&scores_name(stage), TensorRef::F32(scores), problem.score_shape().to_vec())
}

/// Keys and values of before and now as one, where a file has both.
pub(crate) fn presents<'a>(request: &Request, operands: &'a Operands<'_>) -> Vec<Stored<'a>> {
    let Some(past) = request.past else { return vec![] };
    let (inputs, spec) = (operands.as_inputs(), request.problem.spec());
    let stored = |name, data: TensorRef<'a>, of: &cross_attention::TensorSpec, entries: usize| {
        let [_, heads, len, dim] = of.layout.shape;
        Stored::of(name, data, past.order.swap([entries, heads, len, dim]).to_vec())
    };
    let [_, key, value] = request.placed.map(|placed| placed.spec.layout.shape[0]);
    vec![stored("present_key", inputs.key, &spec.key, key), stored("present_value", inputs.value, &spec.value, value)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_told_from_other_files() {
        let file = |header: &str| [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
        assert!(is_result(&file(r#"{"__metadata__":{},"lse":{},"output":{},"probs":{}}"#)));
        for other in [r#"{"query":{},"key":{},"value":{}}"#, r#"{"__metadata__":{},"lse":{},"output":{},"w":{}}"#, "x"]
        {
            assert!(!is_result(&file(other)), "{other}");
        }
        assert!(!is_result(b"text") && !is_result(&[0xff; 64]));
    }
}
