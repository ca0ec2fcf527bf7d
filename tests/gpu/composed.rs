//! What is built on attention: pools of passages, several sources, prepared contexts; as on the CPU.

use cross_attention::context::{ContextInputs, ContextSpec, PreparedContext};
use cross_attention::gpu::{AdapterRequest, Context, GpuError, choose};
use cross_attention::pool::{GroupQuery, PassagePool, PoolAttention, PoolSpec, Storage};
use cross_attention::sources::{
    Combine, Gate, Source, SourceBuffers, SourceInputs, Sources, SourcesBuffers, SourcesError,
};
use cross_attention::{Device, Element, Error, Layout, RowState, TensorSpec};
use libtest_mimic::Trial;

use super::adapters::Adapter;
use super::trials::trial;
use crate::common::contexts;
use crate::common::plain::numbers;
use crate::common::pools::{self, Step};
use crate::common::several;

type Check = fn(&Device) -> Result<(), String>;

const POOL: [(&str, Check); 10] = [
    ("lists", |device| pools::lists(device, Storage::Device, Element::F32)),
    ("lists_f16", |device| pools::lists(device, Storage::Device, Element::F16)),
    ("lists_from_host", |device| pools::lists(device, Storage::Host, Element::F32)),
    ("freed_pages", |device| pools::poison(device, Storage::Device)),
    ("freed_pages_on_host", |device| pools::poison(device, Storage::Host)),
    ("storages_agree", pools::storages_agree),
    ("large_and_capped", |device| pools::large_and_capped(device, Storage::Device)),
    ("large_and_capped_on_host", |device| pools::large_and_capped(device, Storage::Host)),
    ("refusals", pools::refusals),
    ("sequence", |device| pools::sequence(device, Storage::Device, &steps())),
];

const CONTEXTS: [(&str, Check); 3] =
    [("all", contexts::all), ("fifty_calls", contexts::fifty_calls), ("refusals", contexts::refusals)];

type Encode = fn(&Context) -> Result<(), String>;

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
    trials.extend(group("sources", &[("refusals", several::refusals), ("terms", several::terms)]));
    trials.extend(group("contexts", &CONTEXTS));
    let on_device: [(&str, Encode); 2] = [("in_a_callers_encoder", in_a_callers_encoder), ("lost_device", lost_device)];
    for (name, check) in on_device {
        let context = adapter.context.clone();
        trials.push(trial(adapter, "sources", name, move || check(&context)));
    }
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

