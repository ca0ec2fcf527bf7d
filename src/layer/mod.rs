//! Cross-attention as a layer of a model: projections to queries, keys and values, attention, projection of the output.
//!
//! ```
//! use cross_attention::layer::{CrossAttention, LayerConfig, LayerOptions, LayerWeights, Projection};
//! use cross_attention::{Device, Element, TensorData};
//!
//! let config = LayerConfig::new(8, 6, 2); // states of 8, context of 6, 2 heads
//! let projection = |out: usize, inner: usize| Projection {
//!     weight: TensorData::F32(vec![0.5; out * inner]),
//!     bias: Some(vec![0.0; out]),
//! };
//! let weights = LayerWeights {
//!     query: projection(8, 8),
//!     key: projection(8, 6),
//!     value: projection(8, 6),
//!     output: projection(8, 8),
//!     query_norm: None,
//!     key_norm: None,
//! };
//! let layer = CrossAttention::new(config, weights)?;
//! # #[cfg(feature = "native")] {
//! let layer = layer.on_blocking(&Device::Cpu)?;
//! let context = layer.prepare_context_blocking(1, &[1.0; 5 * 6], Element::F32)?; // once for each context
//! let output = layer.forward_prepared_blocking(1, &[1.0; 3 * 8], &context, &LayerOptions::default())?;
//! assert_eq!(output, vec![12.0; 3 * 8]); // values are 6 * 0.5, the output's rows 8 * 0.5 of them
//! # }
//! # Ok::<(), cross_attention::Error>(())
//! ```

mod config;
mod error;
mod names;
mod on_cpu;
mod on_gpu;

use std::sync::Arc;

pub use config::{Biases, LayerConfig, LayerWeights, Norm, NormKind, NormWeights, Projection};
pub use error::LayerError;
pub use names::{LoadError, Names, ProjectionNames, Role, Source};

use crate::device::Device;
use crate::error::Error;
use crate::inputs::AttentionInputs;
use crate::problem::{AttentionProblem, AttentionSpec, Diagonal};
use crate::tensor::{Element, Layout, TensorRef, TensorSpec};

/// A cross-attention layer: a shape and weights that fit it. Cheap to clone.
///
/// With states `X` `[batch, q_len, width]`, context `C` `[batch, kv_len, context_width]` and heads side by side in the
/// rows of a projection:
///
/// ```text
/// Q = norm(X Wq^T + bq)   K = norm(C Wk^T + bk)   V = C Wv^T + bv     norms over head_dim, where the config has them
/// output = attention(Q, K, V) Wo^T + bo
/// ```
///
/// Self-attention is the case `C = X`.
#[derive(Clone, Debug)]
pub struct CrossAttention {
    model: Arc<Model>,
}

#[derive(Debug)]
struct Model {
    config: LayerConfig,
    weights: LayerWeights,
}

impl CrossAttention {
    /// Compares weights with the shape they are for.
    ///
    /// # Errors
    /// A [`LayerError`] that names the size or the weight, what was found and what would do.
    pub fn new(config: LayerConfig, weights: LayerWeights) -> Result<Self, LayerError> {
        config.check()?;
        weights.check(&config)?;
        Ok(Self { model: Arc::new(Model { config, weights }) })
    }

    /// Reads the weights from a safetensors file.
    ///
    /// # Errors
    /// [`LayerError::Load`] names the tensor that is missing or does not fit; otherwise as [`new`](Self::new).
    pub fn load(file: &safetensors::SafeTensors<'_>, names: &Names, config: LayerConfig) -> Result<Self, LayerError> {
        config.check()?;
        let weights = LayerWeights::load(file, names, &config)?;
        Self::new(config, weights)
    }

    /// Its shape.
    #[must_use]
    pub fn config(&self) -> &LayerConfig {
        &self.model.config
    }

    /// Its weights.
    #[must_use]
    pub fn weights(&self) -> &LayerWeights {
        &self.model.weights
    }

