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

mod backward;
mod config;
mod error;
mod names;

use std::sync::Arc;

pub use backward::{LayerGradients, LayerSaved};
pub use config::{Biases, LayerConfig, LayerWeights, Norm, NormKind, NormWeights, Projection};
pub use error::LayerError;
pub use names::{LoadError, Names, ProjectionNames, Role, StoredTensor};
/// The crate that [`CrossAttention::load`] takes its files from.
pub use safetensors;

use crate::device::{Device, KernelChoice};
use crate::engine::{self, Inputs, Kind, Linear, Outputs, Recording, RowNorm, Tensor};
use crate::error::Error;
use crate::problem::{AttentionProblem, AttentionSpec, Diagonal};
use crate::tensor::{Element, Layout, TensorSpec};
use crate::terms::Terms;

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
        if matches!(device, Device::Oracle) {
            return Err(LayerError::Oracle.into());
        }
        let weights = Arc::new(Prepared::new(device, &self.model.config, &self.model.weights).await?);
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
    weights: Arc<Prepared>,
}

/// Projections and norms, where they run.
#[derive(Debug)]
struct Prepared {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    query_norm: Option<RowNorm>,
    key_norm: Option<RowNorm>,
}

impl Prepared {
    async fn new(device: &Device, config: &LayerConfig, weights: &LayerWeights) -> Result<Self, Error> {
        let linear = async |role: Role| {
            let projection = weights.projection(role);
            Linear::new(device, projection.weight.as_ref(), projection.bias.as_deref(), config.shape(role)).await
        };
        let norm = async |norm: Option<Norm>, weights: &Option<NormWeights>| {
            let (Some(norm), Some(weights)) = (norm, weights) else { return Ok(None) };
            let centred = match norm.kind {
                NormKind::Rms => false,
                NormKind::Layer => true,
            };
            let (weight, bias) = (&weights.weight, weights.bias.as_deref());
            Ok::<_, Error>(Some(RowNorm::new(device, weight, bias, centred, norm.epsilon).await?))
        };
        Ok(Self {
            query: linear(Role::Query).await?,
            key: linear(Role::Key).await?,
            value: linear(Role::Value).await?,
            output: linear(Role::Output).await?,
            query_norm: norm(config.query_norm, &weights.query_norm).await?,
            key_norm: norm(config.key_norm, &weights.key_norm).await?,
        })
    }
}

/// What else is said of one call; the default is no mask at all.
#[derive(Clone, Debug, Default)]
pub struct LayerOptions<'a> {
    /// Causal mask along this diagonal.
    pub causal: Option<Diagonal>,
    /// Tokens of the context that a row sees before the diagonal.
    pub window_left: Option<u32>,
    /// Tokens of the context that a row sees behind the diagonal.
    pub window_right: Option<u32>,
    /// `[batch]`, u32, in tokens: rows of each entry that are there; what stands behind gives the output's bias. A host or a
    /// device tensor.
    pub q_lens: Option<Tensor<'a>>,
    /// `[batch]`: tokens of each context that count.
    pub kv_lens: Option<Tensor<'a>>,
    /// Which token sees which.
    pub mask: Option<LayerMask<'a>>,
}

