//! Gradients on the device: as f64 has them, cut, with a workspace full of NaN, in the caller's encoder, and the same bits every
//! time.

use cross_attention::backward::{BackwardInputs, BackwardProblem, Gradients};
use cross_attention::dispatch::Slot;
use cross_attention::gpu::{BackwardBuffers, BoundSteps, GpuBackward, GpuError};
use cross_attention::plan::BackwardPlan;
use cross_attention::verify::verify_backward;
use cross_attention::{DeviceCaps, DeviceClass, Diagonal, Element, Error, Layout, wgpu};
use libtest_mimic::Trial;

use super::adapters::Adapter;
use super::trials::{message, random_cases, trial};
use crate::common::backward::{self, BackwardCase, bits};
use crate::common::case::Case;
use crate::common::{cases, random};

const GROUP: &str = "backward";
/// Random cases with many keys.
const LONG_CASES: u32 = 6;
/// One in so many cases of the table runs on the tiles of GPUs too.
const GPU_TILES: usize = 12;
/// A software driver runs one in so many, for each compiles shaders of its own; one beside another driver fewer.
const SHARES: [usize; 2] = [5, 12];

/// What a trial does that has no case of the table.
type Check = fn(&Adapter) -> Result<(), String>;

pub(crate) fn trials(adapter: &Adapter) -> Vec<Trial> {
    let mut trials = Vec::new();
    let random = random_cases().into_iter().zip(0..).map(|(case, n)| Case { name: format!("random_{n:02}"), ..case });
    let long = random::drawn(&random::long_case(), LONG_CASES).into_iter().zip(0..);
    let long = long.map(|(case, n)| Case { name: format!("random_long_{n:02}"), ..case });
    let all = std::env::var("GPU_TRIALS").is_ok_and(|value| value == "all");
    let software = adapter.context.caps().class == DeviceClass::Software && !all;
    let every = if software { SHARES[usize::from(adapter.sparing)] } else { 1 };
    for case in cases::all().into_iter().chain(own_cases()).chain(random).chain(long).step_by(every) {
        let on = adapter.clone();
        let name = case.name.clone();
        trials.push(trial(adapter, GROUP, &name, move || {
            backward::case_with(&case, &|problem, inputs| run_twice(&on, problem, inputs))
        }));
    }
    // all of others' results on one driver: each has something of its own
    let every_golden = if adapter.sparing { every } else { 1 };
    for (n, path) in backward::golden().into_iter().enumerate().step_by(every_golden) {
        let on = adapter.clone();
        trials.push(trial(adapter, GROUP, &format!("golden_{n:02}"), move || {
            backward::golden_with(&path, 1.0, &|problem, inputs| run_behind_own_forward(&on, problem, inputs))
        }));
    }
    // the tiles of GPUs, which software drivers have no use for
    let table = cases::all().into_iter().step_by(GPU_TILES);
    for case in own_cases().into_iter().chain(table).step_by(every) {
        let class = if case.name.len() % 2 == 0 { DeviceClass::Discrete } else { DeviceClass::Integrated };
        let name = format!("gpu_tiles_{}", case.name);
        trials.push(on_tiles_of(adapter, class, name, case));
    }
    if !adapter.sparing {
        for (class, name) in [(DeviceClass::Discrete, "discrete"), (DeviceClass::Integrated, "integrated")] {
            trials.push(on_tiles_of(adapter, class, format!("whole_tiles_{name}"), whole_tiles()));
        }
    }
    let others: [(&str, Check); 3] = [("shared_batch", shared_batch), ("cut", cut), ("encoded", encoded)];
    for (name, check) in others {
        let on = adapter.clone();
        trials.push(trial(adapter, GROUP, name, move || check(&on)));
    }
    trials
}

/// A case on the tiles of another class of device.
fn on_tiles_of(adapter: &Adapter, class: DeviceClass, name: String, case: Case) -> Trial {
    let on = adapter.clone();
    trial(adapter, GROUP, &name, move || {
        backward::case_with(&case, &|problem, inputs| {
            let plan = BackwardPlan::new(problem, &DeviceCaps { class, ..on.context.caps().clone() });
            let plan = plan.map_err(|error| error.to_string())?;
            let prepared = pollster::block_on(on.context.prepare_backward_plan(plan));
            prepared.and_then(|prepared| prepared.run_blocking(inputs)).map_err(|error| message(&error))
        })
    })
}

/// Enough rows and keys for every register of every tile, in slices of their own, and keys that nobody may read, which are not
/// finite.
fn whole_tiles() -> Case {
    Case::new("backward_whole_tiles", "", 1, [2, 1], [67, 131], [64, 64]).mask("b11k").poisoned()
}

