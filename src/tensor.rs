//! What a tensor looks like in memory: its element type and its layout, in elements, never in bytes.

use half::{bf16, f16};

use crate::name::UnknownName;

/// The type of one stored element. All arithmetic is done in f32, whatever the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Element {
    /// IEEE 754 single precision, 4 bytes.
    F32,
    /// IEEE 754 half precision, 2 bytes. Storage only; needs no f16 support of the device.
    F16,
    /// The upper half of an f32, 2 bytes: its range, with 8 bits of mantissa.
    Bf16,
    /// A signed byte, times the scale of its block of the row: keys and values only, beside `key_scale` and `value_scale`.
    /// An element is `byte * scale`, rounded once to f32.
    I8,
}

impl Element {
    /// Every one.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Bf16, Self::I8];
    /// Those that stand for themselves: what queries, bias and output may be.
    pub const FLOATS: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// Bytes of one element.
    #[must_use]
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::I8 => 1,
        }
    }

    /// `f32`, `f16`, `bf16` or `i8`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::I8 => "i8",
        }
    }
}

impl std::fmt::Display for Element {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Element {
    type Err = UnknownName;

    fn from_str(text: &str) -> Result<Self, UnknownName> {
        UnknownName::find("element type", text, &Self::ALL)
    }
}

/// Where the elements of a four-dimensional tensor lie in a buffer.
///
/// The axes are `[batch, heads, len, dim]`, whatever their order in memory: element `[b, h, i, d]` lies at
/// `offset + b * strides[0] + h * strides[1] + i * strides[2] + d * strides[3]`. Strides and offset count
/// elements. A stride of 0 repeats the same elements along an axis (broadcast).
///
/// ```
/// use cross_attention::Layout;
/// let heads_outside = Layout::bhld([2, 8, 77, 64]);
/// let heads_inside = Layout::blhd([2, 8, 77, 64]);
/// assert_eq!(heads_outside.strides, [8 * 77 * 64, 77 * 64, 64, 1]);
/// assert_eq!(heads_inside.strides, [77 * 8 * 64, 64, 8 * 64, 1]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// `[batch, heads, len, dim]`.
    pub shape: [usize; 4],
    /// Distance between neighbours along each axis of `shape`, in elements.
    pub strides: [usize; 4],
    /// Where element `[0, 0, 0, 0]` lies, in elements from the start of the buffer.
    pub offset: usize,
}

impl Layout {
    /// Memory order `[batch, heads, len, dim]`, without gaps. The shape is given in the same order.
    #[must_use]
    pub const fn bhld(shape: [usize; 4]) -> Self {
        let [_, heads, len, dim] = shape;
        let plane = len.saturating_mul(dim);
        Self { shape, strides: [heads.saturating_mul(plane), plane, dim, 1], offset: 0 }
    }

    /// Memory order `[batch, len, heads, dim]`, without gaps. The shape is still `[batch, heads, len, dim]`.
    #[must_use]
    pub const fn blhd(shape: [usize; 4]) -> Self {
        Self::packed(shape, 1, 0)
    }

    /// One of `parts` equal tensors packed side by side, in memory order `[batch, len, parts, heads, dim]`.
    ///
    /// Packed keys and values (`[batch, len, 2, heads, dim]`) are `packed(shape, 2, 0)` and
    /// `packed(shape, 2, 1)` over the same buffer; packed query, key and value have three parts.
    #[must_use]
    pub const fn packed(shape: [usize; 4], parts: usize, part: usize) -> Self {
        let [_, heads, len, dim] = shape;
        let token = heads.saturating_mul(dim);
        let row = token.saturating_mul(parts);
        Self { shape, strides: [len.saturating_mul(row), dim, row, 1], offset: token.saturating_mul(part) }
    }

    /// The same layout, starting `offset` elements into the buffer.
    #[must_use]
    pub const fn with_offset(mut self, offset: usize) -> Self {
        self.offset = offset;
        self
    }

