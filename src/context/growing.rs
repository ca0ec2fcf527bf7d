//! Contexts that grow by tokens: the keys and values of a decoder's own past, of audio that streams in.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{ContextError, ContextTensors};
use crate::device::{Device, KernelChoice, PreparedAttention};
use crate::engine::{self, Inputs, Outputs, Recording, Tensor};
use crate::error::Error;
use crate::inputs::AttentionOutput;
use crate::kept::Kept;
use crate::problem::{AttentionProblem, AttentionSpec, Diagonal, MAX_LEN, MAX_PAGE_LEN, Paged};
use crate::tensor::{Element, Layout, TensorSpec};
use crate::terms::Terms;

/// Shape and storage of contexts that grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrowingSpec {
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Width of a key row.
    pub head_dim: usize,
    /// Width of a value row.
    pub v_head_dim: usize,
    /// How keys and values are stored, and given: f32, f16 or bf16.
    pub element: Element,
    /// Tokens of a page, a power of two up to [`MAX_PAGE_LEN`].
    pub page_len: usize,
    /// Pages of all contexts together. They are made at once, and never moved.
    pub pages: usize,
}

impl GrowingSpec {
    /// Room for so many tokens in f32, in pages of 16, with values as wide as keys.
    #[must_use]
    pub const fn new(kv_heads: usize, head_dim: usize, tokens: usize) -> Self {
        let page_len = 16;
        let pages = tokens.div_ceil(page_len);
        Self { kv_heads, head_dim, v_head_dim: head_dim, element: Element::F32, page_len, pages }
    }
}

/// Names a context of one [`GrowingContexts`]. Never given twice, also not after it was removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GrowingId {
    of: u64,
    number: u64,
}

impl std::fmt::Display for GrowingId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "context {} of growing contexts {}", self.number, self.of)
    }
}

/// A context's tokens and the pages that hold them, in order.
#[derive(Clone, Debug, Default)]
struct Grown {
    len: usize,
    pages: Vec<usize>,
}

