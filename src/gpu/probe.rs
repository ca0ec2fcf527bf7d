//! Asks a device, once, how it lays invocations over subgroups: kernels that shuffle take them for neighbours.

use super::arrival::arrival;
use super::error::{GpuError, checked};
use crate::caps::SubgroupFault;
use crate::dispatch::wgsl;

/// Workgroups that are asked.
const WORKGROUPS: u32 = 4;
/// Invocations of the workgroups of kernels that use subgroups; the rows kernel's are one subgroup each.
const WIDTHS: [u32; 2] = [64, 128];

/// Why subgroups are not to be used, if so. Natively the device is polled until it has answered.
pub(super) async fn subgroup_fault(
    device: &wgpu::Device,
    queue: &wgpu::Queue,
    sizes: (u32, u32),
) -> Result<Option<SubgroupFault>, GpuError> {
    let limits = device.limits();
    let most = limits.max_compute_invocations_per_workgroup.min(limits.max_compute_workgroup_size_x);
    let one_subgroup = (sizes.0 == sizes.1).then_some(sizes.0);
    let widths = WIDTHS.into_iter().chain(one_subgroup).filter(|width| (1..=most).contains(width));
    for width in widths {
        match lanes(device, queue, width).await {
            Ok(lanes) => {
                if let Err(fault) = SubgroupFault::judge(width, sizes, &lanes) {
                    return Ok(Some(fault));
                }
            }
            // what is wrong with the device is told by whatever is asked of it next
            Err(error @ (GpuError::OutOfMemory { .. } | GpuError::DeviceLost { .. })) => return Err(error),
            Err(error) => return Ok(Some(SubgroupFault::NotAsked { message: error.to_string() })),
        }
    }
    Ok(None)
}

/// What the invocations of a few workgroups say.
async fn lanes(device: &wgpu::Device, queue: &wgpu::Queue, width: u32) -> Result<Vec<[u32; 4]>, GpuError> {
    const WHAT: &str = "a probe of subgroups";
    let bytes = u64::from(WORKGROUPS * width) * 16;
    let in_browser = device.adapter_info().backend == wgpu::Backend::BrowserWebGpu;
    let (sender, arrival) = arrival(None);
    let back = checked(device, WHAT, bytes, || {
        let buffer = |usage| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(WHAT),
                size: bytes,
                usage,
                mapped_at_creation: false,
            })
        };
        let told = buffer(wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC);
        let back = buffer(wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST);
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some(WHAT),
            source: wgpu::ShaderSource::Wgsl(wgsl::probe_subgroups(width, in_browser).into()),
        });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(WHAT),
            layout: None,
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions::default(),
            cache: None,
        });
        let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some(WHAT),
            layout: &pipeline.get_bind_group_layout(0),
            entries: &[wgpu::BindGroupEntry { binding: 0, resource: told.as_entire_binding() }],
        });
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups(WORKGROUPS, 1, 1);
        drop(pass);
        encoder.copy_buffer_to_buffer(&told, 0, &back, 0, bytes);
        queue.submit([encoder.finish()]);
        back.slice(..).map_async(wgpu::MapMode::Read, move |result| sender.arrive(result.is_ok()));
        back
    })
    .await?;
    let failed = |message: String| GpuError::ReadBack { what: WHAT.to_owned(), message };
    #[cfg(not(target_arch = "wasm32"))]
    if let Err(error) = device.poll(wgpu::PollType::wait_indefinitely()) {
        return Err(failed(error.to_string()));
    }
    if !arrival.wait().await {
        return Err(failed("the buffer could not be mapped".to_owned()));
    }
    let view = back.slice(..).get_mapped_range().map_err(|error| failed(error.to_string()))?;
    Ok(view.chunks_exact(16).map(bytemuck::pod_read_unaligned).collect())
}
