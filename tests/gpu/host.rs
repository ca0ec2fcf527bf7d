//! Pipelines kept in a file, times of single shaders, the device's limits, many attentions in one recording.

use cross_attention::gpu::{BoundSteps, Gpu, GpuAttention, GpuError, PipelineCacheFault, PipelineCacheState};
use cross_attention::{AttentionInputs, AttentionProblem, Kernel, Terms, verify, wgpu};

use super::interop::{Check, Data, expect, other_device, problem, text};

/// Name and body of each check; the second argument is the adapter's name.
pub(crate) const CHECKS: [(&str, Check); 3] = [
    ("pipelines_are_kept_in_a_file", pipelines_are_kept_in_a_file),
    ("every_shader_is_timed", every_shader_is_timed),
    ("many_in_one_recording", many_in_one_recording),
];

/// A file of pipelines is written, read by another device of the same kind, and not trusted once it was changed.
fn pipelines_are_kept_in_a_file(_: &Gpu, adapter: &str) -> Result<(), String> {
    let folder = tempfile::tempdir().map_err(text)?;
    let path = folder.path().join("pipelines");
    let problem = problem();
    let data = Data::of(&problem);
    let use_file = || {
        let context = other_device(adapter)?;
        let state = context.use_pipeline_cache(&path).map_err(text)?;
        let output = context.attention_blocking(&problem, &data.inputs(), None).map_err(text)?;
        let report = verify::verify(&problem, &data.inputs(), &output).map_err(text)?;
        if report.passed() { Ok((context, state)) } else { Err(text(report)) }
    };
    let (context, state) = use_file()?;
    if state == PipelineCacheState::Unsupported {
        return if context.device().features().contains(wgpu::Features::PIPELINE_CACHE) {
            Err("the device has caches".to_owned())
        } else {
            Ok(())
        };
    }
    let is = |state: PipelineCacheState, wanted: fn(&PipelineCacheState) -> bool| {
        if wanted(&state) { Ok(()) } else { Err(format!("{state:?}")) }
    };
    is(state, |state| *state == PipelineCacheState::New)?;
    let written = context.save_pipeline_cache().map_err(text)?;
    let whole = std::fs::read(&path).map_err(text)?;
    if written != Some(whole.len() as u64) {
        return Err(format!("{written:?} bytes were written, the file has {}", whole.len()));
    }
    is(use_file()?.1, |state| matches!(state, PipelineCacheState::Loaded { .. }))?;
    let ignored = |bytes: &[u8], wanted: fn(&PipelineCacheState) -> bool| {
        std::fs::write(&path, bytes).map_err(text)?;
        let (context, state) = use_file()?;
        is(state, wanted)?;
        // it is replaced by one that is whole
        context.save_pipeline_cache().map_err(text)?;
        is(use_file()?.1, |state| matches!(state, PipelineCacheState::Loaded { .. }))
    };
    let mut changed = whole.clone();
    *changed.last_mut().ok_or("an empty file")? ^= 1;
    ignored(&changed, |state| *state == PipelineCacheState::Ignored(PipelineCacheFault::Damaged))?;
    ignored(&whole[..whole.len() / 2], |state| *state == PipelineCacheState::Ignored(PipelineCacheFault::Damaged))?;
    // a text is somebody's, and stays
    std::fs::write(&path, "a text").map_err(text)?;
    let (context, state) = use_file()?;
    is(state, |state| *state == PipelineCacheState::Ignored(PipelineCacheFault::NotACache))?;
    expect("a file of another kind", context.save_pipeline_cache().map(|_| ()), |error| {
        matches!(error, GpuError::CacheWrite { .. })
    })?;
    if std::fs::read(&path).map_err(text)? != b"a text" {
        return Err("it was overwritten".to_owned());
    }
    // whole and ours, but not what the driver wants
    ignored(&with_data(&whole, b"junk"), |state| {
        matches!(state, PipelineCacheState::Ignored(PipelineCacheFault::Refused { .. }))
    })?;
    let context = other_device(adapter)?;
    let nowhere = folder.path().join("nowhere/pipelines");
    context.use_pipeline_cache(&nowhere).map_err(text)?;
    expect(
        "a folder that is not there",
        context.save_pipeline_cache().map(|_| ()),
        |error| matches!(error, GpuError::CacheWrite { path, .. } if *path == nowhere),
    )
}

