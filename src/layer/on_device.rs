//! A layer with its weights on a device, and its calls.

use std::sync::Arc;

use super::call::{Call, tokens};
use super::context::KeptContext;
use super::{
    LayerConfig, LayerContext, LayerError, LayerOptions, LayerWeights, Model, Norm, NormKind, NormWeights, Role,
};
use crate::device::{Device, KernelChoice};
use crate::engine::{Inputs, Kind, Linear, Outputs, Recording, RowNorm, Tensor};
use crate::error::Error;
use crate::tensor::Element;

/// A layer with its weights on a device. Cheap to clone.
#[derive(Clone, Debug)]
pub struct LayerOn {
    pub(super) model: Arc<Model>,
    pub(super) device: Device,
    pub(super) weights: Arc<Prepared>,
}

/// Projections and norms, where they run.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) query: Linear,
    pub(super) key: Linear,
    pub(super) value: Linear,
    pub(super) output: Linear,
    pub(super) query_norm: Option<RowNorm>,
    pub(super) key_norm: Option<RowNorm>,
}

impl Prepared {
    pub(super) async fn new(device: &Device, config: &LayerConfig, weights: &LayerWeights) -> Result<Self, Error> {
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
    #[cfg(feature = "threads")]
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
    #[cfg(feature = "threads")]
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
    #[cfg(feature = "threads")]
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
