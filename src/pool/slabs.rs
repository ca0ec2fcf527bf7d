//! Pages of keys and values in slabs, on the device or in host memory.

use super::{PoolError, PoolSpec, Storage};
use crate::device::Device;
use crate::engine::{Recording, Tensor};
use crate::error::Error;
use crate::tensor::{Element, TensorData, TensorRef};

/// Bytes of a slab, where the device allows as much.
const SLAB_BYTES: u64 = 4 << 20;

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

    /// Writes whole pages, keys and values.
    pub(super) async fn write(&self, pages: &[usize], data: [TensorRef<'_>; 2]) -> Result<(), Error> {
        for (tensor, data) in data.into_iter().enumerate() {
            let elements = self.page_elements[tensor];
            for (n, &page) in pages.iter().enumerate() {
                let at = page % self.pages_per_slab * elements;
                let data = match data {
                    TensorRef::F32(data) => TensorRef::F32(&data[n * elements..][..elements]),
                    TensorRef::F16(data) => TensorRef::F16(&data[n * elements..][..elements]),
                };
                self.slabs[page / self.pages_per_slab][tensor].overwrite("a page", at, data).await?;
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

/// Rows `[kv_heads, len, width]` as `[pages, page_len, kv_heads, width]`, zeros after the last row.
pub(super) fn paged(
    data: TensorRef<'_>,
    [kv_heads, len, width]: [usize; 3],
    page_len: usize,
) -> Result<TensorData, Error> {
    let elements = len.next_multiple_of(page_len) * kv_heads * width;
    let bytes = elements as u128 * data.element().size_bytes() as u128;
    // asked for and given back: what cannot be allocated would end the process
    if usize::try_from(bytes).map_or(true, |n| Vec::<u8>::new().try_reserve_exact(n).is_err()) {
        return Err(Error::HostMemory { bytes });
    }
    let mut paged = TensorData::zeros(data.element(), elements);
    for (h, j) in (0..kv_heads).flat_map(|h| (0..len).map(move |j| (h, j))) {
        let (from, at) = ((h * len + j) * width, (j * kv_heads + h) * width);
        match (&mut paged, data) {
            (TensorData::F32(to), TensorRef::F32(data)) => {
                to[at..at + width].copy_from_slice(&data[from..from + width]);
            }
            (TensorData::F16(to), TensorRef::F16(data)) => {
                to[at..at + width].copy_from_slice(&data[from..from + width]);
            }
            // both are of one type
            (TensorData::F32(_), TensorRef::F16(_)) | (TensorData::F16(_), TensorRef::F32(_)) => {}
        }
    }
    Ok(paged)
}