fn prepared(on: &Adapter, problem: &BackwardProblem) -> Result<GpuBackward, String> {
    on.context.prepare_backward_blocking(problem).map_err(|error| message(&error))
}

/// Twice on one workspace: the second call gives the same bits.
fn run_twice(on: &Adapter, problem: &BackwardProblem, inputs: &BackwardInputs<'_>) -> Result<Gradients, String> {
    let prepared = prepared(on, problem)?;
    let first = prepared.run_blocking(inputs).map_err(|error| message(&error))?;
    let second = prepared.run_blocking(inputs).map_err(|error| message(&error))?;
    if bits(&first) == bits(&second) { Ok(first) } else { Err("another run gives other bits".to_owned()) }
}

/// The same of what the device's own forward gives: weights made anew from another's maximum and sum add up to 1 less well.
fn run_behind_own_forward(
    on: &Adapter,
    problem: &BackwardProblem,
    inputs: &BackwardInputs<'_>,
) -> Result<Gradients, String> {
    let forward = on.context.attention_blocking(problem.forward(), &inputs.attention, None);
    let forward = forward.map_err(|error| message(&error))?;
    let row_state = forward.row_state.as_ref().ok_or("the forward returns maximum and sum")?;
    run_twice(on, problem, &BackwardInputs { output: (&forward.output).into(), row_state, ..*inputs })
}

fn call(case: &Case) -> Result<BackwardCase, String> {
    BackwardCase::of(case).ok_or_else(|| format!("{case}: no gradients"))
}

fn within_bounds(case: &BackwardCase, gradients: &Gradients) -> Result<(), String> {
    let report = verify_backward(&case.problem, &case.inputs(), gradients).map_err(|error| error.to_string())?;
    if report.passed() { Ok(()) } else { Err(report.to_string()) }
}

/// Cases of which the kernels make something of their own: both passes split, keys that are shared, wide rows in blocks of columns,
/// tiles that the rows of a group share, every way to sum a bias.
fn own_cases() -> Vec<Case> {
    let new =
        |name: &str, batch, heads, lens, widths| Case::new(format!("backward_{name}"), "", batch, heads, lens, widths);
    let mut cases = vec![
        new("few_keys", 1, [2, 1], [150, 5], [12, 20]),
        new("few_rows", 2, [4, 2], [1, 300], [24, 8]),
        new("wide", 1, [1, 1], [5, 19], [140, 132]),
        new("of_128", 1, [2, 1], [70, 90], [128, 100]).causal(Diagonal::BottomRight).stored([Element::F16; 4]),
        new("of_64", 1, [2, 1], [130, 70], [64, 64]).windows(Some(20), Some(3)),
        new("group_tiles", 1, [6, 2], [11, 35], [8, 8]).causal(Diagonal::BottomRight).softcap(3.0),
        new("shared", 3, [2, 1], [7, 21], [16, 4]).kv_lens(&[21, 0, 5]).spec(|spec| {
            (spec.key.layout.strides[0], spec.value.layout.strides[0]) = (0, 0);
        }),
    ];
    for axes in ["bhqk", "1hqk", "b1qk", "11qk", "bh1k", "b11k", "111k", "bhq1", "11q1", "1h11", "b111", "1111"] {
        let name = format!("bias_{}", axes.replace('1', "o"));
        cases.push(new(&name, 2, [4, 2], [19, 37], [8, 8]).bias(Element::F32, axes).alibi().sinks(0.0));
    }
    cases
}

/// Shared keys and values have one gradient, the sum over the batch, or one for each entry.
fn shared_batch(on: &Adapter) -> Result<(), String> {
    let case = Case::new("backward_one_context", "", 3, [4, 2], [9, 21], [16, 4]).q_lens(&[9, 4, 0]).spec(|spec| {
        (spec.key.layout.strides[0], spec.value.layout.strides[0]) = (0, 0);
    });
    for (key, value) in [(true, true), (true, false), (false, true)] {
        let mut backward = call(&case)?;
        let mut spec = backward.problem.spec().clone();
        for (gradient, summed) in [(&mut spec.d_key, key), (&mut spec.d_value, value)] {
            if let (Some(gradient), true) = (gradient, summed) {
                let [_, heads, len, width] = gradient.layout.shape;
                gradient.layout = Layout::bhld([1, heads, len, width]);
            }
        }
        backward.problem = BackwardProblem::new(spec).map_err(|error| error.to_string())?;
        within_bounds(&backward, &run_twice(on, &backward.problem, &backward.inputs())?)?;
    }
    Ok(())
}

