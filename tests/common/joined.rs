//! Everything that is prepared on a device, called with one of several inputs: what a call writes belongs to the call, so
//! that calls that run at the same time give the bits that each gives alone.

use std::future::Future;
use std::pin::Pin;
use std::task::{Poll, Waker};

use cross_attention::backward::{BackwardInputs, BackwardProblem, BackwardSpec};
use cross_attention::context::{ContextInputs, ContextSpec, ContextStorage, PreparedContext};
use cross_attention::gpu::{AttentionTensors, GpuAttention, PreparedWeights, WeightsBuffers};
#[cfg(feature = "layer")]
use cross_attention::layer::{CrossAttention, LayerConfig, LayerContext, LayerOn, LayerOptions};
use cross_attention::pool::{GroupQuery, PassageId, PassagePool, PoolAttention, PoolSpec};
use cross_attention::sources::{Combine, Gate, PreparedSources, Source, SourceInputs, Sources};
use cross_attention::weights::{HeadReduce, WeightsProblem, WeightsSpec};
use cross_attention::{
    AttentionInputs, AttentionOutput, AttentionProblem, AttentionSpec, Device, Element, Error, Kernel, KernelChoice,
    Layout, PreparedAttention, PreparedBackward, TensorSpec, Terms, cpu, wgpu,
};

use super::plain::numbers;

/// All that a call gives, as bits.
pub(crate) type Bits = Vec<u32>;
pub(crate) type Call<'a> = Pin<Box<dyn Future<Output = Result<Bits, Error>> + 'a>>;

/// Inputs that calls differ in.
pub(crate) const INPUTS: usize = 2;

/// Something prepared on a device, to be called with inputs number `n`.
pub(crate) trait Prepared: Sync {
    fn call(&self, n: usize) -> Call<'_>;
}

pub(crate) type Make = fn(&Device) -> Result<Box<dyn Prepared>, Error>;

/// Name of each, and how it is made.
pub(crate) fn all() -> Vec<(&'static str, Make)> {
    let mut all: Vec<(&'static str, Make)> = vec![
        ("attention", |device| attention(device, KernelChoice::Auto)),
        ("attention_with_weights", |device| Ok(Box::new(WithWeights { device: device.clone(), data: data() }))),
        ("backward", backward),
        ("context_f32", |device| context(device, ContextStorage::F32)),
        ("context_q8_0", |device| context(device, ContextStorage::Q8_0)),
        ("sources_softmax", |device| sources(device, Combine::Softmax)),
        ("sources_sum", |device| sources(device, Combine::Sum)),
        ("pool", pool),
    ];
    #[cfg(feature = "layer")]
    all.extend([
        ("layer", (|device| layer(device, false)) as Make),
        ("layer_with_kept_context", (|device| layer(device, true)) as Make),
    ]);
    all
}

/// Those that only a GPU has.
pub(crate) const ON_GPU: [(&str, Make); 7] = [
    ("rows", |device| attention(device, KernelChoice::Gpu(Kernel::Rows))),
    ("split", |device| attention(device, KernelChoice::Gpu(Kernel::Split))),
    ("tiled", |device| attention(device, KernelChoice::Gpu(Kernel::Tiled))),
    ("fused", |device| attention(device, KernelChoice::Gpu(Kernel::Fused))),
    ("plain", |device| attention(device, KernelChoice::Gpu(Kernel::Plain))),
    ("weights", weights),
    ("linear", linear),
];

/// Drives all of them, by turns, until each is done.
pub(crate) fn drive(device: &Device, mut calls: Vec<Call<'_>>) -> Vec<Result<Bits, Error>> {
    let mut done: Vec<_> = calls.iter().map(|_| None).collect();
    while done.iter().any(Option::is_none) {
        for (call, done) in calls.iter_mut().zip(&mut done) {
            if done.is_none() {
                *done = step(call);
            }
        }
        if let Device::Gpu(context) = device {
            // what the poll says of itself adds nothing
            let _ = context.device().poll(wgpu::PollType::Poll);
        }
        std::thread::yield_now();
    }
    done.into_iter().flatten().collect()
}

