//! The one call that hands stored bytes to a driver.

use super::file::Intact;

/// A pipeline cache that starts with what was stored, or empty. The driver may refuse the data, which is an error of the
/// scope around this.
pub(super) fn create(device: &wgpu::Device, stored: Option<Intact<'_>>) -> wgpu::PipelineCache {
    let descriptor = wgpu::PipelineCacheDescriptor {
        label: Some("pipelines"),
        data: stored.map(|stored| stored.bytes()),
        fallback: false,
    };
    // SAFETY: data must come from `PipelineCache::get_data`. `Intact` is made by reading a file of this crate alone, once
    // the magic number, the checksum over everything, and the adapter, driver and crate version that wrote it are those
    // of this device; what such a file holds was given by `get_data`. wgpu and the driver compare their own headers again.
    // A file that somebody forges on purpose, checksum and all, is beyond this: the folder must be the user's own.
    unsafe { device.create_pipeline_cache(&descriptor) }
}
