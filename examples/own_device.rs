//! Attention inside a program that has a wgpu device of its own: between two compute passes of that program, in its command
//! encoder, on its buffers. Nothing goes to the host in between, and there is one submission.
//!
//! ```sh
//! cargo run --release --example own_device                       a GPU
//! cargo run --release --example own_device -- --device llvmpipe  the adapter with this in its name
//! ```
//!
//! Image positions attend to the tokens of a text, as in a diffusion model: the first pass normalises the states to queries, the
//! attention answers, the second pass adds the answer to the states.

#![expect(clippy::cast_possible_truncation, reason = "a few workgroups")]

#[allow(dead_code, reason = "other examples take their device from the library")]
#[path = "common/flags.rs"]
mod flags;

use std::process::ExitCode;

use clap::Parser;
use cross_attention::gpu::{self, AdapterRequest, AttentionBuffers, Gpu};
use cross_attention::{AttentionInputs, AttentionProblem, AttentionSpec, DeviceRequest, Layout, TensorSpec, cpu, wgpu};
use flags::{DeviceFlag, Failure, say};
use wgpu::BufferUsages as Uses;

const POSITIONS: usize = 256;
const TOKENS: usize = 77;
const HEADS: usize = 8;
const DIM: usize = 40;
const WIDTH: usize = HEADS * DIM;

/// The program's own passes: one invocation a position.
const PASSES: &str = "
const WIDTH = 320u;
@group(0) @binding(0) var<storage, read_write> states: array<f32>;
@group(0) @binding(1) var<storage, read_write> query: array<f32>;
@group(0) @binding(2) var<storage, read_write> answer: array<f32>;

@compute @workgroup_size(64)
fn make_queries(@builtin(global_invocation_id) id: vec3u) {
    let start = id.x * WIDTH;
    if start >= arrayLength(&states) { return; }
    var squares = 0.0;
    for (var d = 0u; d < WIDTH; d++) { squares += states[start + d] * states[start + d]; }
    let by = inverseSqrt(squares / f32(WIDTH) + 1e-5);
    for (var d = 0u; d < WIDTH; d++) { query[start + d] = states[start + d] * by; }
}

@compute @workgroup_size(64)
fn add_answer(@builtin(global_invocation_id) id: vec3u) {
    let start = id.x * WIDTH;
    if start >= arrayLength(&states) { return; }
    for (var d = 0u; d < WIDTH; d++) { states[start + d] += answer[start + d]; }
}";

/// Attention between two compute passes of a program that has a wgpu device of its own
#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    device: DeviceFlag,
}

fn main() -> ExitCode {
    flags::end(run(&Flags::parse()))
}

