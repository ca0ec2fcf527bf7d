//! Tensors that stay on the device: new data for old plans, results that feed the next call, shared buffers, gaps.

use cross_attention::gpu::{AttentionBuffers, AttentionTensors, Gpu, GpuAttention};
use cross_attention::{AttentionData, AttentionOutput, Element, Error, TensorData, cpu};
use libtest_mimic::Trial;

use super::adapters::Adapter;
use super::trials::{message, trial};
use super::{host, interop};
use crate::common::case::Case;
use crate::common::check::{same_bits, within_tolerance};
use crate::common::recipe::Ranges;

/// The group of [`interop`] too.
const GROUP: &str = "api";

type Check = fn(&Adapter) -> Result<(), String>;

const TRIALS: [(&str, Check); 5] = [
    ("new_inputs_for_old_plans", new_inputs_for_old_plans),
    ("two_attentions_in_one_encoder", two_attentions_in_one_encoder),
    ("one_buffer_for_all_inputs", one_buffer_for_all_inputs),
    ("gaps_of_an_output_are_left_alone", gaps_of_an_output_are_left_alone),
    ("inputs_that_do_not_fit", inputs_that_do_not_fit),
];

pub(crate) fn trials(adapter: &Adapter) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, check) in TRIALS {
        let on = adapter.clone();
        trials.push(trial(adapter, GROUP, name, move || check(&on)));
    }
    for (name, check) in interop::CHECKS.into_iter().chain(host::CHECKS) {
        let on = adapter.clone();
        trials.push(trial(adapter, GROUP, name, move || check(&on.context, &on.context.info().name)));
    }
    trials
}

fn case() -> Case {
    Case::new("api", "tensors that stay on the device", 2, [4, 2], [5, 70], [16, 16])
}

/// All that is kept in separate small buffers.
fn full_case() -> Case {
    case().bias(Element::F16, "b1qk").mask("b11k").kv_lens(&[70, 33]).ranges(Ranges::Wild).alibi().sinks(0.0)
}

fn failed(error: impl Into<Error>) -> String {
    message(&error.into())
}

fn new_inputs_for_old_plans(adapter: &Adapter) -> Result<(), String> {
    let case = full_case();
    let problem = case.problem();
    let prepared = adapter.context.prepare_blocking(&problem, None).map_err(failed)?;
    for seed in ["first", "second", "third"] {
        let data = case.recipe.data(seed, &case.spec, &problem);
        let output = prepared.run_blocking(&data.as_inputs()).map_err(failed)?;
        within_tolerance(&problem, &data, &output)?;
    }
    let again = adapter.context.prepare_blocking(&problem, None).map_err(failed)?;
    if again.plan() == prepared.plan() { Ok(()) } else { Err("another plan for the same problem".to_string()) }
}

/// Uploads the tensors of a case without terms.
fn upload(context: &Gpu, data: &AttentionData) -> Result<[wgpu::Buffer; 3], String> {
    let upload = |name, tensor: &TensorData| context.upload_blocking(name, tensor.as_ref().as_bytes()).map_err(failed);
    Ok([upload("query", &data.query)?, upload("key", &data.key)?, upload("value", &data.value)?])
}

fn buffers<'a>(
    inputs: [wgpu::BufferSlice<'a>; 3],
    output: wgpu::BufferSlice<'a>,
    lse: wgpu::BufferSlice<'a>,
) -> AttentionBuffers<'a> {
    let [query, key, value] = inputs;
    AttentionBuffers { lse: Some(lse), ..AttentionBuffers::new(query, key, value, output) }
}

/// The output of one attention is the query of the next, on a device of the caller's, without a wait between.
fn two_attentions_in_one_encoder(adapter: &Adapter) -> Result<(), String> {
    let (device, queue) = (adapter.context.device().clone(), adapter.context.queue().clone());
    let context = Gpu::from_device_blocking(device.clone(), queue.clone()).map_err(failed)?;
    let case = case();
    let (problem, data) = (case.problem(), case.data());
    let prepared = context.prepare_blocking(&problem, None).map_err(failed)?;
    let [query, key, value] = upload(&context, &data)?;
    let rows = problem.rows();
    let bytes = (rows * 16 * 4) as u64;
    let allocate = |name, bytes| context.allocate_blocking(name, bytes).map_err(failed);
    let (first, second) = (allocate("first", bytes)?, allocate("second", bytes)?);
    let lse = allocate("lse", rows as u64 * 4)?;

    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
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
        row_state: None,
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
        row_state: None,
        scores: None,
    };
    same_bits(&got, &want)
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

fn read(context: &Gpu, prepared: &GpuAttention, tensors: &AttentionTensors) -> Result<AttentionOutput, String> {
    let spec = prepared.problem().spec();
    let len = spec.output.layout.extent().ok_or("the case is small")?;
    let lse = tensors.lse.as_ref().ok_or("lse was asked for")?;
    let output = match spec.output.element {
        Element::F32 => context.read_blocking("output", tensors.output.slice(..), len).map(TensorData::F32),
        Element::F16 => context.read_blocking("output", tensors.output.slice(..), len).map(TensorData::F16),
        other => return Err(format!("the case has no {other}")),
    };
    let lse = context.read_blocking("lse", lse.slice(..), prepared.problem().rows());
    Ok(AttentionOutput {
        output: output.map_err(failed)?,
        lse: Some(lse.map_err(failed)?),
        row_state: None,
        scores: None,
    })
}

/// The same refusals as on the CPU, before anything is uploaded.
fn inputs_that_do_not_fit(adapter: &Adapter) -> Result<(), String> {
    let case = full_case();
    let problem = case.problem();
    let changes: [fn(&mut AttentionData); 6] = [
        |data| data.terms.sinks = None,
        |data| data.terms.kv_lens = Some(vec![70, 71]),
        |data| data.terms.mask = Some(vec![true; 3]),
        |data| data.query = TensorData::zeros(Element::F16, 10_000),
        |data| data.key = TensorData::zeros(Element::F32, 3),
        |data| data.terms.row_start = Some(vec![0; 3]),
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
