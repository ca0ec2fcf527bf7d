//! A layer on a device of wgpu: everything between states and output is recorded into one encoder.

use super::Call;
use super::config::{LayerConfig, LayerWeights, Norm, NormKind, NormWeights};
use super::names::Role;
use crate::error::Error;
use crate::gpu::{AttentionBuffers, Context, LinearInput, LinearOutput, PreparedLinear, PreparedNorm};
use crate::tensor::Element;

/// Weights on the device.
#[derive(Debug)]
pub(super) struct GpuWeights {
    device: Context,
    query: PreparedLinear,
    key: PreparedLinear,
    value: PreparedLinear,
    output: PreparedLinear,
    query_norm: Option<PreparedNorm>,
    key_norm: Option<PreparedNorm>,
}

impl GpuWeights {
    pub(super) async fn new(device: &Context, config: &LayerConfig, weights: &LayerWeights) -> Result<Self, Error> {
        let linear = async |role: Role| {
            let projection = weights.projection(role);
            device.prepare_linear(projection.weight.as_ref(), projection.bias.as_deref(), config.shape(role)).await
        };
        let norm = async |norm: Option<Norm>, weights: &Option<NormWeights>| {
            let (Some(norm), Some(weights)) = (norm, weights) else { return Ok(None) };
            let centred = match norm.kind {
                NormKind::Rms => false,
                NormKind::Layer => true,
            };
            let prepared = device.prepare_norm(&weights.weight, weights.bias.as_deref(), centred, norm.epsilon).await?;
            Ok::<_, Error>(Some(prepared))
        };
        Ok(Self {
            device: device.clone(),
            query: linear(Role::Query).await?,
            key: linear(Role::Key).await?,
            value: linear(Role::Value).await?,
            output: linear(Role::Output).await?,
            query_norm: norm(config.query_norm, &weights.query_norm).await?,
            key_norm: norm(config.key_norm, &weights.key_norm).await?,
        })
    }

    pub(super) const fn device(&self) -> &Context {
        &self.device
    }

    /// Keys and values, `[batch, kv_len, kv_heads, head_dim]`.
    pub(super) async fn context(
        &self,
        config: &LayerConfig,
        context: &[f32],
        element: Element,
    ) -> Result<[wgpu::Buffer; 2], Error> {
        let mut encoder = self.encoder();
        let kept = self.record_context(&mut encoder, config, context, element).await?;
        self.submit(encoder).await?;
        Ok(kept)
    }

    pub(super) async fn forward_raw(
        &self,
        config: &LayerConfig,
        states: &[f32],
        context: &[f32],
        call: &Call<'_>,
    ) -> Result<Vec<f32>, Error> {
        let mut encoder = self.encoder();
        let [key, value] = self.record_context(&mut encoder, config, context, Element::F32).await?;
        self.finish(encoder, config, states, [&key, &value], call).await
    }

    pub(super) async fn forward(
        &self,
        config: &LayerConfig,
        states: &[f32],
        kept: [&wgpu::Buffer; 2],
        call: &Call<'_>,
    ) -> Result<Vec<f32>, Error> {
        self.finish(self.encoder(), config, states, kept, call).await
    }

    async fn record_context(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        config: &LayerConfig,
        context: &[f32],
        element: Element,
    ) -> Result<[wgpu::Buffer; 2], Error> {
        let rows = context.len() / config.context_width;
        let context = self.device.upload("context", context).await?;
        let key = self.project(encoder, &self.key, self.key_norm.as_ref(), (&context, rows), element).await?;
        let value = self.project(encoder, &self.value, None, (&context, rows), element).await?;
        Ok([key, value])
    }

    /// Queries, attention and output after what is recorded; submits, and reads the output.
    async fn finish(
        &self,
        mut encoder: wgpu::CommandEncoder,
        config: &LayerConfig,
        states: &[f32],
        [key, value]: [&wgpu::Buffer; 2],
        call: &Call<'_>,
    ) -> Result<Vec<f32>, Error> {
        let device = &self.device;
        let rows = states.len() / config.width;
        let states = device.upload("states", states).await?;
        let norm = self.query_norm.as_ref();
        let query = self.project(&mut encoder, &self.query, norm, (&states, rows), Element::F32).await?;
        let attention = device.prepare(&call.problem, None).await?;
        let kv_lens = match call.options.kv_lens {
            Some(kv_lens) => Some(device.upload("kv_lens", kv_lens).await?),
            None => None,
        };
        let mask = match call.options.mask {
            Some(mask) => Some(device.upload("mask", mask.data).await?),
            None => None,
        };
        let [_, inner] = config.shape(Role::Output);
        let heads = device.allocate("heads", rows as u64 * inner as u64 * 4).await?;
        let mut buffers = AttentionBuffers::new(query.slice(..), key.slice(..), value.slice(..), heads.slice(..));
        buffers.mask = mask.as_ref().map(|mask| mask.slice(..));
        buffers.kv_lens = kv_lens.as_ref().map(|kv_lens| kv_lens.slice(..));
        let bound = attention.bind(&buffers)?;
        device.checked_now("attention", || bound.encode(&mut encoder))?;
        let output = self.project(&mut encoder, &self.output, None, (&heads, rows), Element::F32).await?;
        self.submit(encoder).await?;
        Ok(device.read("output", output.slice(..), rows * config.width).await?)
    }

    /// A projection, and a norm of its heads.
    async fn project(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        linear: &PreparedLinear,
        norm: Option<&PreparedNorm>,
        (input, rows): (&wgpu::Buffer, usize),
        element: Element,
    ) -> Result<wgpu::Buffer, Error> {
        let [out, _] = linear.shape();
        let elements = rows as u64 * out as u64;
        let projected = async |encoder: &mut wgpu::CommandEncoder, element: Element| {
            let buffer = self.device.allocate("projected", elements * element.size_bytes() as u64).await?;
            let from = LinearInput { buffer: input, element: Element::F32, rows };
            let to = LinearOutput { buffer: &buffer, element, stride: out, offset: 0 };
            linear.encode(encoder, from, to).await?;
            Ok::<_, Error>(buffer)
        };
        let Some(norm) = norm else { return projected(encoder, element).await };
        let raw = projected(encoder, Element::F32).await?;
        let normalised = self.device.allocate("normalised", elements * element.size_bytes() as u64).await?;
        norm.encode(encoder, rows * (out / norm.width()), &raw, &normalised, element).await?;
        Ok(normalised)
    }

    fn encoder(&self) -> wgpu::CommandEncoder {
        self.device.device().create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("layer") })
    }

    async fn submit(&self, encoder: wgpu::CommandEncoder) -> Result<(), Error> {
        self.device
            .checked("the submission of a layer", 0, || {
                self.device.queue().submit([encoder.finish()]);
            })
            .await?;
        Ok(())
    }
}
