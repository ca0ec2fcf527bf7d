//! What prepared contexts must do, on any device: the same checks offline and on every GPU.

#![expect(clippy::cast_possible_truncation, reason = "small numbers of tests, and a scale rounded to f32")]

use cross_attention::context::{ContextError, ContextInputs, ContextSpec, ContextStorage, PreparedContext};
use cross_attention::verify::verify;
use cross_attention::weights::{Select, WeightsSpec};
use cross_attention::{
    AlibiSlopes, AttentionInputs, AttentionOutput, AttentionProblem, AttentionSpec, Device, Diagonal, Element, Error,
    HostTerms, Layout, ScoreStage, TensorData, TensorRef, TensorSpec, bf16, f16,
};

use super::case::arranged;
use super::check::same_bits;
use super::plain::numbers;
use super::recipe::places;

const KV_HEADS: usize = 2;
const Q_HEADS: usize = 4;
const KV_LEN: usize = 21;
const Q_LEN: usize = 3;
const DIM: usize = 32;
const WIDTH: usize = 64;

const LENS: [u32; 3] = [21, 0, 9];

/// Keys and values `[contexts, kv_heads, kv_len, width]`.
fn tensors(contexts: usize) -> [Vec<f32>; 2] {
    [DIM, WIDTH].map(|width| numbers(width as u64, contexts * KV_HEADS * KV_LEN * width, 2.0))
}

fn spec(contexts: usize, storage: ContextStorage) -> ContextSpec {
    ContextSpec { v_head_dim: WIDTH, storage, ..ContextSpec::new([contexts, KV_HEADS, KV_LEN, DIM]) }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// What is stored of rows of a width, as f32: bytes times their scales.
fn stored(data: &[f32], width: usize, storage: ContextStorage) -> Vec<f32> {
    match storage {
        ContextStorage::F32 => data.to_vec(),
        ContextStorage::F16 => data.iter().map(|&x| f16::from_f32(x).to_f32()).collect(),
        ContextStorage::Bf16 => data.iter().map(|&x| bf16::from_f32(x).to_f32()).collect(),
        ContextStorage::Int8 => {
            let row = |row: &[f32]| {
                let scale = row.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0;
                row.iter().map(|x| scale * (x / scale).round().clamp(-127.0, 127.0)).collect::<Vec<_>>()
            };
            data.chunks(width).flat_map(row).collect()
        }
        ContextStorage::Q8_0 => {
            let block = |block: &[f32]| {
                let scale = f16::from_f32(block.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0).to_f32();
                block.iter().map(|x| scale * (x / scale).round().clamp(-127.0, 127.0)).collect::<Vec<_>>()
            };
            data.chunks(32).flat_map(block).collect()
        }
        other => panic!("how is {other:?} stored?"),
    }
}

/// The terms of a call, for a batch of so many.
struct Given {
    query: TensorData,
    bias: Vec<f32>,
    mask: Vec<bool>,
    row_start: Vec<i32>,
    row_end: Vec<i32>,
    q_lens: Vec<u32>,
    slopes: Vec<f32>,
    sinks: Vec<f32>,
}

impl Given {
    fn new(batch: usize, element: Element, common: f32) -> Self {
        let rows = batch * Q_LEN;
        Self {
            query: TensorData::from_f32(element, numbers(11, batch * Q_HEADS * Q_LEN * DIM, 1.5)),
            bias: spread(Self::bias(batch), numbers(12, batch * Q_LEN * KV_LEN, 1.0), |x| x + common, f32::NAN),
            mask: spread(Self::mask(batch), numbers(13, batch * Q_LEN * KV_LEN, 1.0), |x| x > -0.5, true),
            row_start: numbers(14, rows, 4.0).into_iter().map(|x| x as i32).collect(),
            row_end: numbers(15, rows, 6.0).into_iter().map(|x| x as i32 + 15).collect(),
            q_lens: (0..batch).map(|b| (b * 2 + 1).min(Q_LEN) as u32).collect(),
            slopes: numbers(16, batch * Q_HEADS, 0.2),
            sinks: numbers(17, Q_HEADS, 1.0),
        }
    }

    /// Key by key, with gaps and an offset.
    fn bias(batch: usize) -> Layout {
        arranged([batch, 1, Q_LEN, KV_LEN], [0, 1, 3, 2], [3, 0, 1, 2], 5)
    }

    fn mask(batch: usize) -> Layout {
        arranged([batch, 1, Q_LEN, KV_LEN], [2, 1, 0, 3], [1, 0, 3, 0], 2)
    }

    fn ask(&self, spec: &mut AttentionSpec, batch: usize) {
        spec.bias = Some(TensorSpec::f32(Self::bias(batch)));
        spec.mask = Some(Self::mask(batch));
        (spec.q_lens, spec.row_ranges, spec.sinks) = (true, true, true);
        spec.alibi_slopes = Some(AlibiSlopes::PerBatchAndHead);
        spec.causal = Some(Diagonal::Fixed(16));
        spec.scale = Some(0.25);
        spec.scores = Some(ScoreStage::Probs);
    }

    fn give<'a>(&'a self, inputs: &mut AttentionInputs<'a>) {
        inputs.terms = HostTerms {
            bias: Some((&self.bias).into()),
            mask: Some(&self.mask),
            q_lens: Some(&self.q_lens),
            row_start: Some(&self.row_start),
            row_end: Some(&self.row_end),
            alibi_slopes: Some(&self.slopes),
            sinks: Some(&self.sinks),
            ..inputs.terms
        };
    }
}

