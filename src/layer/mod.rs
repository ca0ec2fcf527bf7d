//! A whole cross-attention layer: projections of states and context, heads, attention, projection out.
//!
//! Needs the feature `layer`. Weights come from a `safetensors` file by one of several namings ([`Names`]); keys and values of a
//! context can be projected once ([`CrossAttention::prepare_context`]) and used for any number of calls. On a GPU a call is
//! one submission, and nothing goes to the host between the projections and the attention.
//!
//! ```
//! use cross_attention::layer::{CrossAttention, LayerConfig, LayerWeights, LinearWeights, States};
//! use cross_attention::{Device, TensorData};
//!
//! // states of width 4 attend to a context of width 6, 2 heads of 2
//! let config = LayerConfig::new(4, 6, 2);
//! let ones = |outputs: usize, inputs: usize| LinearWeights {
//!     weight: TensorData::F32(vec![0.5; outputs * inputs]),
//!     bias: None,
//! };
//! let weights = LayerWeights {
//!     query: ones(4, 4), key: ones(4, 6), value: ones(4, 6), out: ones(4, 4), query_norm: None, key_norm: None,
//! };
//! # #[cfg(feature = "native")]
//! # {
//! let layer = CrossAttention::new_blocking(&Device::Cpu, config, weights)?;
//! let (states, context) = (vec![1.0; 3 * 4], vec![1.0; 5 * 6]);
//! let context = layer.prepare_context_blocking(States::new(&context, 1, 5))?;
//! let output = layer.forward_prepared_blocking(States::new(&states, 1, 3), &context, &Default::default())?;
//! // every value is 6 * 0.5, and every output 4 * 0.5 times that
//! assert_eq!(output, vec![6.0; 3 * 4]);
//! # }
//! # Ok::<(), cross_attention::Error>(())
//! ```

mod cpu_layer;
mod error;
mod gpu_layer;
mod weights;

use std::sync::Arc;

pub use error::LayerError;
pub use weights::{LayerWeights, LinearWeights, Names, NormWeights, Projection, Source};

use crate::device::Device;
use crate::error::Error;
use crate::inputs::AttentionInputs;
use crate::problem::{AttentionProblem, AttentionSpec, Diagonal};
use crate::tensor::{Layout, TensorRef, TensorSpec};
use cpu_layer::CpuLayer;
use gpu_layer::GpuLayer;

/// Sizes of a layer. Plain fields; found sound when the layer is made.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerConfig {
    /// Elements of a state, in and out.
    pub width: usize,
    /// Elements of a token of the context.
    pub context_width: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; `heads` is a multiple of it.
    pub kv_heads: usize,
    /// Elements of a query or key of a head.
    pub head_dim: usize,
    /// Elements of a value of a head.
    pub v_head_dim: usize,
    /// What scores are multiplied by; `None` is `1/sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// A norm of every query and key head before the scores (QK norm).
    pub norm: Option<HeadNorm>,
}

/// A norm over the elements of a head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadNorm {
    /// Which one.
    pub kind: NormKind,
    /// Added to the mean square.
    pub epsilon: f32,
}

/// A kind of norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NormKind {
    /// By the root of the mean square; Zhang and Sennrich 2019 (arXiv:1910.07467).
    Rms,
    /// By mean and deviation; Ba, Kiros, Hinton 2016 (arXiv:1607.06450).
    Layer,
}

impl LayerConfig {
    /// As many key/value heads as query heads, of `width / heads` elements each, no norm.
    #[must_use]
    pub const fn new(width: usize, context_width: usize, heads: usize) -> Self {
        let head_dim = if heads == 0 { 0 } else { width / heads };
        Self { width, context_width, heads, kv_heads: heads, head_dim, v_head_dim: head_dim, scale: None, norm: None }
    }

    /// Inputs and outputs of a projection.
    pub(crate) const fn sizes(&self, of: Projection) -> [usize; 2] {
        match of {
            Projection::Query => [self.width, self.heads * self.head_dim],
            Projection::Key => [self.context_width, self.kv_heads * self.head_dim],
            Projection::Value => [self.context_width, self.kv_heads * self.v_head_dim],
            Projection::Out => [self.heads * self.v_head_dim, self.width],
        }
    }

    fn check(&self) -> Result<(), LayerError> {
        let counts = [
            ("width", self.width),
            ("context_width", self.context_width),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("v_head_dim", self.v_head_dim),
        ];
        if let Some(&(name, _)) = counts.iter().find(|(_, n)| *n == 0) {
            return Err(LayerError::Zero { name });
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(LayerError::Heads { heads: self.heads, kv_heads: self.kv_heads });
        }
        let inner = self.heads.checked_mul(self.head_dim.max(self.v_head_dim));
        if inner.and_then(|n| n.checked_mul(self.width.max(self.context_width))).is_none() {
            return Err(LayerError::TooWide);
        }
        match self.norm {
            Some(HeadNorm { epsilon, .. }) if !(epsilon.is_finite() && epsilon >= 0.0) => {
                Err(LayerError::Epsilon { found: epsilon.to_string() })
            }
            _ => Ok(()),
        }
    }

