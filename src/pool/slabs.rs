//! Pages of keys and values in slabs, on the device or in host memory.

use half::{bf16, f16};

use super::{PoolError, PoolSpec, Storage};
use crate::device::Device;
use crate::engine::{Recording, Tensor};
use crate::error::Error;
use crate::tensor::{Element, TensorData, TensorRef};

/// Bytes of a page that are written at once, unless two rows are more.
const WRITE_BYTES: usize = 1 << 20;

/// All pages of a pool. Page `n` of each tensor belong together.
#[derive(Debug)]
pub(super) struct Slabs {
    /// Where the slabs lie.
    device: Device,
    /// Keys and values, then their scales where they have any.
    forms: Vec<Form>,
    /// Pages of the first slab, and the most of any. Each further one holds as many as all before it, so that a large pool has
    /// few.
    first_pages: usize,
    most_pages: usize,
    slabs: Vec<Slab>,
    /// The lowest stands last.
    free: Vec<usize>,
}

/// What a page holds of one tensor.
#[derive(Clone, Copy, Debug)]
struct Form {
    element: Element,
    elements: usize,
}

impl Form {
    const fn bytes(self) -> u64 {
        self.elements as u64 * self.element.size_bytes() as u64
    }
}

/// Neighbouring pages.
#[derive(Debug)]
struct Slab {
    first: usize,
    pages: usize,
    tensors: Vec<Tensor<'static>>,
}

impl Slabs {
    /// `limit` is what one buffer of the device may hold.
    pub(super) fn new(spec: &PoolSpec, device: &Device, limit: u64) -> Result<Self, PoolError> {
        let form = |name, element: Element, width: usize| {
            let elements = spec.page_len.saturating_mul(spec.kv_heads).saturating_mul(width);
            let bytes = elements.saturating_mul(element.size_bytes());
            if bytes as u64 > limit {
                return Err(PoolError::PageTooLarge {
                    what: "a buffer of the device",
                    bytes: bytes as u64,
                    max: limit,
                });
            }
            if bytes.is_multiple_of(4) {
                Ok(Form { element, elements })
            } else {
                Err(PoolError::OddPage { name, elements, element })
            }
        };
        let mut forms = vec![form("key", spec.element, spec.head_dim)?, form("value", spec.element, spec.v_head_dim)?];
        if spec.element == Element::I8 {
            forms.extend([form("key_scale", Element::F32, 1)?, form("value_scale", Element::F32, 1)?]);
        }
        let largest = forms.iter().map(|form| form.bytes()).max().unwrap_or(1).max(1);
        let pages = |bytes: u64| usize::try_from(bytes / largest).unwrap_or(usize::MAX).max(1);
        let device = match spec.storage {
            Storage::Device => device.clone(),
            Storage::Host => Device::Cpu,
        };
        let (first_pages, most_pages) = (pages(spec.slab_bytes.min(limit)), pages(limit));
        Ok(Self { device, forms, first_pages, most_pages, slabs: vec![], free: vec![] })
    }

    /// Bytes of a page of each tensor.
    pub(super) fn page_bytes(&self) -> impl Iterator<Item = u64> {
        self.forms.iter().map(|form| form.bytes())
    }

    /// Where the pages lie.
    pub(super) const fn device(&self) -> &Device {
        &self.device
    }

    /// Pages that no passage holds.
    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    /// Bytes of all slabs.
    pub(super) fn bytes(&self) -> u64 {
        self.slabs.iter().flat_map(|slab| &slab.tensors).map(Tensor::bytes).sum()
    }

    /// Makes new slabs until so many pages are free.
    pub(super) async fn reserve(&mut self, pages: usize) -> Result<(), Error> {
        while self.free.len() < pages {
            let first = self.slabs.last().map_or(0, |slab| slab.first + slab.pages);
            let pages = first.clamp(self.first_pages, self.most_pages);
            let tensors = self.allocate(["pages of keys", "pages of values"], &self.device, pages).await?;
            self.slabs.push(Slab { first, pages, tensors });
            // the lowest page is taken first
            self.free.splice(0..0, (first..first + pages).rev());
        }
        Ok(())
    }

    /// Room for so many pages.
    pub(super) async fn allocate(
        &self,
        names: [&'static str; 2],
        device: &Device,
        pages: usize,
    ) -> Result<Vec<Tensor<'static>>, Error> {
        let recording = Recording::new(device);
        let mut tensors = vec![];
        for (form, name) in self.forms.iter().zip(names.into_iter().cycle()) {
            tensors.push(recording.allocate(name, form.element.into(), form.elements * pages).await?);
        }
        Ok(tensors)
    }

    /// The pages that [`take`](Self::take) would give.
    pub(super) fn next(&self, pages: usize) -> Vec<usize> {
        self.free.iter().rev().take(pages).copied().collect()
    }