/// Runs a call until it has to wait.
pub(crate) fn step(call: &mut Call<'_>) -> Option<Result<Bits, Error>> {
    match call.as_mut().poll(&mut std::task::Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => Some(result),
        Poll::Pending => None,
    }
}

/// A call of each input alone.
pub(crate) fn alone(device: &Device, prepared: &dyn Prepared) -> Result<Vec<Bits>, String> {
    let calls = (0..INPUTS).flat_map(|n| drive(device, vec![prepared.call(n)]));
    calls.collect::<Result<_, _>>().map_err(|error| error.to_string())
}

/// Two joined calls in either order, then several threads: each gives the bits of the call alone.
pub(crate) fn check(device: &Device, make: Make) -> Result<(), String> {
    let prepared = make(device).map_err(|error| error.to_string())?;
    let prepared = &*prepared;
    let wanted = alone(device, prepared)?;
    if wanted[0] == wanted[1] {
        return Err("both inputs give the same: nothing could be told apart".to_owned());
    }
    let compare = |what: &str, n: usize, found: Result<Bits, Error>| match found {
        Ok(found) if found == wanted[n] => Ok(()),
        Ok(found) => {
            let others = (0..INPUTS).filter(|other| found == wanted[*other]).collect::<Vec<_>>();
            let different = found.iter().zip(&wanted[n]).filter(|(a, b)| a != b).count();
            Err(format!("{what}, input {n}: {different} of {} differ, as of inputs {others:?}", found.len()))
        }
        Err(error) => Err(format!("{what}, input {n}: {error}")),
    };
    for order in [[0, 1], [1, 0], [0, 0]] {
        let calls = order.iter().map(|&n| prepared.call(n)).collect();
        for (&n, found) in order.iter().zip(drive(device, calls)) {
            compare("joined", n, found)?;
        }
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                scope.spawn(move || {
                    (0..3).try_for_each(|round| {
                        let n = (thread + round) % INPUTS;
                        drive(device, vec![prepared.call(n)])
                            .into_iter()
                            .try_for_each(|found| compare("threads", n, found))
                    })
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked".to_owned())?)
    })
}

fn bits(of: &[&[f32]]) -> Bits {
    of.iter().flat_map(|values| values.iter().map(|x| x.to_bits())).collect()
}

fn output_bits(output: &AttentionOutput) -> Bits {
    let lse = output.lse.as_deref().unwrap_or_default();
    bits(&[&output.output.to_f32(), lse, output.scores.as_deref().unwrap_or_default()])
}

fn of(shape: [usize; 4]) -> TensorSpec {
    TensorSpec::f32(Layout::bhld(shape))
}

/// Query, key and value of one call, with key lengths and sinks of its own, which a GPU copies to one place.
struct Data {
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    kv_lens: [u32; 2],
    sinks: [f32; 4],
}

const Q_LEN: usize = 3;
const KV_LEN: usize = 1100;
const DIM: usize = 8;

fn data() -> [Data; INPUTS] {
    std::array::from_fn(|n| {
        let seed = 10 * n as u64;
        Data {
            query: numbers(seed + 1, 2 * 4 * Q_LEN * DIM, 1.0),
            key: numbers(seed + 2, 2 * 2 * KV_LEN * DIM, 1.0),
            value: numbers(seed + 3, 2 * 2 * KV_LEN * DIM, 1.0),
            kv_lens: if n == 0 { [1100, 700] } else { [650, 1000] },
            sinks: if n == 0 { [0.5, -1.0, 2.0, 0.0] } else { [3.0, 1.0, -2.0, 4.0] },
        }
    })
}

impl Data {
    fn inputs(&self) -> AttentionInputs<'_> {
        AttentionInputs {
            terms: Terms { kv_lens: Some(&self.kv_lens), sinks: Some(&self.sinks), ..Terms::default() },
            ..AttentionInputs::new(&self.query, &self.key, &self.value)
        }
    }
}

