//! Finished rows into the output: as f32 where they lie, rounded to f16 or bf16, or scattered.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::cpu::simd::shared::{Fresh, TensorRows, Unit};
use crate::tensor::Layout;

use super::TensorMut;

/// An element that rows of f32 are stored as.
pub(super) trait Store: Copy + Send + bytemuck::Zeroable {
    fn store(row: &[f32], to: &mut [Self]);
    /// Has `n` rows from `first` on written where they lie, if they are f32 and lie one behind the other. Whether they do.
    fn fill(
        unit: &mut Unit<'_, '_, Self, TensorRows>,
        first: usize,
        n: usize,
        write: impl for<'b> FnOnce(Fresh<'b>) -> &'b mut [f32],
    ) -> bool;
}

impl Store for f32 {
    fn store(row: &[f32], to: &mut [Self]) {
        to.copy_from_slice(row);
    }

    fn fill(
        unit: &mut Unit<'_, '_, Self, TensorRows>,
        first: usize,
        n: usize,
        write: impl for<'b> FnOnce(Fresh<'b>) -> &'b mut [f32],
    ) -> bool {
        unit.fill(first, n, write)
    }
}

macro_rules! rounded {
    ($($element:ty),*) => {$(
        impl Store for $element {
            fn store(row: &[f32], to: &mut [Self]) {
                to.convert_from_f32_slice(row);
            }

            fn fill(
                _: &mut Unit<'_, '_, Self, TensorRows>,
                _: usize,
                _: usize,
                _: impl for<'b> FnOnce(Fresh<'b>) -> &'b mut [f32],
            ) -> bool {
                false
            }
        }
    )*};
}

rounded!(f16, bf16);

/// Puts rows without gaps where a layout says.
pub(super) fn scatter(layout: &Layout, dense: &[f32], mut to: TensorMut<'_>) {
    let [_, heads, len, dim] = layout.shape;
    for (row, values) in dense.chunks_exact(dim.max(1)).enumerate() {
        let start = layout.index([row / (heads * len), row / len % heads, row % len, 0]);
        for (d, &value) in values.iter().enumerate() {
            let at = start + d * layout.strides[3];
            match &mut to {
                TensorMut::F32(data) => data[at] = value,
                TensorMut::F16(data) => data[at] = f16::from_f32(value),
                TensorMut::Bf16(data) => data[at] = bf16::from_f32(value),
                // refused where problems are made
                TensorMut::I8(_) => {}
            }
        }
    }
}
