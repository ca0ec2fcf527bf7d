//! Contexts that are prepared once and attended to many times: an encoder's output, prompts, documents.
//!
//! A [`PreparedContext`] holds the keys and values of one or more contexts on a device. Entries of a batch name the context
//! they attend to, and several may share one without a copy: the prompts of classifier-free guidance, the beams of a
//! search. Where all entries have one context it is an attention whose keys and values repeat along the batch with a stride
//! of 0; else one whose contexts are pages, of which each entry has one ([`Paged`]).
//!
//! [`GrowingContexts`] are contexts to whose ends tokens are written as they come.

mod error;
mod growing;
mod store;

use std::ops::Range;
use std::sync::Arc;

pub use error::ContextError;
pub use growing::{GrowingContexts, GrowingId, GrowingSpec};

use crate::device::{Device, KernelChoice, PreparedAttention};
use crate::engine::{self, Inputs, Kind, Outputs, Recording, Tensor};
use crate::error::Error;
use crate::inputs::{AttentionOutput, RowState};
use crate::kept::Kept;
use crate::problem::{AttentionProblem, AttentionSpec, Paged};
use crate::tensor::{Element, Layout, TensorRef, TensorSpec};
use crate::terms::Terms;
use store::Store;

/// How keys and values of a context are stored, and read by each attention. Arithmetic is f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ContextStorage {
    /// 4 bytes an element.
    #[default]
    F32,
    /// 2 bytes an element; values beyond f16's range become infinite.
    F16,
    /// 2 bytes an element, f32's range with 8 bits of mantissa.
    Bf16,
    /// 34 bytes for 32 neighbours of a row: a signed byte each, and one f16 scale, `max |x| / 127`. An element is off by
    /// half a scale at most: by `max |x| / 253`, or where that largest one is below 0.008 by `max |x| / 254 + 2^-25`. Widths must
    /// be multiples of 32.
    Q8_0,
    /// A signed byte an element, and one f32 scale for each row, `max |x| / 127`: of any width. An element is off by half a
    /// scale at most.
    Int8,
}

/// Columns that have one scale in `q8_0`.
const Q8_0_BLOCK: usize = 32;

/// Shape and storage of contexts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContextSpec {
    /// Number of contexts.
    pub contexts: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Keys of each context, in tokens; shorter ones have a key length.
    pub kv_len: usize,
    /// Width of a key row.
    pub head_dim: usize,
    /// Width of a value row.
    pub v_head_dim: usize,
    /// How they are stored.
    pub storage: ContextStorage,
}

impl ContextSpec {
    /// Contexts `[contexts, kv_heads, kv_len, head_dim]` in f32, with values as wide as keys.
    #[must_use]
    pub const fn new([contexts, kv_heads, kv_len, head_dim]: [usize; 4]) -> Self {
        Self { contexts, kv_heads, kv_len, head_dim, v_head_dim: head_dim, storage: ContextStorage::F32 }
    }
}

/// Data of one call, on the host or on the device. What is given must be what the spec says is given.
#[derive(Clone, Debug)]
pub struct ContextInputs<'a> {
    /// `[batch, q_heads, q_len, head_dim]`.
    pub query: Tensor<'a>,
    /// `[batch]`: the context of each entry. `None`: entry `b` has context `b`, or all have the only one.
    pub context_index: Option<&'a [u32]>,
    /// The rest; key lengths are the contexts'.
    pub terms: Terms<Tensor<'a>>,
}

impl<'a> ContextInputs<'a> {
    /// A query, and nothing else.
    pub fn new(query: impl Into<Tensor<'a>>) -> Self {
        Self { query: query.into(), context_index: None, terms: Terms::default() }
    }
}

/// What an attention to contexts gives, where it was recorded.
#[derive(Clone, Debug)]
pub struct ContextTensors {
    /// `[batch, q_heads, q_len, v_head_dim]` without gaps, as the spec stores it.
    pub output: Tensor<'static>,
    /// f32 `[batch, q_heads, q_len]`, or `[batch, q_heads, q_len, 2]`, maximum and sum, where the spec asks for `row_state`.
    pub rows: Option<Tensor<'static>>,
    /// f32 `[batch, q_heads, q_len, kv_len]`, where the spec asks for them.
    pub scores: Option<Tensor<'static>>,
}

