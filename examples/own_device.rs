//! Attention in the middle of the caller's own work on the caller's own device.
//!
//! A program that renders or runs a model has a device, buffers and a command encoder of its own. Here one encoder takes
//! three things: a compute pass of the program's that makes queries, the attention, and a compute pass of the program's
//! that uses the output. They are one submission, and nothing is copied to the host in between. The sums that come back
//! at the end are compared with the CPU's.
//!
//!     cargo run --example own_device

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::error::Error;

use cross_attention::gpu::{AttentionBuffers, Context};
use cross_attention::{AttentionInputs, AttentionProblem, AttentionSpec, cpu, wgpu};

const QUERY: [usize; 4] = [1, 4, 256, 32];
const KEY: [usize; 4] = [1, 4, 77, 32];
const ELEMENTS: usize = QUERY[0] * QUERY[1] * QUERY[2] * QUERY[3];
const ROWS: usize = ELEMENTS / QUERY[3];

/// The program's own shaders: queries made of their positions, and the mean of each row of the output.
const PASSES: &str = "
@group(0) @binding(0) var<storage, read_write> made: array<f32>;
@group(0) @binding(1) var<storage, read> output: array<f32>;
@group(0) @binding(2) var<storage, read_write> means: array<f32>;

@compute @workgroup_size(64)
fn make_queries(@builtin(global_invocation_id) at: vec3u) {
    if at.x < arrayLength(&made) {
        // multiples of 1/16 between -2 and 2, which every machine computes alike
        made[at.x] = f32(at.x * 37u % 65u) / 16.0 - 2.0;
    }
}

@compute @workgroup_size(64)
fn use_output(@builtin(global_invocation_id) at: vec3u) {
    if at.x < arrayLength(&means) {
        var sum = 0.0;
        for (var d = 0u; d < 32u; d++) {
            sum += output[at.x * 32u + d];
        }
        means[at.x] = sum / 32.0;
    }
}
";

fn main() -> Result<(), Box<dyn Error>> {
    pollster::block_on(run())
}

async fn run() -> Result<(), Box<dyn Error>> {
    // the program's own device; any limits and features will do
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle().with_env());
    let adapter = wgpu::util::initialize_adapter_from_env_or_default(&instance, None).await?;
    let (device, queue) = adapter.request_device(&wgpu::DeviceDescriptor::default()).await?;
    let info = adapter.get_info();
    println!("adapter: {}, {} {}, {}", info.name, info.driver, info.driver_info, info.backend);

    // the attention, planned and prepared once
    let problem = AttentionProblem::new(AttentionSpec::new(QUERY, KEY))?;
    let context = Context::from_device(device.clone(), queue.clone()).await?;
    let attention = context.prepare(&problem, None).await?;
    println!("kernel:  {}", attention.plan().kernel());

    // the program's own buffers; keys and values are there already
    let buffer = |label, len: usize, more: wgpu::BufferUsages| {
        let usage = wgpu::BufferUsages::STORAGE | more;
        let size = len as u64 * 4;
        device.create_buffer(&wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: false })
    };
    let kv_len = KEY.iter().product();
    let key: Vec<f32> = (0..kv_len).map(|n| ((n * 29 % 97) as f32 / 48.0 - 1.0) * 1.5).collect();
    let value: Vec<f32> = (0..kv_len).map(|n| (n * 53 % 101) as f32 / 50.0 - 1.0).collect();
    let (key_buffer, value_buffer) =
        (buffer("key", kv_len, wgpu::BufferUsages::COPY_DST), buffer("value", kv_len, wgpu::BufferUsages::COPY_DST));
    queue.write_buffer(&key_buffer, 0, bytemuck::cast_slice(&key));
    queue.write_buffer(&value_buffer, 0, bytemuck::cast_slice(&value));
    let query_buffer = buffer("query", ELEMENTS, wgpu::BufferUsages::empty());
    let output_buffer = buffer("output", ELEMENTS, wgpu::BufferUsages::empty());
    let means = buffer("means", ROWS, wgpu::BufferUsages::COPY_SRC);

    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: Some("own passes"),
        source: wgpu::ShaderSource::Wgsl(PASSES.into()),
    });
    let pass = |entry: &str, bound: &[(u32, &wgpu::Buffer)]| {
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(entry),
            layout: None,
            module: &module,
            entry_point: Some(entry),
            compilation_options: wgpu::PipelineCompilationOptions::default(),
            cache: None,
        });
        let entries: Vec<_> = bound
            .iter()
            .map(|&(binding, buffer)| wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() })
            .collect();
        let layout = pipeline.get_bind_group_layout(0);
        let descriptor = wgpu::BindGroupDescriptor { label: Some(entry), layout: &layout, entries: &entries };
        let group = device.create_bind_group(&descriptor);
        (pipeline, group)
    };
    let make_queries = pass("make_queries", &[(0, &query_buffer)]);
    let use_output = pass("use_output", &[(1, &output_buffer), (2, &means)]);

    // one encoder, one submission
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let record = |encoder: &mut wgpu::CommandEncoder, own: &(wgpu::ComputePipeline, wgpu::BindGroup), len: usize| {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(&own.0);
        pass.set_bind_group(0, &own.1, &[]);
        pass.dispatch_workgroups(len.div_ceil(64).try_into().unwrap_or(u32::MAX), 1, 1);
    };
    record(&mut encoder, &make_queries, ELEMENTS);
    attention.encode(
        &mut encoder,
        &AttentionBuffers {
            query: query_buffer.slice(..),
            key: key_buffer.slice(..),
            value: value_buffer.slice(..),
            bias: None,
            mask: None,
            kv_lens: None,
            row_start: None,
            row_end: None,
            alibi_slopes: None,
            sinks: None,
            output: output_buffer.slice(..),
            lse: None,
            scores: None,
        },
    )?;
    record(&mut encoder, &use_output, ROWS);
    queue.submit([encoder.finish()]);

    // only now anything comes back: the means
    let found: Vec<f32> = context.read_blocking("means", means.slice(..), ROWS)?;

    let query: Vec<f32> = (0..ELEMENTS).map(|n| (n * 37 % 65) as f32 / 16.0 - 2.0).collect();
    let wanted = cpu::attention(&problem, &AttentionInputs::new(&query, &key, &value))?.output.to_f32();
    let wanted: Vec<f32> = wanted.chunks_exact(32).map(|row| row.iter().sum::<f32>() / 32.0).collect();
    let checksum = |means: &[f32]| means.iter().map(|x| f64::from(*x)).sum::<f64>();
    let off = found.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!(
        "checksum: {:.6} here, {:.6} on the CPU; a row is off by {off:.1e} at most",
        checksum(&found),
        checksum(&wanted)
    );
    // scores lie between -17 and 17, so that f32 costs a weight 2 * (6e-6 for the dot product + 9e-6 for the exponential)
    // on each side, and values are at most about 1
    if off <= 1e-4 { Ok(()) } else { Err("the GPU and the CPU differ".into()) }
}
