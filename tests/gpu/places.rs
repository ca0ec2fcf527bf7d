//! What is built on attention, over tensors of the host, tensors of the device, and in an encoder of the caller's: the same
//! bits from all three; and tensors that are where they must not be.

use std::pin::Pin;

use cross_attention::context::{ContextInputs, ContextSpec, ContextStorage, PreparedContext};
use cross_attention::engine::{Kind, PlaceError, Recording, Tensor};
use cross_attention::gpu::{AdapterRequest, Gpu, choose};
use cross_attention::pool::{GroupQuery, PassageId, PassagePool, PoolAttention, PoolSpec, Storage};
use cross_attention::sources::{Combine, Gate, PreparedSources, Source, SourceInputs, Sources};
use cross_attention::{Device, Element, Error, InputError, Layout, TensorData, TensorSpec, Terms, wgpu};
use libtest_mimic::Trial;

use super::adapters::Adapter;
use super::trials::trial;
use crate::common::plain::numbers;

type Future<'f, T> = Pin<Box<dyn std::future::Future<Output = Result<T, Error>> + 'f>>;

/// Something that records a call with tensors number 0, 1, .., and gives its results.
trait Recorded {
    /// The call's data.
    fn tensors(&self) -> Vec<Tensor<'_>>;

    fn record<'r>(&'r self, on: &'r mut Recording<'_>, with: Vec<Tensor<'r>>) -> Future<'r, Vec<Tensor<'static>>>;
}

type Make = fn(&Device) -> Result<Box<dyn Recorded>, Error>;

const ALL: [(&str, Make); 8] = [
    ("context_runs", |device| context(device, ContextStorage::F32, Element::F32)),
    ("context_runs_f16", |device| context(device, ContextStorage::F16, Element::F16)),
    ("context_runs_q8_0", |device| context(device, ContextStorage::Q8_0, Element::F32)),
    ("sources_softmax", |device| sources(device, Combine::Softmax)),
    ("sources_sum", |device| sources(device, Combine::Sum)),
    ("pool", |device| pool(device, Storage::Device)),
    ("pool_on_host", |device| pool(device, Storage::Host)),
    #[cfg(feature = "layer")]
    ("layer", layer),
];