/// Keys and values of contexts on a device, never changed. Cheap to clone; clones share everything.
///
/// ```
/// use cross_attention::context::{ContextInputs, ContextSpec, PreparedContext};
/// use cross_attention::{Device, Layout, TensorSpec};
/// # pollster::block_on(async {
/// // two prompts of two tokens, one head of width 2
/// let spec = ContextSpec::new([2, 1, 2, 2]);
/// let (key, value) = (vec![0.0f32; 8], vec![1.0f32, 1.0, 3.0, 3.0, 5.0, 5.0, 7.0, 7.0]);
/// let context = PreparedContext::new(&Device::Cpu, spec, &key, &value, None).await?;
/// // three entries of a batch; the last two share the second prompt
/// let attention = context.attention(TensorSpec::f32(Layout::bhld([3, 1, 1, 2])));
/// let query = vec![1.0f32; 6];
/// let inputs = ContextInputs { context_index: Some(&[0, 1, 1]), ..ContextInputs::new(&query) };
/// let result = context.attend(&attention, &inputs).await?;
/// assert_eq!(result.output.to_f32(), [2.0, 2.0, 6.0, 6.0, 6.0, 6.0]);
/// # Ok::<(), cross_attention::Error>(())
/// # }).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct PreparedContext {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    device: Device,
    spec: ContextSpec,
    kv_lens: Option<Vec<u32>>,
    store: Store,
    kept: Kept<PreparedAttention>,
}

/// Neighbouring entries of a batch whose contexts are bound together.
struct Run {
    entries: Range<usize>,
    shelf: usize,
    /// Of each entry, within the shelf.
    contexts: Vec<usize>,
}

impl Run {
    /// The only context of all entries.
    fn one_context(&self) -> Option<usize> {
        let first = *self.contexts.first()?;
        self.contexts.iter().all(|context| *context == first).then_some(first)
    }
}