/// Numbers in the places of a layout, and `gap` between them.
fn spread<T: Copy>(layout: Layout, numbers: Vec<f32>, of: impl Fn(f32) -> T, gap: T) -> Vec<T> {
    let mut data = vec![gap; layout.extent().expect("small")];
    for (at, x) in places(layout.shape).zip(numbers) {
        data[layout.index(at)] = of(x);
    }
    data
}

/// Every storage, with and without terms and key lengths, contexts in any order: as the oracle says for what is stored.
pub(crate) fn all(device: &Device) -> Result<(), String> {
    let indices: [Option<&[u32]>; 5] =
        [None, Some(&[2, 0, 1]), Some(&[1, 1, 1, 2, 2, 0]), Some(&[2]), Some(&[0, 2, 0, 2, 0])];
    use ContextStorage::{Bf16, F16, F32, Int8, Q8_0};
    for storage in [F32, F16, Bf16, Q8_0, Int8] {
        for lens in [None, Some(&LENS[..])] {
            let mut given = tensors(3);
            if lens.is_some() && !matches!(storage, Q8_0 | Int8) {
                poison(&mut given);
            }
            let context =
                PreparedContext::new_blocking(device, spec(3, storage), &given[0], &given[1], lens).map_err(text)?;
            // a key and a value, and the scales of each where there are any; contexts begin at multiples of 256 bytes
            let rows = KV_HEADS as u64 * KV_LEN as u64;
            let [dim, width] = [DIM as u64, WIDTH as u64];
            let each = match storage {
                F32 => vec![dim * 4, width * 4],
                F16 | Bf16 => vec![dim * 2, width * 2],
                Q8_0 => vec![dim, width, dim / 32 * 2, width / 32 * 2],
                _ => vec![dim, width, 4, 4],
            };
            let bytes: u64 = each.into_iter().map(|of_row| 3 * (rows * of_row).next_multiple_of(256)).sum();
            if context.bytes() != bytes {
                return Err(format!("{storage:?}: {} bytes, should be {bytes}", context.bytes()));
            }
            for (n, index) in indices.into_iter().enumerate() {
                // padding and large common parts for one of the orders
                let commons = [None, Some(0.0), Some(1e6), Some(-1e9)];
                for common in commons.into_iter().take(if n == 2 { 4 } else { 2 }) {
                    let element = if n % 2 == 1 { Element::F16 } else { Element::F32 };
                    attend(&context, &given, lens, index, common, element).map_err(|error| {
                        format!("{storage:?}, lens {lens:?}, index {index:?}, terms {common:?}: {error}")
                    })?;
                }
            }
        }
    }
    Ok(())
}

/// NaN behind each key length.
fn poison(tensors: &mut [Vec<f32>; 2]) {
    for (tensor, width) in tensors.iter_mut().zip([DIM, WIDTH]) {
        for (row, numbers) in tensor.chunks_exact_mut(width).enumerate() {
            if row % KV_LEN >= LENS[row / KV_LEN / KV_HEADS] as usize {
                numbers.fill(f32::NAN);
            }
        }
    }
}

