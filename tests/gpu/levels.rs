//! The levels of the API below one call: tensors that stay on the device, the caller's encoder, device and buffers,
//! and what they refuse.

use cross_attention::gpu::{self, AdapterRequest, AttentionBuffers, Context, GpuError};
use cross_attention::{AttentionData, AttentionOutput, Element, Error, TensorData, cpu};
use libtest_mimic::Trial;
use wgpu::{BufferDescriptor, BufferSlice, BufferUsages, CommandEncoderDescriptor, ComputePassDescriptor};

use super::adapters::Adapter;
use super::trials::{message, trial};
use crate::common::case::Case;
use crate::common::check::{same_bits, within_tolerance};
use crate::common::recipe::Ranges;

const GROUP: &str = "levels";

type Check = fn(&Adapter) -> Result<(), String>;

const TRIALS: [(&str, Check); 9] = [
    ("new_inputs_for_old_plans", new_inputs_for_old_plans),
    ("two_attentions_in_one_encoder", two_attentions_in_one_encoder),
    ("one_buffer_for_all_inputs", one_buffer_for_all_inputs),
    ("a_pass_of_the_caller", a_pass_of_the_caller),
    ("gaps_of_an_output_are_left_alone", gaps_of_an_output_are_left_alone),
    ("buffers_that_do_not_fit", buffers_that_do_not_fit),
    ("inputs_that_do_not_fit", inputs_that_do_not_fit),
    ("more_memory_than_there_is", more_memory_than_there_is),
    ("a_lost_device", a_lost_device),
];

pub(crate) fn trials(adapter: &Adapter) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, check) in TRIALS {
        let on = adapter.clone();
        trials.push(trial(adapter, GROUP, name, move || check(&on)));
    }
    trials
}

fn case() -> Case {
    Case::new("levels", "the levels of the API", 2, [4, 2], [5, 70], [16, 16])
}

/// All that is kept in separate small buffers.
fn full_case() -> Case {
    case().bias(Element::F16, "b1qk").mask("b11k").kv_lens(&[70, 33]).ranges(Ranges::Wild).alibi().sinks(0.0)
}

fn failed(error: impl Into<Error>) -> String {
    message(&error.into())
}

fn expect<T: std::fmt::Debug>(
    what: &str,
    result: Result<T, GpuError>,
    right: fn(&GpuError) -> bool,
) -> Result<(), String> {
    match result {
        Err(error) if right(&error) => Ok(()),
        other => Err(format!("{what}: {other:?}")),
    }
}

fn new_inputs_for_old_plans(adapter: &Adapter) -> Result<(), String> {
    let case = full_case();
    let problem = case.problem();
    let prepared = adapter.context.prepare_blocking(&problem, None).map_err(failed)?;
    let made = adapter.context.pipelines();
    for seed in ["first", "second", "third"] {
        let data = case.recipe.data(seed, &case.spec, &problem);
        let output = prepared.run_blocking(&data.as_inputs()).map_err(failed)?;
        within_tolerance(&problem, &data, &output)?;
    }
    let again = adapter.context.prepare_blocking(&problem, None).map_err(failed)?;
    if adapter.context.pipelines() != made || again.plan() != prepared.plan() {
        return Err("preparing again made other pipelines or another plan".to_string());
    }
    Ok(())
}

/// Uploads the tensors of a case without terms.
fn upload(context: &Context, data: &AttentionData) -> Result<[wgpu::Buffer; 3], String> {
    let upload = |name, tensor: &TensorData| context.upload_blocking(name, tensor.as_ref().as_bytes()).map_err(failed);
    Ok([upload("query", &data.query)?, upload("key", &data.key)?, upload("value", &data.value)?])
}

fn buffers<'a>(inputs: [BufferSlice<'a>; 3], output: BufferSlice<'a>, lse: BufferSlice<'a>) -> AttentionBuffers<'a> {
    let [query, key, value] = inputs;
    AttentionBuffers {
        query,
        key,
        value,
        bias: None,
        mask: None,
        kv_lens: None,
        row_start: None,
        row_end: None,
        alibi_slopes: None,
        sinks: None,
        output,
        lse: Some(lse),
        scores: None,
    }
}

