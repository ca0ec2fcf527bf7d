//! The caller's own device, buffers and encoder; what is refused; what happens when the device is gone.

use cross_attention::gpu::{AdapterRequest, AttentionBuffers, Gpu, GpuError, choose};
use cross_attention::{
    AlibiSlopes, AttentionInputs, AttentionProblem, AttentionSpec, Error, Kernel, Plan, TensorSpec, cpu, verify, wgpu,
};
use wgpu::BufferUsages;

pub(super) type Check = fn(&Gpu, &str) -> Result<(), String>;

/// Name and body of each check; the second argument is the adapter's name.
pub(crate) const CHECKS: [(&str, Check); 9] = [
    ("between_own_passes", between_own_passes),
    ("bound_once_used_twice", bound_once_used_twice),
    ("pipelines_are_made_once", pipelines_are_made_once),
    ("slices_of_larger_buffers", slices_of_larger_buffers),
    ("wrong_buffers_are_refused", wrong_buffers_are_refused),
    ("foreign_buffer_is_refused", foreign_buffer_is_refused),
    ("too_large_a_buffer_is_refused", too_large_a_buffer_is_refused),
    ("async_with_another_thread_polling", async_with_another_thread_polling),
    ("lost_device_is_an_error", lost_device_is_an_error),
];

pub(super) fn problem() -> AttentionProblem {
    let mut spec = AttentionSpec::new([2, 4, 9, 12], [2, 2, 21, 12]);
    spec.lse = true;
    AttentionProblem::new(spec).expect("a sound spec")
}

fn numbers(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(next).collect()
}

pub(super) struct Data {
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
}

impl Data {
    pub(super) fn of(problem: &AttentionProblem) -> Self {
        let spec = problem.spec();
        let len = |tensor: &TensorSpec| tensor.layout.extent().expect("small");
        Self {
            query: numbers(len(&spec.query), 1),
            key: numbers(len(&spec.key), 2),
            value: numbers(len(&spec.value), 3),
        }
    }

    pub(super) fn inputs(&self) -> AttentionInputs<'_> {
        AttentionInputs::new(&self.query, &self.key, &self.value)
    }
}

pub(super) fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

pub(super) fn expect(
    what: &str,
    found: Result<(), GpuError>,
    wanted: impl Fn(&GpuError) -> bool,
) -> Result<(), String> {
    match found {
        Err(error) if wanted(&error) => Ok(()),
        Err(error) => Err(format!("{what}: another error than expected: {error}")),
        Ok(()) => Err(format!("{what}: was not refused")),
    }
}

const DOUBLE: &str = "
    @group(0) @binding(0) var<storage, read_write> data: array<f32>;
    @compute @workgroup_size(64)
    fn main(@builtin(global_invocation_id) id: vec3u) {
        if id.x < arrayLength(&data) { data[id.x] *= 2.0; }
    }";