pub(crate) fn trials(adapter: &Adapter) -> Vec<Trial> {
    let of = |(name, make): (&str, Make)| {
        let context = adapter.context.clone();
        trial(adapter, "places", name, move || everywhere(&context, make))
    };
    let mut trials: Vec<_> = ALL.into_iter().map(of).collect();
    let context = adapter.context.clone();
    trials.push(trial(adapter, "places", "refusals", move || refusals(&context)));
    trials
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn everywhere(context: &Gpu, make: Make) -> Result<(), String> {
    let device = Device::Gpu(context.clone());
    let of = make(&device).map_err(text)?;
    let on_host = run(&device, &*of, of.tensors())?;
    let on_device = of.tensors().into_iter().enumerate().map(|(n, tensor)| moved(context, n, &tensor));
    let on_device = on_device.collect::<Result<Vec<_>, String>>()?;
    if run(&device, &*of, on_device.clone())? != on_host {
        return Err("other bits from tensors of the device".to_owned());
    }
    for (name, tensors) in [("the host", of.tensors()), ("the device", on_device)] {
        if in_an_encoder(context, &*of, tensors)? != on_host {
            return Err(format!("other bits in a caller's encoder from tensors of {name}"));
        }
    }
    // the CPU is right as well: not the same bits, but the same numbers
    let cpu = run(&Device::Cpu, &*make(&Device::Cpu).map_err(text)?, of.tensors())?;
    for (n, (got, wanted)) in on_host.iter().zip(&cpu).enumerate() {
        let far = |(x, y): (&f32, &f32)| {
            let off = (x - y).abs();
            x.to_bits() != y.to_bits() && (off.is_nan() || off > 2e-3 * y.abs().max(1.0))
        };
        if got.len() != wanted.len() || got.iter().zip(wanted).any(far) {
            return Err(format!("result {n} is far from the CPU's"));
        }
    }
    Ok(())
}

fn run(device: &Device, of: &dyn Recorded, with: Vec<Tensor<'_>>) -> Result<Vec<Vec<f32>>, String> {
    let recorded = async {
        let mut recording = Recording::new(device);
        let results = of.record(&mut recording, with).await?;
        recording.submit().await?;
        read(&results).await
    };
    pollster::block_on(recorded).map_err(text)
}

async fn read(results: &[Tensor<'static>]) -> Result<Vec<Vec<f32>>, Error> {
    let mut all = vec![];
    for result in results {
        all.push(result.read("a result").await?.into_f32());
    }
    Ok(all)
}

/// Between commands of the caller's, of which the last ones copy what was recorded.
fn in_an_encoder(context: &Gpu, of: &dyn Recorded, with: Vec<Tensor<'_>>) -> Result<Vec<Vec<f32>>, String> {
    let mut encoder = context.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let before = context.allocate_blocking("the caller's", 64).map_err(text)?;
    encoder.clear_buffer(&before, 0, None);
    let mut recording = Recording::in_encoder(context, &mut encoder);
    let results = pollster::block_on(of.record(&mut recording, with)).map_err(text)?;
    // it has nothing of its own to submit
    pollster::block_on(recording.submit()).map_err(text)?;
    let mut copies = vec![];
    for result in &results {
        let slice = result.buffer_slice().ok_or("a result is not on the device")?;
        let to = context.allocate_blocking("a copy", slice.size()).map_err(text)?;
        encoder.copy_buffer_to_buffer(slice.buffer(), slice.offset(), &to, 0, slice.size());
        copies.push(Tensor::on_device(context, to.slice(..), result.kind(), result.len()).map_err(text)?);
    }
    context.queue().submit([encoder.finish()]);
    pollster::block_on(read(&copies)).map_err(text)
}

/// The same elements on the device, in the middle of a larger buffer.
fn moved(context: &Gpu, n: usize, tensor: &Tensor<'_>) -> Result<Tensor<'static>, String> {
    let before = 256 * (1 + n % 3);
    let mut bytes = vec![0xff; before];
    match tensor.kind() {
        Kind::F32 | Kind::F16 => {
            let data: TensorData = pollster::block_on(tensor.read("data")).map_err(text)?;
            bytes.extend_from_slice(data.as_ref().as_bytes());
        }
        other => return Err(format!("a tensor of {other} in a test of f32")),
    }
    bytes.extend([0xff; 64]);
    let buffer = context.upload_blocking("moved", &bytes).map_err(text)?;
    Tensor::on_device(context, buffer.slice(before as u64..), tensor.kind(), tensor.len()).map_err(text)
}

fn of(element: Element, shape: [usize; 4]) -> TensorSpec {
    TensorSpec { element, layout: Layout::bhld(shape) }
}

/// Entries that attend to other contexts than their neighbours, with a bias, and lengths.
struct Contexts {
    context: PreparedContext,
    element: Element,
    query: TensorData,
    bias: Vec<f32>,
}

fn context(device: &Device, storage: ContextStorage, element: Element) -> Result<Box<dyn Recorded>, Error> {
    let spec = ContextSpec { storage, ..ContextSpec::new([3, 2, 7, 32]) };
    let (key, value) = (numbers(1, 3 * 2 * 7 * 32, 1.0), numbers(2, 3 * 2 * 7 * 32, 1.0));
    let context = PreparedContext::new_blocking(device, spec, &key, &value, Some(&[7, 3, 5]))?;
    let query = TensorData::from_f32(element, numbers(3, 5 * 4 * 3 * 32, 1.0));
    Ok(Box::new(Contexts { context, element, query, bias: numbers(4, 5 * 3 * 7, 1.0) }))
}

impl Recorded for Contexts {
    fn tensors(&self) -> Vec<Tensor<'_>> {
        vec![(&self.query).into(), (&self.bias).into()]
    }

    fn record<'r>(&'r self, on: &'r mut Recording<'_>, with: Vec<Tensor<'r>>) -> Future<'r, Vec<Tensor<'static>>> {
        Box::pin(async move {
            let mut spec = self.context.attention(of(self.element, [5, 4, 3, 32]));
            (spec.lse, spec.bias) = (true, Some(of(Element::F32, [5, 1, 3, 7])));
            spec.output.element = self.element;
            let terms = Terms { bias: Some(with[1].clone()), ..Terms::default() };
            let context_index = Some(&[2, 0, 0, 1, 2][..]);
            let inputs = ContextInputs { context_index, terms, ..ContextInputs::new(with[0].clone()) };
            let tensors = self.context.record(on, &spec, &inputs).await?;
            Ok([Some(tensors.output), tensors.rows].into_iter().flatten().collect())
        })
    }
}

/// Two sources, gated; of a sum with weights of rows.
struct Several {
    prepared: PreparedSources,
    data: [Vec<f32>; 7],
}

fn sources(device: &Device, combine: Combine) -> Result<Box<dyn Recorded>, Error> {
    let (lens, query) = ([5, 3], of(Element::F32, [2, 4, 3, 16]));
    let mut described = lens.map(|len| {
        let held = of(Element::F32, [2, 2, len, 16]);
        Source::new(format!("{len} keys"), query, held, held)
    });
    described[1].row_weights = combine == Combine::Sum;
    let prepared = Sources::new(described.to_vec(), combine, Gate::Heads)?.prepare_blocking(device)?;
    let sizes = [2 * 4 * 3 * 16, 2 * 2 * 5 * 16, 2 * 2 * 5 * 16, 2 * 2 * 3 * 16, 2 * 2 * 3 * 16, 4, 2 * 3];
    Ok(Box::new(Several { prepared, data: std::array::from_fn(|n| numbers(n as u64 + 20, sizes[n], 1.0)) }))
}

impl Recorded for Several {
    fn tensors(&self) -> Vec<Tensor<'_>> {
        self.data.iter().map(Tensor::from).collect()
    }

    fn record<'r>(&'r self, on: &'r mut Recording<'_>, with: Vec<Tensor<'r>>) -> Future<'r, Vec<Tensor<'static>>> {
        Box::pin(async move {
            let first = SourceInputs::new(with[1].clone(), with[2].clone());
            let mut second = SourceInputs::new(with[3].clone(), with[4].clone());
            second.row_weights = self.prepared.sources().sources()[1].row_weights.then(|| with[6].clone());
            let gate = Some(with[5].clone());
            let tensors = self.prepared.record(on, with[0].clone(), &[first, second], gate).await?;
            Ok([Some(tensors.output), tensors.row_state, Some(tensors.source_row_state)]
                .into_iter()
                .flatten()
                .collect())
        })
    }
}