    /// The same layout with its strides replaced, in elements along `[batch, heads, len, dim]`.
    #[must_use]
    pub const fn with_strides(mut self, strides: [usize; 4]) -> Self {
        self.strides = strides;
        self
    }

    /// Stretches axes of length 1 to `shape` with a stride of 0; `None` if another axis differs.
    #[must_use]
    pub fn broadcast_to(&self, shape: [usize; 4]) -> Option<Self> {
        let mut strides = self.strides;
        for axis in 0..4 {
            if self.shape[axis] != shape[axis] {
                if self.shape[axis] != 1 {
                    return None;
                }
                strides[axis] = 0;
            }
        }
        Some(Self { shape, strides, offset: self.offset })
    }

    /// Whether some axis has length 0.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// Number of elements of the shape, repeats of a broadcast counted; `None` if it overflows.
    #[must_use]
    pub fn elements(&self) -> Option<usize> {
        if self.is_empty() {
            return Some(0);
        }
        self.shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n))
    }

    /// Number of elements the buffer must hold: one past the last element touched, 0 for an empty tensor;
    /// `None` if it overflows.
    #[must_use]
    pub fn extent(&self) -> Option<usize> {
        if self.is_empty() {
            return Some(0);
        }
        let mut last = self.offset;
        for (&n, &stride) in self.shape.iter().zip(&self.strides) {
            last = last.checked_add((n - 1).checked_mul(stride)?)?;
        }
        last.checked_add(1)
    }

    /// Position of element `[b, h, i, d]` in the buffer. The indices are not compared with the shape, nor the sum with what
    /// can be counted; [`extent`](Self::extent) tells for the whole shape.
    #[must_use]
    pub const fn index(&self, at: [usize; 4]) -> usize {
        self.offset
            + at[0] * self.strides[0]
            + at[1] * self.strides[1]
            + at[2] * self.strides[2]
            + at[3] * self.strides[3]
    }

    /// Whether every row consists of whole groups of four neighbours that start at multiples of four elements.
    #[must_use]
    pub(crate) fn has_vec4_rows(&self) -> bool {
        self.has_rows_of(4)
    }

    /// The same of groups of so many.
    pub(crate) fn has_rows_of(&self, elements: usize) -> bool {
        let [rows @ .., dim] = self.strides;
        let aligned = |(stride, n): (&usize, &usize)| *n <= 1 || stride.is_multiple_of(elements);
        self.shape[3].is_multiple_of(elements)
            && dim == 1
            && self.offset.is_multiple_of(elements)
            && rows.iter().zip(&self.shape).all(aligned)
    }

    /// Whether no two elements share a place, as a tensor that is written to needs it.
    ///
    /// Decided axis by axis, from the smallest stride up: each must step over all that the smaller ones
    /// span. The few exotic layouts that interleave without overlapping are refused too.
    #[must_use]
    pub fn is_injective(&self) -> bool {
        if self.is_empty() {
            return true;
        }
        let mut axes: Vec<(usize, usize)> =
            self.strides.iter().copied().zip(self.shape).filter(|&(_, n)| n > 1).collect();
        axes.sort_unstable();
        let mut span = 0usize;
        for (stride, n) in axes {
            if stride <= span {
                return false;
            }
            span = span.saturating_add(stride.saturating_mul(n - 1));
        }
        true
    }
}

/// One tensor of an attention: what is stored and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TensorSpec {
    /// The type of the stored elements.
    pub element: Element,
    /// Shape, strides and offset.
    pub layout: Layout,
}

impl TensorSpec {
    /// A tensor of f32.
    #[must_use]
    pub const fn f32(layout: Layout) -> Self {
        Self { element: Element::F32, layout }
    }

    /// A tensor of f16.
    #[must_use]
    pub const fn f16(layout: Layout) -> Self {
        Self { element: Element::F16, layout }
    }

    /// A tensor of bf16.
    #[must_use]
    pub const fn bf16(layout: Layout) -> Self {
        Self { element: Element::Bf16, layout }
    }

    /// A tensor of signed bytes, which need scales beside them.
    #[must_use]
    pub const fn i8(layout: Layout) -> Self {
        Self { element: Element::I8, layout }
    }
}

