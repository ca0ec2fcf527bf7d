//! What is built on attention: pools of passages, several sources, prepared contexts; as on the CPU.

use cross_attention::context::{ContextInputs, ContextSpec, PreparedContext};
use cross_attention::gpu::{AdapterRequest, Gpu, GpuError, choose};
use cross_attention::pool::{GroupQuery, PassagePool, PoolAttention, PoolSpec, Storage};
use cross_attention::sources::{Combine, Gate, Source, SourceInputs, Sources};
use cross_attention::{Device, Element, Error, Layout, TensorSpec};
use libtest_mimic::Trial;

use super::adapters::Adapter;
use super::trials::trial;
use crate::common::contexts;
use crate::common::plain::numbers;
use crate::common::pools::{self, Step};
use crate::common::{growing, several};

type Check = fn(&Device) -> Result<(), String>;

const POOL: [(&str, Check); 13] = [
    ("lists", |device| pools::lists(device, Storage::Device, Element::F32)),
    ("lists_f16", |device| pools::lists(device, Storage::Device, Element::F16)),
    ("lists_bf16", |device| pools::lists(device, Storage::Device, Element::Bf16)),
    ("lists_i8", |device| pools::lists(device, Storage::Device, Element::I8)),
    ("lists_i8_from_host", |device| pools::lists(device, Storage::Host, Element::I8)),
    ("lists_from_host", |device| pools::lists(device, Storage::Host, Element::F32)),
    ("freed_pages", |device| pools::poison(device, Storage::Device)),
    ("freed_pages_on_host", |device| pools::poison(device, Storage::Host)),
    ("storages_agree", pools::storages_agree),
    ("large_and_capped", |device| pools::large_and_capped(device, Storage::Device)),
    ("large_and_capped_on_host", |device| pools::large_and_capped(device, Storage::Host)),
    ("refusals", pools::refusals),
    ("sequence", |device| pools::sequence(device, Storage::Device, &steps())),
];

const CONTEXTS: [(&str, Check); 6] = [
    ("all", contexts::all),
    ("fifty_calls", contexts::fifty_calls),
    ("refusals", contexts::refusals),
    ("growing", |device| growing::steps(device, Element::F32)),
    ("growing_bf16", |device| growing::steps(device, Element::Bf16)),
    ("growing_refusals", growing::refusals),
];

/// Appends, removals and calls in turns that return nowhere soon.
fn steps() -> Vec<Step> {
    let step = |n: usize| match n * n % 7 {
        0 | 2 => Step::Append(n * 11 % 31),
        1 => Step::Remove(n * 5),
        _ => Step::Attend(n),
    };
    (0..40).map(|n| if n < 4 { Step::Append(n * 9) } else { step(n) }).collect()
}

pub(crate) fn trials(adapter: &Adapter) -> Vec<Trial> {
    let group = |name: &'static str, checks: &[(&'static str, Check)]| {
        let trials = checks.iter().map(|&(check_name, check)| {
            let device = Device::Gpu(adapter.context.clone());
            trial(adapter, name, check_name, move || check(&device))
        });
        trials.collect::<Vec<_>>()
    };
    let mut trials = group("pool", &POOL);
    trials.extend(group(
        "sources",
        &[("refusals", several::refusals), ("terms", several::terms), ("left_out", several::left_out)],
    ));
    trials.extend(group("contexts", &CONTEXTS));
    let context = adapter.context.clone();
    trials.push(trial(adapter, "sources", "lost_device", move || lost_device(&context)));
    for combine in [Combine::Softmax, Combine::Sum] {
        for gate in [Gate::None, Gate::Scalar, Gate::Heads] {
            let device = Device::Gpu(adapter.context.clone());
            let name = format!("{combine:?}_{gate:?}").to_lowercase();
            trials.push(trial(adapter, "sources", &name, move || {
                several::fixed(combine, gate)
                    .iter()
                    .try_for_each(|asked| several::check(&device, asked).map_err(|error| format!("{asked:?}: {error}")))
            }));
        }
    }
    trials
}

fn of(shape: [usize; 4]) -> TensorSpec {
    TensorSpec::f32(Layout::bhld(shape))
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Everything that is built on attention says so when its device is gone, and a pool stays as it was.
fn lost_device(context: &Gpu) -> Result<(), String> {
    let request = AdapterRequest::Named(context.info().name.clone());
    let lost = pollster::block_on(async { choose(&request).await?.open().await }).map_err(text)?;
    let device = Device::Gpu(lost.clone());
    let numbers = numbers(1, 32, 1.0);
    let mut pool = PassagePool::new(&device, PoolSpec::new(1, 8)).map_err(text)?;
    let id = pool.append_blocking(&numbers, &numbers, 4).map_err(text)?;
    let prompt = PreparedContext::new_blocking(&device, ContextSpec::new([1, 1, 4, 8]), &numbers, &numbers, None);
    let prompt = prompt.map_err(text)?;
    let shape = [1, 1, 4, 8];
    let source = Source::new("only", of(shape), of(shape), of(shape));
    let sources = Sources::new(vec![source], Combine::Sum, Gate::None).map_err(text)?;
    let sources = sources.prepare_blocking(&device).map_err(text)?;
    lost.device().destroy();
    let before = (pool.len(), pool.pages(), pool.free_pages());
    let group = GroupQuery { query: (&numbers).into(), q_len: 4, passages: &[id] };
    let inputs = SourceInputs::new(&numbers, &numbers);
    let results = [
        ("append", pool.append_blocking(&numbers, &numbers, 4).map(drop)),
        ("attend", pool.attend_blocking(&[group], &PoolAttention::new(1)).map(drop)),
        ("context", prompt.attend_blocking(&prompt.attention(of(shape)), &ContextInputs::new(&numbers)).map(drop)),
        ("sources", sources.run_blocking(&numbers, &[inputs], None).map(drop)),
    ];
    for (call, result) in results {
        match result {
            Err(Error::Gpu(GpuError::DeviceLost { .. })) => {}
            other => return Err(format!("{call}: {other:?}")),
        }
    }
    let after = (pool.len(), pool.pages(), pool.free_pages());
    if before == after { Ok(()) } else { Err(format!("{before:?} became {after:?}")) }
}
