//! Merging attentions over disjoint sets of keys into the attention over all of them.

use crate::inputs::RowState;

/// An attention over some of the keys, with the maximum and sum of its rows: what [`merge_states`] takes.
#[derive(Clone, Copy, Debug)]
pub struct StatePart<'a> {
    /// `[rows, v_head_dim]`, normalised over its own keys.
    pub output: &'a [f32],
    /// `[rows]`, as [`RowState::row_max`]: negative infinity for a row that saw no key.
    pub row_max: &'a [f32],
    /// `[rows]`, as [`RowState::row_sum`]: 0 for a row that saw no key.
    pub row_sum: &'a [f32],
}

impl<'a> StatePart<'a> {
    /// An output with the state that came with it.
    #[must_use]
    pub fn new(output: &'a [f32], state: &'a RowState) -> Self {
        Self { output, row_max: &state.row_max, row_sum: &state.row_sum }
    }
}

/// An attention over the keys of all parts.
#[derive(Clone, Debug, PartialEq)]
pub struct MergedStates {
    /// `[rows, v_head_dim]`.
    pub output: Vec<f32>,
    /// Maximum and sum of each row, both `[rows]`.
    pub state: RowState,
}

/// An attention over some of the keys, with the log-sum-exp of its rows: what [`merge`] takes.
#[derive(Clone, Copy, Debug)]
pub struct PartialState<'a> {
    /// `[rows, v_head_dim]`, normalised over its own keys.
    pub output: &'a [f32],
    /// `[rows]`, natural logarithm; negative infinity for a row that saw no key.
    pub lse: &'a [f32],
}

/// An attention over the keys of all parts.
#[derive(Clone, Debug, PartialEq)]
pub struct MergedState {
    /// `[rows, v_head_dim]`.
    pub output: Vec<f32>,
    /// `[rows]`, natural logarithm; negative infinity for a row that saw no key in any part.
    pub lse: Vec<f32>,
}

/// Why partial states could not be merged.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// There is nothing to merge, so the number of rows is not known.
    #[error("there are no parts to merge, needs at least 1")]
    NoParts,
    /// The rows have no elements.
    #[error("v_head_dim is 0, needs at least 1")]
    Width,
    /// Maxima or sums of a part are of another number of rows than the maxima of the first.
    #[error("{name} of part {part} has {found} rows, needs {wanted} as row_max of part 0 has")]
    State {
        /// `row_max` or `row_sum`.
        name: &'static str,
        /// Which part.
        part: usize,
        /// Rows that would do.
        wanted: usize,
        /// Rows that were given.
        found: usize,
    },
    /// A sum is none of exponentials.
    #[error("row_sum of part {part} is {found} in row {row}, needs a finite number from 0 on, or NaN")]
    Sum {
        /// Which part.
        part: usize,
        /// Which of its rows.
        row: usize,
        /// What it has.
        found: f32,
    },
    /// A part has another number of rows than the first.
    #[error("lse of part {part} has {found} rows, needs {wanted} as part 0 has")]
    Lse {
        /// Which part.
        part: usize,
        /// Rows that would do.
        wanted: usize,
        /// Rows that were given.
        found: usize,
    },
    /// The output of a part does not fit its rows.
    #[error("output of part {part} has {found} elements, needs {rows} rows of {v_head_dim}")]
    Output {
        /// Which part.
        part: usize,
        /// Rows of every part.
        rows: usize,
        /// Width of a row that was asked for.
        v_head_dim: usize,
        /// Elements that were given.
        found: usize,
    },
}