    pub(super) fn take(&mut self, pages: usize) {
        self.free.truncate(self.free.len() - pages);
    }

    pub(super) fn give_back(&mut self, pages: Vec<usize>) {
        self.free.extend(pages);
    }

    /// Writes whole pages: rows `[kv_heads, len, width]` of each tensor as `[pages, page_len, kv_heads, width]`, zeros after the
    /// last row. A page may be far larger than what is in it, so no more than a few rows are copied at once.
    pub(super) async fn write(
        &self,
        pages: &[usize],
        data: &[TensorRef<'_>],
        [kv_heads, len, page_len]: [usize; 3],
    ) -> Result<(), Error> {
        for (tensor, (data, form)) in data.iter().zip(&self.forms).enumerate() {
            let row = form.elements / page_len;
            // an even number: what is written starts at a multiple of 4 bytes
            let rows = WRITE_BYTES / (row * form.element.size_bytes()) / 4 * 4;
            let rows = rows.max(4).min(page_len);
            let mut part = zeros(form.element, rows * row)?;
            for (n, &page) in pages.iter().enumerate() {
                let (slab, local) = self.place(page);
                for first in (0..page_len).step_by(rows) {
                    let rows = rows.min(page_len - first);
                    copy_rows(&mut part, *data, [kv_heads, len, row / kv_heads], n * page_len + first, rows);
                    let part = part.as_ref().cut(0..rows * row);
                    let at = local * form.elements + first * row;
                    self.slabs[slab].tensors[tensor].overwrite("a page", at, part).await?;
                }
            }
        }
        // a lost device takes what is written, and keeps nothing
        self.device.check_alive()
    }

    /// The slab of a page, and the page's number in it.
    pub(super) fn place(&self, page: usize) -> (usize, usize) {
        let slab = self.slabs.partition_point(|slab| slab.first + slab.pages <= page);
        (slab, page - self.slabs.get(slab).map_or(0, |slab| slab.first))
    }

    /// The number of a page of a slab.
    pub(super) fn number(&self, slab: usize, page: usize) -> usize {
        self.slabs.get(slab).map_or(0, |slab| slab.first) + page
    }

    /// Tensors of a slab, and how many pages it holds.
    pub(super) fn slab(&self, slab: usize) -> (&[Tensor<'static>], usize) {
        let slab = &self.slabs[slab];
        (&slab.tensors, slab.pages)
    }

    /// A page of each tensor.
    pub(super) fn page(&self, page: usize) -> impl Iterator<Item = Tensor<'static>> {
        let (slab, local) = self.place(page);
        let tensors = self.forms.iter().zip(&self.slabs[slab].tensors);
        tensors.map(move |(form, tensor)| tensor.cut(local * form.elements..(local + 1) * form.elements))
    }

    /// Elements of a page of each tensor.
    pub(super) fn page_elements(&self) -> impl Iterator<Item = usize> {
        self.forms.iter().map(|form| form.elements)
    }
}

fn zeros(element: Element, elements: usize) -> Result<TensorData, Error> {
    let bytes = elements as u128 * element.size_bytes() as u128;
    // asked for and given back: what cannot be allocated would end the process
    if usize::try_from(bytes).map_or(true, |n| Vec::<u8>::new().try_reserve_exact(n).is_err()) {
        return Err(Error::HostMemory { bytes });
    }
    Ok(TensorData::zeros(element, elements))
}

/// Rows from `first` on of `[kv_heads, len, width]` as `[rows, kv_heads, width]`, zeros after the last.
fn copy_rows(
    part: &mut TensorData,
    data: TensorRef<'_>,
    [kv_heads, len, width]: [usize; 3],
    first: usize,
    rows: usize,
) {
    fn copy<T: Copy>(to: &mut [T], data: &[T], zero: T, [kv_heads, len, width]: [usize; 3], [first, rows]: [usize; 2]) {
        for (j, h) in (0..rows).flat_map(|j| (0..kv_heads).map(move |h| (j, h))) {
            let to = &mut to[(j * kv_heads + h) * width..][..width];
            if first + j < len {
                to.copy_from_slice(&data[(h * len + first + j) * width..][..width]);
            } else {
                to.fill(zero);
            }
        }
    }
    let (shape, rows) = ([kv_heads, len, width], [first, rows]);
    match (part, data) {
        (TensorData::F32(to), TensorRef::F32(data)) => copy(to, data, 0.0, shape, rows),
        (TensorData::F16(to), TensorRef::F16(data)) => copy(to, data, f16::ZERO, shape, rows),
        (TensorData::Bf16(to), TensorRef::Bf16(data)) => copy(to, data, bf16::ZERO, shape, rows),
        (TensorData::I8(to), TensorRef::I8(data)) => copy(to, data, 0, shape, rows),
        // both are of one type
        _ => {}
    }
}
