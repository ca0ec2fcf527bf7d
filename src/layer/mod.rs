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
//! # #[cfg(feature = "threads")] {
//! let layer = layer.on_blocking(&Device::Cpu)?;
//! let context = layer.prepare_context_blocking(1, &[1.0; 5 * 6], Element::F32)?; // once for each context
//! let output = layer.forward_prepared_blocking(1, &[1.0; 3 * 8], &context, &LayerOptions::default())?;
//! assert_eq!(output, vec![12.0; 3 * 8]); // values are 6 * 0.5, the output's rows 8 * 0.5 of them
//! # }
//! # Ok::<(), cross_attention::Error>(())
//! ```

mod backward;
mod call;
mod config;
mod context;
mod error;
mod names;
mod on_device;

use std::sync::Arc;

pub use backward::{LayerGradients, LayerSaved};
pub use call::{LayerMask, LayerOptions};
pub use config::{Biases, LayerConfig, LayerWeights, Norm, NormKind, NormWeights, Projection};
pub use context::LayerContext;
pub use error::LayerError;
pub use names::{LoadError, Names, ProjectionNames, Role, StoredTensor};
pub use on_device::LayerOn;
/// The crate that [`CrossAttention::load`] takes its files from.
pub use safetensors;

use self::on_device::Prepared;
use crate::device::Device;
use crate::error::Error;

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
    #[cfg(feature = "threads")]
    pub fn on_blocking(&self, device: &Device) -> Result<LayerOn, Error> {
        device.block_on(self.on(device))
    }
}
