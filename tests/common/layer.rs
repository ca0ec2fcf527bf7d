//! Cross-attention layers against one written out in f64, on any device.

use cross_attention::layer::{
    Biases, CrossAttention, LayerConfig, LayerError, LayerMask, LayerOn, LayerOptions, LayerWeights, Names, Norm,
    NormKind, NormWeights, Projection,
};
use cross_attention::{Device, Diagonal, Element, Error, TensorData};
use safetensors::SafeTensors;

use super::linear::{numbers, wide};

/// What a layer on a device is held to.
type Check = fn(&Device) -> Result<(), String>;

/// Name and check of everything that a layer is held to.
pub(crate) const CHECKS: [(&str, Check); 10] = [
    ("annalog", annalog),
    ("plain", |device| check(device, &LayerConfig::new(24, 24, 3), Element::F32)),
    ("grouped_other_widths_f16", |device| check(device, &grouped(), Element::F16)),
    ("norms_rms", |device| check(device, &normed(NormKind::Rms, false), Element::F32)),
    ("norms_layer", |device| check(device, &normed(NormKind::Layer, true), Element::F16)),
    ("norms_of_heads", |device| check(device, &normed_heads(NormKind::Rms), Element::F32)),
    ("norms_of_heads_layer", |device| check(device, &normed_heads(NormKind::Layer), Element::F32)),
    ("other_device", other_device),
    ("refusals", refusals),
    ("backward", super::layer_backward::check),
];

fn grouped() -> LayerConfig {
    let biases = Biases { query: true, key: false, value: true, output: false };
    LayerConfig { kv_heads: 2, head_dim: 7, v_head_dim: 5, scale: Some(0.3), biases, ..LayerConfig::new(20, 33, 6) }
}

pub(super) fn normed(kind: NormKind, bias: bool) -> LayerConfig {
    let norm = Some(Norm { kind, epsilon: 1e-3, bias });
    LayerConfig { query_norm: norm, key_norm: norm, biases: Biases::NONE, kv_heads: 1, ..LayerConfig::new(70, 66, 1) }
}

/// A token has several rows to be normed, one for each head.
pub(super) fn normed_heads(kind: NormKind) -> LayerConfig {
    let norm = Some(Norm { kind, epsilon: 1e-4, bias: kind == NormKind::Layer });
    LayerConfig { query_norm: norm, key_norm: norm, kv_heads: 3, head_dim: 10, ..LayerConfig::new(24, 30, 6) }
}

/// What was prepared on one device is refused by the same layer on another, and taken by a clone of its own.
fn other_device(device: &Device) -> Result<(), String> {
    let config = LayerConfig::new(8, 6, 2);
    let layer = CrossAttention::new(config.clone(), weights(&config, Element::F32)).map_err(|e| e.to_string())?;
    let (states, context) = (numbers(1, 16), numbers(2, 18));
    let here = on(&layer, device)?;
    let others = match device {
        Device::Gpu(context) => {
            let request = cross_attention::gpu::AdapterRequest::Named(context.info().name.clone());
            let choose = async { cross_attention::gpu::choose(&request).await?.open().await };
            vec![Device::Cpu, Device::Gpu(pollster::block_on(choose).map_err(|error| error.to_string())?)]
        }
        _ => vec![],
    };
    for other in &others {
        let there = on(&layer, other)?;
        for (on, of) in [(&here, &there), (&there, &here)] {
            let kept = of.prepare_context_blocking(1, &context, Element::F32).map_err(|e| e.to_string())?;
            let wanted = LayerError::OtherDevice { wanted: on.device().name(), found: of.device().name() };
            match on.forward_prepared_blocking(1, &states, &kept, &LayerOptions::default()) {
                Err(Error::Layer(error)) if error == wanted => {}
                found => return Err(format!("wanted {wanted:?}, found {found:?}")),
            }
        }
    }
    let kept = here.prepare_context_blocking(1, &context, Element::F32).map_err(|e| e.to_string())?;
    let again = on(&layer, device)?;
    again.forward_prepared_blocking(1, &states, &kept, &LayerOptions::default()).map(drop).map_err(|e| e.to_string())
}

