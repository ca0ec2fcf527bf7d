//! Contexts that are prepared once and attended to many times: an encoder's output, prompts, documents.
//!
//! A [`PreparedContext`] holds the keys and values of one or more contexts on a device. Entries of a batch name the context
//! they attend to, and several may share one without a copy: the prompts of classifier-free guidance, the beams of a
//! search. Neighbouring entries with the same context are one attention whose keys and values repeat along the batch with
//! a stride of 0.

mod error;
mod q8;
mod store;

use std::ops::Range;
use std::sync::Arc;

pub use error::ContextError;

use crate::device::{Device, KernelChoice, PreparedOn};
use crate::error::Error;
use crate::gpu::{AttentionTensors, PreparedAttention};
use crate::inputs::{AttentionInputs, AttentionOutput, RowState};
use crate::kept::Kept;
use crate::problem::{AttentionProblem, AttentionSpec};
use crate::tensor::{Element, Layout, TensorData, TensorRef, TensorSpec};
use store::Store;

/// How keys and values of a context are stored. Arithmetic is f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ContextStorage {
    /// 4 bytes an element.
    #[default]
    F32,
    /// 2 bytes an element; values beyond f16's range become infinite.
    F16,
    /// 34 bytes for 32 neighbours of a row: a signed byte each, and one f16 scale, `max |x| / 127`. An element is off by
    /// half a scale at most: by `max |x| / 253`, or where that largest one is below 0.008 by `max |x| / 254 + 2^-25`. Widths must be multiples of 32. Each call expands the contexts it uses to f32 first, one
    /// after another in the same scratch memory: that is a pass over `4 + 1` bytes an element on top of the attention,
    /// which pays off where memory is short, not where time is.
    Q8_0,
}

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

/// Data of one call in host memory. What is given must be what the spec says is given.
#[derive(Clone, Copy, Debug)]
pub struct ContextInputs<'a> {
    /// `[batch, q_heads, q_len, head_dim]`.
    pub query: TensorRef<'a>,
    /// `[batch]`: the context of each entry. `None`: entry `b` has context `b`, or all have the only one.
    pub context_index: Option<&'a [u32]>,
    /// `[batch, q_heads, q_len, kv_len]`, broadcast as the spec's layout says.
    pub bias: Option<TensorRef<'a>>,
    /// `[batch, q_heads, q_len, kv_len]`, broadcast as the spec's layout says; true = attend.
    pub mask: Option<&'a [bool]>,
    /// `[batch, q_len]`.
    pub row_start: Option<&'a [i32]>,
    /// `[batch, q_len]`.
    pub row_end: Option<&'a [i32]>,
    /// `[q_heads]`.
    pub alibi_slopes: Option<&'a [f32]>,
    /// `[q_heads]`.
    pub sinks: Option<&'a [f32]>,
}

impl<'a> ContextInputs<'a> {
    /// A query, and nothing else.
    pub fn new(query: impl Into<TensorRef<'a>>) -> Self {
        Self {
            query: query.into(),
            context_index: None,
            bias: None,
            mask: None,
            row_start: None,
            row_end: None,
            alibi_slopes: None,
            sinks: None,
        }
    }

    /// The same as inputs of an attention, keys and values left empty.
    fn terms(&self) -> AttentionInputs<'a> {
        AttentionInputs {
            query: self.query,
            key: TensorRef::F32(&[]),
            value: TensorRef::F32(&[]),
            bias: self.bias,
            mask: self.mask,
            kv_lens: None,
            row_start: self.row_start,
            row_end: self.row_end,
            alibi_slopes: self.alibi_slopes,
            sinks: self.sinks,
        }
    }
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
    on_host: Kept<PreparedOn>,
    on_gpu: Kept<PreparedAttention>,
}

/// Neighbouring entries of a batch with one context.
struct Run {
    entries: Range<usize>,
    context: usize,
}

impl PreparedContext {
    /// Stores keys `[contexts, kv_heads, kv_len, head_dim]` and values `[contexts, kv_heads, kv_len, v_head_dim]`, without
    /// gaps, and a key length for each context, where they differ.
    ///
    /// # Errors
    /// [`ContextError::Zero`], [`ContextError::Blocks`], [`ContextError::Len`], [`ContextError::KvLen`],
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
            if storage == ContextStorage::Q8_0 && !width.is_multiple_of(q8::BLOCK) {
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
        let store = Store::new(device, &spec, key, value).await?;
        let inner = Inner {
            device: device.clone(),
            spec,
            kv_lens: kv_lens.map(<[u32]>::to_vec),
            store,
            on_host: Kept::default(),
            on_gpu: Kept::default(),
        };
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

    /// Bytes that keys and values are stored in.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.inner.store.bytes()
    }