/// Enough keys that `split` and `rows` cut them, and `plain` stores scores.
fn problem() -> Result<AttentionProblem, Error> {
    let mut spec = AttentionSpec::new([2, 4, Q_LEN, DIM], [2, 2, KV_LEN, DIM]);
    spec.kv_lens = true;
    spec.sinks = true;
    spec.lse = true;
    Ok(AttentionProblem::new(spec)?)
}

struct Attention {
    prepared: PreparedAttention,
    data: [Data; INPUTS],
}

fn attention(device: &Device, kernel: KernelChoice) -> Result<Box<dyn Prepared>, Error> {
    Ok(Box::new(Attention { prepared: device.prepare_blocking(&problem()?, kernel)?, data: data() }))
}

impl Prepared for Attention {
    fn call(&self, n: usize) -> Call<'_> {
        Box::pin(async move { Ok(output_bits(&self.prepared.run(&self.data[n].inputs()).await?)) })
    }
}

/// Gradients of the attention, given what the CPU's forward returned.
struct Backward {
    prepared: PreparedBackward,
    data: [Data; INPUTS],
    forward: Vec<AttentionOutput>,
    d_output: [Vec<f32>; INPUTS],
}

fn backward(device: &Device) -> Result<Box<dyn Prepared>, Error> {
    let problem = BackwardProblem::new(BackwardSpec::all(problem()?.spec().clone()))?;
    let data = data();
    let forward = data.iter().map(|data| cpu::attention(problem.forward(), &data.inputs()));
    let forward = forward.collect::<Result<_, _>>()?;
    let d_output = [5, 6].map(|seed| numbers(seed, 2 * 4 * Q_LEN * DIM, 1.0));
    Ok(Box::new(Backward { prepared: device.prepare_backward_blocking(&problem)?, data, forward, d_output }))
}

impl Prepared for Backward {
    fn call(&self, n: usize) -> Call<'_> {
        Box::pin(async move {
            let inputs = BackwardInputs::new(self.data[n].inputs(), &self.forward[n], &self.d_output[n])?;
            Ok(super::backward::bits(&self.prepared.run(&inputs).await?))
        })
    }
}

struct WithWeights {
    device: Device,
    data: [Data; INPUTS],
}

impl Prepared for WithWeights {
    fn call(&self, n: usize) -> Call<'_> {
        Box::pin(async move {
            let mean = WeightsSpec { reduce: HeadReduce::Mean, ..WeightsSpec::default() };
            let result = self.device.attention_with_weights(&problem()?, &self.data[n].inputs(), &mean).await?;
            let mut all = output_bits(&result.attention);
            all.extend(bits(&[&result.weights]));
            Ok(all)
        })
    }
}

/// A prepared pass for weights behind a prepared attention.
struct Weights {
    attention: GpuAttention,
    pass: PreparedWeights,
    data: [Data; INPUTS],
}

fn weights(device: &Device) -> Result<Box<dyn Prepared>, Error> {
    let Device::Gpu(context) = device else { return Err(Error::UnknownKernel { name: "weights".to_owned() }) };
    let mut spec = problem()?.spec().clone();
    spec.row_state = true;
    let problem = AttentionProblem::new(spec)?;
    let wanted = WeightsProblem::new(&problem, &WeightsSpec { reduce: HeadReduce::Mean, ..WeightsSpec::default() })?;
    Ok(Box::new(Weights {
        attention: context.prepare_blocking(&problem, None)?,
        pass: context.prepare_weights_blocking(&wanted)?,
        data: data(),
    }))
}