pub(crate) fn weights(config: &LayerConfig, element: Element) -> LayerWeights {
    let mut seed = 10;
    let mut projection = |out: usize, inner: usize, bias: bool| {
        seed += 2;
        let spread = (3.0 / inner as f32).sqrt();
        let weight = numbers(seed, out * inner).into_iter().map(|x| 1.5 * spread * x).collect();
        Projection { weight: TensorData::from_f32(element, weight), bias: bias.then(|| numbers(seed + 1, out)) }
    };
    let norm = |norm: Option<Norm>, seed| {
        norm.map(|norm| NormWeights {
            weight: numbers(seed, config.head_dim).into_iter().map(|x| 1.0 + x / 2.0).collect(),
            bias: norm.bias.then(|| numbers(seed + 1, config.head_dim)),
        })
    };
    let (keys, values) = (config.kv_heads * config.head_dim, config.kv_heads * config.v_head_dim);
    LayerWeights {
        query: projection(config.heads * config.head_dim, config.width, config.biases.query),
        key: projection(keys, config.context_width, config.biases.key),
        value: projection(values, config.context_width, config.biases.value),
        output: projection(config.width, config.heads * config.v_head_dim, config.biases.output),
        query_norm: norm(config.query_norm, 50),
        key_norm: norm(config.key_norm, 60),
    }
}

/// The layer written out, with every result of an operation put through `round`: for f64 nothing, for the direct algorithm
/// in f32 a rounding, `stored` for keys and values that are kept. `allowed(b, h, i, j)` is the mask; a context of one entry is
/// shared. With the output, for each element, what the exponentials, divisions and roots of WGSL may be off by, carried
/// through the output projection.
pub(super) fn written_out(
    layer: &CrossAttention,
    [batch, contexts]: [usize; 2],
    [states, context]: [&[f32]; 2],
    allowed: &dyn Fn(usize, usize, usize, usize) -> bool,
    round: &dyn Fn(f64) -> f64,
    stored: &dyn Fn(f64) -> f64,
) -> (Vec<f64>, Vec<f64>) {
    let (config, weights) = (layer.config(), layer.weights());
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).fold(0.0, |sum, (a, b)| round(sum + round(a * b)));
    let project = |x: &[f64], projection: &Projection, inner: usize| {
        let weight = wide(&projection.weight.to_f32());
        let bias = projection.bias.as_deref().map(wide);
        let of_row = |row: &[f64]| {
            let columns = weight.chunks_exact(inner).enumerate();
            columns.map(|(n, column)| round(dot(row, column) + bias.as_ref().map_or(0.0, |bias| bias[n]))).collect()
        };
        x.chunks_exact(inner).flat_map(|row| -> Vec<f64> { of_row(row) }).collect::<Vec<f64>>()
    };
    let norm = |rows: &mut [f64], norm: Option<Norm>, weights: &Option<NormWeights>| {
        let (Some(norm), Some(weights)) = (norm, weights) else { return };
        for row in rows.chunks_exact_mut(config.head_dim) {
            let n = row.len() as f64;
            let sum = |terms: &mut dyn Iterator<Item = f64>| terms.fold(0.0, |sum, x| round(sum + x));
            let mean = if norm.kind == NormKind::Layer { round(sum(&mut row.iter().copied()) / n) } else { 0.0 };
            let squares = sum(&mut row.iter().map(|x| round(round(x - mean).powi(2))));
            let root = round(round(round(squares / n) + f64::from(norm.epsilon)).sqrt());
            for (d, x) in row.iter_mut().enumerate() {
                let bias = weights.bias.as_ref().map_or(0.0, |bias| f64::from(bias[d]));
                *x = round(round(round(round(*x - mean) / root) * f64::from(weights.weight[d])) + bias);
            }
        }
    };
    let (states, context) = (wide(states), wide(context));
    let mut query = project(&states, &weights.query, config.width);
    let mut key = project(&context, &weights.key, config.context_width);
    let mut value = project(&context, &weights.value, config.context_width);
    norm(&mut query, config.query_norm, &weights.query_norm);
    norm(&mut key, config.key_norm, &weights.key_norm);
    key.iter_mut().chain(&mut value).for_each(|x| *x = stored(*x));
    let (heads, kv_heads, dim, v_dim) = (config.heads, config.kv_heads, config.head_dim, config.v_head_dim);
    let q_len = states.len() / config.width / batch;
    let kv_len = context.len() / config.context_width / contexts;
    let scale = f64::from(config.scale.unwrap_or(1.0 / (dim as f32).sqrt()));
    let normed = config.query_norm.is_some() || config.key_norm.is_some();
    let mut attended = vec![0.0; batch * q_len * heads * v_dim];
    let mut offs = vec![0.0; attended.len()];
    for (n, (out, off)) in attended.chunks_exact_mut(v_dim).zip(offs.chunks_exact_mut(v_dim)).enumerate() {
        let (b, i, h) = (n / heads / q_len, n / heads % q_len, n % heads);
        let entry = if contexts == 1 { 0 } else { b };
        let at = |j: usize| (entry * kv_len + j) * kv_heads + h / (heads / kv_heads);
        let query = &query[n * dim..][..dim];
        let seen: Vec<usize> = (0..kv_len).filter(|&j| allowed(b, h, i, j)).collect();
        let scores: Vec<f64> = seen.iter().map(|&j| round(scale * dot(query, &key[at(j) * dim..][..dim]))).collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let powers: Vec<f64> = scores.iter().map(|s| round(round(s - top).exp())).collect();
        let total = powers.iter().fold(0.0, |sum, power| round(sum + power));
        for (&j, power) in seen.iter().zip(&powers) {
            let prob = round(power / total);
            let value = &value[at(j) * v_dim..][..v_dim];
            out.iter_mut().zip(value).for_each(|(x, v)| *x = round(*x + round(prob * v)));
        }
        for ((&j, power), score) in seen.iter().zip(&powers).zip(&scores) {
            // exp: 3 + 2 |x| ulp; a root: 2 ulp, of query and key
            let exponent =
                (3.0 + 2.0 * (score - top).abs()) * 2.0 * U + if normed { 8.0 * U * score.abs() } else { 0.0 };
            let value = &value[at(j) * v_dim..][..v_dim];
            for ((off, v), out) in off.iter_mut().zip(value).zip(&*out) {
                *off += power / total * exponent * (v - out).abs();
            }
        }
        off.iter_mut().zip(&*out).for_each(|(off, x)| *off += 5.0 * U * x.abs());
    }
    let output = project(&attended, &weights.output, heads * v_dim);
    let matrix: Vec<f64> = weights.output.weight.to_f32().into_iter().map(|w| f64::from(w).abs()).collect();
    let carried = offs.chunks_exact(heads * v_dim).flat_map(|row| {
        matrix.chunks_exact(heads * v_dim).map(|column| row.iter().zip(column).map(|(off, w)| off * w).sum())
    });
    (output, carried.collect())
}