/// A device of the caller's, with default limits and no features; attention between two passes of the caller's own:
/// the query is doubled before, the output after, all in one command buffer.
fn between_own_passes(_: &Gpu, adapter: &str) -> Result<(), String> {
    let adapter = same_adapter(adapter)?;
    // with what kernels may use
    let features = adapter.features() & Gpu::FEATURES;
    let wanted = wgpu::DeviceDescriptor { required_features: features, ..Default::default() };
    let (device, queue) = pollster::block_on(adapter.request_device(&wanted)).map_err(text)?;
    let context = Gpu::from_device_blocking(device.clone(), queue.clone()).map_err(text)?;
    let problem = problem();
    let data = Data::of(&problem);

    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: None,
        source: wgpu::ShaderSource::Wgsl(DOUBLE.into()),
    });
    let double = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: None,
        layout: None,
        module: &module,
        entry_point: None,
        compilation_options: wgpu::PipelineCompilationOptions::default(),
        cache: None,
    });
    let record_double = |encoder: &mut wgpu::CommandEncoder, buffer: &wgpu::Buffer| {
        let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &double.get_bind_group_layout(0),
            entries: &[wgpu::BindGroupEntry { binding: 0, resource: buffer.as_entire_binding() }],
        });
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(&double);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups(64, 1, 1);
    };

    for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.supports(&problem, context.caps()).is_ok()) {
        let prepared = context.prepare_blocking(&problem, Some(kernel)).map_err(text)?;
        let tensors = pollster::block_on(prepared.upload(&data.inputs())).map_err(text)?;
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        record_double(&mut encoder, &tensors.query);
        prepared.encode(&mut encoder, &tensors.buffers()).map_err(text)?;
        record_double(&mut encoder, &tensors.output);
        queue.submit([encoder.finish()]);
        let got: Vec<f32> = context.read_blocking("output", tensors.output.slice(..), 2 * 4 * 9 * 12).map_err(text)?;

        let doubled: Vec<f32> = data.query.iter().map(|x| x * 2.0).collect();
        let inputs = AttentionInputs::new(&doubled, &data.key, &data.value);
        let want = cpu::reference::attention(&problem, &inputs).map_err(text)?;
        let worst = got.iter().zip(&want.output).map(|(got, want)| (f64::from(*got) - 2.0 * want).abs());
        let worst = worst.fold(0.0, f64::max);
        if worst > 4e-6 {
            return Err(format!("{kernel}: off by {worst}"));
        }
    }
    Ok(())
}

/// What is bound sees the buffers' contents at the time it runs, not at the time it was bound.
fn bound_once_used_twice(context: &Gpu, _: &str) -> Result<(), String> {
    let problem = problem();
    let data = Data::of(&problem);
    let prepared = context.prepare_blocking(&problem, None).map_err(text)?;
    let tensors = pollster::block_on(prepared.upload(&data.inputs())).map_err(text)?;
    let bound = prepared.bind(&tensors.buffers()).map_err(text)?;
    for seed in [4, 5] {
        let query = numbers(data.query.len(), seed);
        context.queue().write_buffer(&tensors.query, 0, bytemuck::cast_slice(&query));
        let mut encoder = context.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            bound.encode_in_pass(&mut pass).map_err(text)?;
        }
        context.queue().submit([encoder.finish()]);
        let got: Vec<f32> = context.read_blocking("output", tensors.output.slice(..), 2 * 4 * 9 * 12).map_err(text)?;
        let lse = tensors.lse.as_ref().ok_or("no lse")?;
        let lse: Vec<f32> = context.read_blocking("lse", lse.slice(..), 2 * 4 * 9).map_err(text)?;
        let output = cross_attention::AttentionOutput {
            output: cross_attention::TensorData::F32(got),
            lse: Some(lse),
            row_state: None,
            scores: None,
        };
        let inputs = AttentionInputs::new(&query, &data.key, &data.value);
        let report = verify::verify(&problem, &inputs, &output).map_err(text)?;
        if !report.passed() {
            return Err(text(report));
        }
    }
    Ok(())
}

/// On a device of its own, where nobody else makes any.
fn pipelines_are_made_once(_: &Gpu, adapter: &str) -> Result<(), String> {
    let context = other_device(adapter)?;
    let problem = problem();
    context.prepare_blocking(&problem, None).map_err(text)?;
    let made = context.pipelines();
    // other lengths, the same variant
    let mut longer = AttentionSpec::new([1, 4, 10, 12], [1, 2, 100, 12]);
    longer.lse = true;
    context.prepare_blocking(&AttentionProblem::new(longer).map_err(text)?, None).map_err(text)?;
    context.prepare_blocking(&problem, None).map_err(text)?;
    if context.pipelines() == made { Ok(()) } else { Err(format!("{made} pipelines became {}", context.pipelines())) }
}