/// Passages in several rounds.
struct Pool {
    pool: PassagePool,
    list: Vec<PassageId>,
    query: Vec<f32>,
}

fn pool(device: &Device, storage: Storage) -> Result<Box<dyn Recorded>, Error> {
    // room for five pages of keys and values at once, as many as the longest has
    let mut pool =
        PassagePool::new(device, PoolSpec { storage, staging_bytes: 5 * 2 * 16 * 2 * 8 * 4, ..PoolSpec::new(2, 8) })?;
    let mut list = vec![];
    for (n, len) in [5, 70, 17].into_iter().enumerate() {
        let held = |seed| numbers(seed, 2 * len * 8, 1.0);
        list.push(pool.append_blocking(&held(n as u64), &held(n as u64 + 50), len)?);
    }
    Ok(Box::new(Pool { pool, list, query: numbers(9, 4 * 3 * 8, 1.0) }))
}

impl Recorded for Pool {
    fn tensors(&self) -> Vec<Tensor<'_>> {
        vec![(&self.query).into()]
    }

    fn record<'r>(&'r self, on: &'r mut Recording<'_>, with: Vec<Tensor<'r>>) -> Future<'r, Vec<Tensor<'static>>> {
        Box::pin(async move {
            let group = |passages| GroupQuery { query: with[0].clone(), q_len: 3, passages };
            let groups = [group(&self.list), group(&self.list[1..2]), group(&[])];
            let recorded = self.pool.record(on, &groups, &PoolAttention::new(4)).await?;
            Ok(recorded.into_iter().flat_map(|one| [one.output, one.row_state, one.part_row_state]).collect())
        })
    }
}

#[cfg(feature = "layer")]
struct Layer {
    layer: cross_attention::layer::LayerOn,
    states: Vec<f32>,
    context: Vec<f32>,
}

