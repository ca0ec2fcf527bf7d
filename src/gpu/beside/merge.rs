//! Merging of partial attentions on the device.

use crate::cpu::{MergeError, MergedState, PartialState, check_parts};
use crate::dispatch::Variant;
use crate::error::Error;
use crate::gpu::context::Context;
use crate::gpu::error::GpuError;
use crate::gpu::pipelines::Interface;
use crate::kernels::beside::merge::MergePlan;

impl Context {
    /// Merges partial attentions over disjoint sets of keys, from host memory to host memory; see
    /// [`cpu::merge`](crate::cpu::merge). Natively, somebody must poll the device meanwhile;
    /// [`merge_blocking`](Self::merge_blocking) does.
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
    #[cfg(feature = "native")]
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
        let limit = self.caps().max_storage_buffer_binding_size;
        let bound = [
            ("part_output", buffers.part_output, parts * rows * width * 4),
            ("part_lse", buffers.part_lse, parts * rows * row_words * 4),
            ("output", buffers.output, rows * width * 4),
            ("lse", buffers.lse, rows * row_words * 4),
        ];
        for (name, buffer, needed) in bound {
            if buffer.size() < needed {
                return Err(GpuError::BufferTooSmall { name, needed, found: buffer.size() }.into());
            }
            if needed > limit {
                return Err(GpuError::BufferTooLarge { what: name.to_owned(), bytes: needed, max: limit }.into());
            }
            if !buffer.usage().contains(wgpu::BufferUsages::STORAGE) {
                let found = buffer.usage();
                return Err(GpuError::Usage { name, needed: wgpu::BufferUsages::STORAGE, found }.into());
            }
        }
        for (n, (written, to, _)) in bound.into_iter().enumerate().skip(2) {
            for (read, from, _) in bound.into_iter().take(n) {
                if to == from {
                    return Err(GpuError::Aliased { written, read }.into());
                }
            }
        }
        let interface = Interface(vec![(1, false), (2, false), (3, true), (4, true)]);
        let pipeline = self.pipeline(&Variant::merge(row_states), &interface).await?;
        let uses = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let params = self.buffer("params", size_of_val(&plan.params) as u64, uses).await?;
        self.checked("merge", 0, || {
            self.queue().write_buffer(&params, 0, bytemuck::bytes_of(&plan.params));
            let mut entries = vec![wgpu::BindGroupEntry { binding: 0, resource: params.as_entire_binding() }];
            for (binding, (_, buffer, needed)) in (1..).zip(bound) {
                let resource = wgpu::BufferBinding { buffer, offset: 0, size: wgpu::BufferSize::new(needed) };
                entries.push(wgpu::BindGroupEntry { binding, resource: wgpu::BindingResource::Buffer(resource) });
            }
            let group = self.device().create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some("merge"),
                layout: &pipeline.layout,
                entries: &entries,
            });
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            pass.set_pipeline(&pipeline.pipeline);
            pass.set_bind_group(0, &group, &[]);
            let [x, y, z] = plan.grid;
            pass.dispatch_workgroups(x, y, z);
        })
        .await?;
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