/// Rounding error of one f32 operation.
const U: f64 = 1.0 / (1u64 << 24) as f64;

#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
fn to_f32(x: f64) -> f64 {
    f64::from(x as f32)
}

fn to_f16(x: f64) -> f64 {
    cross_attention::f16::from_f64(to_f32(x)).to_f64()
}

/// What a layer must give, and what each element may be off by: twice what the direct algorithm in f32, every sum in order,
/// is off by at worst in all of the output, and what WGSL's functions add. Keys and values that are kept in f16 are rounded in
/// the yardstick as they are on a device; such a rounding may fall to either side where f32 is off before it, which moves one
/// element by as much again.
struct Wanted {
    output: Vec<f64>,
    may: Vec<f64>,
}

impl Wanted {
    fn new(
        layer: &CrossAttention,
        batch: [usize; 2],
        tokens: [&[f32]; 2],
        allowed: &dyn Fn(usize, usize, usize, usize) -> bool,
        stored: Element,
    ) -> Self {
        let exactly = |x: f64| x;
        let kept = if stored == Element::F16 { to_f16 } else { to_f32 };
        let (output, functions) = written_out(layer, batch, tokens, allowed, &exactly, &exactly);
        let (plain, _) = written_out(layer, batch, tokens, allowed, &to_f32, &kept);
        let worst = output.iter().zip(&plain).map(|(x, plain)| (x - plain).abs()).fold(0.0, f64::max);
        let may = output.iter().zip(functions).map(|(x, of)| 2.0 * worst + of + 2.0 * U * x.abs() + 1e-37).collect();
        Self { output, may }
    }
}

fn compare(found: &[f32], Wanted { output, may }: &Wanted) -> Result<(), String> {
    if found.len() != output.len() {
        return Err(format!("{} elements, not {}", found.len(), output.len()));
    }
    for (n, ((&found, want), may)) in found.iter().zip(output).zip(may).enumerate() {
        let off = (f64::from(found) - want).abs();
        if off.is_nan() || off > *may {
            return Err(format!("element {n} is {found}, not {want}: off by {off:e}, allowed {may:e}"));
        }
    }
    Ok(())
}

pub(super) fn on(layer: &CrossAttention, device: &Device) -> Result<LayerOn, String> {
    layer.on_blocking(device).map_err(|error| error.to_string())
}