impl PreparedContext {
    /// Stores keys `[contexts, kv_heads, kv_len, head_dim]` and values `[contexts, kv_heads, kv_len, v_head_dim]`, without
    /// gaps, and a key length for each context, where they differ.
    ///
    /// # Errors
    /// [`ContextError::Zero`], [`ContextError::NoScale`], [`ContextError::Blocks`], [`ContextError::Len`], [`ContextError::KvLen`],
    /// [`ContextError::NotStorable`], [`ContextError::Overflow`]; [`Error::Gpu`].
    pub async fn new<'a>(
        device: &Device,
        spec: ContextSpec,
        key: impl Into<TensorRef<'a>>,
        value: impl Into<TensorRef<'a>>,
        kv_lens: Option<&[u32]>,
    ) -> Result<Self, Error> {
        let ContextSpec { contexts, kv_heads, kv_len, head_dim, v_head_dim, storage } = spec;
        let counts =
            [("contexts", contexts), ("kv_heads", kv_heads), ("head_dim", head_dim), ("v_head_dim", v_head_dim)];
        if let Some((name, _)) = counts.into_iter().find(|(_, n)| *n == 0) {
            return Err(ContextError::Zero { name }.into());
        }
        let (key, value) = (key.into(), value.into());
        for (name, data, width, name_of_width) in
            [("key", key, head_dim, "head_dim"), ("value", value, v_head_dim, "v_head_dim")]
        {
            if data.element() == Element::I8 {
                return Err(ContextError::NoScale { name }.into());
            }
            if storage == ContextStorage::Q8_0 && !width.is_multiple_of(Q8_0_BLOCK) {
                return Err(ContextError::Blocks { name: name_of_width, found: width }.into());
            }
            let wanted = Layout::bhld([contexts, kv_heads, kv_len, width]).elements();
            let wanted = wanted.ok_or(ContextError::Overflow { contexts, kv_heads, kv_len, width })?;
            if data.len() != wanted {
                return Err(ContextError::Len { name, wanted, found: data.len() }.into());
            }
        }
        if let Some(kv_lens) = kv_lens {
            if kv_lens.len() != contexts {
                return Err(ContextError::Len { name: "kv_lens", wanted: contexts, found: kv_lens.len() }.into());
            }
            if let Some(context) = kv_lens.iter().position(|&len| len as usize > kv_len) {
                return Err(ContextError::KvLen { context, found: kv_lens[context], kv_len }.into());
            }
        }
        // the query is of no account here
        let query = TensorSpec::f32(Layout::bhld([1, kv_heads, 1, head_dim]));
        let store = Store::new(device, &spec, &attention(&spec, query), key, value).await?;
        let inner =
            Inner { device: device.clone(), spec, kv_lens: kv_lens.map(<[u32]>::to_vec), store, kept: Kept::default() };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// [`new`](Self::new), blocking.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    #[cfg(feature = "native")]
    pub fn new_blocking<'a>(
        device: &Device,
        spec: ContextSpec,
        key: impl Into<TensorRef<'a>>,
        value: impl Into<TensorRef<'a>>,
        kv_lens: Option<&[u32]>,
    ) -> Result<Self, Error> {
        device.block_on(Self::new(device, spec, key, value, kv_lens))
    }

    /// Shape and storage.
    #[must_use]
    pub fn spec(&self) -> &ContextSpec {
        &self.inner.spec
    }

    /// Bytes that keys and values are stored in. Each context begins at a multiple of 256 bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.inner.store.bytes()
    }

    /// Number of prepared attentions that are kept for calls to come. A call that is like an earlier one adds none.
    #[must_use]
    pub fn prepared(&self) -> usize {
        self.inner.kept.len()
    }

    /// What is asked of an attention to the contexts, to be completed: scale, masks, bias, what to return. Key, value, their
    /// scales and `kv_lens` are the context's and stay as they are, and are not given in a call; the output is without gaps.
    #[must_use]
    pub fn attention(&self, query: TensorSpec) -> AttentionSpec {
        attention(&self.inner.spec, query)
    }

    /// Every entry of the batch attends to its context; on a GPU in one submission. The output is
    /// `[batch, q_heads, q_len, v_head_dim]` without gaps.
    ///
    /// # Errors
    /// As [`record`](Self::record), and [`Error::Gpu`].
    pub async fn attend(&self, spec: &AttentionSpec, inputs: &ContextInputs<'_>) -> Result<AttentionOutput, Error> {
        let mut recording = Recording::new(&self.inner.device);
        let tensors = self.record(&mut recording, spec, inputs).await?;
        recording.submit().await?;
        tensors.read(spec).await
    }

    /// The same in a recording: nothing is submitted or read.
    ///
    /// # Errors
    /// [`Error::Context`] for an index that is no context's and for a spec of other keys, [`Error::Problem`],
    /// [`Error::Input`], [`Error::Place`], [`Error::Plan`], [`Error::Gpu`].
    pub async fn record(
        &self,
        recording: &mut Recording<'_>,
        spec: &AttentionSpec,
        inputs: &ContextInputs<'_>,
    ) -> Result<ContextTensors, Error> {
        recording.check_device(&self.inner.device)?;
        let own = self.attention(spec.query);
        let same = [
            ("key", spec.key == own.key && spec.key_scale == own.key_scale),
            ("value", spec.value == own.value && spec.value_scale == own.value_scale),
            ("block_table", spec.paged.is_none()),
            ("kv_lens", !spec.kv_lens),
        ];
        for (name, same) in same {
            if !same {
                return Err(ContextError::Keys { name }.into());
            }
        }
        let problem = AttentionProblem::new(spec.clone())?;
        let output = &problem.spec().output.layout;
        if !output.is_empty() && *output != Layout::bhld(output.shape) {
            return Err(ContextError::OutputLayout { strides: output.strides }.into());
        }
        engine::reaches("query", &inputs.query, &problem.spec().query)?;
        // what is given in a call has no scales
        engine::check_terms(&inputs.terms, &problem.with_own_scales())?;
        let runs = self.runs(problem.batch(), inputs.context_index)?;
        let tensors = ContextTensors::new(recording, &problem).await?;
        let query = recording.place("query", &inputs.query).await?;
        let terms = recording.place_terms(&inputs.terms).await?;
        for run in &runs {
            self.record_run(recording, &problem, run, (&query, &terms), &tensors).await?;
        }
        Ok(tensors)
    }

    /// [`attend`](Self::attend), blocking.
    ///
    /// # Errors
    /// As [`attend`](Self::attend).
    #[cfg(feature = "native")]
    pub fn attend_blocking(&self, spec: &AttentionSpec, inputs: &ContextInputs<'_>) -> Result<AttentionOutput, Error> {
        self.inner.device.block_on(self.attend(spec, inputs))
    }

    /// The batch cut where contexts are not bound together.
    fn runs(&self, batch: usize, index: Option<&[u32]>) -> Result<Vec<Run>, ContextError> {
        let contexts = self.inner.spec.contexts;
        let of: Vec<usize> = match index {
            Some(index) if index.len() != batch => {
                return Err(ContextError::Len { name: "context_index", wanted: batch, found: index.len() });
            }
            Some(index) => index.iter().map(|&context| context as usize).collect(),
            None if contexts == 1 => vec![0; batch],
            None if contexts == batch => (0..batch).collect(),
            None => return Err(ContextError::Batch { batch, contexts }),
        };
        if let (Some(row), Some(index)) = (of.iter().position(|context| *context >= contexts), index) {
            return Err(ContextError::Index { row, found: index[row], contexts });
        }
        let per_shelf = self.inner.store.per_shelf;
        let mut runs: Vec<Run> = vec![];
        for (entry, context) in of.into_iter().enumerate() {
            let (shelf, context) = (context / per_shelf, context % per_shelf);
            match runs.last_mut() {
                Some(run) if run.shelf == shelf => {
                    run.entries.end = entry + 1;
                    run.contexts.push(context);
                }
                _ => runs.push(Run { entries: entry..entry + 1, shelf, contexts: vec![context] }),
            }
        }
        Ok(runs)
    }

    /// The attention of one run, and of its tensors what it takes. It does not say where in the batch the run stands, so that
    /// runs of one length share it; but on a device tensors are bound at multiples of its alignment, and what lies before the
    /// run within those is an offset.
    async fn record_run(
        &self,
        recording: &mut Recording<'_>,
        whole: &AttentionProblem,
        run: &Run,
        (query, terms): (&Tensor<'_>, &Terms<Tensor<'_>>),
        to: &ContextTensors,
    ) -> Result<(), Error> {
        let (first, count) = (run.entries.start, run.entries.len());
        let mut spec = whole.spec().clone();
        // elements of a tensor from the run's first entry on
        fn cut<'t>(tensor: &Tensor<'t>, layout: &mut Layout, [first, count]: [usize; 2]) -> Tensor<'t> {
            let start = first * layout.strides[0];
            layout.shape[0] = count;
            let end = start + layout.extent().unwrap_or(0);
            // of an empty tensor nothing is read, whatever its strides
            let (tensor, before) = tensor.cut_to_bind(start.min(tensor.len())..end.min(tensor.len()));
            layout.offset += before;
            tensor
        }
        let at = [first, count];
        let query = cut(query, &mut spec.query.layout, at);
        let (mut of_run, whole_terms) = (terms.clone(), whole.terms());
        for (term, of) in of_run.row_data_mut().into_iter().zip(whole_terms.row_data()) {
            if let (Some(list), (_, Some(of))) = (term, of)
                && of.by_batch
            {
                let share = of.elements / whole.batch();
                *list = list.cut(first * share..run.entries.end * share);
            }
        }
        of_run.bias = terms.bias.as_ref().zip(spec.bias.as_mut()).map(|(bias, of)| cut(bias, &mut of.layout, at));
        of_run.mask = terms.mask.as_ref().zip(spec.mask.as_mut()).map(|(mask, layout)| cut(mask, layout, at));
        spec.output.layout = Layout::bhld([count, whole.q_heads(), whole.q_len(), whole.v_head_dim()]);
        let per_entry = whole.q_heads() * whole.q_len() * whole.v_head_dim();
        let (output, before) = to.output.cut_to_bind(first * per_entry..run.entries.end * per_entry);
        spec.output.layout.offset = before;
        let one_context = run.one_context();
        let [key, value, key_scale, value_scale] = self.inner.store.tensors(run.shelf, one_context, count, &mut spec);
        (of_run.key_scale, of_run.value_scale) = (key_scale, value_scale);
        spec.kv_lens = self.inner.kv_lens.is_some();
        let first_context = run.shelf * self.inner.store.per_shelf;
        let of_context = |lens: &Vec<u32>| run.contexts.iter().map(|n| lens[first_context + n]).collect::<Vec<_>>();
        let lens = self.inner.kv_lens.as_ref().map(of_context);
        if let Some(lens) = &lens {
            of_run.kv_lens = Some(recording.place("kv_lens", &lens.into()).await?);
        }
        let table: Vec<i32> = run.contexts.iter().map(|n| i32::try_from(*n).unwrap_or(i32::MAX)).collect();
        if one_context.is_none() {
            spec.paged = Some(Paged { table_len: 1, kv_len: self.inner.spec.kv_len });
            of_run.block_table = Some(recording.place("block_table", &(&table).into()).await?);
        }
        let problem = AttentionProblem::new(spec)?;
        let prepared = self.inner.kept.get(&problem, self.inner.device.prepare(&problem, KernelChoice::Auto)).await?;
        let (Some(key), Some(value)) = (key, value) else { return Err(ContextError::Keys { name: "key" }.into()) };
        let inputs = Inputs { query, key, value, terms: of_run };
        if count == whole.batch() {
            let to = Outputs { output, rows: to.rows.clone(), scores: to.scores.clone() };
            return recording.attend(&prepared, &inputs, &to);
        }
        // what has no layout is written to its place by a copy
        let entries = |of: &Option<Tensor<'static>>| of.as_ref().map(|of| of.len() / whole.batch() * count);
        let mut own = Outputs { output, rows: None, scores: None };
        if let Some(len) = entries(&to.rows) {
            own.rows = Some(recording.allocate("rows of a run", Kind::F32, len).await?);
        }
        if let Some(len) = entries(&to.scores) {
            own.scores = Some(recording.allocate("scores of a run", Kind::F32, len).await?);
        }
        recording.attend(&prepared, &inputs, &own)?;
        for (from, to) in [(&own.rows, &to.rows), (&own.scores, &to.scores)] {
            if let (Some(from), Some(to)) = (from, to) {
                recording.copy(from, to, to.len() / whole.batch() * first)?;
            }
        }
        Ok(())
    }
}