#[cfg(feature = "layer")]
fn layer(device: &Device) -> Result<Box<dyn Recorded>, Error> {
    let config = cross_attention::layer::LayerConfig::new(24, 33, 4);
    let weights = crate::common::layer::weights(&config, Element::F16);
    let layer = cross_attention::layer::CrossAttention::new(config, weights)?.on_blocking(device)?;
    Ok(Box::new(Layer { layer, states: numbers(13, 2 * 5 * 24, 1.0), context: numbers(11, 2 * 9 * 33, 1.0) }))
}

#[cfg(feature = "layer")]
impl Recorded for Layer {
    fn tensors(&self) -> Vec<Tensor<'_>> {
        vec![(&self.states).into(), (&self.context).into()]
    }

    /// With its context projected in the call, and kept before.
    fn record<'r>(&'r self, on: &'r mut Recording<'_>, with: Vec<Tensor<'r>>) -> Future<'r, Vec<Tensor<'static>>> {
        Box::pin(async move {
            let lens = [9u32, 4];
            let options = cross_attention::layer::LayerOptions { kv_lens: Some((&lens).into()), ..Default::default() };
            let (states, context) = (with[0].clone(), with[1].clone());
            let kept = self.layer.record_context(on, 2, context.clone(), Element::F32).await?;
            let of_kept = self.layer.record_prepared(on, 2, states.clone(), &kept, &options).await?;
            Ok(vec![self.layer.record(on, 2, states, context, &options).await?, of_kept])
        })
    }
}

/// Tensors that are elsewhere, or of another kind, are refused by name; nothing panics in wgpu.
fn refusals(context: &Gpu) -> Result<(), String> {
    let request = AdapterRequest::Named(context.info().name.clone());
    let other = pollster::block_on(async { choose(&request).await?.open().await }).map_err(text)?;
    let (here, elsewhere) = (Device::Gpu(context.clone()), Device::Gpu(other.clone()));
    let data = numbers(1, 64, 1.0);
    let on = |context: &Gpu| {
        let buffer = context.upload_blocking("data", &data).map_err(text)?;
        Tensor::on_device(context, buffer.slice(..), Kind::F32, 64).map_err(text)
    };
    let (tensor, foreign) = (on(context)?, on(&other)?);
    let refused = |device: &Device, recording: &mut Recording<'_>, tensor: Tensor<'_>, wanted: Error| {
        let spec = ContextSpec::new([1, 1, 8, 8]);
        let of = PreparedContext::new_blocking(device, spec, &data, &data, None).map_err(text)?;
        let asked = of.attention(TensorSpec::f32(Layout::bhld([1, 1, 8, 8])));
        match pollster::block_on(of.record(recording, &asked, &ContextInputs::new(tensor))) {
            Err(error) if error.to_string() == wanted.to_string() => Ok(()),
            found => Err(format!("wanted {wanted:?}, found {found:?}")),
        }
    };
    let name = context.info().name.clone();
    let cpu = Device::Cpu;
    let on_device = PlaceError::OnDevice { name: "query", device: cpu.name() };
    refused(&cpu, &mut Recording::new(&cpu), tensor.clone(), on_device.into())?;
    let other_device = PlaceError::OtherDevice { name: "query", device: name.clone() };
    refused(&here, &mut Recording::new(&here), foreign, other_device.into())?;
    let kind = InputError::Element { name: "query", wanted: Kind::F32, found: Kind::U32 };
    refused(&here, &mut Recording::new(&here), Tensor::from(&[1u32; 64]), kind.into())?;
    for (prepared, recording) in [(&here, &elsewhere), (&cpu, &here), (&here, &cpu)] {
        let wanted = PlaceError::OtherRecording { prepared: prepared.name(), recording: recording.name() };
        refused(prepared, &mut Recording::new(recording), tensor.clone(), wanted.into())?;
    }
    let buffer = context.allocate_blocking("small", 16).map_err(text)?;
    match Tensor::on_device(context, buffer.slice(..), Kind::F32, 5) {
        Err(PlaceError::TooShort { needed: 20, found: 16 }) => Ok(()),
        found => Err(format!("{found:?}")),
    }
}
