//! Contexts that are prepared once and attended to many times: an encoder's output, prompts, documents.
//!
//! A [`PreparedContext`] holds the keys and values of one or more contexts on a device. Entries of a batch name the context
//! they attend to, and several may share one without a copy: the prompts of classifier-free guidance, the beams of a
//! search. Where all entries have one context it is an attention whose keys and values repeat along the batch with a stride
//! of 0; else one whose contexts are pages, of which each entry has one
//! ([`Paged`](crate::Paged)).
//!
//! [`GrowingContexts`] are contexts to whose ends tokens are written as they come.

mod error;
mod growing;
mod run;
mod store;
mod weights;

use std::sync::Arc;

pub use error::ContextError;
pub use growing::{GrowingContexts, GrowingId, GrowingSpec};

use crate::device::{Device, PreparedAttention};
use crate::engine::{self, Kind, Recording, Tensor};
use crate::error::Error;
use crate::inputs::{AttentionOutput, RowState};
use crate::kept::Kept;
use crate::problem::{AttentionProblem, AttentionSpec};
use crate::tensor::{Element, Layout, TensorRef, TensorSpec};
use crate::terms::Terms;
use run::Run;
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
    #[cfg(feature = "threads")]
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

    /// Whether contexts are of lengths of their own.
    #[cfg(feature = "mpi")]
    pub(crate) fn has_lens(&self) -> bool {
        self.inner.kv_lens.is_some()
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
        let (problem, runs) = self.checked(recording, spec, inputs)?;
        let tensors = ContextTensors::new(recording, &problem).await?;
        let query = recording.place("query", &inputs.query).await?;
        let terms = recording.place_terms(&inputs.terms).await?;
        for run in &runs {
            self.record_run(recording, &problem, run, (&query, &terms), &tensors).await?;
        }
        Ok(tensors)
    }

    /// Compares a call with the contexts, and cuts its batch.
    fn checked(
        &self,
        recording: &Recording<'_>,
        spec: &AttentionSpec,
        inputs: &ContextInputs<'_>,
    ) -> Result<(AttentionProblem, Vec<Run>), Error> {
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
        Ok((problem, runs))
    }

    /// [`attend`](Self::attend), blocking.
    ///
    /// # Errors
    /// As [`attend`](Self::attend).
    #[cfg(feature = "threads")]
    pub fn attend_blocking(&self, spec: &AttentionSpec, inputs: &ContextInputs<'_>) -> Result<AttentionOutput, Error> {
        self.inner.device.block_on(self.attend(spec, inputs))
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
    pub(crate) async fn new(recording: &Recording<'_>, problem: &AttentionProblem) -> Result<Self, Error> {
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

#[cfg(all(test, feature = "threads"))]
mod tests {
    use super::*;

    #[test]
    fn contexts_without_a_key_give_zeros() {
        let none: Vec<f32> = vec![];
        let spec = ContextSpec::new([2, 1, 0, 2]);
        let context = PreparedContext::new_blocking(&Device::Cpu, spec, &none, &none, None).unwrap();
        let attention = context.attention(TensorSpec::f32(Layout::bhld([3, 1, 1, 2])));
        let query = vec![1.0f32; 6];
        let inputs = ContextInputs { context_index: Some(&[0, 1, 1]), ..ContextInputs::new(&query) };
        let result = context.attend_blocking(&attention, &inputs).unwrap();
        assert_eq!(result.output.to_f32(), [0.0; 6]);
    }
}
