//! Elements of one type in host memory, whatever the type.

use std::ops::Range;

use crate::tensor::{Element, TensorRef};

/// The type of the elements of a tensor or of a term.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    F16,
    /// 2 bytes.
    Bf16,
    /// 4 bytes.
    U32,
    /// 4 bytes.
    I32,
    /// 1 byte.
    I8,
    /// 1 byte; 0 is false.
    Bool,
}

impl Kind {
    /// Bytes of an element.
    #[must_use]
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::F32 | Self::U32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::I8 | Self::Bool => 1,
        }
    }
}

impl Kind {
    /// That of elements of a tensor.
    #[must_use]
    pub const fn of(element: Element) -> Self {
        match element {
            Element::F32 => Self::F32,
            Element::F16 => Self::F16,
            Element::Bf16 => Self::Bf16,
            Element::I8 => Self::I8,
        }
    }

    /// What a tensor of these holds, where an attention can read it.
    #[must_use]
    pub const fn element(self) -> Option<Element> {
        match self {
            Self::F32 => Some(Element::F32),
            Self::F16 => Some(Element::F16),
            Self::Bf16 => Some(Element::Bf16),
            Self::I8 => Some(Element::I8),
            Self::U32 | Self::I32 | Self::Bool => None,
        }
    }
}

impl From<Element> for Kind {
    fn from(element: Element) -> Self {
        Self::of(element)
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::I8 => "i8",
            Self::Bool => "bool",
        })
    }
}

/// Elements in host memory, borrowed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum HostSlice<'a> {
    Tensor(TensorRef<'a>),
    U32(&'a [u32]),
    I32(&'a [i32]),
    Bool(&'a [bool]),
}

impl<'a> HostSlice<'a> {
    pub(crate) const fn kind(&self) -> Kind {
        match self {
            Self::Tensor(data) => Kind::of(data.element()),
            Self::U32(_) => Kind::U32,
            Self::I32(_) => Kind::I32,
            Self::Bool(_) => Kind::Bool,
        }
    }

    pub(crate) const fn len(&self) -> usize {
        match self {
            Self::Tensor(data) => data.len(),
            Self::U32(data) => data.len(),
            Self::I32(data) => data.len(),
            Self::Bool(data) => data.len(),
        }
    }

    pub(crate) fn cut(&self, range: Range<usize>) -> Self {
        match *self {
            Self::Tensor(data) => Self::Tensor(data.cut(range)),
            Self::U32(data) => Self::U32(&data[range]),
            Self::I32(data) => Self::I32(&data[range]),
            Self::Bool(data) => Self::Bool(&data[range]),
        }
    }

    pub(crate) fn bytes(&self) -> &'a [u8] {
        match self {
            Self::Tensor(data) => data.as_bytes(),
            Self::U32(data) => bytemuck::cast_slice(data),
            Self::I32(data) => bytemuck::cast_slice(data),
            Self::Bool(data) => bytemuck::cast_slice(data),
        }
    }
}

impl<'a> From<TensorRef<'a>> for HostSlice<'a> {
    fn from(data: TensorRef<'a>) -> Self {
        Self::Tensor(data)
    }
}

impl<'a> From<&'a [f32]> for HostSlice<'a> {
    fn from(data: &'a [f32]) -> Self {
        Self::Tensor(TensorRef::F32(data))
    }
}

impl<'a> From<&'a [u32]> for HostSlice<'a> {
    fn from(data: &'a [u32]) -> Self {
        Self::U32(data)
    }
}

impl<'a> From<&'a [i32]> for HostSlice<'a> {
    fn from(data: &'a [i32]) -> Self {
        Self::I32(data)
    }
}

impl<'a> From<&'a [bool]> for HostSlice<'a> {
    fn from(data: &'a [bool]) -> Self {
        Self::Bool(data)
    }
}