/// Contexts on a device to whose ends tokens are written.
///
/// Their keys and values lie in pages that are found by a table, so that a context grows where there is a free page, and nothing
/// of what is there is copied.
///
/// ```
/// use cross_attention::context::{GrowingContexts, GrowingSpec};
/// use cross_attention::engine::{Recording, Tensor};
/// use cross_attention::{Device, Diagonal, Layout, TensorSpec, Terms};
/// # pollster::block_on(async {
/// let device = Device::Cpu;
/// let mut contexts = GrowingContexts::new(&device, GrowingSpec::new(1, 2, 64)).await?;
/// let id = contexts.add();
/// let (token, query) = (vec![1.0f32, 0.0], vec![1.0f32, 0.0]);
/// for n in 0..3 {
///     let mut recording = Recording::new(&device);
///     // one token of one context; what is attended to next sees it
///     let value = vec![n as f32, 10.0];
///     contexts.append(&mut recording, &[id], &Tensor::from(&token), &Tensor::from(&value), 1).await?;
///     let spec = contexts.attention(&[id], TensorSpec::f32(Layout::bhld([1, 1, 1, 2])))?;
///     let tensors = contexts.record(&mut recording, &spec, &[id], &Tensor::from(&query), &Terms::default()).await?;
///     recording.submit().await?;
///     // all keys are equal, so the values are averaged
///     assert_eq!(tensors.output.read("output").await?.to_f32(), [n as f32 / 2.0, 10.0]);
/// }
/// assert_eq!(contexts.len(id)?, 3);
/// # Ok::<(), cross_attention::Error>(())
/// # }).unwrap();
/// ```
#[derive(Debug)]
pub struct GrowingContexts {
    device: Device,
    spec: GrowingSpec,
    /// Keys and values, `[pages, page_len, kv_heads, width]`.
    tensors: [Tensor<'static>; 2],
    /// The lowest stands last.
    free: Vec<usize>,
    grown: HashMap<u64, Grown>,
    number: u64,
    next: u64,
    kept: Kept<PreparedAttention>,
}

impl GrowingContexts {
    /// Makes all pages; there is no context yet.
    ///
    /// # Errors
    /// [`ContextError::Zero`], [`ContextError::PageLen`], [`ContextError::OddRow`], [`ContextError::Storage`],
    /// [`ContextError::Pages`]; [`Error::Gpu`], [`Error::HostMemory`].
    pub async fn new(device: &Device, spec: GrowingSpec) -> Result<Self, Error> {
        static ALL: AtomicU64 = AtomicU64::new(0);
        let GrowingSpec { kv_heads, head_dim, v_head_dim, element, page_len, pages } = spec;
        let counts = [("kv_heads", kv_heads), ("head_dim", head_dim), ("v_head_dim", v_head_dim), ("pages", pages)];
        if let Some((name, _)) = counts.into_iter().find(|(_, n)| *n == 0) {
            return Err(ContextError::Zero { name }.into());
        }
        if !page_len.is_power_of_two() || page_len > MAX_PAGE_LEN {
            return Err(ContextError::PageLen { page_len }.into());
        }
        if element == Element::I8 {
            return Err(ContextError::Storage { found: element }.into());
        }
        let limit = device.max_binding_bytes();
        let mut lens = [0; 2];
        for (len, (name, width)) in lens.iter_mut().zip([("key", head_dim), ("value", v_head_dim)]) {
            let row = kv_heads.saturating_mul(width);
            if !row.saturating_mul(element.size_bytes()).is_multiple_of(4) {
                return Err(ContextError::OddRow { name, elements: row, element }.into());
            }
            *len = row.saturating_mul(page_len).saturating_mul(pages);
            let bytes = (*len as u64).saturating_mul(element.size_bytes() as u64);
            if bytes > limit || pages.saturating_mul(page_len) > MAX_LEN / 2 {
                return Err(ContextError::Pages { pages, bytes, max: limit }.into());
            }
        }
        let recording = Recording::new(device);
        let tensors = [
            recording.allocate("pages of keys", element.into(), lens[0]).await?,
            recording.allocate("pages of values", element.into(), lens[1]).await?,
        ];
        Ok(Self {
            device: device.clone(),
            spec,
            tensors,
            free: (0..pages).rev().collect(),
            grown: HashMap::new(),
            number: ALL.fetch_add(1, Ordering::Relaxed),
            next: 0,
            kept: Kept::default(),
        })
    }

    /// [`new`](Self::new), blocking.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    #[cfg(feature = "threads")]
    pub fn new_blocking(device: &Device, spec: GrowingSpec) -> Result<Self, Error> {
        device.block_on(Self::new(device, spec))
    }

    /// Shape and storage.
    #[must_use]
    pub const fn spec(&self) -> &GrowingSpec {
        &self.spec
    }

    /// Pages that no context holds.
    #[must_use]
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// Bytes of all pages, held and free.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(Tensor::bytes).sum()
    }

    /// Number of prepared attentions that are kept for calls to come: one for each power of two of pages that a context has.
    #[must_use]
    pub fn prepared(&self) -> usize {
        self.kept.len()
    }

    /// A context without tokens. It takes no page until some are appended.
    pub fn add(&mut self) -> GrowingId {
        let number = self.next;
        self.next += 1;
        self.grown.insert(number, Grown::default());
        GrowingId { of: self.number, number }
    }

    /// Removes a context; its pages are free for others. What was recorded before still sees it if it is submitted before what
    /// is written to these pages later.
    ///
    /// # Errors
    /// [`ContextError::Unknown`].
    pub fn remove(&mut self, id: GrowingId) -> Result<(), ContextError> {
        self.grown(id)?;
        if let Some(grown) = self.grown.remove(&id.number) {
            self.free.extend(grown.pages);
        }
        Ok(())
    }

    /// Length of a context, in tokens.
    ///
    /// # Errors
    /// [`ContextError::Unknown`].
    pub fn len(&self, id: GrowingId) -> Result<usize, ContextError> {
        Ok(self.grown(id)?.len)
    }

