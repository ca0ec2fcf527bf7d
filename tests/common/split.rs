//! One attention as two over disjoint sets of keys, and how far their merge may be off.

use cross_attention::{AttentionData, AttentionProblem, Element, Layout, TensorData};

use super::case::Case;
use super::check::is_near;

pub(crate) struct Part {
    pub(crate) problem: AttentionProblem,
    pub(crate) data: AttentionData,
}

/// The case twice, with row ranges that leave the keys before `at` to one and all others to the other. A sink
/// takes part in the first only. Both give f32 and lse, in memory order `[batch, heads, len, dim]`.
pub(crate) fn at(case: &Case, at: usize) -> [Part; 2] {
    let at = i32::try_from(at).expect("cases are small");
    let whole = dense(case);
    let data = case.data();
    let rows = case.problem().batch() * case.problem().q_len();
    let ends = |given: &Option<Vec<i32>>, open: i32| given.clone().unwrap_or_else(|| vec![open; rows]);
    let (starts, ends) = (ends(&data.terms.row_start, i32::MIN), ends(&data.terms.row_end, i32::MAX));
    let part = |first: bool| {
        let mut spec = whole.spec.clone();
        let mut data = data.clone();
        spec.row_ranges = true;
        data.terms.row_start = Some(starts.iter().map(|&start| if first { start } else { start.max(at) }).collect());
        data.terms.row_end = Some(ends.iter().map(|&end| if first { end.min(at) } else { end }).collect());
        if !first {
            spec.sinks = false;
            data.terms.sinks = None;
        }
        Part { problem: AttentionProblem::new(spec).expect("the whole case is sound"), data }
    };
    [part(true), part(false)]
}

/// The case with an f32 output without gaps, lse and no scores, as states are merged.
pub(crate) fn dense(case: &Case) -> Case {
    let mut case = case.clone();
    case.spec.lse = true;
    case.spec.scores = None;
    case.spec.output.element = Element::F32;
    case.spec.output.layout = Layout::bhld(case.spec.output.layout.shape);
    case
}

/// Compares a merged state with the whole, row by row. Rounding lse costs `eps * |lse|` in the weight of a part,
/// so that is what a merge may lose on top of what the parts are off by.
pub(crate) fn compare(
    case: &Case,
    [output, lse]: [&[f32]; 2],
    [whole_output, whole_lse]: [&[f32]; 2],
) -> Result<(), String> {
    let v_head_dim = case.problem().v_head_dim();
    let largest =
        |of: &TensorData| of.to_f32().into_iter().filter(|x| x.is_finite()).fold(0.0f32, |m, x| x.abs().max(m));
    let data = case.data();
    let value_max = largest(&data.value) * data.terms.value_scale.as_ref().map_or(1.0, largest);
    let size = if case.recipe.poison { 3.0 * case.recipe.value_size } else { value_max };
    if output.len() != whole_output.len() || lse.len() != whole_lse.len() {
        return Err(format!("{case}\n{} rows merged, {} in the whole", lse.len(), whole_lse.len()));
    }
    for (row, (&got, &want)) in lse.iter().zip(whole_lse).enumerate() {
        let loss = f32::EPSILON * (16.0 + 4.0 * if want.is_finite() { want.abs() } else { 0.0 });
        let same = got.to_bits() == want.to_bits();
        if !same && !is_near(f64::from(got), f64::from(want), f64::from(loss)) {
            return Err(format!("{case}\nlse of row {row}: merged {got}, whole {want}, may be off by {loss}"));
        }
        for d in row * v_head_dim..(row + 1) * v_head_dim {
            let (got, want) = (output[d], whole_output[d]);
            let same = got.to_bits() == want.to_bits();
            if !same && !is_near(f64::from(got), f64::from(want), f64::from(loss * size)) {
                let may = loss * size;
                return Err(format!("{case}\noutput of row {row}: merged {got}, whole {want}, may be off by {may}"));
            }
        }
    }
    Ok(())
}
