//! A device of wgpu's that checks everything and computes nothing.

use cross_attention::Terms;
use cross_attention::gpu::{AttentionBuffers, Gpu};
use cross_attention::wgpu;

pub(crate) fn context() -> Gpu {
    let descriptor = wgpu::InstanceDescriptor {
        backends: wgpu::Backends::NOOP,
        backend_options: wgpu::BackendOptions {
            noop: wgpu::NoopBackendOptions { enable: true, ..Default::default() },
            ..Default::default()
        },
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    };
    let instance = wgpu::Instance::new(descriptor);
    let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()));
    let device = adapter.expect("the adapter is built in").request_device(&wgpu::DeviceDescriptor::default());
    let (device, queue) = pollster::block_on(device).expect("the default limits");
    Gpu::from_device_blocking(device, queue).expect("16 bytes")
}

/// Without optional tensors.
pub(crate) fn buffers<'a>(
    query: &'a wgpu::Buffer,
    key: &'a wgpu::Buffer,
    value: &'a wgpu::Buffer,
    output: &'a wgpu::Buffer,
) -> AttentionBuffers<'a> {
    AttentionBuffers {
        query: query.slice(..),
        key: key.slice(..),
        value: value.slice(..),
        terms: Terms::default(),
        output: output.slice(..),
        lse: None,
        scores: None,
        large_values: false,
    }
}
