//! A pool of passages: keys and values that come and go, and attention over any of them.
//!
//! Retrieval (RAG, fusion in the decoder, RETRO) attends to a few passages out of many. A [`PassagePool`] keeps the keys and values of each
//! once, in pages of a fixed number of tokens (as the paged cache of Kwon et al. 2023, arXiv:2309.06180, does), and
//! [`attend`](PassagePool::attend) takes, for each group of queries, a list of passages, with one softmax over all of
//! them. What each passage contributed comes back as its probability mass.
//!
//! The chosen passages are entries of a batch with key lengths, whose pages are found by a table where they lie; the query is
//! repeated with a stride of 0, and the partial attentions are merged exactly. Nothing of keys and values is copied. Pages lie in a
//! few slabs, each half of all there are, and there is a round for each. Only where pages are in host memory and the
//! device is a GPU are they copied: as many as the staging memory holds, in rounds.

mod attend;
mod error;
mod slabs;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

pub use attend::{GroupOutput, GroupQuery, GroupTensors, PoolAttention};
pub use error::PoolError;

use crate::device::{Device, PreparedAttention};
use crate::error::Error;
use crate::kept::Kept;
use crate::problem::{MAX_LEN, MAX_PAGE_LEN};
use crate::quantize::Quantized;
use crate::tensor::{Element, TensorRef};
use slabs::Slabs;

/// Where a pool keeps its pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Storage {
    /// On the device; in host memory where the device is the CPU.
    #[default]
    Device,
    /// In host memory; what a call needs is copied to the device each time. Results are the same, but for the order in which
    /// what is copied at once is merged.
    Host,
}

/// What a pool holds and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolSpec {
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Width of a key row.
    pub head_dim: usize,
    /// Width of a value row.
    pub v_head_dim: usize,
    /// How keys and values are stored. [`Element::I8`]: passages are given in f32, and stored as signed bytes with one f32 scale
    /// for each row ([`Quantized`]).
    pub element: Element,
    /// Tokens of a page, a power of two up to [`MAX_PAGE_LEN`]. A passage takes whole pages.
    pub page_len: usize,
    /// Where pages are kept.
    pub storage: Storage,
    /// Bytes of keys and values that are copied to a GPU at once where pages are kept in host memory, at least one page of
    /// both; a device's limit on bindings counts too. Of no account elsewhere.
    pub staging_bytes: u64,
    /// Bytes of keys in the first slab, or of values if these are wider: at least one page, and no more than the device binds at
    /// once. Each further slab holds as many pages as all before it, and a call has a round for each slab that it meets.
    pub slab_bytes: u64,
}

impl PoolSpec {
    /// f32, pages of 16 tokens on the device, values as wide as keys; 64 MiB of staging memory, 4 MiB in the first slab.
    #[must_use]
    pub const fn new(kv_heads: usize, head_dim: usize) -> Self {
        Self {
            kv_heads,
            head_dim,
            v_head_dim: head_dim,
            element: Element::F32,
            page_len: 16,
            storage: Storage::Device,
            staging_bytes: 64 << 20,
            slab_bytes: 4 << 20,
        }
    }
}

/// Names a passage of one pool. Never given twice, also not after the passage was removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PassageId {
    pool: u64,
    number: u64,
}

impl std::fmt::Display for PassageId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "passage {} of pool {}", self.number, self.pool)
    }
}

/// A passage's length and its pages, in order.
#[derive(Debug)]
struct Passage {
    len: usize,
    pages: Vec<usize>,
}

/// Keys and values of passages on a device.
///
/// ```
/// use cross_attention::Device;
/// use cross_attention::pool::{GroupQuery, PassagePool, PoolAttention, PoolSpec};
/// # pollster::block_on(async {
/// let mut pool = PassagePool::new(&Device::Cpu, PoolSpec::new(1, 2))?;
/// // two passages of one token each, with equal keys
/// let a = pool.append(&vec![1.0f32, 0.0], &vec![1.0f32, 1.0], 1).await?;
/// let b = pool.append(&vec![1.0f32, 0.0], &vec![3.0f32, 5.0], 1).await?;
/// let query = vec![0.5f32, 0.5];
/// let group = GroupQuery { query: (&query).into(), q_len: 1, passages: &[a, b] };
/// let result = pool.attend(std::slice::from_ref(&group), &PoolAttention::new(1)).await?;
/// assert_eq!(result[0].output, [2.0, 3.0]);
/// assert_eq!(result[0].mass, [0.5, 0.5]);
/// pool.remove(a)?;
/// assert!(pool.attend(&[group], &PoolAttention::new(1)).await.is_err());
/// # Ok::<(), cross_attention::Error>(())
/// # }).unwrap();
/// ```
#[derive(Debug)]
pub struct PassagePool {
    spec: PoolSpec,
    device: Device,
    kept: Kept<PreparedAttention>,
    slabs: Slabs,
    /// Most pages that are staged at once.
    staging_pages: usize,
    passages: HashMap<u64, Passage>,
    number: u64,
    next: u64,
}

