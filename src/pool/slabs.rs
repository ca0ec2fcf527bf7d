//! Pages of keys and values in slabs, on the device or in host memory.

use half::{bf16, f16};

use super::{PoolError, PoolSpec, Storage};
use crate::device::Device;
use crate::engine::{Recording, Tensor};
use crate::error::Error;
use crate::tensor::{Element, TensorData, TensorRef};

/// Bytes of a slab, where the device allows as much.
const SLAB_BYTES: u64 = 4 << 20;

/// Bytes of a page that are written at once, unless two rows are more.
const WRITE_BYTES: usize = 1 << 20;

/// All pages of a pool. Page `n` of the keys and page `n` of the values belong together.
#[derive(Debug)]
pub(super) struct Slabs {
    /// Where the slabs lie.
    device: Device,
    element: Element,
    /// Elements of a page of keys, and of a page of values.
    page_elements: [usize; 2],
    pages_per_slab: usize,
    /// Neighbouring pages.
    slabs: Vec<[Tensor<'static>; 2]>,
    /// The lowest stands last.
    free: Vec<usize>,
}

impl Slabs {
    /// `limit` is what one buffer of the device may hold.
    pub(super) fn new(spec: &PoolSpec, device: &Device, limit: u64) -> Result<Self, PoolError> {
        let elements = |name, width: usize| {
            let elements = spec.page_len.saturating_mul(spec.kv_heads).saturating_mul(width);
            let bytes = elements.saturating_mul(spec.element.size_bytes());
            if bytes as u64 > limit {
                return Err(PoolError::PageTooLarge {
                    what: "a buffer of the device",
                    bytes: bytes as u64,
                    max: limit,
                });
            }
            if bytes.is_multiple_of(4) { Ok(elements) } else { Err(PoolError::OddPage { name, elements }) }
        };
        let page_elements = [elements("key", spec.head_dim)?, elements("value", spec.v_head_dim)?];
        let largest = page_elements[0].max(page_elements[1]) as u64 * spec.element.size_bytes() as u64;
        let pages = (SLAB_BYTES.min(limit) / largest).max(1);
        let device = match spec.storage {
            Storage::Device => device.clone(),
            Storage::Host => Device::Cpu,
        };
        let pages_per_slab = usize::try_from(pages).unwrap_or(usize::MAX);
        Ok(Self { device, element: spec.element, page_elements, pages_per_slab, slabs: vec![], free: vec![] })
    }

    /// Bytes of a page of keys, and of a page of values.
    pub(super) fn page_bytes(&self) -> [u64; 2] {
        self.page_elements.map(|elements| elements as u64 * self.element.size_bytes() as u64)
    }

    /// Elements of a page of keys, and of a page of values.
    pub(super) const fn page_elements(&self) -> [usize; 2] {
        self.page_elements
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
        self.slabs.iter().flatten().map(Tensor::bytes).sum()
    }

    /// Makes new slabs until so many pages are free.
    pub(super) async fn reserve(&mut self, pages: usize) -> Result<(), Error> {
        let recording = Recording::new(&self.device);
        let kind = self.element.into();
        while self.free.len() < pages {
            let [key, value] = self.page_elements.map(|elements| elements * self.pages_per_slab);
            let slab = [
                recording.allocate("pages of keys", kind, key).await?,
                recording.allocate("pages of values", kind, value).await?,
            ];
            let first = self.slabs.len() * self.pages_per_slab;
            self.slabs.push(slab);
            // the lowest page is taken first
            self.free.splice(0..0, (first..first + self.pages_per_slab).rev());
        }
        Ok(())
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

    /// Writes whole pages: rows `[kv_heads, len, width]` of keys and of values as `[pages, page_len, kv_heads, width]`, zeros
    /// after the last row. A page may be far larger than what is in it, so no more than a few rows are copied at once.
    pub(super) async fn write(
        &self,
        pages: &[usize],
        data: [TensorRef<'_>; 2],
        [kv_heads, len, page_len]: [usize; 3],
    ) -> Result<(), Error> {
        for (tensor, data) in data.into_iter().enumerate() {
            let elements = self.page_elements[tensor];
            let row = elements / page_len;
            // an even number: what is written starts at a multiple of 4 bytes
            let rows = (WRITE_BYTES / (row * self.element.size_bytes()) / 2 * 2).max(2).min(page_len);
            let mut part = zeros(self.element, rows * row)?;
            for (n, &page) in pages.iter().enumerate() {
                let at = page % self.pages_per_slab * elements;
                for first in (0..page_len).step_by(rows) {
                    let rows = rows.min(page_len - first);
                    copy_rows(&mut part, data, [kv_heads, len, row / kv_heads], n * page_len + first, rows);
                    let part = part.as_ref().cut(0..rows * row);
                    let slab = &self.slabs[page / self.pages_per_slab][tensor];
                    slab.overwrite("a page", at + first * row, part).await?;
                }
            }
        }
        // a lost device takes what is written, and keeps nothing
        self.device.check_alive()
    }

    /// A page of the keys (0) or values (1).
    pub(super) fn page(&self, tensor: usize, page: usize) -> Tensor<'static> {
        let elements = self.page_elements[tensor];
        let at = page % self.pages_per_slab * elements;
        self.slabs[page / self.pages_per_slab][tensor].cut(at..at + elements)
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
    for (j, h) in (0..rows).flat_map(|j| (0..kv_heads).map(move |h| (j, h))) {
        let at = (j * kv_heads + h) * width;
        let from = (first + j < len).then(|| (h * len + first + j) * width);
        match (&mut *part, data, from) {
            (TensorData::F32(to), TensorRef::F32(data), Some(from)) => {
                to[at..at + width].copy_from_slice(&data[from..from + width]);
            }
            (TensorData::F16(to), TensorRef::F16(data), Some(from)) => {
                to[at..at + width].copy_from_slice(&data[from..from + width]);
            }
            (TensorData::Bf16(to), TensorRef::Bf16(data), Some(from)) => {
                to[at..at + width].copy_from_slice(&data[from..from + width]);
            }
            (TensorData::I8(to), TensorRef::I8(data), Some(from)) => {
                to[at..at + width].copy_from_slice(&data[from..from + width]);
            }
            (TensorData::F32(to), _, None) => to[at..at + width].fill(0.0),
            (TensorData::F16(to), _, None) => to[at..at + width].fill(f16::ZERO),
            (TensorData::Bf16(to), _, None) => to[at..at + width].fill(bf16::ZERO),
            (TensorData::I8(to), _, None) => to[at..at + width].fill(0),
            // both are of one type
            (_, _, Some(_)) => {}
        }
    }
}