/// A boolean mask without gaps, true = attend.
#[derive(Clone, Debug)]
pub struct LayerMask<'a> {
    /// Row after row.
    pub data: Tensor<'a>,
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
    /// `[batch, kv_len, context_width]`. On a GPU everything is one submission.
    ///
    /// Gives the bits that [`prepare_context`](Self::prepare_context) as f32 and
    /// [`forward_prepared`](Self::forward_prepared) give.
    ///
    /// # Errors
    /// [`Error::Layer`], [`Error::Problem`] and [`Error::Input`] if the data or options do not fit, [`Error::Gpu`].
    pub async fn forward<'a>(
        &self,
        batch: usize,
        states: impl Into<Tensor<'a>>,
        context: impl Into<Tensor<'a>>,
        options: &LayerOptions<'_>,
    ) -> Result<Vec<f32>, Error> {
        let mut recording = Recording::new(&self.device);
        let output = self.record(&mut recording, batch, states, context, options).await?;
        recording.submit().await?;
        output.read_f32("output").await
    }

    /// The same in a recording: nothing is submitted or read. The output is f32 `[batch, q_len, width]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and [`Error::Place`].
    pub async fn record<'a>(
        &self,
        recording: &mut Recording<'_>,
        batch: usize,
        states: impl Into<Tensor<'a>>,
        context: impl Into<Tensor<'a>>,
        options: &LayerOptions<'_>,
    ) -> Result<Tensor<'static>, Error> {
        recording.check_device(&self.device)?;
        let (states, context) = (states.into(), context.into());
        let kv_len = tokens("context", batch, self.config().context_width, &context)?;
        let call = Call::new(self.config(), batch, &states, [batch, kv_len], Element::F32, options)?;
        let kept = self.project_context(recording, &context, Element::F32).await?;
        self.attend(recording, &states, &kept, &call).await
    }

    /// Projects keys and values of a context `[batch, kv_len, context_width]`, to be kept for any number of calls.
    ///
    /// # Errors
    /// [`Error::Layer`] if the context is no whole number of tokens, [`Error::Gpu`].
    pub async fn prepare_context<'a>(
        &self,
        batch: usize,
        context: impl Into<Tensor<'a>>,
        element: Element,
    ) -> Result<LayerContext, Error> {
        let mut recording = Recording::new(&self.device);
        let kept = self.record_context(&mut recording, batch, context, element).await?;
        recording.submit().await?;
        Ok(kept)
    }

    /// The same in a recording. The context is there for what is recorded, or submitted, behind.
    ///
    /// # Errors
    /// As [`prepare_context`](Self::prepare_context), and [`Error::Place`].
    pub async fn record_context<'a>(
        &self,
        recording: &mut Recording<'_>,
        batch: usize,
        context: impl Into<Tensor<'a>>,
        element: Element,
    ) -> Result<LayerContext, Error> {
        recording.check_device(&self.device)?;
        if !Element::FLOATS.contains(&element) {
            return Err(LayerError::Element { found: element }.into());
        }
        let context = context.into();
        let kv_len = tokens("context", batch, self.config().context_width, &context)?;
        let tensors = self.project_context(recording, &context, element).await?;
        let (model, device) = (Arc::clone(&self.model), self.device.clone());
        Ok(LayerContext { kept: Arc::new(KeptContext { model, device, batch, kv_len, element, tensors }) })
    }

    /// The layer's output `[batch, q_len, width]` for `states` `[batch, q_len, width]` and a prepared context, whose batch
    /// is the same, or 1 and shared.
    ///
    /// # Errors
    /// [`LayerError::OtherLayer`] and [`LayerError::OtherDevice`] if the context is not of this layer on this device;
    /// otherwise as [`forward`](Self::forward).
    pub async fn forward_prepared<'a>(
        &self,
        batch: usize,
        states: impl Into<Tensor<'a>>,
        context: &LayerContext,
        options: &LayerOptions<'_>,
    ) -> Result<Vec<f32>, Error> {
        let mut recording = Recording::new(&self.device);
        let output = self.record_prepared(&mut recording, batch, states, context, options).await?;
        recording.submit().await?;
        output.read_f32("output").await
    }

    /// The same in a recording: nothing is submitted or read.
    ///
    /// # Errors
    /// As [`forward_prepared`](Self::forward_prepared), and [`Error::Place`].
    pub async fn record_prepared<'a>(
        &self,
        recording: &mut Recording<'_>,
        batch: usize,
        states: impl Into<Tensor<'a>>,
        context: &LayerContext,
        options: &LayerOptions<'_>,
    ) -> Result<Tensor<'static>, Error> {
        recording.check_device(&self.device)?;
        let (kept, states) = (&*context.kept, states.into());
        if !Arc::ptr_eq(&kept.model, &self.model) {
            return Err(LayerError::OtherLayer.into());
        }
        if Recording::new(&kept.device).check_device(&self.device).is_err() {
            return Err(LayerError::OtherDevice { wanted: self.device.name(), found: kept.device.name() }.into());
        }
        let call = Call::new(self.config(), batch, &states, [kept.batch, kept.kv_len], kept.element, options)?;
        self.attend(recording, &states, &kept.tensors, &call).await
    }

    /// Keys and values of a context.
    async fn project_context(
        &self,
        recording: &mut Recording<'_>,
        context: &Tensor<'_>,
        element: Element,
    ) -> Result<[Tensor<'static>; 2], Error> {
        let Prepared { key, value, key_norm, .. } = &*self.weights;
        let rows = context.len() / self.config().context_width;
        let context = recording.place("context", context).await?;
        let key = recording.project(key, key_norm.as_ref(), (&context, rows), element).await?;
        let value = recording.project(value, None, (&context, rows), element).await?;
        Ok([key, value])
    }

    /// Queries, attention and output.
    async fn attend(
        &self,
        recording: &mut Recording<'_>,
        states: &Tensor<'_>,
        [key, value]: &[Tensor<'static>; 2],
        call: &Call<'_>,
    ) -> Result<Tensor<'static>, Error> {
        let Prepared { query, output, query_norm, .. } = &*self.weights;
        let rows = states.len() / self.config().width;
        let states = recording.place("states", states).await?;
        let query = recording.project(query, query_norm.as_ref(), (&states, rows), Element::F32).await?;
        let attention = self.device.prepare(&call.problem, KernelChoice::Auto).await?;
        let terms = recording.place_terms(&call.terms).await?;
        let inputs = Inputs { query, key: key.clone(), value: value.clone(), terms };
        let [_, inner] = self.config().shape(Role::Output);
        let heads = recording.allocate("heads", Kind::F32, rows * inner).await?;
        recording.attend(&attention, &inputs, &Outputs { output: heads.clone(), rows: None, scores: None })?;
        recording.project(output, None, (&heads, rows), Element::F32).await
    }

    /// [`forward`](Self::forward), blocking.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    #[cfg(feature = "native")]
    pub fn forward_blocking<'a>(
        &self,
        batch: usize,
        states: impl Into<Tensor<'a>>,
        context: impl Into<Tensor<'a>>,
        options: &LayerOptions<'_>,
    ) -> Result<Vec<f32>, Error> {
        self.device.block_on(self.forward(batch, states, context, options))
    }

    /// [`prepare_context`](Self::prepare_context), blocking.
    ///
    /// # Errors
    /// As [`prepare_context`](Self::prepare_context).
    #[cfg(feature = "native")]
    pub fn prepare_context_blocking<'a>(
        &self,
        batch: usize,
        context: impl Into<Tensor<'a>>,
        element: Element,
    ) -> Result<LayerContext, Error> {
        self.device.block_on(self.prepare_context(batch, context, element))
    }

    /// [`forward_prepared`](Self::forward_prepared), blocking.
    ///
    /// # Errors
    /// As [`forward_prepared`](Self::forward_prepared).
    #[cfg(feature = "native")]
    pub fn forward_prepared_blocking<'a>(
        &self,
        batch: usize,
        states: impl Into<Tensor<'a>>,
        context: &LayerContext,
        options: &LayerOptions<'_>,
    ) -> Result<Vec<f32>, Error> {
        self.device.block_on(self.forward_prepared(batch, states, context, options))
    }
}