/// The output of one attention is the query of the next, on a device of the caller's, without a wait between.
fn two_attentions_in_one_encoder(adapter: &Adapter) -> Result<(), String> {
    let (device, queue) = (adapter.context.device().clone(), adapter.context.queue().clone());
    let context = Context::from_device_blocking(device.clone(), queue.clone()).map_err(failed)?;
    let case = case();
    let (problem, data) = (case.problem(), case.data());
    let prepared = context.prepare_blocking(&problem, None).map_err(failed)?;
    let [query, key, value] = upload(&context, &data)?;
    let rows = problem.rows();
    let bytes = (rows * 16 * 4) as u64;
    let allocate = |name, bytes| context.allocate_blocking(name, bytes).map_err(failed);
    let (first, second) = (allocate("first", bytes)?, allocate("second", bytes)?);
    let lse = allocate("lse", rows as u64 * 4)?;

    let mut encoder = device.create_command_encoder(&CommandEncoderDescriptor::default());
    for (query, output) in [(&query, &first), (&first, &second)] {
        let inputs = [query.slice(..), key.slice(..), value.slice(..)];
        prepared.encode(&mut encoder, &buffers(inputs, output.slice(..), lse.slice(..))).map_err(failed)?;
    }
    queue.submit([encoder.finish()]);

    let read = |buffer: &wgpu::Buffer, len| context.read_blocking("output", buffer.slice(..), len);
    let first: Vec<f32> = read(&first, rows * 16).map_err(failed)?;
    let output = AttentionOutput {
        output: TensorData::F32(read(&second, rows * 16).map_err(failed)?),
        lse: Some(read(&lse, rows).map_err(failed)?),
        scores: None,
    };
    let chained = AttentionData { query: TensorData::F32(first), ..data };
    within_tolerance(&problem, &chained, &output)
}

fn one_buffer_for_all_inputs(adapter: &Adapter) -> Result<(), String> {
    let context = &adapter.context;
    let case = case();
    let (problem, data) = (case.problem(), case.data());
    let want = context.attention_blocking(&problem, &data.as_inputs(), None).map_err(failed)?;
    // each tensor at the next multiple of 256 bytes
    let mut all = vec![f32::NAN; 64];
    let starts = [&data.query, &data.key, &data.value].map(|tensor| {
        let start = all.len() as u64 * 4;
        all.extend(tensor.to_f32());
        all.resize(all.len().next_multiple_of(64), f32::NAN);
        start
    });
    let all = context.upload_blocking("all", &all).map_err(failed)?;
    let rows = problem.rows();
    let output = context.allocate_blocking("output", (rows * 16 * 4) as u64).map_err(failed)?;
    let lse = context.allocate_blocking("lse", rows as u64 * 4).map_err(failed)?;
    let prepared = context.prepare_blocking(&problem, None).map_err(failed)?;
    let inputs = starts.map(|start| all.slice(start..));
    let bound = prepared.bind(&buffers(inputs, output.slice(..), lse.slice(..))).map_err(failed)?;
    pollster::block_on(prepared.submit(&bound)).map_err(failed)?;
    let got = AttentionOutput {
        output: TensorData::F32(context.read_blocking("output", output.slice(..), rows * 16).map_err(failed)?),
        lse: Some(context.read_blocking("lse", lse.slice(..), rows).map_err(failed)?),
        scores: None,
    };
    same_bits(&got, &want)
}

fn a_pass_of_the_caller(adapter: &Adapter) -> Result<(), String> {
    let context = &adapter.context;
    let case = case().causal(cross_attention::Diagonal::BottomRight);
    let (problem, data) = (case.problem(), case.data());
    let prepared = context.prepare_blocking(&problem, None).map_err(failed)?;
    let tensors = uploaded(prepared.upload(&data.as_inputs()))?;
    let bound = prepared.bind(&tensors.buffers()).map_err(failed)?;
    let mut encoder = context.device().create_command_encoder(&CommandEncoderDescriptor::default());
    {
        let mut pass = encoder.begin_compute_pass(&ComputePassDescriptor::default());
        // twice is as good as once
        bound.encode_in_pass(&mut pass).map_err(failed)?;
        bound.encode_in_pass(&mut pass).map_err(failed)?;
    }
    context.queue().submit([encoder.finish()]);
    within_tolerance(&problem, &data, &read(context, &prepared, &tensors)?)?;

    // several kinds of row data must be copied together first, which a pass cannot
    let case = full_case();
    let prepared = context.prepare_blocking(&case.problem(), None).map_err(failed)?;
    let tensors = uploaded(prepared.upload(&case.data().as_inputs()))?;
    let bound = prepared.bind(&tensors.buffers()).map_err(failed)?;
    let mut encoder = context.device().create_command_encoder(&CommandEncoderDescriptor::default());
    let mut pass = encoder.begin_compute_pass(&ComputePassDescriptor::default());
    let result = bound.encode_in_pass(&mut pass);
    expect("row data in a pass", result, |error| *error == GpuError::NeedsEncoder)
}

