//! Cross-attention layers against one written out in f64, on any device.

use cross_attention::layer::{
    Biases, CrossAttention, LayerConfig, LayerError, LayerMask, LayerOn, LayerOptions, LayerWeights, Names, Norm,
    NormKind, NormWeights, Projection,
};
use cross_attention::{Device, Diagonal, Element, Error, TensorData};
use safetensors::SafeTensors;

use super::linear::{exact, numbers, wide};

/// What a layer on a device is held to.
type Check = fn(&Device) -> Result<(), String>;

/// Name and check of everything that a layer is held to.
pub(crate) const CHECKS: [(&str, Check); 6] = [
    ("annalog", annalog),
    ("plain", |device| check(device, &LayerConfig::new(24, 24, 3), Element::F32)),
    ("grouped_other_widths_f16", |device| check(device, &grouped(), Element::F16)),
    ("norms_rms", |device| check(device, &normed(NormKind::Rms, false), Element::F32)),
    ("norms_layer", |device| check(device, &normed(NormKind::Layer, true), Element::F16)),
    ("refusals", refusals),
];

fn grouped() -> LayerConfig {
    let biases = Biases { query: true, key: false, value: true, output: false };
    LayerConfig { kv_heads: 2, head_dim: 7, v_head_dim: 5, scale: Some(0.3), biases, ..LayerConfig::new(20, 33, 6) }
}