    /// Brings the weights to a device: f16 stays f16 on a GPU, and becomes f32 on the CPU.
    ///
    /// # Errors
    /// [`LayerError::Oracle`] for the oracle, [`Error::Gpu`].
    pub async fn on(&self, device: &Device) -> Result<LayerOn, Error> {
        let weights = match device {
            Device::Cpu => Weights::Cpu(Arc::new(on_cpu::CpuWeights::new(&self.model.weights))),
            Device::Gpu(context) => {
                Weights::Gpu(Arc::new(on_gpu::GpuWeights::new(context, &self.model.config, &self.model.weights).await?))
            }
            Device::Oracle => return Err(LayerError::Oracle.into()),
        };
        Ok(LayerOn { model: Arc::clone(&self.model), device: device.clone(), weights })
    }

    /// [`on`](Self::on), blocking.
    ///
    /// # Errors
    /// As [`on`](Self::on).
    #[cfg(feature = "native")]
    pub fn on_blocking(&self, device: &Device) -> Result<LayerOn, Error> {
        device.block_on(self.on(device))
    }
}

/// A layer with its weights on a device. Cheap to clone.
#[derive(Clone, Debug)]
pub struct LayerOn {
    model: Arc<Model>,
    device: Device,
    weights: Weights,
}

#[derive(Clone, Debug)]
enum Weights {
    Cpu(Arc<on_cpu::CpuWeights>),
    Gpu(Arc<on_gpu::GpuWeights>),
}

/// What else is said of one call; the default is no mask at all.
#[derive(Clone, Copy, Debug, Default)]
pub struct LayerOptions<'a> {
    /// Causal mask along this diagonal.
    pub causal: Option<Diagonal>,
    /// Tokens of the context that a row sees before the diagonal.
    pub window_left: Option<u32>,
    /// Tokens of the context that a row sees behind the diagonal.
    pub window_right: Option<u32>,
    /// `[batch]`: tokens of each context that count.
    pub kv_lens: Option<&'a [u32]>,
    /// Which token sees which.
    pub mask: Option<LayerMask<'a>>,
}

/// A boolean mask without gaps, true = attend.
#[derive(Clone, Copy, Debug)]
pub struct LayerMask<'a> {
    /// Row after row.
    pub data: &'a [bool],
    /// `[batch, heads, q_len, kv_len]`, each axis may also be 1: `[batch, 1, 1, kv_len]` for padding.
    pub shape: [usize; 4],
}

impl LayerOn {
    /// The device.
    #[must_use]
    pub const fn device(&self) -> &Device {
        &self.device
    }

    /// Its shape.
    #[must_use]
    pub fn config(&self) -> &LayerConfig {
        &self.model.config
    }

    /// The layer's output `[batch, q_len, width]` for `states` `[batch, q_len, width]` and `context`
    /// `[batch, kv_len, context_width]`. On a GPU everything is one submission, and natively somebody must poll the
    /// device meanwhile.
    ///
    /// Gives the bits that [`prepare_context`](Self::prepare_context) as f32 and
    /// [`forward_prepared`](Self::forward_prepared) give.
    ///
    /// # Errors
    /// [`Error::Layer`], [`Error::Problem`] and [`Error::Input`] if the data or options do not fit, [`Error::Gpu`].
    pub async fn forward(
        &self,
        batch: usize,
        states: &[f32],
        context: &[f32],
        options: &LayerOptions<'_>,
    ) -> Result<Vec<f32>, Error> {
        let kv_len = tokens("context", batch, self.config().context_width, context.len())?;
        let call = Call::new(self.config(), batch, states, [batch, kv_len], Element::F32, options)?;
        match &self.weights {
            Weights::Cpu(weights) => {
                let (key, value) = weights.context(self.config(), context, Element::F32);
                weights.forward(self.config(), states, key.as_ref(), value.as_ref(), &call)
            }
            Weights::Gpu(weights) => weights.forward_raw(self.config(), states, context, &call).await,
        }
    }