/// Merges attentions over disjoint sets of keys, row by row: `row_max` is the largest of all parts, `row_sum` the sum over
/// parts of `row_sum_p exp(row_max_p - row_max)`, and each part has its share of that in the output.
///
/// Nothing is lost to the size of the scores: parts weigh as one attention over all keys weighs them in f32. An empty part
/// (`row_sum` 0) is neutral, whatever its output holds; a row that is empty in all parts gives zeros, negative infinity and
/// 0. A row that only one part has keeps its values. A sink is a part of its own: its logit, a sum of 1, and zeros.
///
/// ```
/// use cross_attention::RowState;
/// use cross_attention::cpu::{StatePart, merge_states};
/// // two parts of equal mass, whose scores are all about -10^9
/// let state = RowState { row_max: vec![-1e9], row_sum: vec![2.0] };
/// let merged = merge_states(&[StatePart::new(&[1.0], &state), StatePart::new(&[3.0], &state)], 1)?;
/// assert_eq!((merged.output, merged.state.row_max, merged.state.row_sum), (vec![2.0], vec![-1e9], vec![4.0]));
/// # Ok::<(), cross_attention::cpu::MergeError>(())
/// ```
///
/// # Errors
/// A [`MergeError`] if there are no parts, they differ in rows or width, or a sum is below 0 or infinite.
pub fn merge_states(parts: &[StatePart<'_>], v_head_dim: usize) -> Result<MergedStates, MergeError> {
    let rows = check_state_parts(parts, v_head_dim)?;
    let state = RowState { row_max: vec![f32::NEG_INFINITY; rows], row_sum: vec![0.0; rows] };
    let mut merged = MergedStates { output: vec![0.0; rows * v_head_dim], state };
    for row in 0..rows {
        // a sum of NaN is not 0
        let live = || parts.iter().filter(|part| part.row_sum[row] != 0.0);
        if live().next().is_none() {
            continue;
        }
        let row_max = live().map(|part| part.row_max[row]).fold(f32::NEG_INFINITY, f32::max);
        let mass = |part: &StatePart<'_>| part.row_sum[row] * (part.row_max[row] - row_max).exp();
        let row_sum: f32 = live().map(mass).sum();
        let output = &mut merged.output[row * v_head_dim..][..v_head_dim];
        for part in live() {
            let weight = mass(part) / row_sum;
            for (x, value) in output.iter_mut().zip(&part.output[row * v_head_dim..]) {
                *x += weight * value;
            }
        }
        merged.state.row_max[row] = if row_sum.is_nan() { f32::NAN } else { row_max };
        merged.state.row_sum[row] = row_sum;
    }
    Ok(merged)
}

/// Merges attentions over disjoint sets of keys, row by row:
/// `lse = ln(sum exp(lse_p))`, `output = sum exp(lse_p - lse) * output_p`.
///
/// An lse is rounded to f32, so the weight of a part against another is off by up to a relative `2^-23 |lse|`: 1e-5 of
/// scores around 100, 1e-3 around 10^4; around 10^9, which some use for padding, all parts weigh the same. Where the maximum
/// and the sum of the rows are known, [`merge_states`] loses none of that.
///
/// An empty part (`lse` of negative infinity) is neutral, whatever its output holds; a row that is empty in all parts
/// gives zeros and negative infinity. A row that only one part has keeps its values.
///
/// ```
/// use cross_attention::cpu::{PartialState, merge};
/// let seen = PartialState { output: &[1.0, 2.0], lse: &[0.5] };
/// let empty = PartialState { output: &[f32::NAN, f32::NAN], lse: &[f32::NEG_INFINITY] };
/// let merged = merge(&[empty, seen], 2)?;
/// assert_eq!((merged.output, merged.lse), (vec![1.0, 2.0], vec![0.5]));
/// # Ok::<(), cross_attention::cpu::MergeError>(())
/// ```
///
/// # Errors
/// A [`MergeError`] if there are no parts, or they differ in rows or width.
pub fn merge(parts: &[PartialState<'_>], v_head_dim: usize) -> Result<MergedState, MergeError> {
    let rows = check_parts(parts, v_head_dim)?;
    let mut merged = MergedState { output: vec![0.0; rows * v_head_dim], lse: vec![f32::NEG_INFINITY; rows] };
    for row in 0..rows {
        let live = || parts.iter().filter(|part| part.lse[row] != f32::NEG_INFINITY);
        if live().next().is_none() {
            continue;
        }
        let row_max = live().map(|part| part.lse[row]).fold(f32::NEG_INFINITY, f32::max);
        let row_sum: f32 = live().map(|part| (part.lse[row] - row_max).exp()).sum();
        merged.lse[row] = row_max + row_sum.ln();
        let output = &mut merged.output[row * v_head_dim..][..v_head_dim];
        for part in live() {
            // divided by the sum, not by exp(lse): rounding lse at 1e4 would cost four digits
            let weight = (part.lse[row] - row_max).exp() / row_sum;
            for (x, value) in output.iter_mut().zip(&part.output[row * v_head_dim..]) {
                *x += weight * value;
            }
        }
    }
    Ok(merged)
}

/// The number of rows that all parts have.
pub(crate) fn check_state_parts(parts: &[StatePart<'_>], v_head_dim: usize) -> Result<usize, MergeError> {
    if v_head_dim == 0 {
        return Err(MergeError::Width);
    }
    let rows = parts.first().ok_or(MergeError::NoParts)?.row_max.len();
    for (part, state) in parts.iter().enumerate() {
        for (name, found) in [("row_max", state.row_max.len()), ("row_sum", state.row_sum.len())] {
            if found != rows {
                return Err(MergeError::State { name, part, wanted: rows, found });
            }
        }
        if rows.checked_mul(v_head_dim) != Some(state.output.len()) {
            return Err(MergeError::Output { part, rows, v_head_dim, found: state.output.len() });
        }
        // NaN is that of scores that are NaN or infinite, and goes on as NaN
        let wrong = |sum: &f32| *sum < 0.0 || sum.is_infinite();
        if let Some(row) = state.row_sum.iter().position(wrong) {
            return Err(MergeError::Sum { part, row, found: state.row_sum[row] });
        }
    }
    Ok(rows)
}

/// The same for parts with a log-sum-exp.
pub(crate) fn check_parts(parts: &[PartialState<'_>], v_head_dim: usize) -> Result<usize, MergeError> {
    if v_head_dim == 0 {
        return Err(MergeError::Width);
    }
    let rows = parts.first().ok_or(MergeError::NoParts)?.lse.len();
    for (part, state) in parts.iter().enumerate() {
        if state.lse.len() != rows {
            return Err(MergeError::Lse { part, wanted: rows, found: state.lse.len() });
        }
        if rows.checked_mul(v_head_dim) != Some(state.output.len()) {
            return Err(MergeError::Output { part, rows, v_head_dim, found: state.output.len() });
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_parts_are_neutral() {
        let none = f32::NEG_INFINITY;
        let merged = merge(
            &[
                PartialState { output: &[f32::NAN, 7.0, f32::INFINITY, 1.0], lse: &[none, none] },
                PartialState { output: &[1.5, -2.5, 3.0, 4.0], lse: &[-0.3, none] },
                PartialState { output: &[f32::NAN; 4], lse: &[none, none] },
            ],
            2,
        )
        .unwrap();
        assert_eq!(merged, MergedState { output: vec![1.5, -2.5, 0.0, 0.0], lse: vec![-0.3, none] });
    }

    #[test]
    fn sums_that_no_exponentials_have_are_refused() {
        for found in [-1.0, f32::INFINITY, f32::NEG_INFINITY] {
            let states = [[0.0, 2.0], [f32::NAN, found]];
            let parts = states.each_ref().map(|sum| StatePart { output: &[0.0; 2], row_max: &[0.0; 2], row_sum: sum });
            assert_eq!(merge_states(&parts, 1), Err(MergeError::Sum { part: 1, row: 1, found }));
        }
    }

    #[test]
    fn weights_are_those_of_the_masses() {
        for shift in [0.0, 1e4, -1e4] {
            let lse = [shift, shift + 1.0];
            let merged = merge(
                &[PartialState { output: &[1.0], lse: &lse[..1] }, PartialState { output: &[2.0], lse: &lse[1..] }],
                1,
            )
            .unwrap();
            let (a, b) = (1.0, 1f64.exp());
            assert!((f64::from(merged.output[0]) - (a + 2.0 * b) / (a + b)).abs() < 3e-7, "{merged:?}");
            assert!((f64::from(merged.lse[0]) - (f64::from(shift) + (a + b).ln())).abs() < 1e-3, "{merged:?}");
        }
    }

    #[test]
    fn states_weigh_the_same_whatever_the_scores_have_in_common() {
        let (a, b) = (3.0, 5.0 * 1f64.exp());
        for common in [0.0f32, 1e4, -1e4, 1e6, -1e6] {
            let (low, high) = ([common], [common + 1.0]);
            let merged = merge_states(
                &[
                    StatePart { output: &[1.0], row_max: &low, row_sum: &[3.0] },
                    StatePart { output: &[2.0], row_max: &high, row_sum: &[5.0] },
                ],
                1,
            )
            .unwrap();
            assert!((f64::from(merged.output[0]) - (a + 2.0 * b) / (a + b)).abs() < 3e-7, "{common}: {merged:?}");
            assert!((f64::from(merged.state.row_sum[0]) - (a + b) / 1f64.exp()).abs() < 2e-6, "{common}: {merged:?}");
            assert_eq!(merged.state.row_max, high);
        }
        // seven eighths and one eighth of a row whose scores are all the lowest number there is
        for padding in [-1e9, f32::MIN] {
            let row_max = [padding];
            let merged = merge_states(
                &[
                    StatePart { output: &[0.0], row_max: &row_max, row_sum: &[1313.0] },
                    StatePart { output: &[1.0], row_max: &row_max, row_sum: &[187.0] },
                ],
                1,
            )
            .unwrap();
            assert!((f64::from(merged.output[0]) - 187.0 / 1500.0).abs() < 1e-7, "{padding}: {merged:?}");
        }
    }

    #[test]
    fn empty_states_are_neutral_and_nan_stays_in_its_row() {
        let none = f32::NEG_INFINITY;
        let merged = merge_states(
            &[
                StatePart { output: &[f32::NAN, 7.0, f32::NAN], row_max: &[none; 3], row_sum: &[0.0; 3] },
                StatePart { output: &[1.5, 3.0, 1.0], row_max: &[-0.3, none, 2.0], row_sum: &[2.0, 0.0, 1.0] },
                // a sink of 0.5, and a row that saw NaN
                StatePart { output: &[0.0; 3], row_max: &[none, 0.5, f32::NAN], row_sum: &[0.0, 1.0, f32::NAN] },
            ],
            1,
        )
        .unwrap();
        assert_eq!(merged.output[..2], [1.5, 0.0]);
        assert_eq!((&merged.state.row_max[..2], &merged.state.row_sum[..2]), (&[-0.3, 0.5][..], &[2.0, 1.0][..]));
        assert!(merged.output[2].is_nan() && merged.state.row_max[2].is_nan() && merged.state.row_sum[2].is_nan());
    }

    #[test]
    fn refused_states_name_the_part() {
        let a = StatePart { output: &[0.0; 4], row_max: &[0.0; 2], row_sum: &[1.0; 2] };
        assert_eq!(merge_states(&[], 2), Err(MergeError::NoParts));
        let b = StatePart { row_sum: &[1.0], ..a };
        let error = merge_states(&[a, b], 2).unwrap_err();
        assert_eq!(error.to_string(), "row_sum of part 1 has 1 rows, needs 2 as row_max of part 0 has");
        assert_eq!(merge_states(&[a], 0), Err(MergeError::Width));
        assert!(matches!(merge_states(&[a], 3), Err(MergeError::Output { part: 0, .. })));
    }

    #[test]
    fn nan_stays_in_its_row() {
        let a = PartialState { output: &[f32::NAN, 1.0], lse: &[0.0, 0.0] };
        let b = PartialState { output: &[1.0, 3.0], lse: &[0.0, 0.0] };
        let merged = merge(&[a, b], 1).unwrap();
        assert!(merged.output[0].is_nan());
        assert!((merged.output[1] - 2.0).abs() < 1e-6);
    }

    #[test]
    fn refusals_name_the_part() {
        let a = PartialState { output: &[0.0; 4], lse: &[0.0; 2] };
        assert_eq!(merge(&[], 2), Err(MergeError::NoParts));
        assert_eq!(
            merge(&[a, PartialState { output: &[0.0; 4], lse: &[0.0] }], 2),
            Err(MergeError::Lse { part: 1, wanted: 2, found: 1 })
        );
        let error = merge(&[a, PartialState { output: &[0.0; 3], lse: &[0.0; 2] }], 2).unwrap_err();
        assert_eq!(error.to_string(), "output of part 1 has 3 elements, needs 2 rows of 2");
        assert!(merge(&[a], usize::MAX).is_err());
        let none = merge(&[PartialState { output: &[], lse: &[] }], 2).unwrap();
        assert_eq!(none, MergedState { output: vec![], lse: vec![] });
    }
}
