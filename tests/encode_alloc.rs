//! Recording and submitting a bound attention allocates what wgpu does for the same dispatches, and nothing beside.
#![cfg(feature = "native")]
#![expect(unsafe_code, reason = "an allocator is unsafe to write; this one counts and passes on")]
#![expect(clippy::expect_used, reason = "a test that cannot go on stops")]
#![allow(missing_docs, reason = "a test")]

#[expect(dead_code, reason = "each test counts something else")]
#[path = "common/counting.rs"]
mod counting;

#[path = "common/noop.rs"]
mod noop;

use cross_attention::dispatch::Slot;
use cross_attention::gpu::{AttentionBuffers, BoundSteps, Gpu, GpuAttention};
use cross_attention::{AttentionProblem, AttentionSpec, Kernel, wgpu};

/// The fewest allocations of several times: some times a table inside wgpu grows, or the test runner's thread allocates.
fn allocations(mut work: impl FnMut()) -> usize {
    let count = |_| {
        let before = counting::allocations();
        work();
        counting::allocations() - before
    };
    (0..16).map(count).min().unwrap_or(0)
}

/// Bytes from the parameters of one dispatch to those of the next: they are fewer, and this is a multiple of any alignment.
const PARAMS_STEP: u64 = 512;

/// The dispatches of a plan, built with wgpu alone from what the plan says in public.
struct Bare {
    dispatches: Vec<(wgpu::ComputePipeline, wgpu::BindGroup, [u32; 3])>,
}

impl Bare {
    fn new(context: &Gpu, prepared: &GpuAttention, buffers: &AttentionBuffers<'_>) -> Self {
        let device = context.device();
        let buffer = |label, size, usage| {
            device.create_buffer(&wgpu::BufferDescriptor { label, size, usage, mapped_at_creation: false })
        };
        let params = buffer(None, PARAMS_STEP * prepared.plan().steps().len() as u64, wgpu::BufferUsages::UNIFORM);
        let workspace = buffer(None, prepared.plan().workspace_bytes().max(4), wgpu::BufferUsages::STORAGE);
        let dispatches = prepared.plan().steps().iter().enumerate().map(|(n, step)| {
            let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
                label: None,
                source: wgpu::ShaderSource::Wgsl(step.variant.wgsl().into()),
            });
            let constants: Vec<_> =
                step.variant.overrides.iter().map(|(name, value)| (*name, f64::from(*value))).collect();
            let entry = |binding, ty| wgpu::BindGroupLayoutEntry {
                binding,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
                count: None,
            };
            let storage = step.bindings.iter().map(|bound| {
                let read_only = !bound.written;
                entry(number(bound.slot), wgpu::BufferBindingType::Storage { read_only })
            });
            let entries: Vec<_> = [entry(0, wgpu::BufferBindingType::Uniform)].into_iter().chain(storage).collect();
            let layout =
                device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: None, entries: &entries });
            let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: None,
                bind_group_layouts: &[Some(&layout)],
                immediate_size: 0,
            });
            let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: None,
                layout: Some(&pipeline_layout),
                module: &module,
                entry_point: None,
                compilation_options: wgpu::PipelineCompilationOptions { constants: &constants, ..Default::default() },
                cache: None,
            });
            let params = wgpu::BufferBinding {
                buffer: &params,
                offset: n as u64 * PARAMS_STEP,
                size: wgpu::BufferSize::new(size_of_val(&step.params) as u64),
            };
            let mut entries =
                vec![wgpu::BindGroupEntry { binding: 0, resource: wgpu::BindingResource::Buffer(params) }];
            for bound in &step.bindings {
                let buffer = match bound.slot {
                    Slot::Query => buffers.query.buffer(),
                    Slot::Key => buffers.key.buffer(),
                    Slot::Value => buffers.value.buffer(),
                    Slot::Output => buffers.output.buffer(),
                    _ => &workspace,
                };
                let binding = number(bound.slot);
                entries.push(wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() });
            }
            let layout = &pipeline.get_bind_group_layout(0);
            let group = device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries });
            (pipeline, group, step.workgroups())
        });
        Self { dispatches: dispatches.collect() }
    }

    fn record(&self, pass: &mut wgpu::ComputePass<'_>) {
        for (pipeline, group, [x, y, z]) in &self.dispatches {
            pass.set_pipeline(pipeline);
            pass.set_bind_group(0, group, &[]);
            pass.dispatch_workgroups(*x, *y, *z);
        }
    }
}