    /// Projects keys and values of a context `[batch, kv_len, context_width]`, to be kept for any number of calls.
    ///
    /// # Errors
    /// [`Error::Layer`] if the context is no whole number of tokens, [`Error::Gpu`].
    pub async fn prepare_context(
        &self,
        batch: usize,
        context: &[f32],
        element: Element,
    ) -> Result<LayerContext, Error> {
        let kv_len = tokens("context", batch, self.config().context_width, context.len())?;
        let store = match &self.weights {
            Weights::Cpu(weights) => {
                let (key, value) = weights.context(self.config(), context, element);
                Store::Cpu { key, value }
            }
            Weights::Gpu(weights) => {
                let [key, value] = weights.context(self.config(), context, element).await?;
                Store::Gpu { device: weights.device().clone(), key, value }
            }
        };
        let kept = Kept { model: Arc::clone(&self.model), batch, kv_len, element, store };
        Ok(LayerContext { kept: Arc::new(kept) })
    }

    /// The layer's output `[batch, q_len, width]` for `states` `[batch, q_len, width]` and a prepared context, whose batch
    /// is the same, or 1 and shared.
    ///
    /// # Errors
    /// [`LayerError::OtherLayer`] and [`LayerError::OtherDevice`] if the context is not of this layer on this device;
    /// otherwise as [`forward`](Self::forward).
    pub async fn forward_prepared(
        &self,
        batch: usize,
        states: &[f32],
        context: &LayerContext,
        options: &LayerOptions<'_>,
    ) -> Result<Vec<f32>, Error> {
        let kept = &*context.kept;
        if !Arc::ptr_eq(&kept.model, &self.model) {
            return Err(LayerError::OtherLayer.into());
        }
        let other = |found: String| LayerError::OtherDevice { wanted: self.device.name(), found };
        let call = Call::new(self.config(), batch, states, [kept.batch, kept.kv_len], kept.element, options)?;
        match (&self.weights, &kept.store) {
            (Weights::Cpu(weights), Store::Cpu { key, value }) => {
                weights.forward(self.config(), states, key.as_ref(), value.as_ref(), &call)
            }
            (Weights::Gpu(weights), Store::Gpu { device, key, value }) if device.is_clone_of(weights.device()) => {
                weights.forward(self.config(), states, [key, value], &call).await
            }
            (_, Store::Cpu { .. }) => Err(other(Device::Cpu.name()).into()),
            (_, Store::Gpu { device, .. }) => Err(other(Device::Gpu(device.clone()).name()).into()),
        }
    }

    /// [`forward`](Self::forward), blocking.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    #[cfg(feature = "native")]
    pub fn forward_blocking(
        &self,
        batch: usize,
        states: &[f32],
        context: &[f32],
        options: &LayerOptions<'_>,
    ) -> Result<Vec<f32>, Error> {
        self.device.block_on(self.forward(batch, states, context, options))
    }

    /// [`prepare_context`](Self::prepare_context), blocking.
    ///
    /// # Errors
    /// As [`prepare_context`](Self::prepare_context).
    #[cfg(feature = "native")]
    pub fn prepare_context_blocking(
        &self,
        batch: usize,
        context: &[f32],
        element: Element,
    ) -> Result<LayerContext, Error> {
        self.device.block_on(self.prepare_context(batch, context, element))
    }

    /// [`forward_prepared`](Self::forward_prepared), blocking.
    ///
    /// # Errors
    /// As [`forward_prepared`](Self::forward_prepared).
    #[cfg(feature = "native")]
    pub fn forward_prepared_blocking(
        &self,
        batch: usize,
        states: &[f32],
        context: &LayerContext,
        options: &LayerOptions<'_>,
    ) -> Result<Vec<f32>, Error> {
        self.device.block_on(self.forward_prepared(batch, states, context, options))
    }
}

/// Keys and values of a context, projected by a layer and kept on its device. Clones share them.
#[derive(Clone, Debug)]
pub struct LayerContext {
    kept: Arc<Kept>,
}

#[derive(Debug)]
struct Kept {
    model: Arc<Model>,
    batch: usize,
    kv_len: usize,
    element: Element,
    store: Store,
}

#[derive(Debug)]
enum Store {
    Cpu { key: crate::tensor::TensorData, value: crate::tensor::TensorData },
    Gpu { device: crate::gpu::Context, key: wgpu::Buffer, value: wgpu::Buffer },
}

