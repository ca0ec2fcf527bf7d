//! Pipelines and their layouts, made from variants.

use super::error::{GpuError, checked};
use crate::plan::{Step, Variant};

/// A compute pipeline with the layout of its one bind group.
#[derive(Clone, Debug)]
pub(super) struct Pipeline {
    pub(super) pipeline: wgpu::ComputePipeline,
    pub(super) layout: wgpu::BindGroupLayout,
}

/// The buffers a pipeline binds besides the uniform at 0: binding number and whether it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Interface(pub(super) Vec<(u32, bool)>);

impl Interface {
    pub(super) fn of(step: &Step) -> Self {
        Self(step.bindings.iter().map(|binding| (binding.slot.binding(), binding.written)).collect())
    }
}

impl Pipeline {
    pub(super) async fn new(device: &wgpu::Device, variant: &Variant, interface: &Interface) -> Result<Self, GpuError> {
        let name = variant.shader.name();
        let entry = |binding, ty| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
            count: None,
        };
        let mut entries = vec![entry(0, wgpu::BufferBindingType::Uniform)];
        for &(binding, written) in &interface.0 {
            entries.push(entry(binding, wgpu::BufferBindingType::Storage { read_only: !written }));
        }
        let constants: Vec<_> = variant.overrides.iter().map(|(name, value)| (*name, f64::from(*value))).collect();
        checked(device, &format!("the pipeline of {name}"), 0, || {
            let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
                label: Some(name),
                source: wgpu::ShaderSource::Wgsl(variant.wgsl().into()),
            });
            let layout = device
                .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(name), entries: &entries });
            let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: Some(name),
                bind_group_layouts: &[Some(&layout)],
                immediate_size: 0,
            });
            let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(name),
                layout: Some(&pipeline_layout),
                module: &module,
                entry_point: Some("main"),
                compilation_options: wgpu::PipelineCompilationOptions {
                    constants: &constants,
                    // every kernel writes workgroup memory before it reads it
                    zero_initialize_workgroup_memory: false,
                },
                cache: None,
            });
            Self { pipeline, layout }
        })
        .await
    }
}