/// Tensors in the middle of larger buffers: by the slice's start, and by the layout's offset.
fn slices_of_larger_buffers(context: &Gpu, _: &str) -> Result<(), String> {
    let mut spec = problem().spec().clone();
    spec.query.layout = spec.query.layout.with_offset(3);
    let problem = AttentionProblem::new(spec).map_err(text)?;
    let data = Data::of(&problem);
    let prepared = context.prepare_blocking(&problem, None).map_err(text)?;
    let tensors = pollster::block_on(prepared.upload(&data.inputs())).map_err(text)?;
    let mut padded = vec![f32::NAN; 256];
    padded.extend_from_slice(&data.query);
    padded.extend([f32::NAN; 5]);
    let larger = context.upload_blocking("query", &padded).map_err(text)?;
    let mut buffers = tensors.buffers();
    buffers.query = larger.slice(256 * 4..);
    let bound = prepared.bind(&buffers).map_err(text)?;
    pollster::block_on(prepared.submit(&bound)).map_err(text)?;
    let got = context.read_blocking::<f32>("output", tensors.output.slice(..), 2 * 4 * 9 * 12).map_err(text)?;
    let plain = context.attention_blocking(&problem, &data.inputs(), None).map_err(text)?;
    if plain.output.to_f32() != got {
        return Err("other bits than from a buffer of its own".to_owned());
    }
    Ok(())
}

fn wrong_buffers_are_refused(context: &Gpu, _: &str) -> Result<(), String> {
    let problem = problem();
    let data = Data::of(&problem);
    let prepared = context.prepare_blocking(&problem, None).map_err(text)?;
    let tensors = pollster::block_on(prepared.upload(&data.inputs())).map_err(text)?;
    let good = tensors.buffers();
    let bind = |buffers: &AttentionBuffers<'_>| prepared.bind(buffers).map(|_| ());
    bind(&good).map_err(text)?;

    let mut buffers = good;
    buffers.lse = None;
    expect("lse left out", bind(&buffers), |e| matches!(e, GpuError::Missing { name: "lse" }))?;
    let mut buffers = good;
    buffers.terms.sinks = Some(tensors.key.slice(..));
    expect("sinks given", bind(&buffers), |e| matches!(e, GpuError::Unexpected { name: "sinks" }))?;
    let mut buffers = good;
    buffers.key = tensors.key.slice(256..);
    expect("key cut short", bind(&buffers), |e| {
        matches!(e, GpuError::BufferTooSmall { name: "key", needed: 4032, found: 3776 })
    })?;
    let mut buffers = good;
    buffers.output = tensors.query.slice(..);
    expect("output onto query", bind(&buffers), |e| {
        matches!(e, GpuError::Aliased { written: "output", read: "query" })
    })?;
    let descriptor = |size, usage| wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false };
    let uniform = context.device().create_buffer(&descriptor(4032, BufferUsages::UNIFORM));
    let mut buffers = good;
    buffers.value = uniform.slice(..);
    expect("not a storage buffer", bind(&buffers), |e| matches!(e, GpuError::Usage { name: "value", .. }))?;
    let larger = context.device().create_buffer(&descriptor(8192, BufferUsages::STORAGE));
    let mut buffers = good;
    buffers.value = larger.slice(4..);
    expect("unaligned slice", bind(&buffers), |e| matches!(e, GpuError::Alignment { name: "value", offset: 4, .. }))?;

    // two kinds of row data are copied, which needs an encoder and the usage for it
    let mut spec = problem.spec().clone();
    spec.alibi_slopes = Some(AlibiSlopes::PerHead);
    spec.sinks = true;
    let both = AttentionProblem::new(spec).map_err(text)?;
    let prepared = context.prepare_blocking(&both, None).map_err(text)?;
    let mut buffers = good;
    let slopes = context.upload_blocking("slopes", &[0.5f32; 4]).map_err(text)?;
    let no_copy = context.device().create_buffer(&descriptor(16, BufferUsages::STORAGE));
    buffers.terms.alibi_slopes = Some(slopes.slice(..));
    buffers.terms.sinks = Some(no_copy.slice(..));
    expect("sinks that cannot be copied", prepared.bind(&buffers).map(|_| ()), |e| {
        matches!(e, GpuError::Usage { name: "sinks", needed: BufferUsages::COPY_SRC, .. })
    })?;
    buffers.terms.sinks = Some(slopes.slice(..));
    let bound = prepared.bind(&buffers).map_err(text)?;
    let mut encoder = context.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
    expect("copies within a pass", bound.encode_in_pass(&mut pass), |e| matches!(e, GpuError::NeedsEncoder))
}