impl PassagePool {
    /// An empty pool. Slabs are made as passages come.
    ///
    /// # Errors
    /// [`PoolError::Zero`], [`PoolError::PageLen`], [`PoolError::OddPage`], [`PoolError::PageTooLarge`].
    pub fn new(device: &Device, spec: PoolSpec) -> Result<Self, Error> {
        static POOLS: AtomicU64 = AtomicU64::new(0);
        let counts = [
            ("kv_heads", spec.kv_heads),
            ("head_dim", spec.head_dim),
            ("v_head_dim", spec.v_head_dim),
            ("page_len", spec.page_len),
        ];
        if let Some((name, _)) = counts.into_iter().find(|(_, n)| *n == 0) {
            return Err(PoolError::Zero { name }.into());
        }
        if !spec.page_len.is_power_of_two() || spec.page_len > MAX_PAGE_LEN {
            return Err(PoolError::PageLen { page_len: spec.page_len }.into());
        }
        let limit = device.max_binding_bytes();
        let slabs = Slabs::new(&spec, device, limit)?;
        let both = slabs.page_bytes().fold(0u64, u64::saturating_add);
        let largest = slabs.page_bytes().max().unwrap_or(1).max(1);
        let staged = spec.storage == Storage::Host && matches!(device, Device::Gpu(_));
        if staged && both > spec.staging_bytes {
            let max = spec.staging_bytes;
            return Err(PoolError::PageTooLarge { what: "staging", bytes: both, max }.into());
        }
        let staging_pages = (spec.staging_bytes / both.max(1)).min(limit / largest);
        let staging_pages = usize::try_from(staging_pages).unwrap_or(usize::MAX).min(MAX_LEN / spec.page_len).max(1);
        let number = POOLS.fetch_add(1, Ordering::Relaxed);
        let (device, kept) = (device.clone(), Kept::default());
        Ok(Self { spec, device, kept, slabs, staging_pages, passages: HashMap::new(), number, next: 0 })
    }

    /// What it holds and how.
    #[must_use]
    pub const fn spec(&self) -> &PoolSpec {
        &self.spec
    }

    /// Number of passages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.passages.len()
    }

    /// Whether there is no passage.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.passages.is_empty()
    }

    /// Pages that passages hold.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.passages.values().map(|passage| passage.pages.len()).sum()
    }

    /// Pages that are there and free.
    #[must_use]
    pub fn free_pages(&self) -> usize {
        self.slabs.free()
    }

    /// Bytes of all pages, held and free, on the device or in host memory.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.slabs.bytes()
    }

    /// Length of a passage, in tokens.
    ///
    /// # Errors
    /// [`PoolError::Unknown`], [`PoolError::Removed`].
    pub fn passage_len(&self, id: PassageId) -> Result<usize, PoolError> {
        Ok(self.passage(id)?.len)
    }

    /// Adds a passage of `len` tokens: `key` is `[kv_heads, len, head_dim]`, `value` is `[kv_heads, len, v_head_dim]`,
    /// without gaps. A length of 0 is possible; such a passage has no mass.
    ///
    /// # Errors
    /// [`PoolError::Len`], [`PoolError::Element`], [`PoolError::TooLong`], [`PoolError::Quantize`], [`Error::Gpu`],
    /// [`Error::HostMemory`].
    pub async fn append<'a>(
        &mut self,
        key: impl Into<TensorRef<'a>>,
        value: impl Into<TensorRef<'a>>,
        len: usize,
    ) -> Result<PassageId, Error> {
        let PoolSpec { kv_heads, head_dim, v_head_dim, element, page_len, .. } = self.spec;
        if len > MAX_LEN {
            return Err(PoolError::TooLong { len, max: MAX_LEN }.into());
        }
        let (key, value) = (key.into(), value.into());
        let given = if element == Element::I8 { Element::F32 } else { element };
        for (name, data, width) in [("key", key, head_dim), ("value", value, v_head_dim)] {
            if data.element() != given {
                return Err(PoolError::Element { name, wanted: given, found: data.element() }.into());
            }
            let wanted = kv_heads.checked_mul(len).and_then(|n| n.checked_mul(width));
            if wanted != Some(data.len()) {
                return Err(PoolError::Len { name, kv_heads, len, width, found: data.len() }.into());
            }
        }
        let mut bytes = vec![];
        if let (Element::I8, TensorRef::F32(key), TensorRef::F32(value)) = (element, key, value) {
            for (name, data, width) in [("key", key, head_dim), ("value", value, v_head_dim)] {
                let stored = Quantized::new(data, width, Element::F32);
                bytes.push(stored.map_err(|source| PoolError::Quantize { name, source })?);
            }
        }
        let stored: Vec<TensorRef<'_>> = match &bytes[..] {
            [key, value] => {
                vec![(&key.bytes).into(), (&value.bytes).into(), (&key.scales).into(), (&value.scales).into()]
            }
            _ => vec![key, value],
        };
        let count = len.div_ceil(page_len);
        self.slabs.reserve(count).await?;
        let pages = self.slabs.next(count);
        self.slabs.write(&pages, &stored, [kv_heads, len, page_len]).await?;
        // nothing can fail from here on
        self.slabs.take(count);
        let number = self.next;
        self.next += 1;
        self.passages.insert(number, Passage { len, pages });
        Ok(PassageId { pool: self.number, number })
    }

    /// [`append`](Self::append), blocking.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    #[cfg(feature = "threads")]
    pub fn append_blocking<'a>(
        &mut self,
        key: impl Into<TensorRef<'a>>,
        value: impl Into<TensorRef<'a>>,
        len: usize,
    ) -> Result<PassageId, Error> {
        let device = self.device.clone();
        device.block_on(self.append(key, value, len))
    }

    /// Removes a passage; its pages are free for others. Calls that were submitted before still see it.
    ///
    /// # Errors
    /// [`PoolError::Unknown`], [`PoolError::Removed`].
    pub fn remove(&mut self, id: PassageId) -> Result<(), PoolError> {
        self.passage(id)?;
        if let Some(passage) = self.passages.remove(&id.number) {
            self.slabs.give_back(passage.pages);
        }
        Ok(())
    }

    fn passage(&self, id: PassageId) -> Result<&Passage, PoolError> {
        if id.pool != self.number || id.number >= self.next {
            return Err(PoolError::Unknown { id });
        }
        self.passages.get(&id.number).ok_or(PoolError::Removed { id })
    }
}