/// Two sources that are slices of one buffer, recorded between copies of the caller's; as from host memory.
fn in_a_callers_encoder(context: &Context) -> Result<(), String> {
    // 2 heads of 64: 5 and 3 keys
    let (query, lens, width) = (numbers(1, 2 * 2 * 3 * 64, 1.0), [5, 3], 64);
    let held = numbers(2, 2 * 2 * 2 * (5 + 3) * width, 2.0);
    let gate = [0.7f32, -0.4];
    let of_len = |len| of([2, 2, len, width]);
    let described = lens.map(|len| Source::new(format!("{len} keys"), of([2, 2, 3, width]), of_len(len), of_len(len)));
    // key and value of the first, then of the second
    let mut starts = vec![0usize];
    for len in [5, 5, 3, 3] {
        starts.push(starts[starts.len() - 1] + 2 * 2 * len * width);
    }
    let part = |n: usize| &held[starts[n]..starts[n + 1]];
    let inputs = [SourceInputs::new(part(0), part(1)), SourceInputs::new(part(2), part(3))];
    for combine in [Combine::Softmax, Combine::Sum] {
        let sources = Sources::new(described.to_vec(), combine, Gate::Heads).map_err(text)?;
        let prepared = sources.prepare_blocking(&Device::Gpu(context.clone())).map_err(text)?;
        let wanted = prepared.run_blocking((&query).into(), &inputs, Some(&gate)).map_err(text)?;
        let on_gpu = prepared.on_gpu().ok_or("it is on a GPU")?;
        let upload = |name, data: &[f32]| context.upload_blocking(name, data).map_err(text);
        let (query, held, gate) = (upload("query", &query)?, upload("held", &held)?, upload("gate", &gate)?);
        let rows = 2 * 2 * 3;
        let output = context.allocate_blocking("output", (rows * width * 4) as u64).map_err(text)?;
        let row_state = context.allocate_blocking("row_state", rows as u64 * 8).map_err(text)?;
        let source_row_state = context.allocate_blocking("source_row_state", 2 * rows as u64 * 8).map_err(text)?;
        let slice = |n: usize| held.slice(starts[n] as u64 * 4..starts[n + 1] as u64 * 4);
        let source = |n: usize| SourceBuffers {
            key: slice(2 * n),
            value: slice(2 * n + 1),
            bias: None,
            mask: None,
            kv_lens: None,
            row_start: None,
            row_end: None,
            alibi_slopes: None,
            sinks: None,
        };
        let shared = SourcesBuffers {
            query: query.slice(..),
            row_weights: None,
            gate: Some(&gate),
            output: &output,
            row_state: &row_state,
            source_row_state: &source_row_state,
        };
        let new_encoder = || context.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let mut encoder = new_encoder();
        pollster::block_on(on_gpu.encode(&mut encoder, &[source(0), source(1)], &shared)).map_err(text)?;
        context.queue().submit([encoder.finish()]);
        let got: Vec<f32> = context.read_blocking("output", output.slice(..), rows * width).map_err(text)?;
        if got != wanted.output {
            return Err(format!("{combine:?}: {got:?}\nwanted {:?}", wanted.output));
        }
        if let Some(wanted) = &wanted.lse {
            let pairs: Vec<f32> = context.read_blocking("row_state", row_state.slice(..), 2 * rows).map_err(text)?;
            let (row_max, row_sum) = pairs.chunks_exact(2).map(|pair| (pair[0], pair[1])).unzip();
            let got = RowState { row_max, row_sum }.lse();
            if got != *wanted {
                return Err(format!("lse {got:?}, wanted {wanted:?}"));
            }
        }
        let refused =
            |sources: &[SourceBuffers<'_>], shared: SourcesBuffers<'_>, wanted: Error| match pollster::block_on(
                on_gpu.encode(&mut new_encoder(), sources, &shared),
            ) {
                Err(error) if error == wanted => Ok(()),
                found => Err(format!("wanted {wanted:?}, found {found:?}")),
            };
        let both = [source(0), source(1)];
        refused(&both[..1], shared, SourcesError::Count { wanted: 2, found: 1 }.into())?;
        refused(&both, SourcesBuffers { gate: None, ..shared }, GpuError::Missing { name: "gate" }.into())?;
        let unexpected = SourcesBuffers { row_weights: Some(&gate), ..shared };
        refused(&both, unexpected, GpuError::Unexpected { name: "row_weights" }.into())?;
        let small = GpuError::BufferTooSmall { name: "output", needed: (rows * width * 4) as u64, found: 96 };
        let short = context.allocate_blocking("output", 96).map_err(text)?;
        refused(&both, SourcesBuffers { output: &short, ..shared }, small.into())?;
        // what is written may be nothing else of the call
        for (written, read, twice) in [
            ("row_state", "source_row_state", SourcesBuffers { row_state: &source_row_state, ..shared }),
            ("output", "query", SourcesBuffers { query: output.slice(..), ..shared }),
            ("output", "source_row_state", SourcesBuffers { source_row_state: &output, ..shared }),
        ] {
            refused(&both, twice, GpuError::Aliased { written, read }.into())?;
        }
    }
    Ok(())
}

/// Everything that is built on attention says so when its device is gone, and a pool stays as it was.
fn lost_device(context: &Context) -> Result<(), String> {
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
        ("sources", sources.run_blocking((&numbers).into(), &[inputs], None).map(drop)),
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
