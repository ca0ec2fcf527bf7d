//! Merging of partial attentions on the device.

use crate::cpu::{MergeError, MergedState, PartialState, check_parts};
use crate::dispatch::Variant;
use crate::error::Error;
use crate::gpu::open::Gpu;
use crate::kernels::beside::merge::MergePlan;

impl Gpu {
    /// Merges partial attentions over disjoint sets of keys, from host memory to host memory; see
    /// [`cpu::merge`](crate::cpu::merge).
    ///
    /// # Errors
    /// [`Error::Merge`] if the parts do not fit together, [`Error::Gpu`].
    pub async fn merge(&self, parts: &[PartialState<'_>], v_head_dim: usize) -> Result<MergedState, Error> {
        let rows = check_parts(parts, v_head_dim)?;
        let outputs: Vec<f32> = parts.iter().flat_map(|part| part.output).copied().collect();
        let lses: Vec<f32> = parts.iter().flat_map(|part| part.lse).copied().collect();
        let outputs = self.upload("part_output", &outputs).await?;
        let lses = self.upload("part_lse", &lses).await?;
        let output = self.allocate("output", (rows * v_head_dim * 4) as u64).await?;
        let lse = self.allocate("lse", (rows * 4) as u64).await?;
        let buffers = MergeBuffers { part_output: &outputs, part_lse: &lses, output: &output, lse: &lse };
        let mut encoder = self.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        self.encode_merge(&mut encoder, parts.len(), rows, v_head_dim, &buffers).await?;
        self.checked("the submission of a merge", 0, || self.queue().submit([encoder.finish()])).await?;
        Ok(MergedState {
            output: self.read("output", output.slice(..), rows * v_head_dim).await?,
            lse: self.read("lse", lse.slice(..), rows).await?,
        })
    }

    /// [`merge`](Self::merge), blocking.
    ///
    /// # Errors
    /// As [`merge`](Self::merge).
    #[cfg(feature = "threads")]
    pub fn merge_blocking(&self, parts: &[PartialState<'_>], v_head_dim: usize) -> Result<MergedState, Error> {
        self.block_on(self.merge(parts, v_head_dim))
    }

    /// Records the merge of `parts` states of `rows` rows of `v_head_dim` elements into the caller's encoder, by their
    /// log-sum-exp. How far that can be off stands at [`cpu::merge`](crate::cpu::merge);
    /// [`encode_merge_states`](Self::encode_merge_states) is exact whatever the scores.
    ///
    /// # Errors
    /// [`Error::Gpu`] names the buffer that is too small or made for other uses; [`Error::Merge`] without parts.
    pub async fn encode_merge(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        parts: usize,
        rows: usize,
        v_head_dim: usize,
        buffers: &MergeBuffers<'_>,
    ) -> Result<(), Error> {
        self.encode_merge_by(encoder, parts, [rows, v_head_dim], false, buffers).await
    }

    /// The same by maximum and sum of each row, as attentions write them whose spec asks for `row_state`: `part_lse` is
    /// `[parts, rows, 2]`, and `lse`, written, `[rows, 2]`.
    ///
    /// Nothing is looked at here: a sum below 0 or an infinite one, which [`merge_states`](crate::cpu::merge_states) refuses, is
    /// taken as it is.
    ///
    /// # Errors
    /// As [`encode_merge`](Self::encode_merge).
    pub async fn encode_merge_states(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        parts: usize,
        rows: usize,
        v_head_dim: usize,
        buffers: &MergeBuffers<'_>,
    ) -> Result<(), Error> {
        self.encode_merge_by(encoder, parts, [rows, v_head_dim], true, buffers).await
    }

    async fn encode_merge_by(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        parts: usize,
        [rows, v_head_dim]: [usize; 2],
        row_states: bool,
        buffers: &MergeBuffers<'_>,
    ) -> Result<(), Error> {
        let row_words = if row_states { 2 } else { 1 };
        if parts == 0 {
            return Err(MergeError::NoParts.into());
        }
        if v_head_dim == 0 {
            return Err(MergeError::Width.into());
        }
        let Some(plan) =
            MergePlan::new(parts, rows, v_head_dim, self.caps()).map_err(|reason| Error::MergePlan { reason })?
        else {
            return Ok(());
        };
        let (rows, width, parts) = (rows as u64, v_head_dim as u64, parts as u64);
        let bound = [
            (buffers.part_output, parts * rows * width * 4),
            (buffers.part_lse, parts * rows * row_words * 4),
            (buffers.output, rows * width * 4),
            (buffers.lse, rows * row_words * 4),
        ];
        let params = bytemuck::bytes_of(&plan.params);
        self.encode_beside(encoder, &Variant::merge(row_states), params, &bound, plan.grid).await?;
        Ok(())
    }
}

/// The buffers of a merge, f32 throughout, without gaps.
#[derive(Clone, Copy, Debug)]
pub struct MergeBuffers<'a> {
    /// `[parts, rows, v_head_dim]`.
    pub part_output: &'a wgpu::Buffer,
    /// `[parts, rows]`.
    pub part_lse: &'a wgpu::Buffer,
    /// `[rows, v_head_dim]`, written.
    pub output: &'a wgpu::Buffer,
    /// `[rows]`, written.
    pub lse: &'a wgpu::Buffer,
}