/// Binding numbers as in shaders/common.
fn number(slot: Slot) -> u32 {
    match slot {
        Slot::Query => 1,
        Slot::Key => 2,
        Slot::Value => 3,
        Slot::Output => 7,
        Slot::Workspace | Slot::States => 9,
        other => panic!("{other:?} is in no spec here"),
    }
}

fn encoded(context: &Gpu, record: impl FnOnce(&mut wgpu::CommandEncoder)) -> wgpu::CommandBuffer {
    let mut encoder = context.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    record(&mut encoder);
    encoder.finish()
}

fn pass(encoder: &mut wgpu::CommandEncoder) -> wgpu::ComputePass<'_> {
    encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some("attention"), timestamp_writes: None })
}

#[test]
fn recording_allocates_what_wgpu_does() {
    let context = noop::context();
    // one dispatch; split and combine; three passes
    let shapes =
        [([1, 2, 60, 32], 70, Kernel::Fused), ([1, 2, 1, 32], 2000, Kernel::Split), ([1, 2, 9, 32], 70, Kernel::Plain)];
    for (query, kv_len, kernel) in shapes {
        let problem = AttentionProblem::new(AttentionSpec::new(query, [1, 2, kv_len, 32])).unwrap();
        let prepared = context.prepare_blocking(&problem, Some(kernel)).unwrap();
        let allocate = |len: usize| context.allocate_blocking("tensor", len as u64 * 4).unwrap();
        let (q, k, v) = (allocate(query[2] * 64), allocate(kv_len * 64), allocate(kv_len * 64));
        let output = allocate(query[2] * 64);
        let buffers = noop::buffers(&q, &k, &v, &output);
        let bound = prepared.bind(&buffers).unwrap();
        let bare = Bare::new(&context, &prepared, &buffers);

        let wgpu_alone = allocations(|| drop(encoded(&context, |encoder| bare.record(&mut pass(encoder)))));
        let ours = allocations(|| drop(encoded(&context, |encoder| bound.encode(encoder))));
        assert!(wgpu_alone > 0, "{kernel}: nothing was counted");
        assert!(ours <= wgpu_alone, "{kernel}: {ours} allocations, wgpu alone {wgpu_alone}");

        let wgpu_alone = allocations(|| {
            drop(encoded(&context, |encoder| {
                let mut pass = pass(encoder);
                (0..6).for_each(|_| bare.record(&mut pass));
            }));
        });
        let ours = allocations(|| {
            drop(encoded(&context, |encoder| BoundSteps::encode_all([&bound; 6], encoder)));
        });
        assert!(ours <= wgpu_alone, "{kernel}, six in a pass: {ours} allocations, wgpu alone {wgpu_alone}");
        let ours = allocations(|| {
            drop(encoded(&context, |encoder| {
                let mut pass = pass(encoder);
                (0..6).for_each(|_| bound.encode_in_pass(&mut pass).unwrap());
            }));
        });
        assert!(ours <= wgpu_alone, "{kernel}, six in a pass of the caller's: {ours}, wgpu alone {wgpu_alone}");

        let wgpu_alone = allocations(|| {
            let scopes = [wgpu::ErrorFilter::OutOfMemory, wgpu::ErrorFilter::Internal, wgpu::ErrorFilter::Validation]
                .map(|filter| context.device().push_error_scope(filter));
            context.queue().submit([encoded(&context, |encoder| bare.record(&mut pass(encoder)))]);
            for scope in scopes.into_iter().rev() {
                assert!(pollster::block_on(scope.pop()).is_none());
            }
        });
        let ours = allocations(|| pollster::block_on(prepared.submit(&bound)).unwrap());
        assert!(ours <= wgpu_alone, "{kernel}, submitted: {ours} allocations, wgpu alone {wgpu_alone}");
    }
}
