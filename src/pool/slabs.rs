//! Pages of keys and values in slabs, on the device or in host memory.

use super::{PoolError, PoolSpec, Storage};
use crate::error::Error;
use crate::gpu::Context;
use crate::tensor::{Element, TensorRef};

/// Bytes of a slab, where the device allows as much.
const SLAB_BYTES: u64 = 4 << 20;

/// All pages of a pool. Page `n` of the keys and page `n` of the values belong together.
#[derive(Debug)]
pub(super) struct Slabs {
    context: Option<Context>,
    /// Words of 4 bytes of a page of keys, and of a page of values.
    pub(super) page_words: [usize; 2],
    pages_per_slab: usize,
    slabs: Vec<[Slab; 2]>,
    free: Vec<usize>,
}

/// Neighbouring pages.
#[derive(Debug)]
enum Slab {
    Host(Vec<u32>),
    Device(wgpu::Buffer),
}

impl Slabs {
    /// `context` where slabs are to lie on a device; `limit` is what one buffer of the device may hold.
    pub(super) fn new(spec: &PoolSpec, context: Option<Context>, limit: u64) -> Result<Self, PoolError> {
        let words = |name, width: usize| {
            let elements = spec.page_len.saturating_mul(spec.kv_heads).saturating_mul(width);
            let bytes = elements.saturating_mul(spec.element.size_bytes());
            if bytes as u64 > limit {
                return Err(PoolError::PageTooLarge {
                    what: "a buffer of the device",
                    bytes: bytes as u64,
                    max: limit,
                });
            }
            if bytes.is_multiple_of(4) { Ok(bytes / 4) } else { Err(PoolError::OddPage { name, elements }) }
        };
        let page_words = [words("key", spec.head_dim)?, words("value", spec.v_head_dim)?];
        let largest = page_words[0].max(page_words[1]) as u64 * 4;
        let pages = (SLAB_BYTES.min(limit) / largest).max(1);
        let context = context.filter(|_| spec.storage == Storage::Device);
        let pages_per_slab = usize::try_from(pages).unwrap_or(usize::MAX);
        Ok(Self { context, page_words, pages_per_slab, slabs: vec![], free: vec![] })
    }

    /// Pages that no passage holds.
    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    /// Bytes of all slabs.
    pub(super) fn bytes(&self) -> u64 {
        let [key, value] = self.page_words;
        (self.slabs.len() * self.pages_per_slab) as u64 * (key + value) as u64 * 4
    }

    /// Makes new slabs until so many pages are free.
    pub(super) async fn reserve(&mut self, pages: usize) -> Result<(), Error> {
        while self.free.len() < pages {
            let [key, value] = self.page_words.map(|words| words * self.pages_per_slab);
            let slab = match &self.context {
                Some(context) => [
                    Slab::Device(context.allocate("pages of keys", key as u64 * 4).await?),
                    Slab::Device(context.allocate("pages of values", value as u64 * 4).await?),
                ],
                None => [Slab::Host(zeros(key)?), Slab::Host(zeros(value)?)],
            };
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
    pub(super) async fn write(&mut self, pages: &[usize], data: [&[u32]; 2]) -> Result<(), Error> {
        for (tensor, words) in data.into_iter().enumerate() {
            let page_words = self.page_words[tensor];
            for (&page, words) in pages.iter().zip(words.chunks_exact(page_words)) {
                let at = page % self.pages_per_slab * page_words;
                match &mut self.slabs[page / self.pages_per_slab][tensor] {
                    Slab::Host(slab) => slab[at..at + page_words].copy_from_slice(words),
                    Slab::Device(slab) => {
                        if let Some(context) = &self.context {
                            let bytes = bytemuck::cast_slice(words);
                            context
                                .checked("a page", bytes.len() as u64, || {
                                    context.queue().write_buffer(slab, at as u64 * 4, bytes);
                                })
                                .await?;
                        }
                    }
                }
            }
        }
        // a lost device takes what is written, and keeps nothing
        self.context.as_ref().map_or(Ok(()), |context| Ok(context.check_alive()?))
    }

    /// Where each of these pages of the keys (0) or values (1) lies.
    pub(super) fn each<'a>(&'a self, tensor: usize, pages: &'a [usize]) -> impl Iterator<Item = Page<'a>> {
        pages.iter().map(move |&page| {
            let words = self.page_words[tensor];
            let at = page % self.pages_per_slab * words;
            match &self.slabs[page / self.pages_per_slab][tensor] {
                Slab::Host(slab) => Page::Host(&slab[at..at + words]),
                Slab::Device(slab) => Page::Device { slab, start_bytes: at as u64 * 4 },
            }
        })
    }
}

/// Where a page lies.
pub(super) enum Page<'a> {
    Host(&'a [u32]),
    Device { slab: &'a wgpu::Buffer, start_bytes: u64 },
}

/// Zeros, or an error where the host has no memory for them.
pub(super) fn zeros(words: usize) -> Result<Vec<u32>, Error> {
    let mut data = vec![];
    data.try_reserve_exact(words).map_err(|_| Error::HostMemory { bytes: words as u128 * 4 })?;
    data.resize(words, 0);
    Ok(data)
}

/// Rows `[kv_heads, len, width]` as `[pages, page_len, kv_heads, width]`, zeros after the last row.
pub(super) fn paged(
    data: TensorRef<'_>,
    [kv_heads, len, width]: [usize; 3],
    page_len: usize,
) -> Result<Vec<u32>, Error> {
    let element = data.element().size_bytes();
    let row = width * element;
    let bytes = data.as_bytes();
    let tokens = len.next_multiple_of(page_len);
    let mut words = zeros((tokens * kv_heads * row).div_ceil(4))?;
    let to: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
    for h in 0..kv_heads {
        for j in 0..len {
            let from = (h * len + j) * row;
            let at = (j * kv_heads + h) * row;
            to[at..at + row].copy_from_slice(&bytes[from..from + row]);
        }
    }
    Ok(words)
}

/// Words as the elements that lie in them.
pub(super) fn elements(words: &[u32], element: Element) -> TensorRef<'_> {
    match element {
        Element::F32 => TensorRef::F32(bytemuck::cast_slice(words)),
        Element::F16 => TensorRef::F16(bytemuck::cast_slice(words)),
    }
}