pub(super) fn other_device(adapter: &str) -> Result<Gpu, String> {
    let chosen = pollster::block_on(choose(&AdapterRequest::Named(adapter.to_owned()))).map_err(text)?;
    pollster::block_on(chosen.open()).map_err(text)
}

/// Two devices of one instance. (With a buffer of another instance wgpu itself panics.)
fn foreign_buffer_is_refused(_: &Gpu, adapter: &str) -> Result<(), String> {
    let adapter = same_adapter(adapter)?;
    let open = || {
        let (device, queue) =
            pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default())).map_err(text)?;
        Gpu::from_device_blocking(device, queue).map_err(text)
    };
    let (context, other) = (open()?, open()?);
    let problem = problem();
    let data = Data::of(&problem);
    let prepared = context.prepare_blocking(&problem, None).map_err(text)?;
    let tensors = pollster::block_on(prepared.upload(&data.inputs())).map_err(text)?;
    let foreign = other.upload_blocking("query", &data.query).map_err(text)?;
    let mut buffers = tensors.buffers();
    buffers.query = foreign.slice(..);
    expect("a buffer of another device", prepared.bind(&buffers).map(|_| ()), |e| {
        matches!(e, GpuError::Validation { .. })
    })
}

/// The adapter of this name, of an instance of our own.
pub(super) fn same_adapter(name: &str) -> Result<wgpu::Adapter, String> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    let same = |found: &wgpu::Adapter| {
        let info = found.get_info();
        info.name == name && info.backend != wgpu::Backend::Gl
    };
    adapters.into_iter().find(same).ok_or_else(|| format!("{name} is gone"))
}

fn too_large_a_buffer_is_refused(context: &Gpu, _: &str) -> Result<(), String> {
    let max = context.caps().max_buffer_size;
    match context.allocate_blocking("keys", max + 4) {
        Err(GpuError::BufferTooLarge { bytes, max: allowed, .. }) if bytes > max && allowed == max => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

fn async_with_another_thread_polling(context: &Gpu, _: &str) -> Result<(), String> {
    let problem = problem();
    let data = Data::of(&problem);
    let done = std::sync::atomic::AtomicBool::new(false);
    let order = std::sync::atomic::Ordering::Relaxed;
    let output = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(order) {
                let _ = context.device().poll(wgpu::PollType::Poll);
                std::thread::yield_now();
            }
        });
        let output = pollster::block_on(context.attention(&problem, &data.inputs(), None));
        done.store(true, order);
        output
    });
    let report = verify::verify(&problem, &data.inputs(), &output.map_err(text)?).map_err(text)?;
    if report.passed() { Ok(()) } else { Err(text(report)) }
}

fn lost_device_is_an_error(_: &Gpu, adapter: &str) -> Result<(), String> {
    let context = other_device(adapter)?;
    let problem = problem();
    let data = Data::of(&problem);
    let prepared = context.prepare_blocking(&problem, None).map_err(text)?;
    let tensors = pollster::block_on(prepared.upload(&data.inputs())).map_err(text)?;
    context.device().destroy();
    let results = [
        ("run", prepared.run_blocking(&data.inputs()).map(|_| ())),
        // binding alone may pass: nothing runs yet
        ("submit", {
            let bound = prepared.bind(&tensors.buffers());
            bound.and_then(|bound| pollster::block_on(prepared.submit(&bound))).map_err(Error::from)
        }),
        ("attention", context.attention_blocking(&problem, &data.inputs(), None).map(|_| ())),
        ("warm_up", {
            // pipelines that are not there yet
            let plan = Plan::new(&problem, context.caps(), Some(Kernel::Plain)).map_err(text)?;
            context.warm_up_blocking(&[plan])
        }),
        ("read", context.read_blocking::<f32>("output", tensors.output.slice(..), 1).map(|_| ()).map_err(Error::from)),
    ];
    for (call, result) in results {
        match result {
            Err(Error::Gpu(GpuError::DeviceLost { .. })) => {}
            other => return Err(format!("{call}: {other:?}")),
        }
    }
    Ok(())
}