/// Keys and values of a context, projected by a layer and kept on its device. Clones share them.
#[derive(Clone, Debug)]
pub struct LayerContext {
    kept: Arc<KeptContext>,
}

#[derive(Debug)]
struct KeptContext {
    model: Arc<Model>,
    device: Device,
    batch: usize,
    kv_len: usize,
    element: Element,
    /// Keys and values.
    tensors: [Tensor<'static>; 2],
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
    terms: Terms<Tensor<'a>>,
}

impl<'a> Call<'a> {
    fn new(
        config: &LayerConfig,
        batch: usize,
        states: &Tensor<'_>,
        [kv_batch, kv_len]: [usize; 2],
        element: Element,
        options: &LayerOptions<'a>,
    ) -> Result<Self, Error> {
        let q_len = tokens("states", batch, config.width, states)?;
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
        (spec.q_lens, spec.kv_lens) = (options.q_lens.is_some(), options.kv_lens.is_some());
        spec.mask = options.mask.as_ref().map(|mask| Layout::bhld(mask.shape));
        let problem = AttentionProblem::new(spec)?;
        if let Some(mask) = &options.mask {
            let wanted = mask.shape.iter().try_fold(1usize, |n, &m| n.checked_mul(m)).unwrap_or(usize::MAX);
            if mask.data.len() != wanted {
                return Err(LayerError::Mask { shape: mask.shape, wanted, found: mask.data.len() }.into());
            }
        }
        let mask = options.mask.as_ref().map(|mask| mask.data.clone());
        let (q_lens, kv_lens) = (options.q_lens.clone(), options.kv_lens.clone());
        let terms = Terms { mask, q_lens, kv_lens, ..Terms::default() };
        engine::check_terms(&terms, &problem)?;
        Ok(Self { problem, terms })
    }
}

/// Tokens of each entry of the batch.
fn tokens(name: &'static str, batch: usize, width: usize, of: &Tensor<'_>) -> Result<usize, Error> {
    engine::is_a(name, of, Kind::F32)?;
    let found = of.len();
    let token = batch.saturating_mul(width);
    if token == 0 && found == 0 {
        return Ok(0);
    }
    if token == 0 || !found.is_multiple_of(token) {
        return Err(LayerError::Tokens { name, batch, width, found }.into());
    }
    Ok(found / token)
}