/// Uploading waits for nothing but wgpu's own answers.
fn uploaded<T>(future: impl Future<Output = Result<T, Error>>) -> Result<T, String> {
    pollster::block_on(future).map_err(failed)
}

/// Padding between rows belongs to the caller.
fn gaps_of_an_output_are_left_alone(adapter: &Adapter) -> Result<(), String> {
    let context = &adapter.context;
    for element in [Element::F32, Element::F16] {
        let case = case().stored([element; 4]).spec(|spec| {
            let shape = spec.output.layout.shape;
            spec.output.layout = crate::common::case::arranged(shape, [0, 2, 1, 3], [1, 3, 5, 1], 3);
        });
        let (problem, data) = (case.problem(), case.data());
        let prepared = context.prepare_blocking(&problem, None).map_err(failed)?;
        let mut tensors = uploaded(prepared.upload(&data.as_inputs()))?;
        let layout = problem.spec().output.layout;
        let len = layout.extent().ok_or("the case is small")?;
        let filled = TensorData::from_f32(element, vec![7.0; len + 1]);
        tensors.output = context.upload_blocking("output", filled.as_ref().as_bytes()).map_err(failed)?;
        let bound = prepared.bind(&tensors.buffers()).map_err(failed)?;
        pollster::block_on(prepared.submit(&bound)).map_err(failed)?;
        let mut output = read(context, &prepared, &tensors)?;
        let mut numbers = output.output.to_f32();
        let mut gap = vec![true; len];
        crate::common::recipe::places(layout.shape).for_each(|at| gap[layout.index(at)] = false);
        for (n, x) in numbers.iter_mut().enumerate().filter(|(n, _)| gap[*n]) {
            if x.to_bits() != 7f32.to_bits() {
                return Err(format!("{element}: element {n} is in a gap and was 7, is {x}"));
            }
            *x = 0.0;
        }
        output.output = TensorData::from_f32(element, numbers);
        within_tolerance(&problem, &data, &output)?;
    }
    Ok(())
}

fn read(
    context: &Context,
    prepared: &gpu::PreparedAttention,
    tensors: &gpu::AttentionTensors,
) -> Result<AttentionOutput, String> {
    let spec = prepared.problem().spec();
    let len = spec.output.layout.extent().ok_or("the case is small")?;
    let lse = tensors.lse.as_ref().ok_or("lse was asked for")?;
    let output = match spec.output.element {
        Element::F32 => context.read_blocking("output", tensors.output.slice(..), len).map(TensorData::F32),
        Element::F16 => context.read_blocking("output", tensors.output.slice(..), len).map(TensorData::F16),
    };
    let lse = context.read_blocking("lse", lse.slice(..), prepared.problem().rows());
    Ok(AttentionOutput { output: output.map_err(failed)?, lse: Some(lse.map_err(failed)?), scores: None })
}