fn normed(kind: NormKind, bias: bool) -> LayerConfig {
    let norm = Some(Norm { kind, epsilon: 1e-3, bias });
    LayerConfig { query_norm: norm, key_norm: norm, biases: Biases::NONE, kv_heads: 1, ..LayerConfig::new(70, 66, 1) }
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

/// The layer in f64; `allowed(b, h, i, j)` is the mask.
fn plain(
    layer: &CrossAttention,
    batch: usize,
    [states, context]: [&[f32]; 2],
    allowed: &dyn Fn(usize, usize, usize, usize) -> bool,
) -> Vec<f64> {
    let (config, weights) = (layer.config(), layer.weights());
    let project = |x: &[f64], projection: &Projection, inner: usize| {
        let bias = projection.bias.as_deref().map(wide);
        exact(x, &wide(&projection.weight.to_f32()), bias.as_deref(), inner).0
    };
    let norm = |rows: &mut [f64], norm: Option<Norm>, weights: &Option<NormWeights>| {
        let (Some(norm), Some(weights)) = (norm, weights) else { return };
        for row in rows.chunks_exact_mut(config.head_dim) {
            let n = row.len() as f64;
            let mean = if norm.kind == NormKind::Layer { row.iter().sum::<f64>() / n } else { 0.0 };
            let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
            for (d, x) in row.iter_mut().enumerate() {
                let bias = weights.bias.as_ref().map_or(0.0, |bias| f64::from(bias[d]));
                *x = (*x - mean) / (variance + f64::from(norm.epsilon)).sqrt() * f64::from(weights.weight[d]) + bias;
            }
        }
    };
    let (states, context) = (wide(states), wide(context));
    let mut query = project(&states, &weights.query, config.width);
    let mut key = project(&context, &weights.key, config.context_width);
    let value = project(&context, &weights.value, config.context_width);
    norm(&mut query, config.query_norm, &weights.query_norm);
    norm(&mut key, config.key_norm, &weights.key_norm);
    let (heads, kv_heads, dim, v_dim) = (config.heads, config.kv_heads, config.head_dim, config.v_head_dim);
    let q_len = states.len() / config.width / batch;
    let kv_len = context.len() / config.context_width / batch;
    let scale = config.scale.map_or(1.0 / (dim as f64).sqrt(), f64::from);
    let mut attended = vec![0.0; batch * q_len * heads * v_dim];
    for b in 0..batch {
        for h in 0..heads {
            let kv_head = h / (heads / kv_heads);
            for i in 0..q_len {
                let query = &query[((b * q_len + i) * heads + h) * dim..][..dim];
                let score = |j: usize| {
                    let key = &key[((b * kv_len + j) * kv_heads + kv_head) * dim..][..dim];
                    scale * query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>()
                };
                let seen: Vec<_> = (0..kv_len).filter(|&j| allowed(b, h, i, j)).map(|j| (j, score(j))).collect();
                let top = seen.iter().map(|(_, s)| *s).fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = seen.iter().map(|(_, s)| (s - top).exp()).sum();
                for (j, s) in seen {
                    for d in 0..v_dim {
                        attended[((b * q_len + i) * heads + h) * v_dim + d] +=
                            (s - top).exp() / total * value[((b * kv_len + j) * kv_heads + kv_head) * v_dim + d];
                    }
                }
            }
        }
    }
    project(&attended, &weights.output, heads * v_dim)
}

/// Of numbers about 1, through sums of at most `n` products each, three times one after another and a softmax over scores
/// of up to `s`: each projection is off by `n` epsilon of its magnitudes at most, a score by `n` epsilon of `s`, and what
/// follows carries that on. `largest` stands for the magnitudes of the output.
fn bound(config: &LayerConfig, largest: f64, stored: Element) -> f64 {
    let n = (config.width + config.context_width + 2 * config.head_dim + config.heads * config.v_head_dim) as f64;
    let epsilon = f64::from(f32::EPSILON);
    // f16 keeps 11 bits of each key and value; a softmax doubles what it is given, times the scores' spread of about 4
    let storage = if stored == Element::F16 { 2f64.powi(-11) * 10.0 } else { 0.0 };
    (n * epsilon * 10.0 + storage) * (1.0 + largest)
}

fn compare(found: &[f32], want: &[f64], bound: f64) -> Result<(), String> {
    if found.len() != want.len() {
        return Err(format!("{} elements, not {}", found.len(), want.len()));
    }
    for (n, (&found, want)) in found.iter().zip(want).enumerate() {
        let off = (f64::from(found) - want).abs();
        if off.is_nan() || off > bound {
            return Err(format!("element {n} is {found}, not {want}: off by {off:e}, allowed {bound:e}"));
        }
    }
    Ok(())
}

fn on(layer: &CrossAttention, device: &Device) -> Result<LayerOn, String> {
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
        let bits: Vec<bool> = (0..batch * kv_len).map(|n| n % 3 != 1).collect();
        let mask = LayerMask { data: &bits, shape: [batch, 1, 1, kv_len] };
        let none = LayerOptions::default();
        type Allowed<'a> = &'a dyn Fn(usize, usize, usize, usize) -> bool;
        let cases: [(&str, LayerOptions<'_>, Allowed<'_>); 4] = [
            ("no mask", none, &|_, _, _, _| true),
            ("causal", LayerOptions { causal: Some(Diagonal::TopLeft), ..none }, &|_, _, i, j| j <= i),
            ("kv_lens", LayerOptions { kv_lens: Some(&kv_lens), ..none }, &|b, _, _, j| j < kv_lens[b] as usize),
            ("mask", LayerOptions { mask: Some(mask), ..none }, &|b, _, _, j| bits[b * kv_len + j]),
        ];
        for (name, options, allowed) in cases {
            let at = |error: String| format!("{name}, batch {batch}, {q_len} of {kv_len}: {error}");
            let fail = |error: Error| at(error.to_string());
            let want = plain(&layer, batch, [&states, &context], allowed);
            let largest = want.iter().fold(0.0f64, |top, x| top.max(x.abs()));
            let raw = on_device.forward_blocking(batch, &states, &context, &options).map_err(fail)?;
            compare(&raw, &want, bound(config, largest, Element::F32)).map_err(at)?;
            for stored in [Element::F32, Element::F16] {
                let kept = on_device.prepare_context_blocking(batch, &context, stored).map_err(fail)?;
                let bytes =
                    batch * kv_len * config.kv_heads * (config.head_dim + config.v_head_dim) * stored.size_bytes();
                if kept.bytes() != bytes as u64 || kept.kv_len() != kv_len || kept.batch() != batch {
                    return Err(at(format!("{kept:?} is not {bytes} bytes")));
                }
                let run = || on_device.forward_prepared_blocking(batch, &states, &kept, &options).map_err(fail);
                let (found, again) = (run()?, run()?);
                compare(&found, &want, bound(config, largest, stored)).map_err(at)?;
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                if bits(&found) != bits(&again) || (stored == Element::F32 && bits(&found) != bits(&raw)) {
                    return Err(at("other bits from a prepared context".to_owned()));
                }
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
    let mask = LayerMask { data: &keep, shape: [2, 1, 1, 36] };
    let options = LayerOptions { mask: Some(mask), ..LayerOptions::default() };
    let (states, context, want) = (tensor("x")?, tensor("encoder_output")?, wide(&tensor("proj")?));
    let found =
        on(&layer, device)?.forward_blocking(2, &states, &context, &options).map_err(|error| error.to_string())?;
    let largest = want.iter().fold(0.0f64, |top, x| top.max(x.abs()));
    // the stored result is itself f32
    compare(&found, &want, bound(layer.config(), largest, Element::F32))
}

fn refusals(device: &Device) -> Result<(), String> {
    let config = LayerConfig::new(8, 6, 2);
    let new = |seed: f32| {
        let mut weights = weights(&config, Element::F32);
        weights.query.bias = Some(vec![seed; 8]);
        CrossAttention::new(config.clone(), weights).map_err(|error| error.to_string())
    };
    let (layer, other) = (on(&new(0.0)?, device)?, on(&new(1.0)?, device)?);
    let none = LayerOptions::default();
    let (states, context) = (vec![0.0; 16], vec![0.0; 18]);
    let kept = other.prepare_context_blocking(1, &context, Element::F32).map_err(|error| error.to_string())?;
    let mask = LayerMask { data: &[true; 5], shape: [1, 1, 1, 3] };
    let found = [
        layer.forward_blocking(1, &states[1..], &context, &none).err(),
        layer.forward_blocking(3, &states, &context, &none).err(),
        layer.forward_blocking(0, &states, &context, &none).err(),
        layer.forward_blocking(1, &states, &context[1..], &none).err(),
        layer.forward_blocking(1, &states, &context, &LayerOptions { mask: Some(mask), ..none }).err(),
        layer.forward_prepared_blocking(1, &states, &kept, &none).err(),
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
    let long = layer.forward_blocking(1, &states, &context, &LayerOptions { kv_lens: Some(&[4]), ..none });
    if !matches!(long, Err(Error::Input(_))) {
        return Err(format!("{long:?}"));
    }
    Ok(())
}
