//! Merging attentions over disjoint sets of keys into the attention over all of them.

/// An attention over some of the keys: what [`merge`] takes.
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
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// There is nothing to merge, so the number of rows is not known.
    #[error("there are no parts to merge, needs at least 1")]
    NoParts,
    /// The rows have no elements.
    #[error("v_head_dim is 0, needs at least 1")]
    Width,
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

/// Merges attentions over disjoint sets of keys, row by row:
/// `lse = ln(sum exp(lse_p))`, `output = sum exp(lse_p - lse) * output_p`.
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
