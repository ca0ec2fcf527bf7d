//! A layer on a GPU: projections, norms and attention in one encoder.

use super::{HeadNorm, LayerConfig, LayerTerms, LayerWeights, LinearWeights, NormKind, NormWeights, Projection};
use crate::error::Error;
use crate::gpu::linear::{GpuHeadNorm, GpuLinear};
use crate::gpu::{AttentionBuffers, Context};
use crate::problem::AttentionProblem;

/// Weights on a device.
#[derive(Debug)]
pub(super) struct GpuLayer {
    context: Context,
    /// Query, key, value, out.
    projections: [GpuLinear; 4],
    /// Of queries and keys.
    norms: [Option<GpuHeadNorm>; 2],
}

impl GpuLayer {
    pub(super) async fn new(context: &Context, config: &LayerConfig, weights: &LayerWeights) -> Result<Self, Error> {
        let linear = async |of: Projection, linear: &LinearWeights| {
            context.upload_linear(config.sizes(of), linear.tensor(), linear.bias.as_deref()).await
        };
        let norm = async |weights: &Option<NormWeights>| {
            let (Some(HeadNorm { kind, epsilon }), Some(weights)) = (config.norm, weights) else { return Ok(None) };
            let centered = kind == NormKind::Layer;
            let shift = weights.shift.as_deref();
            context.upload_head_norm(&weights.gain, shift, centered, epsilon).await.map(Some)
        };
        Ok(Self {
            context: context.clone(),
            projections: [
                linear(Projection::Query, &weights.query).await?,
                linear(Projection::Key, &weights.key).await?,
                linear(Projection::Value, &weights.value).await?,
                linear(Projection::Out, &weights.out).await?,
            ],
            norms: [norm(&weights.query_norm).await?, norm(&weights.key_norm).await?],
        })
    }

    pub(super) const fn context(&self) -> &Context {
        &self.context
    }

    async fn project(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        of: Projection,
        name: &str,
        rows: usize,
        x: &wgpu::Buffer,
    ) -> Result<wgpu::Buffer, Error> {
        self.context.encode_linear(encoder, &self.projections[of as usize], name, rows, x).await
    }

    async fn normalise(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        norm: usize,
        vectors: usize,
        x: &wgpu::Buffer,
    ) -> Result<(), Error> {
        match &self.norms[norm] {
            Some(norm) => self.context.encode_head_norm(encoder, norm, vectors, x).await,
            None => Ok(()),
        }
    }

    fn encoder(&self) -> wgpu::CommandEncoder {
        self.context.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default())
    }

    async fn submit(&self, what: &str, encoder: wgpu::CommandEncoder) -> Result<(), Error> {
        self.context.checked(what, 0, || self.context.queue().submit([encoder.finish()])).await?;
        Ok(())
    }

    pub(super) async fn project_context(
        &self,
        config: &LayerConfig,
        tokens: usize,
        context: &[f32],
    ) -> Result<[wgpu::Buffer; 2], Error> {
        let x = self.context.upload("context", context).await?;
        let mut encoder = self.encoder();
        let key = self.project(&mut encoder, Projection::Key, "key", tokens, &x).await?;
        self.normalise(&mut encoder, 1, tokens * config.kv_heads, &key).await?;
        let value = self.project(&mut encoder, Projection::Value, "value", tokens, &x).await?;
        self.submit("the projections of a context", encoder).await?;
        Ok([key, value])
    }

    pub(super) async fn forward(
        &self,
        config: &LayerConfig,
        problem: &AttentionProblem,
        states: &[f32],
        [key, value]: &[wgpu::Buffer; 2],
        terms: &LayerTerms<'_>,
    ) -> Result<Vec<f32>, Error> {
        terms.inputs(&[], &[], &[]).check_terms(problem)?;
        let context = &self.context;
        let rows = problem.batch() * problem.q_len();
        let attention = context.prepare(problem, None).await?;
        let x = context.upload("states", states).await?;
        let mask = match terms.mask {
            Some((mask, _)) => Some(context.upload("mask", mask).await?),
            None => None,
        };
        let bias = match terms.bias {
            Some((bias, _)) => Some(context.upload_tensor("bias", bias).await?),
            None => None,
        };
        let kv_lens = match terms.kv_lens {
            Some(kv_lens) => Some(context.upload("kv_lens", kv_lens).await?),
            None => None,
        };
        let heads_width = config.sizes(Projection::Out)[0];
        let heads = context.allocate("heads", rows as u64 * heads_width as u64 * 4).await?;

        let mut encoder = self.encoder();
        let query = self.project(&mut encoder, Projection::Query, "query", rows, &x).await?;
        self.normalise(&mut encoder, 0, rows * config.heads, &query).await?;
        let mut buffers = AttentionBuffers::new(query.slice(..), key.slice(..), value.slice(..), heads.slice(..));
        buffers.mask = mask.as_ref().map(|mask| mask.slice(..));
        buffers.bias = bias.as_ref().map(|bias| bias.slice(..));
        buffers.kv_lens = kv_lens.as_ref().map(|kv_lens| kv_lens.slice(..));
        attention.encode(&mut encoder, &buffers)?;
        let y = self.project(&mut encoder, Projection::Out, "output", rows, &heads).await?;
        self.submit("a layer", encoder).await?;
        Ok(context.read("output", y.slice(..), rows * config.width).await?)
    }
}