impl Prepared for Weights {
    fn call(&self, n: usize) -> Call<'_> {
        Box::pin(async move {
            let context = self.attention.gpu();
            let tensors: AttentionTensors = self.attention.upload(&self.data[n].inputs()).await?;
            let weights = self.pass.allocate().await?;
            self.attention.submit(&self.attention.bind(&tensors.buffers())?).await?;
            // others record and submit meanwhile
            let output = self.attention.read_output(&tensors).await?;
            let mut encoder = context.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let buffers = tensors.buffers();
            self.pass.encode(&mut encoder, &WeightsBuffers::of(&buffers, weights.slice(..))?)?;
            context.queue().submit([encoder.finish()]);
            let weights: Vec<f32> = context.read("weights", weights.slice(..), self.pass.problem().elements()).await?;
            let mut all = output_bits(&output);
            all.extend(bits(&[&weights]));
            Ok(all)
        })
    }
}

struct Linear {
    prepared: cross_attention::gpu::PreparedLinear,
    data: [Vec<f32>; INPUTS],
}

fn linear(device: &Device) -> Result<Box<dyn Prepared>, Error> {
    let Device::Gpu(context) = device else { return Err(Error::UnknownKernel { name: "linear".to_owned() }) };
    let (weight, bias) = (numbers(1, 24 * 40, 1.0), numbers(2, 24, 1.0));
    let prepared = context.prepare_linear_blocking((&weight).into(), Some(&bias), [24, 40])?;
    Ok(Box::new(Linear { prepared, data: [numbers(3, 7 * 40, 1.0), numbers(4, 7 * 40, 1.0)] }))
}

impl Prepared for Linear {
    fn call(&self, n: usize) -> Call<'_> {
        Box::pin(async move { Ok(bits(&[&self.prepared.run((&self.data[n]).into()).await?])) })
    }
}

/// Two contexts in one call.
struct Contexts {
    context: PreparedContext,
    query: [Vec<f32>; INPUTS],
    index: [[u32; 3]; INPUTS],
}

fn context(device: &Device, storage: ContextStorage) -> Result<Box<dyn Prepared>, Error> {
    let spec = ContextSpec { storage, ..ContextSpec::new([2, 2, 700, 32]) };
    let (key, value) = (numbers(1, 2 * 2 * 700 * 32, 1.0), numbers(2, 2 * 2 * 700 * 32, 1.0));
    Ok(Box::new(Contexts {
        context: PreparedContext::new_blocking(device, spec, &key, &value, Some(&[700, 450]))?,
        query: [3, 4].map(|seed| numbers(seed, 3 * 4 * 2 * 32, 1.0)),
        index: [[0, 1, 1], [1, 0, 1]],
    }))
}

impl Prepared for Contexts {
    fn call(&self, n: usize) -> Call<'_> {
        Box::pin(async move {
            let mut spec = self.context.attention(of([3, 4, 2, 32]));
            spec.lse = true;
            let inputs = ContextInputs { context_index: Some(&self.index[n]), ..ContextInputs::new(&self.query[n]) };
            Ok(output_bits(&self.context.attend(&spec, &inputs).await?))
        })
    }
}

struct Several {
    prepared: PreparedSources,
    /// Query, then key and value of each source.
    data: [[Vec<f32>; 5]; INPUTS],
    gates: [[f32; 4]; INPUTS],
}

fn sources(device: &Device, combine: Combine) -> Result<Box<dyn Prepared>, Error> {
    let (lens, query) = ([600, 90], of([2, 4, Q_LEN, DIM]));
    let described =
        lens.map(|len| Source::new(format!("{len} keys"), query, of([2, 2, len, DIM]), of([2, 2, len, DIM])));
    let prepared = Sources::new(described.to_vec(), combine, Gate::Heads)?.prepare_blocking(device)?;
    let sizes = [4 * Q_LEN, 2 * 600, 2 * 600, 2 * 90, 2 * 90].map(|rows| 2 * rows * DIM);
    let data = |seed: u64| std::array::from_fn(|at| numbers(seed + at as u64, sizes[at], 1.0));
    Ok(Box::new(Several {
        prepared,
        data: [data(10), data(20)],
        gates: [[0.7, -0.4, 1.0, 0.2], [-0.1, 0.9, 0.3, 2.0]],
    }))
}