/// Elements of a tensor in host memory, borrowed. Shape and strides are in the [`TensorSpec`] beside it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum TensorRef<'a> {
    /// Stored as f32.
    F32(&'a [f32]),
    /// Stored as f16.
    F16(&'a [f16]),
    /// Stored as bf16.
    Bf16(&'a [bf16]),
    /// Stored as signed bytes; their scales are beside them.
    I8(&'a [i8]),
}

impl<'a> TensorRef<'a> {
    /// The type of the elements.
    #[must_use]
    pub const fn element(&self) -> Element {
        match self {
            Self::F32(_) => Element::F32,
            Self::F16(_) => Element::F16,
            Self::Bf16(_) => Element::Bf16,
            Self::I8(_) => Element::I8,
        }
    }

    /// Number of elements.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::F16(data) => data.len(),
            Self::Bf16(data) => data.len(),
            Self::I8(data) => data.len(),
        }
    }

    /// Whether there are no elements.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The element at `index`, widened to f32 (exact). Of a signed byte it is the byte, without its scale.
    ///
    /// # Panics
    /// If `index` is not below [`len`](Self::len).
    #[must_use]
    pub fn get(&self, index: usize) -> f32 {
        match self {
            Self::F32(data) => data[index],
            Self::F16(data) => data[index].to_f32(),
            Self::Bf16(data) => data[index].to_f32(),
            Self::I8(data) => f32::from(data[index]),
        }
    }

    /// The elements as bytes, in the machine's order.
    #[must_use]
    pub fn as_bytes(&self) -> &'a [u8] {
        match self {
            Self::F32(data) => bytemuck::cast_slice(data),
            Self::F16(data) => bytemuck::cast_slice(data),
            Self::Bf16(data) => bytemuck::cast_slice(data),
            Self::I8(data) => bytemuck::cast_slice(data),
        }
    }

    /// A copy.
    #[must_use]
    pub fn to_owned(&self) -> TensorData {
        match *self {
            Self::F32(data) => TensorData::F32(data.to_vec()),
            Self::F16(data) => TensorData::F16(data.to_vec()),
            Self::Bf16(data) => TensorData::Bf16(data.to_vec()),
            Self::I8(data) => TensorData::I8(data.to_vec()),
        }
    }

    /// The elements of a range, which must lie within.
    pub(crate) fn cut(&self, range: std::ops::Range<usize>) -> Self {
        match *self {
            Self::F32(data) => Self::F32(&data[range]),
            Self::F16(data) => Self::F16(&data[range]),
            Self::Bf16(data) => Self::Bf16(&data[range]),
            Self::I8(data) => Self::I8(&data[range]),
        }
    }
}

macro_rules! from_slices {
    ($($type:ty => $variant:ident),*) => {$(
        impl<'a> From<&'a [$type]> for TensorRef<'a> {
            fn from(data: &'a [$type]) -> Self {
                Self::$variant(data)
            }
        }

        impl<'a, const N: usize> From<&'a [$type; N]> for TensorRef<'a> {
            fn from(data: &'a [$type; N]) -> Self {
                Self::$variant(data)
            }
        }

        impl<'a> From<&'a Vec<$type>> for TensorRef<'a> {
            fn from(data: &'a Vec<$type>) -> Self {
                Self::$variant(data)
            }
        }
    )*};
}

from_slices!(f32 => F32, f16 => F16, bf16 => Bf16, i8 => I8);

impl<'a> From<&'a TensorData> for TensorRef<'a> {
    fn from(data: &'a TensorData) -> Self {
        data.as_ref()
    }
}

/// Elements of a tensor in host memory, owned.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum TensorData {
    /// Stored as f32.
    F32(Vec<f32>),
    /// Stored as f16.
    F16(Vec<f16>),
    /// Stored as bf16.
    Bf16(Vec<bf16>),
    /// Stored as signed bytes; their scales are beside them.
    I8(Vec<i8>),
}

