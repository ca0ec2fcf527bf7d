//! Elements in one piece of memory, on the host or on a device.

use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use half::{bf16, f16};

use super::PlaceError;
use crate::error::Error;
use crate::gpu::Gpu;
use crate::slice::{HostSlice, Kind};
use crate::tensor::{TensorData, TensorRef};

/// Elements of one type that lie behind one another, in host memory or on a device. Cheap to clone: clones share them.
///
/// ```
/// use cross_attention::engine::{Kind, Tensor};
/// let data = vec![1.0f32, 2.0, 3.0];
/// let tensor = Tensor::from(&data);
/// assert_eq!((tensor.kind(), tensor.len()), (Kind::F32, 3));
/// ```
#[derive(Clone, Debug)]
pub struct Tensor<'a>(Place<'a>);

#[derive(Clone, Debug)]
enum Place<'a> {
    Borrowed(HostSlice<'a>),
    Held { data: Arc<RwLock<TensorData>>, kind: Kind, range: Range<usize> },
    Device(OnDevice),
}

#[derive(Clone, Debug)]
struct OnDevice {
    gpu: Gpu,
    buffer: wgpu::Buffer,
    start_bytes: u64,
    kind: Kind,
    len: usize,
}

impl Tensor<'_> {
    /// `len` elements of a buffer of a GPU, from the start of the slice on.
    ///
    /// # Errors
    /// [`PlaceError::TooShort`] if the slice has fewer bytes.
    pub fn on_device(
        gpu: &Gpu,
        slice: wgpu::BufferSlice<'_>,
        kind: Kind,
        len: usize,
    ) -> Result<Tensor<'static>, PlaceError> {
        let needed = (len as u64).saturating_mul(kind.size_bytes() as u64);
        if slice.size() < needed {
            return Err(PlaceError::TooShort { needed, found: slice.size() });
        }
        let buffer = slice.buffer().clone();
        let (gpu, start_bytes) = (gpu.clone(), slice.offset());
        Ok(Tensor(Place::Device(OnDevice { gpu, buffer, start_bytes, kind, len })))
    }

    /// Takes over elements in host memory.
    #[must_use]
    pub fn held(data: TensorData) -> Tensor<'static> {
        let (kind, range) = (data.as_ref().element().into(), 0..data.as_ref().len());
        Tensor(Place::Held { data: Arc::new(RwLock::new(data)), kind, range })
    }

    /// The type of the elements.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match &self.0 {
            Place::Borrowed(data) => data.kind(),
            Place::Held { kind, .. } => *kind,
            Place::Device(on) => on.kind,
        }
    }

    /// Number of elements.
    #[must_use]
    pub const fn len(&self) -> usize {
        match &self.0 {
            Place::Borrowed(data) => data.len(),
            Place::Held { range, .. } => range.end - range.start,
            Place::Device(on) => on.len,
        }
    }

    /// Whether there are no elements.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of all elements.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.len() as u64 * self.kind().size_bytes() as u64
    }

    /// The part of a buffer that it is, where it is on a device.
    #[must_use]
    pub fn buffer_slice(&self) -> Option<wgpu::BufferSlice<'_>> {
        match &self.0 {
            Place::Borrowed(_) | Place::Held { .. } => None,
            // a binding is a multiple of 4 bytes
            Place::Device(on) => {
                let end = (on.start_bytes + self.bytes()).next_multiple_of(4).min(on.buffer.size());
                Some(on.buffer.slice(on.start_bytes..end.max(on.start_bytes + 4).min(on.buffer.size())))
            }
        }
    }

    /// Its device, where it is on one.
    pub(crate) const fn gpu(&self) -> Option<&Gpu> {
        match &self.0 {
            Place::Borrowed(_) | Place::Held { .. } => None,
            Place::Device(on) => Some(&on.gpu),
        }
    }

    /// What can be read on the host without waiting.
    pub(crate) fn host(&self) -> Option<HostRead<'_>> {
        match &self.0 {
            Place::Borrowed(data) => Some(HostRead::Borrowed(*data)),
            Place::Held { data, range, .. } => {
                Some(HostRead::Held(data.read().unwrap_or_else(PoisonError::into_inner), range.clone()))
            }
            Place::Device(_) => None,
        }
    }

    /// The same of another tensor on the host.
    pub(super) fn write_from(&self, at: usize, from: &Tensor<'_>) -> bool {
        if let (Place::Held { data: to, .. }, Place::Held { data: source, range, .. }) = (&self.0, &from.0)
            && Arc::ptr_eq(to, source)
        {
            // a lock cannot be had twice
            let copy = Self::held(source.read().unwrap_or_else(PoisonError::into_inner).clone());
            return self.write_from(at, &copy.cut(range.clone()));
        }
        from.host().is_some_and(|read| self.write(at, read.slice()))
    }

    /// Puts elements in the place of those from `at` on, on the host; whether they fit.
    pub(super) fn write(&self, at: usize, from: HostSlice<'_>) -> bool {
        let Place::Held { data, range, .. } = &self.0 else { return false };
        let mut data = data.write().unwrap_or_else(PoisonError::into_inner);
        let at = range.start + at;
        match (&mut *data, from) {
            (TensorData::F32(to), HostSlice::Tensor(TensorRef::F32(from))) => {
                to[at..at + from.len()].copy_from_slice(from);
            }
            (TensorData::F16(to), HostSlice::Tensor(TensorRef::F16(from))) => {
                to[at..at + from.len()].copy_from_slice(from);
            }
            (TensorData::Bf16(to), HostSlice::Tensor(TensorRef::Bf16(from))) => {
                to[at..at + from.len()].copy_from_slice(from);
            }
            (TensorData::I8(to), HostSlice::Tensor(TensorRef::I8(from))) => {
                to[at..at + from.len()].copy_from_slice(from);
            }
            _ => return false,
        }
        true
    }
}

