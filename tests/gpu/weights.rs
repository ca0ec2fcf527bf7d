//! Selected attention weights on the device: as f64 has them, alone and behind the attention, cut and in the caller's
//! encoder.

use cross_attention::gpu::{GpuError, WeightsBuffers};
use cross_attention::plan::WeightsPlan;
use cross_attention::weights::{HeadReduce, Keys, Select, WeightsProblem, WeightsSpec};
use cross_attention::{AttentionData, AttentionProblem, Device, DeviceCaps, Error, Terms, wgpu};
use libtest_mimic::Trial;

use super::adapters::Adapter;
use super::trials::{message, random_cases, trial};
use crate::common::case::Case;
use crate::common::{cases, weights};

const GROUP: &str = "weights";

/// Cases with every term that a score has, every way to store what goes into it, and rows without keys.
const CASES: [&str; 20] = [
    "kv_len_129",
    "q_len_33",
    "heads_gqa_of_3",
    "causal_gqa_odd",
    "mask_blank_rows",
    "kv_lens_zero",
    "no_keys_all_terms",
    "no_queries_all_terms",
    "wild_sinks_blank_rows",
    "logits_all_1e4",
    "head_dim_5_v_320",
    "sinks",
    "long_causal_half",
    "long_all_terms",
    "padded_1e9_probs",
    "padded_1e9_equal_probs",
    "padded_min_equal_probs",
    "padded_1e9_sinks",
    "common_1e6_probs",
    "common_minus_1e6_long_keys",
];

/// Selections of each case, and how many random cases there are.
const SELECTIONS: u64 = 4;
const RANDOM_CASES: usize = 40;

/// What a trial does that has no case of the table.
type Check = fn(&Adapter) -> Result<(), String>;

pub(crate) fn trials(adapter: &Adapter) -> Vec<Trial> {
    let table = cases::all();
    let named = |name: &str| table.iter().find(|case| case.name == name).expect("a case of the table").clone();
    let poisoned = table.iter().filter(|case| case.recipe.poison).take(6).cloned();
    let planted = table.iter().filter(|case| !case.recipe.planted.is_empty()).take(8).cloned();
    let mut trials = Vec::new();
    for case in CASES.into_iter().map(named).chain(poisoned).chain(planted) {
        let on = adapter.clone();
        let name = case.name.clone();
        trials.push(trial(adapter, GROUP, &name, move || {
            (0..SELECTIONS).try_for_each(|number| check(&on, &case, if number == 0 { 0 } else { 100 + number }))
        }));
    }
    for (n, case) in random_cases().into_iter().take(RANDOM_CASES).enumerate() {
        let on = adapter.clone();
        let name = format!("random_{n:02}");
        trials.push(trial(adapter, GROUP, &name, move || check(&on, &case, n as u64 + 1)));
    }
    let others: [(&str, Check); 4] =
        [("one_call", one_call), ("cut", cut), ("encoded", encoded), ("refusals", refusals)];
    for (name, check) in others {
        let on = adapter.clone();
        trials.push(trial(adapter, GROUP, name, move || check(&on)));
    }
    trials
}