impl LayerContext {
    /// Entries of the batch.
    #[must_use]
    pub fn batch(&self) -> usize {
        self.kept.batch
    }

    /// Length of the context, in tokens.
    #[must_use]
    pub fn kv_len(&self) -> usize {
        self.kept.kv_len
    }

    /// How keys and values are stored.
    #[must_use]
    pub fn element(&self) -> Element {
        self.kept.element
    }

    /// Bytes that keys and values take.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let LayerConfig { kv_heads, head_dim, v_head_dim, .. } = self.kept.model.config;
        let elements = self.kept.batch * self.kept.kv_len * kv_heads * (head_dim + v_head_dim);
        elements as u64 * self.kept.element.size_bytes() as u64
    }
}

/// One call's attention: heads side by side in memory, as projections write and read them.
#[derive(Debug)]
struct Call<'a> {
    problem: AttentionProblem,
    options: LayerOptions<'a>,
}

impl<'a> Call<'a> {
    fn new(
        config: &LayerConfig,
        batch: usize,
        states: &[f32],
        [kv_batch, kv_len]: [usize; 2],
        element: Element,
        options: &LayerOptions<'a>,
    ) -> Result<Self, Error> {
        let q_len = tokens("states", batch, config.width, states.len())?;
        let &LayerConfig { heads, kv_heads, head_dim, v_head_dim, .. } = config;
        let tensor = |element, shape| TensorSpec { element, layout: Layout::blhd(shape) };
        let mut spec = AttentionSpec::from_tensors(
            tensor(Element::F32, [batch, heads, q_len, head_dim]),
            tensor(element, [kv_batch, kv_heads, kv_len, head_dim]),
            tensor(element, [kv_batch, kv_heads, kv_len, v_head_dim]),
        );
        spec.output = tensor(Element::F32, [batch, heads, q_len, v_head_dim]);
        spec.scale = config.scale;
        spec.causal = options.causal;
        spec.window_left = options.window_left;
        spec.window_right = options.window_right;
        spec.kv_lens = options.kv_lens.is_some();
        spec.mask = options.mask.map(|mask| Layout::bhld(mask.shape));
        let problem = AttentionProblem::new(spec)?;
        if let Some(mask) = options.mask {
            let wanted = mask.shape.iter().try_fold(1usize, |n, &m| n.checked_mul(m)).unwrap_or(usize::MAX);
            if mask.data.len() != wanted {
                return Err(LayerError::Mask { shape: mask.shape, wanted, found: mask.data.len() }.into());
            }
        }
        let call = Self { problem, options: *options };
        call.check_lens()?;
        Ok(call)
    }

    /// Key lengths are compared before anything is computed.
    fn check_lens(&self) -> Result<(), Error> {
        let Some(kv_lens) = self.options.kv_lens else { return Ok(()) };
        let (batch, kv_len) = (self.problem.batch(), self.problem.kv_len());
        if kv_lens.len() != batch {
            return Err(crate::InputError::Len { name: "kv_lens", wanted: batch, found: kv_lens.len() }.into());
        }
        match (0..).zip(kv_lens).find(|(_, len)| **len as usize > kv_len) {
            Some((batch, &found)) => Err(crate::InputError::KvLen { batch, found, kv_len }.into()),
            None => Ok(()),
        }
    }

    fn inputs<'b>(
        &self,
        query: impl Into<TensorRef<'b>>,
        key: TensorRef<'b>,
        value: TensorRef<'b>,
    ) -> AttentionInputs<'b>
    where
        'a: 'b,
    {
        let mut inputs = AttentionInputs::new(query, key, value);
        inputs.kv_lens = self.options.kv_lens;
        inputs.mask = self.options.mask.map(|mask| mask.data);
        inputs
    }
}

/// Tokens of each batch entry, of `width` elements each.
fn tokens(name: &'static str, batch: usize, width: usize, found: usize) -> Result<usize, LayerError> {
    let token = batch.saturating_mul(width);
    if token == 0 && found == 0 {
        return Ok(0);
    }
    if token == 0 || !found.is_multiple_of(token) {
        return Err(LayerError::Tokens { name, batch, width, found });
    }
    Ok(found / token)
}
