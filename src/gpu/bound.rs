//! An attention bound to buffers, recorded as often as one likes.

use super::error::GpuError;

/// A prepared attention bound to buffers: recording it allocates nothing of its own.
#[derive(Clone, Debug)]
pub struct BoundSteps {
    pub(super) dispatches: Vec<Dispatch>,
    pub(super) copies: Vec<RowDataCopy>,
}

/// One dispatch, ready to be recorded.
#[derive(Clone, Debug)]
pub(super) struct Dispatch {
    pub(super) pipeline: wgpu::ComputePipeline,
    pub(super) group: wgpu::BindGroup,
    pub(super) grid: [u32; 3],
}

/// Row data of the caller's on its way into the packed buffer.
#[derive(Clone, Debug)]
pub(super) struct RowDataCopy {
    pub(super) from: wgpu::Buffer,
    pub(super) from_bytes: u64,
    pub(super) to: wgpu::Buffer,
    pub(super) to_bytes: u64,
    pub(super) bytes: u64,
}

impl BoundSteps {
    /// Records the attention: the copies of row data, if any, then one compute pass.
    pub fn encode(&self, encoder: &mut wgpu::CommandEncoder) {
        self.encode_timed(encoder, None);
    }

    /// Records the attention into a compute pass of the caller's, beside other work of theirs.
    ///
    /// # Errors
    /// [`GpuError::NeedsEncoder`] where row data of several kinds must be copied first.
    pub fn encode_in_pass(&self, pass: &mut wgpu::ComputePass<'_>) -> Result<(), GpuError> {
        if !self.copies.is_empty() {
            return Err(GpuError::NeedsEncoder);
        }
        self.dispatch(pass);
        Ok(())
    }

    /// Records several attentions, one after another, in one compute pass; each whose row data must be copied first
    /// begins a new pass. The output of one may be an input of the next.
    pub fn encode_all<'a>(attentions: impl IntoIterator<Item = &'a Self>, encoder: &mut wgpu::CommandEncoder) {
        let mut attentions = attentions.into_iter().peekable();
        while let Some(first) = attentions.next() {
            first.copy(encoder);
            let mut pass = encoder.begin_compute_pass(&PASS);
            first.dispatch(&mut pass);
            while let Some(next) = attentions.next_if(|next| next.copies.is_empty()) {
                next.dispatch(&mut pass);
            }
        }
    }

    pub(super) fn encode_timed(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        timestamp_writes: Option<wgpu::ComputePassTimestampWrites<'_>>,
    ) {
        self.copy(encoder);
        self.dispatch(&mut encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { timestamp_writes, ..PASS }));
    }

    pub(super) fn copy(&self, encoder: &mut wgpu::CommandEncoder) {
        for copy in &self.copies {
            encoder.copy_buffer_to_buffer(&copy.from, copy.from_bytes, &copy.to, copy.to_bytes, copy.bytes);
        }
    }

    fn dispatch(&self, pass: &mut wgpu::ComputePass<'_>) {
        let mut set = None;
        for dispatch in &self.dispatches {
            // parts of one problem share a pipeline
            if set != Some(&dispatch.pipeline) {
                pass.set_pipeline(&dispatch.pipeline);
                set = Some(&dispatch.pipeline);
            }
            dispatch.record_rest(pass);
        }
    }
}

impl Dispatch {
    #[cfg(feature = "threads")]
    pub(super) fn record(&self, pass: &mut wgpu::ComputePass<'_>) {
        pass.set_pipeline(&self.pipeline);
        self.record_rest(pass);
    }

    fn record_rest(&self, pass: &mut wgpu::ComputePass<'_>) {
        pass.set_bind_group(0, &self.group, &[]);
        let [x, y, z] = self.grid;
        pass.dispatch_workgroups(x, y, z);
    }
}

pub(super) const PASS: wgpu::ComputePassDescriptor<'static> =
    wgpu::ComputePassDescriptor { label: Some("attention"), timestamp_writes: None };