    /// Heads as a projection leaves them, inside of tokens. A batch of 1 may stand for more.
    fn tensor(&self, [batch, of]: [usize; 2], heads: usize, len: usize, dim: usize) -> TensorSpec {
        let mut layout = Layout::blhd([batch, heads, len, dim]);
        if of == 1 {
            layout.strides[0] = 0;
        }
        TensorSpec::f32(layout)
    }

    /// The attention of a call; `found` entries of the context stand for the batch.
    fn problem(
        &self,
        [batch, q_len]: [usize; 2],
        [found, kv_len]: [usize; 2],
        terms: &LayerTerms<'_>,
    ) -> Result<AttentionProblem, Error> {
        if found != 1 && found != batch {
            return Err(LayerError::Batch { batch, found }.into());
        }
        let mut spec = AttentionSpec::from_tensors(
            self.tensor([batch, batch.max(2)], self.heads, q_len, self.head_dim),
            self.tensor([batch, found], self.kv_heads, kv_len, self.head_dim),
            self.tensor([batch, found], self.kv_heads, kv_len, self.v_head_dim),
        );
        spec.output = self.tensor([batch, batch.max(2)], self.heads, q_len, self.v_head_dim);
        spec.scale = self.scale;
        spec.kv_lens = terms.kv_lens.is_some();
        spec.mask = terms.mask.map(|(_, layout)| layout);
        spec.bias = terms.bias.map(|(_, bias)| bias);
        spec.causal = terms.causal;
        Ok(AttentionProblem::new(spec)?)
    }
}