fn run(flags: &Flags) -> Result<(), Failure> {
    say!(
        "Image positions attend to the tokens of a text between two compute passes of a program that owns the device:"
    );
    say!(
        "in its command encoder, on its buffers, in one submission; the states that come out are compared with the CPU's."
    );
    // what such a program has anyway: an adapter, a device, pipelines, buffers
    let adapter = find_adapter(&flags.device.device)?;
    let info = adapter.get_info();
    say!("device: {}, {} {} ({})\n", info.name, info.driver, info.driver_info, info.backend);
    let descriptor = wgpu::DeviceDescriptor {
        // nothing of it is needed; kernels use what is there
        required_features: adapter.features() & Gpu::FEATURES,
        ..Default::default()
    };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))?;
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: Some("own passes"),
        source: wgpu::ShaderSource::Wgsl(PASSES.into()),
    });
    let access = |binding| wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Storage { read_only: false },
            has_dynamic_offset: false,
            min_binding_size: None,
        },
        count: None,
    };
    let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
        label: None,
        entries: &[access(0), access(1), access(2)],
    });
    let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
        bind_group_layouts: &[Some(&layout)],
        ..Default::default()
    });
    let [make_queries, add_answer] = ["make_queries", "add_answer"].map(|entry| {
        device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(entry),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some(entry),
            compilation_options: wgpu::PipelineCompilationOptions::default(),
            cache: None,
        })
    });
    let buffer = |name, elements: usize, usage| {
        let size = (elements * size_of::<f32>()) as u64;
        device.create_buffer(&wgpu::BufferDescriptor { label: Some(name), size, usage, mapped_at_creation: false })
    };
    let states = buffer("states", POSITIONS * WIDTH, Uses::STORAGE | Uses::COPY_DST | Uses::COPY_SRC);
    let query = buffer("query", POSITIONS * WIDTH, Uses::STORAGE);
    let context_states = buffer("keys and values", TOKENS * 2 * WIDTH, Uses::STORAGE | Uses::COPY_DST);
    let answer = buffer("answer", POSITIONS * WIDTH, Uses::STORAGE);
    let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: None,
        layout: &layout,
        entries: &[&states, &query, &answer]
            .map(wgpu::Buffer::as_entire_binding)
            .into_iter()
            .zip(0..)
            .map(|(resource, binding)| wgpu::BindGroupEntry { binding, resource })
            .collect::<Vec<_>>(),
    });
    let first = numbers(POSITIONS * WIDTH, 1);
    let keys_and_values = numbers(TOKENS * 2 * WIDTH, 2);
    queue.write_buffer(&states, 0, bytemuck::cast_slice(&first));
    queue.write_buffer(&context_states, 0, bytemuck::cast_slice(&keys_and_values));

    // the attention, once: heads lie inside rows, keys beside values, and nothing is copied to change that
    let tensor = |len, parts, part| TensorSpec::f32(Layout::packed([1, HEADS, len, DIM], parts, part));
    let mut spec = AttentionSpec::from_tensors(tensor(POSITIONS, 1, 0), tensor(TOKENS, 2, 0), tensor(TOKENS, 2, 1));
    spec.output = tensor(POSITIONS, 1, 0);
    let problem = AttentionProblem::new(spec)?;
    let attention = Gpu::from_device_blocking(device.clone(), queue.clone())?.prepare_blocking(&problem, None)?;
    say!("{}\n", attention.plan());

    // every step of the program: three dispatches of its own choice, one submission
    let buffers =
        AttentionBuffers::new(query.slice(..), context_states.slice(..), context_states.slice(..), answer.slice(..));
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    own_pass(&mut encoder, &make_queries, &group);
    attention.encode(&mut encoder, &buffers)?;
    own_pass(&mut encoder, &add_answer, &group);
    let staging = buffer("staging", POSITIONS * WIDTH, Uses::COPY_DST | Uses::MAP_READ);
    encoder.copy_buffer_to_buffer(&states, 0, &staging, 0, staging.size());
    queue.submit([encoder.finish()]);

    // the end of the example: what came out, beside the same on the CPU
    staging.map_async(wgpu::MapMode::Read, .., |result| {
        if let Err(error) = result {
            say!("the result cannot be mapped: {error}");
        }
    });
    device.poll(wgpu::PollType::wait_indefinitely())?;
    let found: Vec<f32> = bytemuck::cast_slice(&staging.get_mapped_range(..)?).to_vec();
    let normal: Vec<f32> = first
        .chunks_exact(WIDTH)
        .flat_map(|row| {
            let by = 1.0 / (row.iter().map(|x| x * x).sum::<f32>() / WIDTH as f32 + 1e-5).sqrt();
            row.iter().map(move |x| x * by)
        })
        .collect();
    let inputs = AttentionInputs::new(&normal, &keys_and_values, &keys_and_values);
    let answer = cpu::attention(&problem, &inputs)?.output.to_f32();
    let off = (0..found.len()).map(|n| (found[n] - first[n] - answer[n]).abs()).fold(0.0, f32::max);
    say!("{} states, at most {off:.1e} off the CPU's", found.len());
    // states of size 1, sums of 40 products, and an inverse root that may be two units off
    if off > 1e-5 { Err(format!("{off} is too much").into()) } else { Ok(()) }
}

/// The adapter that the library would take for the same words; a program with a device of its own has one already.
fn find_adapter(wanted: &DeviceRequest) -> Result<wgpu::Adapter, Failure> {
    let request = match wanted {
        DeviceRequest::Auto | DeviceRequest::Gpu => AdapterRequest::Hardware,
        DeviceRequest::Named(name) => AdapterRequest::Named(name.clone()),
        DeviceRequest::Number(number) => AdapterRequest::Number(*number),
        DeviceRequest::Backend(backend) => AdapterRequest::Backend(*backend),
        other => {
            return Err(
                format!("--device {other} is no device of wgpu, and this example is about one; {OTHERS}").into()
            );
        }
    };
    let chosen = pollster::block_on(gpu::choose(&request)).map_err(|error| format!("{error}; {OTHERS}"))?;
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let all = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    let same = |adapter: &wgpu::Adapter| adapter.get_info() == chosen.summary.info;
    Ok(all.into_iter().find(same).ok_or("the adapter that was chosen is gone")?)
}

/// What would do.
const OTHERS: &str =
    "--device takes gpu, an adapter's number, a backend, or part of a name, of a software driver too (llvmpipe)";

fn own_pass(encoder: &mut wgpu::CommandEncoder, pipeline: &wgpu::ComputePipeline, group: &wgpu::BindGroup) {
    let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
    pass.set_pipeline(pipeline);
    pass.set_bind_group(0, group, &[]);
    pass.dispatch_workgroups(POSITIONS.div_ceil(64) as u32, 1, 1);
}

/// Numbers from -1 to 1, the same every time.
fn numbers(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(next).collect()
}