fn wanted(problem: &AttentionProblem, spec: &WeightsSpec) -> Result<WeightsProblem, String> {
    WeightsProblem::new(problem, spec).map_err(|error| error.to_string())
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

fn check(adapter: &Adapter, case: &Case, number: u64) -> Result<(), String> {
    let (problem, data) = (case.problem(), case.data());
    let spec = weights::selection(&problem, number);
    let wanted = wanted(&problem, &spec)?;
    let lse = weights::lse(&problem, &data);
    let run = |data: &AttentionData| {
        adapter.context.weights_blocking(&wanted, &data.as_inputs(), &lse).map_err(|error| message(&error))
    };
    let got = run(&data)?;
    if !same_bits(&got, &run(&case.clean().data())?) {
        return Err(format!("{case}\n{spec:?}: what is not allowed, or another run, changes the weights"));
    }
    weights::compare(case, &data, &lse, &spec, &got)
}

fn larger() -> Case {
    Case::new("weights_larger", "several blocks of keys, several entries", 5, [4, 2], [40, 150], [16, 12])
        .sinks(0.0)
        .alibi()
        .kv_lens(&[150, 0, 64, 65, 1])
}

fn segments() -> WeightsSpec {
    WeightsSpec {
        heads: Select::List(vec![3, 0, 3]),
        reduce: HeadReduce::Mean,
        rows: Select::Range(2..38),
        keys: Keys::Segments(vec![0..150, 0..64, 64..65, 65..65, 149..150]),
    }
}

/// Attention and weights in one submission: the attention is as without, the weights are as from its maxima and sums.
fn one_call(adapter: &Adapter) -> Result<(), String> {
    let case = larger().without_lse();
    let (problem, data) = (case.problem(), case.data());
    let inputs = data.as_inputs();
    let device = Device::Gpu(adapter.context.clone());
    for spec in [segments(), WeightsSpec::default()] {
        let both = device.attention_with_weights_blocking(&problem, &inputs, &spec).map_err(|e| message(&e))?;
        let alone = device.attention_blocking(&problem, &inputs).map_err(|e| message(&e))?;
        if both.attention.output != alone.output {
            return Err("the weights change the output".to_owned());
        }
        let lse = both.attention.lse.ok_or("lse is always returned")?;
        let wanted = wanted(&problem, &spec)?;
        if both.shape != wanted.shape() {
            return Err(format!("shape {:?}, should be {:?}", both.shape, wanted.shape()));
        }
        weights::compare(&case, &data, &lse, &spec, &both.weights)?;
        let mut asked = problem.spec().clone();
        asked.row_state = true;
        let asked = AttentionProblem::new(asked).map_err(|error| error.to_string())?;
        let state = device.attention_blocking(&asked, &inputs).map_err(|e| message(&e))?.row_state;
        let state = state.ok_or("row_state was asked for")?;
        let again = adapter.context.weights_blocking(&wanted, &inputs, &state).map_err(|e| message(&e))?;
        if !same_bits(&again, &both.weights) {
            return Err("the same pass in a call of its own gives other bits".to_owned());
        }
    }
    Ok(())
}

/// A plan for a device that takes one batch entry at a time, and has few workgroups along an axis, gives the same bits.
fn cut(adapter: &Adapter) -> Result<(), String> {
    let case = larger();
    let (problem, data) = (case.problem(), case.data());
    let lse = weights::lse(&problem, &data);
    let wanted = wanted(&problem, &WeightsSpec::default())?;
    let context = &adapter.context;
    let one_entry = wanted.shape().iter().product::<usize>() as u64 * 4 / 5;
    let caps = DeviceCaps {
        max_storage_buffer_binding_size: one_entry + 256,
        max_compute_workgroups_per_dimension: 47,
        ..context.caps().clone()
    };
    let plan = WeightsPlan::new(&wanted, &caps).map_err(|error| error.to_string())?;
    if plan.steps().len() != 5 {
        return Err(format!("{} steps, should be 5", plan.steps().len()));
    }
    let whole = context.weights_blocking(&wanted, &data.as_inputs(), &lse).map_err(|e| message(&e))?;
    let cut = run_plan(adapter, &case, plan, &lse)?;
    weights::compare(&case, &data, &lse, &WeightsSpec::default(), &cut)?;
    if same_bits(&whole, &cut) { Ok(()) } else { Err("cut, the weights have other bits".to_owned()) }
}

fn run_plan(adapter: &Adapter, case: &Case, plan: WeightsPlan, lse: &[f32]) -> Result<Vec<f32>, String> {
    let context = &adapter.context;
    let data = case.data();
    let run = async {
        let upload = async |name, words: &[u32]| context.upload(name, words).await;
        let query = context.upload_tensor("query", data.query.as_ref()).await?;
        let key = context.upload_tensor("key", data.key.as_ref()).await?;
        let kv_lens = upload("kv_lens", data.terms.kv_lens.as_deref().unwrap_or_default()).await?;
        let slopes = context.upload("alibi_slopes", data.terms.alibi_slopes.as_deref().unwrap_or_default()).await?;
        let pairs: Vec<f32> =
            lse.iter().flat_map(|&lse| [lse, if lse == f32::NEG_INFINITY { 0.0 } else { 1.0 }]).collect();
        let row_state = context.upload("row_state", &pairs).await?;
        let elements = plan.problem().shape().iter().product();
        let prepared = context.prepare_weights_plan(plan).await?;
        let weights = prepared.allocate().await?;
        let buffers = WeightsBuffers {
            query: query.slice(..),
            key: key.slice(..),
            terms: Terms { kv_lens: Some(kv_lens.slice(..)), alibi_slopes: Some(slopes.slice(..)), ..Terms::default() },
            row_state: row_state.slice(..),
            weights: weights.slice(..),
        };
        let mut encoder = context.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        prepared.encode(&mut encoder, &buffers)?;
        context.queue().submit([encoder.finish()]);
        Ok::<_, Error>(context.read("weights", weights.slice(..), elements).await?)
    };
    drive(adapter, run).map_err(|error| message(&error))
}

/// Waits for a future and polls the device meanwhile.
fn drive<T>(adapter: &Adapter, future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    loop {
        if let std::task::Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
        adapter.context.device().poll(wgpu::PollType::wait_indefinitely()).expect("the device answers");
    }
}

/// Recorded between the caller's own passes, behind the attention whose maxima and sums it reads.
fn encoded(adapter: &Adapter) -> Result<(), String> {
    let case = larger();
    let data = case.data();
    let mut asked = case.problem().spec().clone();
    asked.row_state = true;
    let problem = AttentionProblem::new(asked).map_err(|error| error.to_string())?;
    let spec = segments();
    let wanted = wanted(&problem, &spec)?;
    let context = &adapter.context;
    let run = || {
        let attention = context.prepare_blocking(&problem, None)?;
        let pass = context.prepare_weights_blocking(&wanted)?;
        let tensors = attention.upload_blocking(&data.as_inputs())?;
        let weights = drive(adapter, pass.allocate())?;
        let buffers = tensors.buffers();
        let mut encoder = context.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        attention.encode(&mut encoder, &buffers)?;
        pass.encode(&mut encoder, &WeightsBuffers::of(&buffers, weights.slice(..))?)?;
        context.queue().submit([encoder.finish()]);
        let lse = attention.read_output_blocking(&tensors)?.lse.unwrap_or_default();
        let got: Vec<f32> = context.read_blocking("weights", weights.slice(..), 5 * 36 * 5)?;
        Ok::<_, Error>((lse, got))
    };
    let (lse, got) = run().map_err(|error| message(&error))?;
    weights::compare(&case, &data, &lse, &spec, &got)
}

fn refusals(adapter: &Adapter) -> Result<(), String> {
    let case = Case::new("weights_refused", "buffers that will not do", 1, [2, 2], [3, 9], [8, 8]);
    let mut asked = case.problem().spec().clone();
    asked.row_state = true;
    let problem = AttentionProblem::new(asked).map_err(|error| error.to_string())?;
    let wanted = wanted(&problem, &WeightsSpec::default())?;
    let context = &adapter.context;
    let pass = context.prepare_weights_blocking(&wanted).map_err(|error| message(&error))?;
    let attention = context.prepare_blocking(&problem, None).map_err(|error| message(&error))?;
    let tensors = attention.upload_blocking(&case.data().as_inputs()).map_err(|error| message(&error))?;
    let allocate = |bytes| context.allocate_blocking("weights", bytes).map_err(|error| error.to_string());
    let (right, small) = (allocate(2 * 3 * 9 * 4)?, allocate(2 * 3 * 9 * 4 - 4)?);
    let buffers = tensors.buffers();
    let of = |weights| WeightsBuffers::of(&buffers, weights).map_err(|error| error.to_string());
    let good = of(right.slice(..))?;
    let found = [
        pass.bind(&of(small.slice(..))?).err(),
        pass.bind(&WeightsBuffers { weights: tensors.query.slice(..), query: right.slice(..), ..good }).err(),
        pass.bind(&WeightsBuffers { row_state: right.slice(..), ..good }).err(),
        pass.bind(&WeightsBuffers { terms: Terms { mask: Some(small.slice(..)), ..good.terms }, ..good }).err(),
        pass.bind(&good).err(),
    ];
    let expected = [
        Some(GpuError::BufferTooSmall { name: "weights", needed: 216, found: 212 }),
        Some(GpuError::BufferTooSmall { name: "weights", needed: 216, found: tensors.query.size() }),
        Some(GpuError::Aliased { written: "weights", read: "row_state" }),
        Some(GpuError::Unexpected { name: "mask" }),
        None,
    ];
    if found == expected { Ok(()) } else { Err(format!("{found:?}\nshould be\n{expected:?}")) }
}