/// The attention to contexts of a shape.
fn attention(of: &ContextSpec, query: TensorSpec) -> AttentionSpec {
    let ContextSpec { kv_heads, kv_len, head_dim, v_head_dim, storage, .. } = *of;
    let element = match storage {
        ContextStorage::F32 => Element::F32,
        ContextStorage::F16 => Element::F16,
        ContextStorage::Bf16 => Element::Bf16,
        ContextStorage::Q8_0 | ContextStorage::Int8 => Element::I8,
    };
    let of = |element, width| TensorSpec { element, layout: Layout::bhld([1, kv_heads, kv_len, width]) };
    let scale = |width: usize| store::scales(storage, width).map(|(element, block)| of(element, width / block));
    AttentionSpec {
        key_scale: scale(head_dim),
        value_scale: scale(v_head_dim),
        ..AttentionSpec::from_tensors(query, of(element, head_dim), of(element, v_head_dim))
    }
}

impl ContextTensors {
    pub(super) async fn new(recording: &Recording<'_>, problem: &AttentionProblem) -> Result<Self, Error> {
        let (spec, rows) = (problem.spec(), problem.rows());
        let mut tensors = Self {
            output: recording.allocate("output", spec.output.element.into(), rows * problem.v_head_dim()).await?,
            rows: None,
            scores: None,
        };
        if spec.returns_rows() {
            tensors.rows = Some(recording.allocate("lse", Kind::F32, rows * spec.lse_width()).await?);
        }
        if spec.scores.is_some() {
            let len = rows.checked_mul(problem.kv_len()).ok_or(Error::HostMemory { bytes: u128::MAX })?;
            tensors.scores = Some(recording.allocate("scores", Kind::F32, len).await?);
        }
        Ok(tensors)
    }

    /// Everything in host memory, as the spec asks for it.
    pub(super) async fn read(&self, spec: &AttentionSpec) -> Result<AttentionOutput, Error> {
        let (mut lse, mut row_state, mut scores) = (None, None, None);
        if let Some(rows) = &self.rows {
            let rows = rows.read_f32("lse").await?;
            if spec.row_state {
                let state = RowState::from_pairs(&rows);
                lse = spec.lse.then(|| state.lse());
                row_state = Some(state);
            } else {
                lse = Some(rows);
            }
        }
        if let Some(all) = &self.scores {
            scores = Some(all.read_f32("scores").await?);
        }
        Ok(AttentionOutput { output: self.output.read("output").await?, lse, row_state, scores })
    }
}