fn attend(
    context: &PreparedContext,
    given: &[Vec<f32>; 2],
    lens: Option<&[u32]>,
    index: Option<&[u32]>,
    common: Option<f32>,
    element: Element,
) -> Result<(), String> {
    let of_entry: Vec<usize> = index.map_or((0..3).collect(), |index| index.iter().map(|&c| c as usize).collect());
    let batch = of_entry.len();
    let (terms, with_terms) = (Given::new(batch, element, common.unwrap_or(0.0)), common.is_some());
    let query = TensorSpec { element, layout: Layout::bhld([batch, Q_HEADS, Q_LEN, DIM]) };
    let mut asked = context.attention(query);
    asked.lse = true;
    if with_terms {
        terms.ask(&mut asked, batch);
    }
    let mut inputs = AttentionInputs::new(terms.query.as_ref(), TensorRef::F32(&[]), TensorRef::F32(&[]));
    if with_terms {
        terms.give(&mut inputs);
    }
    let call = ContextInputs { context_index: index, terms: inputs.terms(), ..ContextInputs::new(inputs.query) };
    // weights in a pass of their own, where scores have the largest common part; of storages one with scales and one without
    let storage = context.spec().storage;
    let of_storage = matches!(storage, ContextStorage::F16 | ContextStorage::Q8_0);
    let with_weights = common == Some(-1e9) && lens.is_some() && of_storage;
    asked.row_state = with_weights;
    let mut got = context.attend_blocking(&asked, &call).map_err(text)?;
    let prepared = context.prepared();
    same_bits(&got, &context.attend_blocking(&asked, &call).map_err(text)?)?;
    if context.prepared() != prepared {
        return Err("the second call prepared something".to_owned());
    }
    let weights = match &got.row_state {
        Some(state) => {
            let of_heads = |heads| WeightsSpec { heads, ..WeightsSpec::default() };
            let all = context.weights_blocking(&asked, &call, &of_heads(Select::All), state).map_err(text)?;
            let third = context.weights_blocking(&asked, &call, &of_heads(Select::List(vec![2])), state);
            let heads = all.chunks(Q_LEN * KV_LEN).skip(2).step_by(Q_HEADS);
            if third.map_err(text)? != heads.flatten().copied().collect::<Vec<_>>() {
                return Err("the weights of one head are not those of it among all".to_owned());
            }
            Some(all)
        }
        None => None,
    };
    // each entry with a copy of its context
    let copies = [DIM, WIDTH].map(|width| KV_HEADS * KV_LEN * width);
    let [key, value] = [0, 1].map(|n| {
        let all = stored(&given[n], [DIM, WIDTH][n], storage);
        of_entry.iter().flat_map(|c| all[c * copies[n]..(c + 1) * copies[n]].to_vec()).collect::<Vec<f32>>()
    });
    let of = |width| TensorSpec::f32(Layout::bhld([batch, KV_HEADS, KV_LEN, width]));
    (asked.key, asked.value) = (of(DIM), of(WIDTH));
    (asked.key_scale, asked.value_scale) = (None, None);
    asked.kv_lens = lens.is_some();
    let problem = AttentionProblem::new(asked).map_err(text)?;
    let kv_lens: Option<Vec<u32>> = lens.map(|lens| of_entry.iter().map(|&c| lens[c]).collect());
    (inputs.key, inputs.value, inputs.terms.kv_lens) = ((&key).into(), (&value).into(), kv_lens.as_deref());
    let report = verify(&problem, &inputs, &got).map_err(text)?;
    if !report.passed() {
        return Err(report.to_string());
    }
    let Some(weights) = weights else { return Ok(()) };
    got.scores = Some(weights);
    let report = verify(&problem, &inputs, &got).map_err(text)?;
    if report.passed() { Ok(()) } else { Err(format!("weights: {report}")) }
}

/// Fifty calls with one context are fifty plain calls, bit for bit, and plan once.
pub(crate) fn fifty_calls(device: &Device) -> Result<(), String> {
    let [key, value] = tensors(1);
    let context =
        PreparedContext::new_blocking(device, spec(1, ContextStorage::F32), &key, &value, None).map_err(text)?;
    let query = TensorSpec::f32(Layout::bhld([4, Q_HEADS, Q_LEN, DIM]));
    let mut asked = context.attention(query);
    asked.lse = true;
    let problem = AttentionProblem::new(asked.clone()).map_err(text)?;
    for n in 0..50 {
        let query = numbers(1000 + n, 4 * Q_HEADS * Q_LEN * DIM, 2.0);
        let got: AttentionOutput = context.attend_blocking(&asked, &ContextInputs::new(&query)).map_err(text)?;
        let plain = device.attention_blocking(&problem, &AttentionInputs::new(&query, &key, &value)).map_err(text)?;
        same_bits(&got, &plain).map_err(|error| format!("call {n}: {error}"))?;
    }
    if context.prepared() == 1 { Ok(()) } else { Err(format!("{} attentions are kept", context.prepared())) }
}