/// The file with other data of the driver's, and the checksum of that.
fn with_data(file: &[u8], data: &[u8]) -> Vec<u8> {
    let (magic, rest) = file.split_at(8);
    let mut body = rest[8..].to_vec();
    let mut at = 0;
    for _ in 0..2 {
        let len = body[at..at + 4].iter().rev().fold(0, |len, byte| len << 8 | usize::from(*byte));
        at += 4 + len;
    }
    body.truncate(at);
    body.extend((data.len() as u64).to_le_bytes());
    body.extend(data);
    let sum = u64::from(crc32fast::hash(&body));
    [magic, &sum.to_le_bytes(), &body].concat()
}

/// Each shader has times of its own, and the device has limits.
fn every_shader_is_timed(context: &Gpu, _: &str) -> Result<(), String> {
    let problem = problem();
    let data = Data::of(&problem);
    let prepared = context.prepare_blocking(&problem, Some(Kernel::Plain)).map_err(text)?;
    let tensors = prepared.upload_blocking(&data.inputs()).map_err(text)?;
    let bound = prepared.bind(&tensors.buffers()).map_err(text)?;
    let kernels = prepared.time_kernels_blocking(&bound, 3).map_err(text)?;
    match kernels {
        None if context.caps().timestamps => return Err("no times".to_owned()),
        None => {}
        Some(kernels) => {
            let dispatches: usize = kernels.iter().map(|kernel| kernel.dispatches).sum();
            let rounds = kernels.iter().all(|kernel| kernel.timing.millis.len() == 3);
            if dispatches != prepared.plan().steps().len() || !rounds {
                return Err(format!("{kernels:?}"));
            }
        }
    }
    let roofline = context.roofline_blocking(std::time::Duration::ZERO).map_err(text)?;
    let sound = |rate: f64| rate.is_finite() && rate > 0.0;
    if sound(roofline.gflops) && sound(roofline.gbps) { Ok(()) } else { Err(format!("{roofline:?}")) }
}

/// Two attentions with key lengths and sinks of their own, which are copied to one place, and one without, together.
fn many_in_one_recording(context: &Gpu, _: &str) -> Result<(), String> {
    let mut spec = problem().spec().clone();
    spec.kv_lens = true;
    spec.sinks = true;
    let masked = AttentionProblem::new(spec).map_err(text)?;
    let prepared = context.prepare_blocking(&masked, None).map_err(text)?;
    let plain = context.prepare_blocking(&problem(), None).map_err(text)?;
    let (data, sinks) = (Data::of(&masked), [0.5f32, -1.0, 2.0, 0.0]);
    let lens = [[21u32, 7], [3, 20]];
    let inputs = |lens| AttentionInputs {
        terms: Terms { kv_lens: Some(lens), sinks: Some(&sinks), ..Terms::default() },
        ..data.inputs()
    };
    let first = prepared.upload_blocking(&inputs(&lens[0])).map_err(text)?;
    let second = prepared.upload_blocking(&inputs(&lens[1])).map_err(text)?;
    let third = plain.upload_blocking(&data.inputs()).map_err(text)?;
    let bound = [
        prepared.bind(&first.buffers()).map_err(text)?,
        plain.bind(&third.buffers()).map_err(text)?,
        prepared.bind(&second.buffers()).map_err(text)?,
    ];
    let mut encoder = context.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    BoundSteps::encode_all(&bound, &mut encoder);
    context.queue().submit([encoder.finish()]);
    let check = |prepared: &GpuAttention, tensors, inputs: &AttentionInputs<'_>| {
        let output = prepared.read_output_blocking(tensors).map_err(text)?;
        let report = verify::verify(prepared.problem(), inputs, &output).map_err(text)?;
        if report.passed() { Ok(()) } else { Err(text(report)) }
    };
    check(&prepared, &first, &inputs(&lens[0]))?;
    check(&plain, &third, &data.inputs())?;
    check(&prepared, &second, &inputs(&lens[1]))
}