/// What is masked or added in a call. The default is nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct LayerTerms<'a> {
    /// Tokens of the context that each batch entry may see, `[batch]`.
    pub kv_lens: Option<&'a [u32]>,
    /// Boolean mask, true = attend, with its layout over `[batch, heads, q_len, kv_len]`.
    pub mask: Option<(&'a [bool], Layout)>,
    /// Additive bias with its layout over `[batch, heads, q_len, kv_len]`.
    pub bias: Option<(TensorRef<'a>, TensorSpec)>,
    /// A causal mask along this diagonal.
    pub causal: Option<Diagonal>,
}

impl<'a> LayerTerms<'a> {
    fn inputs(&self, query: &'a [f32], key: &'a [f32], value: &'a [f32]) -> AttentionInputs<'a> {
        let mut inputs = AttentionInputs::new(query, key, value);
        inputs.kv_lens = self.kv_lens;
        inputs.mask = self.mask.map(|(mask, _)| mask);
        inputs.bias = self.bias.map(|(bias, _)| bias);
        inputs
    }
}

/// Tokens of a sequence, `[batch, len, width]` without gaps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct States<'a> {
    /// The elements.
    pub data: &'a [f32],
    /// Entries of the batch.
    pub batch: usize,
    /// Tokens of an entry.
    pub len: usize,
}

impl<'a> States<'a> {
    /// `[batch, len, width]`.
    #[must_use]
    pub const fn new(data: &'a [f32], batch: usize, len: usize) -> Self {
        Self { data, batch, len }
    }

    fn check(&self, name: &'static str, width: usize) -> Result<(), LayerError> {
        let Self { data, batch, len } = *self;
        let wanted = batch.checked_mul(len).and_then(|n| n.checked_mul(width));
        if wanted != Some(data.len()) {
            return Err(LayerError::States { name, batch, len, width, found: data.len() });
        }
        Ok(())
    }
}

/// A cross-attention layer with its weights on a device. Clones share them.
#[derive(Clone, Debug)]
pub struct CrossAttention {
    config: LayerConfig,
    place: Place,
}

/// Where the weights are.
#[derive(Clone, Debug)]
enum Place {
    Cpu(Arc<CpuLayer>),
    Gpu(Arc<GpuLayer>),
}

/// Keys and values of a context, projected once by a layer. Clones share them.
#[derive(Clone, Debug)]
pub struct LayerContext {
    batch: usize,
    len: usize,
    bytes: u64,
    parts: ContextParts,
}

#[derive(Clone, Debug)]
enum ContextParts {
    /// The layer that it is of, keys, values.
    Cpu(Arc<CpuLayer>, Arc<[Vec<f32>; 2]>),
    Gpu(Arc<GpuLayer>, [wgpu::Buffer; 2]),
}

impl LayerContext {
    /// Entries of the batch.
    #[must_use]
    pub const fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens of an entry.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no tokens.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0 || self.batch == 0
    }

    /// Memory that keys and values take, in bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl CrossAttention {
    /// Puts a layer on a device. The oracle has no layers: there it computes as the CPU does.
    ///
    /// # Errors
    /// [`Error::Layer`] if the configuration is not sound or a weight has another size, [`Error::Gpu`].
    pub async fn new(device: &Device, config: LayerConfig, weights: LayerWeights) -> Result<Self, Error> {
        config.check()?;
        weights.check(&config)?;
        let place = match device {
            Device::Cpu | Device::Oracle => Place::Cpu(Arc::new(CpuLayer::new(&config, &weights))),
            Device::Gpu(context) => Place::Gpu(Arc::new(GpuLayer::new(context, &config, &weights).await?)),
        };
        Ok(Self { config, place })
    }

    /// [`new`](Self::new), blocking.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    #[cfg(feature = "native")]
    pub fn new_blocking(device: &Device, config: LayerConfig, weights: LayerWeights) -> Result<Self, Error> {
        device.block_on(Self::new(device, config, weights))
    }

    /// The sizes it was made with.
    #[must_use]
    pub const fn config(&self) -> &LayerConfig {
        &self.config
    }

    /// Projects a context `[batch, kv_len, context_width]` to keys and values, which stay on the device.
    ///
    /// # Errors
    /// [`Error::Layer`] if the data does not fit, [`Error::Gpu`].
    pub async fn prepare_context(&self, context: States<'_>) -> Result<LayerContext, Error> {
        context.check("context", self.config.context_width)?;
        let States { batch, len, .. } = context;
        let tokens = batch * len;
        let width = self.config.kv_heads * (self.config.head_dim + self.config.v_head_dim);
        let bytes = (tokens as u64).saturating_mul(width as u64).saturating_mul(4);
        let parts = match &self.place {
            Place::Cpu(layer) => {
                ContextParts::Cpu(Arc::clone(layer), Arc::new(layer.project_context(&self.config, context.data)?))
            }
            Place::Gpu(layer) => {
                let parts = layer.project_context(&self.config, tokens, context.data).await?;
                ContextParts::Gpu(Arc::clone(layer), parts)
            }
        };
        Ok(LayerContext { batch, len, bytes, parts })
    }

    /// [`prepare_context`](Self::prepare_context), blocking.
    ///
    /// # Errors
    /// As [`prepare_context`](Self::prepare_context).
    #[cfg(feature = "native")]
    pub fn prepare_context_blocking(&self, context: States<'_>) -> Result<LayerContext, Error> {
        self.block_on(self.prepare_context(context))
    }

    /// The layer on states `[batch, q_len, width]` and a prepared context of the same batch, or of one entry for all of it.
    /// Gives `[batch, q_len, width]`.
    ///
    /// # Errors
    /// [`Error::Layer`] if states or context do not fit, [`Error::Problem`] and [`Error::Input`] for the terms,
    /// [`Error::Plan`], [`Error::LayerPlan`], [`Error::Gpu`].
    pub async fn forward_prepared(
        &self,
        states: States<'_>,
        context: &LayerContext,
        terms: &LayerTerms<'_>,
    ) -> Result<Vec<f32>, Error> {
        states.check("states", self.config.width)?;
        let shape = [states.batch, states.len];
        let problem = self.config.problem(shape, [context.batch, context.len], terms)?;
        match (&self.place, &context.parts) {
            (Place::Cpu(layer), ContextParts::Cpu(of, parts)) if Arc::ptr_eq(layer, of) => {
                layer.forward(&self.config, &problem, states.data, parts, terms)
            }
            (Place::Gpu(layer), ContextParts::Gpu(of, parts)) if Arc::ptr_eq(layer, of) => {
                layer.forward(&self.config, &problem, states.data, parts, terms).await
            }
            (Place::Cpu(_) | Place::Gpu(_), ContextParts::Cpu(..) | ContextParts::Gpu(..)) => {
                Err(LayerError::OtherLayer.into())
            }
        }
    }

    /// [`forward_prepared`](Self::forward_prepared), blocking.
    ///
    /// # Errors
    /// As [`forward_prepared`](Self::forward_prepared).
    #[cfg(feature = "native")]
    pub fn forward_prepared_blocking(
        &self,
        states: States<'_>,
        context: &LayerContext,
        terms: &LayerTerms<'_>,
    ) -> Result<Vec<f32>, Error> {
        self.block_on(self.forward_prepared(states, context, terms))
    }

    /// The layer on states and a context that is used once: the same bits as with a prepared one. Self-attention is
    /// `forward(states, states, ..)`.
    ///
    /// # Errors
    /// As [`prepare_context`](Self::prepare_context) and [`forward_prepared`](Self::forward_prepared).
    pub async fn forward(
        &self,
        states: States<'_>,
        context: States<'_>,
        terms: &LayerTerms<'_>,
    ) -> Result<Vec<f32>, Error> {
        states.check("states", self.config.width)?;
        let context = self.prepare_context(context).await?;
        self.forward_prepared(states, &context, terms).await
    }

    /// [`forward`](Self::forward), blocking.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    #[cfg(feature = "native")]
    pub fn forward_blocking(
        &self,
        states: States<'_>,
        context: States<'_>,
        terms: &LayerTerms<'_>,
    ) -> Result<Vec<f32>, Error> {
        self.block_on(self.forward(states, context, terms))
    }

    #[cfg(feature = "native")]
    fn block_on<T>(&self, future: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        match &self.place {
            Place::Cpu(_) => pollster::block_on(future),
            Place::Gpu(layer) => layer.context().block_on(future),
        }
    }
}