    /// Bytes of the memory that one context is expanded to on a GPU: 0 where nothing is.
    #[must_use]
    pub fn scratch_bytes(&self) -> u64 {
        self.inner.store.scratch_bytes()
    }

    /// Number of prepared attentions that are kept for calls to come. A call that is like an earlier one adds none.
    #[must_use]
    pub fn prepared(&self) -> usize {
        self.inner.on_host.len() + self.inner.on_gpu.len()
    }

    /// What is asked of an attention to the contexts, to be completed: scale, masks, bias, what to return. Key, value and
    /// `kv_lens` are the context's and stay as they are; the output is without gaps.
    #[must_use]
    pub fn attention(&self, query: TensorSpec) -> AttentionSpec {
        let ContextSpec { kv_heads, kv_len, head_dim, v_head_dim, storage, .. } = self.inner.spec;
        let element = match storage {
            ContextStorage::F32 | ContextStorage::Q8_0 => Element::F32,
            ContextStorage::F16 => Element::F16,
        };
        let of = |width| TensorSpec { element, layout: Layout::bhld([1, kv_heads, kv_len, width]) };
        AttentionSpec::from_tensors(query, of(head_dim), of(v_head_dim))
    }

    /// Every entry of the batch attends to its context; on a GPU in one submission. The output is
    /// `[batch, q_heads, q_len, v_head_dim]` without gaps.
    ///
    /// # Errors
    /// [`Error::Context`] for an index that is no context's and for a spec of other keys, [`Error::Problem`],
    /// [`Error::Input`], [`Error::Plan`], [`Error::Gpu`].
    pub async fn attend(&self, spec: &AttentionSpec, inputs: &ContextInputs<'_>) -> Result<AttentionOutput, Error> {
        let own = self.attention(spec.query);
        for (name, same) in
            [("key", spec.key == own.key), ("value", spec.value == own.value), ("kv_lens", !spec.kv_lens)]
        {
            if !same {
                return Err(ContextError::Keys { name }.into());
            }
        }
        let problem = AttentionProblem::new(spec.clone())?;
        let output = &problem.spec().output.layout;
        if !output.is_empty() && *output != Layout::bhld(output.shape) {
            return Err(ContextError::OutputLayout { strides: output.strides }.into());
        }
        inputs.terms().check_beside_keys(&problem)?;
        let runs = self.runs(problem.batch(), inputs.context_index)?;
        let mut all = AttentionOutput {
            output: TensorData::zeros(spec.output.element, 0),
            lse: spec.lse.then(Vec::new),
            row_state: spec.row_state.then(RowState::default),
            scores: spec.scores.map(|_| vec![]),
        };
        match &self.inner.store {
            Store::Host(_) => {
                for run in &runs {
                    append(&mut all, self.run_on_host(&problem, run, inputs).await?);
                }
            }
            Store::Gpu(store) => {
                let context = store.context();
                let mut encoder = context.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
                let mut recorded = vec![];
                for run in &runs {
                    recorded.push(self.record(&mut encoder, store, &problem, run, inputs).await?);
                }
                context.check_faults()?;
                context
                    .checked("the submission of an attention to contexts", 0, || {
                        context.queue().submit([encoder.finish()])
                    })
                    .await?;
                for (prepared, tensors) in recorded {
                    append(&mut all, prepared.read_output(&tensors).await?);
                }
            }
        }
        Ok(all)
    }

    /// [`attend`](Self::attend), blocking.
    ///
    /// # Errors
    /// As [`attend`](Self::attend).
    #[cfg(feature = "native")]
    pub fn attend_blocking(&self, spec: &AttentionSpec, inputs: &ContextInputs<'_>) -> Result<AttentionOutput, Error> {
        self.inner.device.block_on(self.attend(spec, inputs))
    }