/// Every mask, raw and prepared, with few tokens and many.
fn check(device: &Device, config: &LayerConfig, element: Element) -> Result<(), String> {
    let layer = CrossAttention::new(config.clone(), weights(config, element)).map_err(|error| error.to_string())?;
    let on_device = on(&layer, device)?;
    for (batch, q_len, kv_len) in [(1, 1, 9u32), (2, 5, 70), (1, 0, 3), (2, 3, 0)] {
        let half = kv_len / 2;
        let kv_len = kv_len as usize;
        let states = numbers(5, batch * q_len * config.width);
        let context = numbers(6, batch * kv_len * config.context_width);
        let kv_lens: Vec<u32> = (0..batch).map(|b| if b == 1 { 0 } else { half }).collect();
        let rows = u32::try_from(q_len).map_err(|error| error.to_string())?;
        let q_lens: Vec<u32> = (0..batch).map(|b| if b == 1 { rows } else { rows / 2 }).collect();
        let bits: Vec<bool> = (0..batch * kv_len).map(|n| n % 3 != 1).collect();
        let mask = LayerMask { data: (&bits).into(), shape: [batch, 1, 1, kv_len] };
        let none = LayerOptions::default;
        type Allowed<'a> = &'a dyn Fn(usize, usize, usize, usize) -> bool;
        let window = |left, right| LayerOptions { window_left: left, window_right: right, ..none() };
        let at_end = Some(Diagonal::BottomRight);
        let ends = |i: usize| i + kv_len - q_len.min(kv_len);
        let cases: [(&str, LayerOptions<'_>, Allowed<'_>); 8] = [
            ("no mask", none(), &|_, _, _, _| true),
            ("causal", LayerOptions { causal: Some(Diagonal::TopLeft), ..none() }, &|_, _, i, j| j <= i),
            ("q_lens", LayerOptions { q_lens: Some((&q_lens).into()), ..none() }, &|b, _, i, _| i < q_lens[b] as usize),
            ("kv_lens", LayerOptions { kv_lens: Some((&kv_lens).into()), ..none() }, &|b, _, _, j| {
                j < kv_lens[b] as usize
            }),
            ("mask", LayerOptions { mask: Some(mask.clone()), ..none() }, &|b, _, _, j| bits[b * kv_len + j]),
            ("window before", window(Some(1), None), &|_, _, i, j| j + 1 >= i),
            ("window behind", window(None, Some(2)), &|_, _, i, j| j <= i + 2),
            (
                "window before, causal",
                LayerOptions {
                    causal: at_end.filter(|_| q_len <= kv_len).or(Some(Diagonal::TopLeft)),
                    ..window(Some(3), None)
                },
                &|_, _, i, j| {
                    let at = if q_len <= kv_len { ends(i) } else { i };
                    j <= at && j + 3 >= at
                },
            ),
        ];
        for (name, options, allowed) in cases {
            let at = |error: String| format!("{name}, batch {batch}, {q_len} of {kv_len}: {error}");
            let fail = |error: Error| at(error.to_string());
            let want = Wanted::new(&layer, [batch; 2], [&states, &context], allowed, Element::F32);
            let raw = on_device.forward_blocking(batch, &states, &context, &options).map_err(fail)?;
            compare(&raw, &want).map_err(at)?;
            for stored in [Element::F32, Element::F16] {
                let want = Wanted::new(&layer, [batch; 2], [&states, &context], allowed, stored);
                let kept = on_device.prepare_context_blocking(batch, &context, stored).map_err(fail)?;
                let bytes =
                    batch * kv_len * config.kv_heads * (config.head_dim + config.v_head_dim) * stored.size_bytes();
                if kept.bytes() != bytes as u64 || kept.kv_len() != kv_len || kept.batch() != batch {
                    return Err(at(format!("{kept:?} is not {bytes} bytes")));
                }
                let run = || on_device.forward_prepared_blocking(batch, &states, &kept, &options).map_err(fail);
                let (found, again) = (run()?, run()?);
                compare(&found, &want).map_err(at)?;
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                if bits(&found) != bits(&again) || (stored == Element::F32 && bits(&found) != bits(&raw)) {
                    return Err(at("other bits from a prepared context".to_owned()));
                }
            }
            // one context for the whole batch
            if batch > 1 && name != "kv_lens" && name != "mask" {
                let shared = &context[..kv_len * config.context_width];
                let kept = on_device.prepare_context_blocking(1, shared, Element::F32).map_err(fail)?;
                let found = on_device.forward_prepared_blocking(batch, &states, &kept, &options).map_err(fail)?;
                let want = Wanted::new(&layer, [batch, 1], [&states, shared], allowed, Element::F32);
                compare(&found, &want).map_err(|error| at(format!("shared: {error}")))?;
            }
        }
    }
    Ok(())
}