impl Tensor<'static> {
    /// Puts elements in the place of those from `at` on, wherever they are; on a device before what is submitted next.
    pub(crate) async fn overwrite(&self, name: &'static str, at: usize, from: TensorRef<'_>) -> Result<(), Error> {
        let Place::Device(on) = &self.0 else {
            let fits = self.write(at, HostSlice::Tensor(from));
            return if fits { Ok(()) } else { Err(crate::InputError::Missing { name }.into()) };
        };
        let start = on.start_bytes + at as u64 * on.kind.size_bytes() as u64;
        let (gpu, bytes) = (&on.gpu, from.as_bytes());
        gpu.checked(name, bytes.len() as u64, || gpu.queue().write_buffer(&on.buffer, start, bytes)).await?;
        Ok(())
    }
}

impl<'a> Tensor<'a> {
    /// Elements of a range, which must lie within.
    pub(crate) fn cut(&self, range: Range<usize>) -> Self {
        debug_assert!(range.end <= self.len(), "{range:?} of {}", self.len());
        Self(match &self.0 {
            Place::Borrowed(data) => Place::Borrowed(data.cut(range)),
            Place::Held { data, kind, range: of } => {
                let range = of.start + range.start..of.start + range.end;
                Place::Held { data: Arc::clone(data), kind: *kind, range }
            }
            Place::Device(on) => Place::Device(OnDevice {
                start_bytes: on.start_bytes + range.start as u64 * on.kind.size_bytes() as u64,
                len: range.len(),
                ..on.clone()
            }),
        })
    }

    /// Elements from one on that can be bound: on a device those from some elements before it on. Also how many these are.
    pub(crate) fn cut_to_bind(&self, range: Range<usize>) -> (Self, usize) {
        let before = match &self.0 {
            Place::Borrowed(_) | Place::Held { .. } => 0,
            Place::Device(on) => {
                let alignment = u64::from(on.gpu.caps().min_storage_buffer_offset_alignment.max(1));
                let size = on.kind.size_bytes() as u64;
                let start = on.start_bytes + range.start as u64 * size;
                usize::try_from(start % alignment / size).unwrap_or(0).min(range.start)
            }
        };
        (self.cut(range.start - before..range.end), before)
    }
}

/// Elements on the host, for as long as they are read.
#[derive(Debug)]
pub(crate) enum HostRead<'r> {
    Borrowed(HostSlice<'r>),
    Held(RwLockReadGuard<'r, TensorData>, Range<usize>),
}

impl HostRead<'_> {
    pub(crate) fn slice(&self) -> HostSlice<'_> {
        match self {
            Self::Borrowed(data) => *data,
            Self::Held(data, range) => HostSlice::Tensor(data.as_ref().cut(range.clone())),
        }
    }

    /// As a tensor of an attention; nothing where it is of another kind.
    pub(crate) fn tensor(&self) -> TensorRef<'_> {
        match self.slice() {
            HostSlice::Tensor(data) => data,
            _ => TensorRef::F32(&[]),
        }
    }

    /// As f32; nothing where it is of another kind.
    pub(crate) fn f32(&self) -> &[f32] {
        match self.slice() {
            HostSlice::Tensor(TensorRef::F32(data)) => data,
            _ => &[],
        }
    }

    pub(crate) fn u32(&self) -> &[u32] {
        match self.slice() {
            HostSlice::U32(data) => data,
            _ => &[],
        }
    }

    pub(crate) fn i32(&self) -> &[i32] {
        match self.slice() {
            HostSlice::I32(data) => data,
            _ => &[],
        }
    }

    pub(crate) fn bools(&self) -> &[bool] {
        match self.slice() {
            HostSlice::Bool(data) => data,
            _ => &[],
        }
    }
}

impl<'a> From<HostSlice<'a>> for Tensor<'a> {
    fn from(data: HostSlice<'a>) -> Self {
        Self(Place::Borrowed(data))
    }
}

impl<'a> From<TensorRef<'a>> for Tensor<'a> {
    fn from(data: TensorRef<'a>) -> Self {
        Self(Place::Borrowed(HostSlice::Tensor(data)))
    }
}

impl<'a> From<&'a TensorData> for Tensor<'a> {
    fn from(data: &'a TensorData) -> Self {
        data.as_ref().into()
    }
}

macro_rules! from_slices {
    ($($type:ty => $make:expr),*) => {$(
        impl<'a> From<&'a [$type]> for Tensor<'a> {
            fn from(data: &'a [$type]) -> Self {
                Self(Place::Borrowed(($make)(data)))
            }
        }

        impl<'a> From<&'a Vec<$type>> for Tensor<'a> {
            fn from(data: &'a Vec<$type>) -> Self {
                data.as_slice().into()
            }
        }

        impl<'a, const N: usize> From<&'a [$type; N]> for Tensor<'a> {
            fn from(data: &'a [$type; N]) -> Self {
                data.as_slice().into()
            }
        }
    )*};
}

from_slices!(
    f32 => |data| HostSlice::Tensor(TensorRef::F32(data)),
    f16 => |data| HostSlice::Tensor(TensorRef::F16(data)),
    u32 => HostSlice::U32,
    i32 => HostSlice::I32,
    bf16 => |data| HostSlice::Tensor(TensorRef::Bf16(data)),
    i8 => |data| HostSlice::Tensor(TensorRef::I8(data)),
    bool => HostSlice::Bool
);