fn buffers_that_do_not_fit(adapter: &Adapter) -> Result<(), String> {
    let context = &adapter.context;
    let case = case();
    let (problem, data) = (case.problem(), case.data());
    let prepared = context.prepare_blocking(&problem, None).map_err(failed)?;
    let [query, key, value] = upload(context, &data)?;
    let rows = problem.rows() as u64;
    let output = context.allocate_blocking("output", rows * 16 * 4).map_err(failed)?;
    let lse = context.allocate_blocking("lse", rows * 4).map_err(failed)?;
    let right = buffers([query.slice(..), key.slice(..), value.slice(..)], output.slice(..), lse.slice(..));
    prepared.bind(&right).map_err(failed)?;

    let missing = AttentionBuffers { lse: None, ..right };
    expect("missing", prepared.bind(&missing), |e| matches!(e, GpuError::Missing { name: "lse" }))?;
    let extra = AttentionBuffers { scores: Some(output.slice(..)), ..right };
    expect("not asked for", prepared.bind(&extra), |e| matches!(e, GpuError::Unexpected { name: "scores" }))?;
    let short = AttentionBuffers { output: output.slice(..output.size() - 4), ..right };
    expect("too short", prepared.bind(&short), |e| matches!(e, GpuError::BufferTooSmall { name: "output", .. }))?;
    let aliased = AttentionBuffers { output: key.slice(..), ..right };
    expect("aliased", prepared.bind(&aliased), |e| matches!(e, GpuError::Aliased { written: "output", read: "key" }))?;
    let odd = context.allocate_blocking("odd", query.size() + 4).map_err(failed)?;
    let odd = AttentionBuffers { query: odd.slice(4..), ..right };
    if context.caps().min_storage_buffer_offset_alignment > 4 {
        expect("alignment", prepared.bind(&odd), |e| matches!(e, GpuError::Alignment { name: "query", .. }))?;
    }
    let descriptor =
        BufferDescriptor { label: None, size: value.size(), usage: BufferUsages::COPY_SRC, mapped_at_creation: false };
    let other = context.device().create_buffer(&descriptor);
    let unusable = AttentionBuffers { value: other.slice(..), ..right };
    expect("usage", prepared.bind(&unusable), |e| matches!(e, GpuError::Usage { name: "value", .. }))
}

/// The same refusals as on the CPU, before anything is uploaded.
fn inputs_that_do_not_fit(adapter: &Adapter) -> Result<(), String> {
    let case = full_case();
    let problem = case.problem();
    let changes: [fn(&mut AttentionData); 6] = [
        |data| data.sinks = None,
        |data| data.kv_lens = Some(vec![70, 71]),
        |data| data.mask = Some(vec![true; 3]),
        |data| data.query = TensorData::zeros(Element::F16, 10_000),
        |data| data.key = TensorData::zeros(Element::F32, 3),
        |data| data.row_start = Some(vec![0; 3]),
    ];
    for change in changes {
        let mut data = case.data();
        change(&mut data);
        let want = cpu::attention(&problem, &data.as_inputs()).expect_err("refused on the CPU");
        match adapter.context.attention_blocking(&problem, &data.as_inputs(), None) {
            Err(Error::Input(error)) if error == want => {}
            other => return Err(format!("{other:?}, should be {want:?}")),
        }
    }
    Ok(())
}

fn more_memory_than_there_is(adapter: &Adapter) -> Result<(), String> {
    let too_large = adapter.context.caps().max_buffer_size.saturating_add(4);
    let result = adapter.context.allocate_blocking("far too much", too_large);
    expect("over the limit", result, |e| matches!(e, GpuError::BufferTooLarge { .. } | GpuError::OutOfMemory { .. }))?;
    // the device is as good as before
    let case = case();
    let output = adapter.context.attention_blocking(&case.problem(), &case.data().as_inputs(), None).map_err(failed)?;
    within_tolerance(&case.problem(), &case.data(), &output)
}

/// On a device of its own, for it is destroyed.
fn a_lost_device(adapter: &Adapter) -> Result<(), String> {
    let request = AdapterRequest::Named(adapter.context.info().name.clone());
    let context = pollster::block_on(async { gpu::choose(&request).await?.open().await }).map_err(failed)?;
    let case = case();
    let (problem, data) = (case.problem(), case.data());
    let prepared = context.prepare_blocking(&problem, None).map_err(failed)?;
    prepared.run_blocking(&data.as_inputs()).map_err(failed)?;
    context.device().destroy();
    for _ in 0..2 {
        match prepared.run_blocking(&data.as_inputs()) {
            Err(Error::Gpu(GpuError::DeviceLost { .. })) => {}
            other => return Err(format!("a run on a destroyed device: {other:?}")),
        }
        match context.attention_blocking(&problem, &data.as_inputs(), None) {
            Err(Error::Gpu(GpuError::DeviceLost { .. })) => {}
            other => return Err(format!("a call on a destroyed device: {other:?}")),
        }
    }
    Ok(())
}