impl Prepared for Several {
    fn call(&self, n: usize) -> Call<'_> {
        Box::pin(async move {
            let [query, key, value, other_key, other_value] = &self.data[n];
            let inputs = [SourceInputs::new(key, value), SourceInputs::new(other_key, other_value)];
            let result = self.prepared.run(query, &inputs, Some((&self.gates[n]).into())).await?;
            Ok(bits(&[&result.output, result.lse.as_deref().unwrap_or_default(), &result.source_lse]))
        })
    }
}

/// Passages of several lengths in several rounds.
struct Pool {
    pool: PassagePool,
    lists: [Vec<PassageId>; INPUTS],
    query: [Vec<f32>; INPUTS],
}

fn pool(device: &Device) -> Result<Box<dyn Prepared>, Error> {
    // room for six pages of keys and values at once
    let spec = PoolSpec { staging_bytes: 6 * 2 * 16 * 2 * 8 * 4, ..PoolSpec::new(2, DIM) };
    let mut pool = PassagePool::new(device, spec)?;
    let mut ids = vec![];
    for (n, len) in [5, 40, 100, 17, 64].into_iter().enumerate() {
        let held = |seed| numbers(seed, 2 * len * DIM, 1.0);
        ids.push(pool.append_blocking(&held(n as u64), &held(n as u64 + 50), len)?);
    }
    let lists = [ids.clone(), ids[1..4].to_vec()];
    Ok(Box::new(Pool { pool, lists, query: [7, 8].map(|seed| numbers(seed, 4 * Q_LEN * DIM, 1.0)) }))
}

impl Prepared for Pool {
    fn call(&self, n: usize) -> Call<'_> {
        Box::pin(async move {
            let group =
                |n: usize| GroupQuery { query: (&self.query[n]).into(), q_len: Q_LEN, passages: &self.lists[n] };
            let results = self.pool.attend(&[group(n), group(1 - n)], &PoolAttention::new(4)).await?;
            Ok(results.iter().flat_map(|one| bits(&[&one.output, &one.lse, &one.passage_lse, &one.mass])).collect())
        })
    }
}

#[cfg(feature = "layer")]
struct Layer {
    layer: LayerOn,
    states: [Vec<f32>; INPUTS],
    contexts: [Vec<f32>; INPUTS],
    kept: Option<LayerContext>,
}

#[cfg(feature = "layer")]
fn layer(device: &Device, kept: bool) -> Result<Box<dyn Prepared>, Error> {
    let config = LayerConfig::new(24, 33, 4);
    let weights = super::layer::weights(&config, Element::F16);
    let layer = CrossAttention::new(config, weights)?.on_blocking(device)?;
    let contexts = [11, 12].map(|seed| numbers(seed, 2 * 40 * 33, 1.0));
    let kept = if kept { Some(layer.prepare_context_blocking(2, &contexts[0], Element::F16)?) } else { None };
    Ok(Box::new(Layer { layer, states: [13, 14].map(|seed| numbers(seed, 2 * 5 * 24, 1.0)), contexts, kept }))
}

#[cfg(feature = "layer")]
impl Prepared for Layer {
    fn call(&self, n: usize) -> Call<'_> {
        Box::pin(async move {
            let lens = if n == 0 { [40u32, 13] } else { [25, 31] };
            let options = LayerOptions { kv_lens: Some((&lens).into()), ..LayerOptions::default() };
            let output = match &self.kept {
                Some(kept) => self.layer.forward_prepared(2, &self.states[n], kept, &options).await?,
                None => self.layer.forward(2, &self.states[n], &self.contexts[n], &options).await?,
            };
            Ok(bits(&[&output]))
        })
    }
}