    /// Whether there is no context.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.grown.is_empty()
    }

    /// Records the writing of `tokens` tokens to the end of each of these contexts: `key` is
    /// `[contexts, tokens, kv_heads, head_dim]`, `value` is `[contexts, tokens, kv_heads, v_head_dim]`, without gaps, on the host or on
    /// the device, in the element that is stored. Nothing else is moved: a copy for each page that is written to.
    ///
    /// The tokens count from now on: what is recorded behind sees them. A recording that is thrown away leaves tokens that
    /// nobody wrote.
    ///
    /// # Errors
    /// [`ContextError::Unknown`], [`ContextError::Twice`], [`ContextError::Len`], [`ContextError::Full`]: then nothing is
    /// recorded. [`Error::Input`] for another element, [`Error::Place`], [`Error::Gpu`].
    pub async fn append(
        &mut self,
        recording: &mut Recording<'_>,
        ids: &[GrowingId],
        key: &Tensor<'_>,
        value: &Tensor<'_>,
        tokens: usize,
    ) -> Result<(), Error> {
        recording.check_device(&self.device)?;
        let GrowingSpec { kv_heads, head_dim, v_head_dim, element, page_len, .. } = self.spec;
        let mut needed = 0usize;
        for (n, id) in ids.iter().enumerate() {
            let grown = self.grown(*id)?;
            if ids[..n].contains(id) {
                return Err(ContextError::Twice { id: *id }.into());
            }
            needed = needed.saturating_add(grown.len.saturating_add(tokens).div_ceil(page_len) - grown.pages.len());
        }
        for (name, tensor, width) in [("key", key, head_dim), ("value", value, v_head_dim)] {
            engine::is_a(name, tensor, element.into())?;
            let wanted = [ids.len(), tokens, kv_heads, width].into_iter().try_fold(1usize, usize::checked_mul);
            if wanted != Some(tensor.len()) {
                let wanted = wanted.unwrap_or(usize::MAX);
                return Err(ContextError::Len { name, wanted, found: tensor.len() }.into());
            }
        }
        if needed > self.free.len() {
            return Err(ContextError::Full { needed, free: self.free.len() }.into());
        }
        let placed = [recording.place("key", key).await?, recording.place("value", value).await?];
        let rows = [kv_heads * head_dim, kv_heads * v_head_dim];
        for (n, id) in ids.iter().enumerate() {
            let mut done = 0;
            while done < tokens {
                let Some(grown) = self.grown.get_mut(&id.number) else { break };
                if grown.len == grown.pages.len() * page_len {
                    // counted above
                    let Some(page) = self.free.pop() else { break };
                    grown.pages.push(page);
                }
                let (page, slot) = (grown.pages[grown.len / page_len], grown.len % page_len);
                let count = (page_len - slot).min(tokens - done);
                for ((from, to), row) in placed.iter().zip(&self.tensors).zip(rows) {
                    let first = (n * tokens + done) * row;
                    recording.copy(&from.cut(first..first + count * row), to, (page * page_len + slot) * row)?;
                }
                grown.len += count;
                done += count;
            }
        }
        Ok(())
    }

    /// What is asked of an attention to these contexts, one for each entry of the batch, to be completed: scale, masks, bias,
    /// causal, what to return. Key, value, pages and `kv_lens` are the contexts' and stay as they are, and are not given in a call;
    /// the output is without gaps. Bias and mask are as wide as the spec's `paged` says: lengths rounded up, so that a context
    /// that grows is planned for anew only when its pages double.
    ///
    /// A diagonal is [`Diagonal::EndOfKeys`], for the last query stands on the last key of its context.
    ///
    /// # Errors
    /// [`ContextError::Unknown`].
    pub fn attention(&self, ids: &[GrowingId], query: TensorSpec) -> Result<AttentionSpec, ContextError> {
        let GrowingSpec { kv_heads, head_dim, v_head_dim, element, page_len, pages } = self.spec;
        let mut table_len = 1;
        for id in ids {
            table_len = table_len.max(self.grown(*id)?.pages.len().next_power_of_two());
        }
        let of = |width| TensorSpec { element, layout: Layout::blhd([pages, kv_heads, page_len, width]) };
        let mut spec = AttentionSpec::from_pages(query, of(head_dim), of(v_head_dim), table_len);
        spec.kv_lens = true;
        Ok(spec)
    }

    /// Records the attention of each entry of the batch to its context.
    ///
    /// # Errors
    /// [`Error::Context`] for ids and for a spec of other keys or diagonals, [`Error::Problem`], [`Error::Input`], [`Error::Place`],
    /// [`Error::Plan`], [`Error::Gpu`].
    pub async fn record(
        &self,
        recording: &mut Recording<'_>,
        spec: &AttentionSpec,
        ids: &[GrowingId],
        query: &Tensor<'_>,
        terms: &Terms<Tensor<'_>>,
    ) -> Result<ContextTensors, Error> {
        recording.check_device(&self.device)?;
        let own = self.attention(ids, spec.query)?;
        let same = [
            ("key", spec.key == own.key && spec.key_scale.is_none()),
            ("value", spec.value == own.value && spec.value_scale.is_none()),
            ("block_table", spec.paged == own.paged),
            ("kv_lens", spec.kv_lens),
        ];
        if let Some((name, _)) = same.into_iter().find(|(_, same)| !same) {
            return Err(ContextError::Keys { name }.into());
        }
        let problem = AttentionProblem::new(spec.clone())?;
        if problem.batch() != ids.len() {
            return Err(ContextError::Batch { batch: problem.batch(), contexts: ids.len() }.into());
        }
        if problem.diagonal() == Diagonal::BottomRight {
            return Err(ContextError::Diagonal.into());
        }
        let output = &problem.spec().output.layout;
        if !output.is_empty() && *output != Layout::bhld(output.shape) {
            return Err(ContextError::OutputLayout { strides: output.strides }.into());
        }
        let (lens, table) = self.tables(ids, own.paged)?;
        let mut all = terms.clone();
        for (name, given) in [("kv_lens", &terms.kv_lens), ("block_table", &terms.block_table)] {
            if given.is_some() {
                return Err(ContextError::Keys { name }.into());
            }
        }
        (all.kv_lens, all.block_table) = (Some(Tensor::from(&lens)), Some(Tensor::from(&table)));
        engine::reaches("query", query, &problem.spec().query)?;
        engine::check_terms(&all, &problem)?;
        let tensors = ContextTensors::new(recording, &problem).await?;
        let query = recording.place("query", query).await?;
        let terms = recording.place_terms(&all).await?;
        let prepared = self.kept.get(&problem, self.device.prepare(&problem, KernelChoice::Auto)).await?;
        let [key, value] = self.tensors.clone();
        let inputs = Inputs { query, key, value, terms };
        let to = Outputs { output: tensors.output.clone(), rows: tensors.rows.clone(), scores: tensors.scores.clone() };
        recording.attend(&prepared, &inputs, &to)?;
        Ok(tensors)
    }

    /// The same from host memory to host memory; on a GPU in one submission.
    ///
    /// # Errors
    /// As [`record`](Self::record), and [`Error::Gpu`].
    pub async fn attend(
        &self,
        spec: &AttentionSpec,
        ids: &[GrowingId],
        query: &Tensor<'_>,
        terms: &Terms<Tensor<'_>>,
    ) -> Result<AttentionOutput, Error> {
        let mut recording = Recording::new(&self.device);
        let tensors = self.record(&mut recording, spec, ids, query, terms).await?;
        recording.submit().await?;
        tensors.read(spec).await
    }

    /// Key lengths, and the pages of each context.
    fn tables(&self, ids: &[GrowingId], paged: Option<Paged>) -> Result<(Vec<u32>, Vec<i32>), ContextError> {
        let table_len = paged.map_or(1, |paged| paged.table_len);
        let (mut lens, mut table) = (vec![], vec![]);
        for id in ids {
            let grown = self.grown(*id)?;
            lens.push(u32::try_from(grown.len).unwrap_or(u32::MAX));
            // behind the last page nothing is looked at
            let pages = grown.pages.iter().map(|page| i32::try_from(*page).unwrap_or(i32::MAX));
            table.extend(pages.chain(std::iter::repeat(-1)).take(table_len));
        }
        Ok((lens, table))
    }

    fn grown(&self, id: GrowingId) -> Result<&Grown, ContextError> {
        let found = if id.of == self.number { self.grown.get(&id.number) } else { None };
        found.ok_or(ContextError::Unknown { id })
    }
}