/// Limits that cut every pass along every axis.
fn cut(on: &Adapter) -> Result<(), String> {
    let cases = [
        Case::new("backward_cut", "", 3, [4, 2], [40, 70], [16, 12])
            .mask("bhqk")
            .sinks(0.0)
            .alibi()
            .kv_lens(&[70, 0, 33]),
        Case::new("backward_cut_bias", "", 2, [2, 2], [33, 50], [8, 8]).bias(Element::F32, "bhqk"),
        Case::new("backward_cut_sums", "", 2, [2, 2], [33, 50], [8, 8]).bias(Element::F32, "111k"),
    ];
    for (case, limit) in cases.into_iter().zip([16 << 10, 16 << 10, 8 << 10]) {
        let case = call(&case)?;
        let own = on.context.caps();
        let mut steps = 0;
        for bytes in [u64::MAX, limit, limit / 2] {
            let caps = DeviceCaps {
                max_storage_buffer_binding_size: own.max_storage_buffer_binding_size.min(bytes),
                ..own.clone()
            };
            let plan = BackwardPlan::new(&case.problem, &caps).map_err(|error| error.to_string())?;
            if plan.steps().len() <= steps {
                return Err(format!("not cut to {bytes}:\n{plan}"));
            }
            steps = plan.steps().len();
            let prepared =
                pollster::block_on(on.context.prepare_backward_plan(plan)).map_err(|error| message(&error))?;
            within_bounds(&case, &prepared.run_blocking(&case.inputs()).map_err(|error| message(&error))?)?;
        }
    }
    Ok(())
}

/// Forward and backward in one encoder of the caller's, over buffers that both bind; what stood in the gradients is gone.
fn encoded(on: &Adapter) -> Result<(), String> {
    let mut case = call(&Case::new("backward_encoded", "", 1, [2, 1], [9, 30], [8, 8]).sinks(0.5).alibi())?;
    let text = |error: Error| message(&error);
    let gpu = &on.context;
    let prepared = prepared(on, &case.problem)?;
    let attention = gpu.prepare_blocking(case.problem.forward(), None).map_err(text)?;
    let tensors = attention.upload_blocking(&case.data.as_inputs()).map_err(text)?;
    let upload = |name: &str, data: &[f32]| gpu.upload_blocking(name, data).map_err(|error| error.to_string());
    let d_output =
        pollster::block_on(gpu.upload_tensor("d_output", (&case.d_output).into())).map_err(|e| e.to_string())?;
    let d_lse = case.d_lse.as_ref().map(|d_lse| upload("d_lse", d_lse)).transpose()?;
    let d_weights = case.d_weights.as_ref().map(|d_weights| upload("d_weights", d_weights)).transpose()?;
    let gradients = pollster::block_on(prepared.allocate()).map_err(|error| error.to_string())?;
    let slots = [Slot::DQuery, Slot::DKey, Slot::DValue, Slot::DBias, Slot::DAlibiSlopes, Slot::DSinks, Slot::DScale];
    for buffer in slots.into_iter().filter_map(|slot| gradients.buffer(slot)) {
        gpu.queue().write_buffer(buffer, 0, &vec![0xff; usize::try_from(buffer.size()).expect("small")]);
    }
    let own = tensors.buffers();
    let mut buffers = gradients.buffers(&own, d_output.slice(..)).map_err(|error| error.to_string())?;
    buffers.d_lse = d_lse.as_ref().map(|buffer| buffer.slice(..));
    buffers.d_weights = d_weights.as_ref().map(|buffer| buffer.slice(..));
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let bound = attention.bind(&own).map_err(|error| error.to_string())?;
    let bound_backward = prepared.bind(&buffers).map_err(|error| error.to_string())?;
    BoundSteps::encode_all([&bound, &bound_backward], &mut encoder);
    gpu.queue().submit([encoder.finish()]);
    let found = pollster::block_on(prepared.read(&gradients)).map_err(text)?;
    // the oracle takes what this forward gave
    case.forward = attention.read_output_blocking(&tensors).map_err(text)?;
    within_bounds(&case, &found)?;
    // what is read must not be written
    let aliased = BackwardBuffers { d_query: Some(buffers.query), ..buffers };
    match prepared.bind(&aliased) {
        Err(GpuError::Aliased { written: "d_query", read: "query" }) => {}
        other => return Err(format!("{other:?}")),
    }
    let missing = BackwardBuffers { d_key: None, ..buffers };
    match prepared.bind(&missing) {
        Err(GpuError::Missing { name: "d_key" }) => Ok(()),
        other => Err(format!("{other:?}")),
    }
}
