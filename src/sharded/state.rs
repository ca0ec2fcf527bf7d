//! Rows of a state as they are sent: maximum, sum, then the output. A row is never split.

use crate::error::Error;
use crate::inputs::RowState;

/// Numbers of a row before its output.
pub(super) const HEAD: usize = 2;

/// Rows `[rows, 2 + width]`.
pub(super) fn pack(output: &[f32], state: &RowState, width: usize) -> Vec<f32> {
    let mut packed = Vec::with_capacity(output.len() + HEAD * state.row_max.len());
    for ((row, max), sum) in output.chunks_exact(width).zip(&state.row_max).zip(&state.row_sum) {
        packed.extend([*max, *sum]);
        packed.extend_from_slice(row);
    }
    packed
}

/// Output and state of packed rows; of those without a key zeros, negative infinity and 0, whatever was sent for them.
pub(super) fn unpack(packed: &[f32], width: usize) -> (Vec<f32>, RowState) {
    let rows = packed.len() / (HEAD + width);
    let mut state = RowState { row_max: Vec::with_capacity(rows), row_sum: Vec::with_capacity(rows) };
    let mut output = Vec::with_capacity(rows * width);
    for row in packed.chunks_exact(HEAD + width) {
        let is_empty = row[1] == 0.0;
        state.row_max.push(if is_empty { f32::NEG_INFINITY } else { row[0] });
        state.row_sum.push(row[1]);
        if is_empty {
            output.resize(output.len() + width, 0.0);
        } else {
            output.extend_from_slice(&row[HEAD..]);
        }
    }
    (output, state)
}

/// Room for so many numbers, or an error: what cannot be allocated would end the process.
pub(super) fn room(len: usize) -> Result<Vec<f32>, Error> {
    let mut room: Vec<f32> = vec![];
    match room.try_reserve_exact(len) {
        Ok(()) => Ok(room),
        Err(_) => Err(Error::HostMemory { bytes: len as u128 * size_of::<f32>() as u128 }),
    }
}

/// So many zeros, or an error.
pub(super) fn zeros(len: usize) -> Result<Vec<f32>, Error> {
    let mut zeros = room(len)?;
    zeros.resize(len, 0.0);
    Ok(zeros)
}

/// Every row of a shape, in the order of a tensor without gaps.
pub(super) fn rows([a, b, c, _]: [usize; 4]) -> impl Iterator<Item = [usize; 3]> {
    (0..a).flat_map(move |a| (0..b).flat_map(move |b| (0..c).map(move |c| [a, b, c])))
}

/// Every place of a shape, in the same order.
pub(super) fn places(shape: [usize; 4]) -> impl Iterator<Item = [usize; 4]> {
    rows(shape).flat_map(move |[a, b, c]| (0..shape[3]).map(move |d| [a, b, c, d]))
}

/// Merges the rows of earlier ranks into those of later ones. A row without a key (a sum of 0) is neutral, whatever its output
/// holds; so two of them never meet as the difference of two infinities.
pub(super) fn merge_into(earlier: &[f32], later: &mut [f32], width: usize) {
    for (a, b) in earlier.chunks_exact(HEAD + width).zip(later.chunks_exact_mut(HEAD + width)) {
        if a[1] == 0.0 {
            continue;
        }
        if b[1] == 0.0 {
            b.copy_from_slice(a);
            continue;
        }
        let max = a[0].max(b[0]);
        let (of_a, of_b) = (a[1] * (a[0] - max).exp(), b[1] * (b[0] - max).exp());
        let sum = of_a + of_b;
        let (of_a, of_b) = (of_a / sum, of_b / sum);
        b[0] = if sum.is_nan() { f32::NAN } else { max };
        b[1] = sum;
        for (x, y) in b[HEAD..].iter_mut().zip(&a[HEAD..]) {
            *x = of_a * y + of_b * *x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_without_keys_are_neutral_and_the_rest_is_weighed() {
        let none = [f32::NEG_INFINITY, 0.0, f32::NAN];
        let mut both_empty = none;
        merge_into(&none, &mut both_empty, 1);
        let (output, state) = unpack(&both_empty, 1);
        assert_eq!((output, state.row_max, state.row_sum), (vec![0.0], vec![f32::NEG_INFINITY], vec![0.0]));
        let seen = [3.0, 2.0, 7.0];
        let mut row = none;
        merge_into(&seen, &mut row, 1);
        assert_eq!(row[..], seen[..]);
        merge_into(&none, &mut row, 1);
        assert_eq!(row[..], seen[..]);
        // equal mass
        let mut row = [-1e9, 2.0, 1.0];
        merge_into(&[-1e9, 2.0, 3.0], &mut row, 1);
        assert_eq!(row[..], [-1e9, 4.0, 2.0][..]);
    }
}