/// Every refusal.
pub(crate) fn refusals(device: &Device) -> Result<(), String> {
    let [key, value] = tensors(3);
    let refused = |found: Result<(), Error>, wanted: ContextError| match found {
        Err(Error::Context(error)) if error == wanted => Ok(()),
        found => Err(format!("wanted {wanted:?}, found {found:?}")),
    };
    let new = |spec, key: &[f32], value: &[f32], lens: Option<&[u32]>| {
        PreparedContext::new_blocking(device, spec, key, value, lens).map(drop)
    };
    let good = spec(3, ContextStorage::F32);
    refused(new(ContextSpec { contexts: 0, ..good }, &key, &value, None), ContextError::Zero { name: "contexts" })?;
    let wanted = value.len();
    let short = ContextError::Len { name: "value", wanted, found: wanted - 1 };
    refused(new(good, &key, &value[1..], None), short)?;
    let lens = ContextError::Len { name: "kv_lens", wanted: 3, found: 2 };
    refused(new(good, &key, &value, Some(&[1, 2])), lens)?;
    let long = ContextError::KvLen { context: 1, found: 22, kv_len: KV_LEN };
    refused(new(good, &key, &value, Some(&[21, 22, 23])), long)?;
    let blocks = ContextSpec { head_dim: 48, storage: ContextStorage::Q8_0, ..good };
    refused(new(blocks, &key, &value, None), ContextError::Blocks { name: "head_dim", found: 48 })?;
    let bytes = vec![1i8; key.len()];
    let given = PreparedContext::new_blocking(device, good, &bytes[..], &value, None).map(drop);
    refused(given, ContextError::NoScale { name: "key" })?;
    let huge = ContextSpec { kv_len: usize::MAX / 8, ..good };
    if !matches!(new(huge, &key, &value, None), Err(Error::Context(ContextError::Overflow { .. }))) {
        return Err("more than can be counted is taken".to_owned());
    }
    let mut large = value.clone();
    large[100] = 1e30;
    let storable = ContextError::NotStorable { name: "value", at: 100, value: 1e30, scale: Element::F16 };
    refused(new(spec(3, ContextStorage::Q8_0), &key, &large, None), storable)?;

    let context = PreparedContext::new_blocking(device, good, &key, &value, None).map_err(text)?;
    let query = numbers(1, 2 * Q_HEADS * Q_LEN * DIM, 1.0);
    let asked = context.attention(TensorSpec::f32(Layout::bhld([2, Q_HEADS, Q_LEN, DIM])));
    let attend = |asked: &AttentionSpec, index: Option<&[u32]>| {
        let inputs = ContextInputs { context_index: index, ..ContextInputs::new(&query) };
        context.attend_blocking(asked, &inputs).map(drop)
    };
    refused(attend(&asked, None), ContextError::Batch { batch: 2, contexts: 3 })?;
    let len = ContextError::Len { name: "context_index", wanted: 2, found: 1 };
    refused(attend(&asked, Some(&[0])), len)?;
    refused(attend(&asked, Some(&[0, 3])), ContextError::Index { row: 1, found: 3, contexts: 3 })?;
    let changed = |change: fn(&mut AttentionSpec)| {
        let mut asked = asked.clone();
        change(&mut asked);
        attend(&asked, Some(&[0, 1]))
    };
    refused(changed(|spec| spec.key.layout.offset = 1), ContextError::Keys { name: "key" })?;
    refused(changed(|spec| spec.value.element = Element::F16), ContextError::Keys { name: "value" })?;
    refused(changed(|spec| spec.kv_lens = true), ContextError::Keys { name: "kv_lens" })?;
    let gaps = changed(|spec| spec.output.layout = Layout::blhd(spec.output.layout.shape));
    let strides = Layout::blhd([2, Q_HEADS, Q_LEN, WIDTH]).strides;
    refused(gaps, ContextError::OutputLayout { strides })?;
    // as any attention refuses
    let problems = [
        changed(|spec| spec.query.layout = Layout::bhld([2, Q_HEADS, Q_LEN, 16])),
        changed(|spec| spec.query.layout = Layout::bhld([2, 3, Q_LEN, DIM])),
        changed(|spec| spec.scale = Some(f32::NAN)),
    ];
    for (n, found) in problems.into_iter().enumerate() {
        if !matches!(found, Err(Error::Problem(_))) {
            return Err(format!("problem {n}: {found:?}"));
        }
    }
    let missing = changed(|spec| spec.sinks = true);
    if !matches!(missing, Err(Error::Input(_))) {
        return Err(format!("missing sinks: {missing:?}"));
    }
    attend(&asked, Some(&[2, 2])).map_err(text)
}