impl TensorData {
    /// `len` zeros of the given type.
    #[must_use]
    pub fn zeros(element: Element, len: usize) -> Self {
        match element {
            Element::F32 => Self::F32(vec![0.0; len]),
            Element::F16 => Self::F16(vec![f16::ZERO; len]),
            Element::Bf16 => Self::Bf16(vec![bf16::ZERO; len]),
            Element::I8 => Self::I8(vec![0; len]),
        }
    }

    /// `values` rounded to the given type, to nearest even; out of its range they become infinite, as IEEE 754 says. Signed
    /// bytes hold -128 to 127 and have no infinity: beyond it, they are these; NaN becomes 0. For scales and bytes of any numbers
    /// see [`Quantized`](crate::quantize::Quantized).
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "saturates, as documented")]
    pub fn from_f32(element: Element, values: Vec<f32>) -> Self {
        match element {
            Element::F32 => Self::F32(values),
            Element::F16 => Self::F16(values.into_iter().map(f16::from_f32).collect()),
            Element::Bf16 => Self::Bf16(values.into_iter().map(bf16::from_f32).collect()),
            Element::I8 => Self::I8(values.into_iter().map(|x| x.round_ties_even() as i8).collect()),
        }
    }

    /// Borrows the elements.
    #[must_use]
    pub fn as_ref(&self) -> TensorRef<'_> {
        match self {
            Self::F32(data) => TensorRef::F32(data),
            Self::F16(data) => TensorRef::F16(data),
            Self::Bf16(data) => TensorRef::Bf16(data),
            Self::I8(data) => TensorRef::I8(data),
        }
    }

    /// All elements widened to f32 (exact; bytes without their scales), without a copy where they are f32.
    #[must_use]
    pub fn into_f32(self) -> Vec<f32> {
        match self {
            Self::F32(data) => data,
            Self::F16(data) => data.into_iter().map(f16::to_f32).collect(),
            Self::Bf16(data) => data.into_iter().map(bf16::to_f32).collect(),
            Self::I8(data) => data.into_iter().map(f32::from).collect(),
        }
    }

    /// All elements widened to f32 (exact; bytes without their scales).
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Self::F32(data) => data.clone(),
            Self::F16(data) => data.iter().map(|x| x.to_f32()).collect(),
            Self::Bf16(data) => data.iter().map(|x| x.to_f32()).collect(),
            Self::I8(data) => data.iter().map(|&x| f32::from(x)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extent_counts_to_the_last_element() {
        assert_eq!(Layout::bhld([2, 3, 4, 5]).extent(), Some(120));
        assert_eq!(Layout::blhd([2, 3, 4, 5]).with_offset(7).extent(), Some(127));
        assert_eq!(Layout::bhld([2, 3, 0, 5]).with_offset(7).extent(), Some(0));
        let overflowing = Layout::bhld([usize::MAX, 3, 4, 5]);
        assert_eq!(overflowing.extent(), None);
        assert_eq!(overflowing.elements(), None);
    }

    #[test]
    fn packed_parts_lie_side_by_side() {
        let key = Layout::packed([1, 2, 3, 4], 2, 0);
        let value = Layout::packed([1, 2, 3, 4], 2, 1);
        assert_eq!(key.index([0, 1, 2, 3]), 2 * 16 + 4 + 3);
        assert_eq!(value.index([0, 1, 2, 3]), 8 + 2 * 16 + 4 + 3);
    }

    #[test]
    fn injective_means_no_place_is_shared() {
        assert!(Layout::bhld([2, 3, 4, 5]).is_injective());
        assert!(Layout::blhd([2, 3, 4, 5]).is_injective());
        assert!(!Layout::bhld([2, 3, 4, 5]).with_strides([0, 20, 5, 1]).is_injective());
        assert!(!Layout::bhld([2, 3, 4, 5]).with_strides([60, 20, 4, 1]).is_injective());
        assert!(Layout::bhld([1, 3, 4, 5]).with_strides([0, 20, 5, 1]).is_injective());
        assert!(Layout::bhld([2, 3, 0, 5]).is_injective());
    }
}