/// A layer of a model, on real tokens of two entries of a padded batch.
fn annalog(device: &Device) -> Result<(), String> {
    let bytes = include_bytes!("../golden/layer/annalog.safetensors");
    let file = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let model = include_bytes!("../../examples/data/annalog/model.safetensors");
    let model = SafeTensors::deserialize(model).map_err(|error| error.to_string())?;
    let names =
        Names::separate("decoder.layers.0.encoder_attention.", ["fc_q", "fc_k", "fc_v", "fc_o"], ["q_norm", "k_norm"]);
    let layer =
        CrossAttention::load(&model, &names, LayerConfig::new(256, 256, 8)).map_err(|error| error.to_string())?;
    let tensor = |name: &str| {
        let data = file.tensor(name).map_err(|error| error.to_string())?.data().to_vec();
        Ok::<_, String>(data.as_chunks::<4>().0.iter().map(|&x| f32::from_le_bytes(x)).collect::<Vec<f32>>())
    };
    let keep = file.tensor("key_keep").map_err(|error| error.to_string())?;
    let keep: Vec<bool> = keep.data().iter().map(|&byte| byte != 0).collect();
    let mask = LayerMask { data: (&keep).into(), shape: [2, 1, 1, 36] };
    let options = LayerOptions { mask: Some(mask), ..LayerOptions::default() };
    let (states, context, want) = (tensor("x")?, tensor("encoder_output")?, wide(&tensor("proj")?));
    let found =
        on(&layer, device)?.forward_blocking(2, &states, &context, &options).map_err(|error| error.to_string())?;
    let allowed = |b: usize, _: usize, _: usize, j: usize| keep[b * 36 + j];
    let ours = Wanted::new(&layer, [2; 2], [&states, &context], &allowed, Element::F32);
    compare(&found, &ours)?;
    // the stored result is itself f32
    let stored: Vec<f32> = tensor("proj")?;
    compare(&stored, &ours).map_err(|error| format!("the file: {error}"))?;
    compare(&found, &Wanted { output: want, may: ours.may.iter().map(|may| 2.0 * may).collect() })
}

fn refusals(device: &Device) -> Result<(), String> {
    let config = LayerConfig::new(8, 6, 2);
    let new = |seed: f32| {
        let mut weights = weights(&config, Element::F32);
        weights.query.bias = Some(vec![seed; 8]);
        CrossAttention::new(config.clone(), weights).map_err(|error| error.to_string())
    };
    let (layer, other) = (on(&new(0.0)?, device)?, on(&new(1.0)?, device)?);
    let none = LayerOptions::default;
    let (states, context) = (vec![0.0; 16], vec![0.0; 18]);
    let kept = other.prepare_context_blocking(1, &context, Element::F32).map_err(|error| error.to_string())?;
    let mask = LayerMask { data: (&[true; 5]).into(), shape: [1, 1, 1, 3] };
    let found = [
        layer.forward_blocking(1, &states[1..], &context, &none()).err(),
        layer.forward_blocking(3, &states, &context, &none()).err(),
        layer.forward_blocking(0, &states, &context, &none()).err(),
        layer.forward_blocking(1, &states, &context[1..], &none()).err(),
        layer.forward_blocking(1, &states, &context, &LayerOptions { mask: Some(mask), ..none() }).err(),
        layer.forward_prepared_blocking(1, &states, &kept, &none()).err(),
    ];
    let tokens = |name, batch, width, found| LayerError::Tokens { name, batch, width, found };
    let wanted = [
        tokens("states", 1, 8, 15),
        tokens("states", 3, 8, 16),
        tokens("context", 0, 6, 18),
        tokens("context", 1, 6, 17),
        LayerError::Mask { shape: [1, 1, 1, 3], wanted: 3, found: 5 },
        LayerError::OtherLayer,
    ];
    for (found, wanted) in found.into_iter().zip(wanted) {
        if found != Some(Error::Layer(wanted.clone())) {
            return Err(format!("{found:?}, not {wanted:?}"));
        }
    }
    let long =
        layer.forward_blocking(1, &states, &context, &LayerOptions { kv_lens: Some((&[4u32]).into()), ..none() });
    if !matches!(long, Err(Error::Input(_))) {
        return Err(format!("{long:?}"));
    }
    Ok(())
}