    /// The batch cut where the context changes.
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
        let mut runs: Vec<Run> = vec![];
        for (entry, context) in of.into_iter().enumerate() {
            match runs.last_mut() {
                Some(run) if run.context == context => run.entries.end = entry + 1,
                _ => runs.push(Run { entries: entry..entry + 1, context }),
            }
        }
        Ok(runs)
    }

    /// The attention of one run. It does not say where in the batch the run stands, so that runs of one length share it.
    fn problem_of(&self, whole: &AttentionProblem, run: &Run) -> Result<AttentionProblem, Error> {
        let mut spec = whole.spec().clone();
        let layouts = [&mut spec.query.layout, &mut spec.key.layout, &mut spec.value.layout];
        let terms = spec.bias.as_mut().map(|bias| &mut bias.layout).into_iter().chain(&mut spec.mask);
        for layout in layouts.into_iter().chain(terms) {
            layout.shape[0] = run.entries.len();
        }
        let [_, heads, len, width] = spec.output.layout.shape;
        spec.output.layout = Layout::bhld([run.entries.len(), heads, len, width]);
        spec.kv_lens = self.inner.kv_lens.is_some();
        Ok(AttentionProblem::new(spec)?)
    }

    /// The key length of each entry of a run.
    fn kv_lens_of(&self, run: &Run) -> Option<Vec<u32>> {
        self.inner.kv_lens.as_ref().map(|lens| vec![lens[run.context]; run.entries.len()])
    }

    async fn run_on_host(
        &self,
        whole: &AttentionProblem,
        run: &Run,
        inputs: &ContextInputs<'_>,
    ) -> Result<AttentionOutput, Error> {
        let problem = self.problem_of(whole, run)?;
        let device = &self.inner.device;
        let prepared = self.inner.on_host.get(&problem, device.prepare(&problem, KernelChoice::Auto)).await?;
        let kv_lens = self.kv_lens_of(run);
        let mut inputs = inputs_of(whole, &problem, run, inputs);
        inputs.kv_lens = kv_lens.as_deref();
        let [key, value] = self.inner.store.on_host(run.context);
        (inputs.key, inputs.value) = (TensorData::as_ref(&key), TensorData::as_ref(&value));
        prepared.run(&inputs).await
    }

    async fn record(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        store: &store::OnGpu,
        whole: &AttentionProblem,
        run: &Run,
        inputs: &ContextInputs<'_>,
    ) -> Result<(Arc<PreparedAttention>, AttentionTensors), Error> {
        let context = store.context();
        let problem = self.problem_of(whole, run)?;
        let prepared = self.inner.on_gpu.get(&problem, context.prepare(&problem, None)).await?;
        let kv_lens = self.kv_lens_of(run);
        let mut inputs = inputs_of(whole, &problem, run, inputs);
        inputs.kv_lens = kv_lens.as_deref();
        let query = context.upload_tensor("query", inputs.query).await?;
        let [key, value] = store.tensors(encoder, run.context).await?;
        let tensors = prepared.upload_terms(&inputs, [query, key, value]).await?;
        prepared.encode(encoder, &tensors.buffers())?;
        Ok((prepared, tensors))
    }
}

/// What a run takes of the inputs.
fn inputs_of<'a>(
    whole: &AttentionProblem,
    problem: &AttentionProblem,
    run: &Run,
    inputs: &ContextInputs<'a>,
) -> AttentionInputs<'a> {
    let first = run.entries.start;
    let mut of_run = inputs.terms();
    let (from, to) = (whole.spec(), problem.spec());
    let extent = |layout: &Layout| layout.extent().unwrap_or(0);
    of_run.query = cut(inputs.query, first * from.query.layout.strides[0], extent(&to.query.layout));
    if let (Some(bias), Some(from), Some(to)) = (inputs.bias, &from.bias, &to.bias) {
        of_run.bias = Some(cut(bias, first * from.layout.strides[0], extent(&to.layout)));
    }
    if let (Some(mask), Some(from), Some(to)) = (inputs.mask, &from.mask, &to.mask) {
        of_run.mask = Some(&mask[first * from.strides[0]..][..extent(to)]);
    }
    let rows = first * whole.q_len()..run.entries.end * whole.q_len();
    of_run.row_start = inputs.row_start.map(|starts| &starts[rows.clone()]);
    of_run.row_end = inputs.row_end.map(|ends| &ends[rows.clone()]);
    of_run
}

/// `len` elements from `start` on.
fn cut(data: TensorRef<'_>, start: usize, len: usize) -> TensorRef<'_> {
    match data {
        TensorRef::F32(data) => TensorRef::F32(&data[start..start + len]),
        TensorRef::F16(data) => TensorRef::F16(&data[start..start + len]),
    }
}

/// Puts the outputs of a run behind those of the runs before it.
fn append(all: &mut AttentionOutput, run: AttentionOutput) {
    match (&mut all.output, run.output) {
        (TensorData::F32(all), TensorData::F32(run)) => all.extend(run),
        (TensorData::F16(all), TensorData::F16(run)) => all.extend(run),
        // both are of the spec's element
        (TensorData::F32(_), TensorData::F16(_)) | (TensorData::F16(_), TensorData::F32(_)) => {}
    }
    for (all, run) in [(&mut all.lse, run.lse), (&mut all.scores, run.scores)] {
        if let (Some(all), Some(run)) = (all, run) {
            all.extend(run);
        }
    }
    if let (Some(all), Some(run)) = (&mut all.row_state, run.row_state) {
        all.row_max.extend(run.row_max);
        all.row_sum.extend(run.row_sum);
    }
}
