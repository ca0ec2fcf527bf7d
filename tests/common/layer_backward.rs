//! Gradients of a layer on a device against slopes of the layer written out in f64.

use cross_attention::layer::{CrossAttention, LayerConfig, LayerGradients, LayerMask, LayerOptions, LayerWeights};
use cross_attention::layer::{NormKind, Projection};
use cross_attention::{Device, Element, TensorData};

use super::layer::{normed, normed_heads, on, weights, written_out};
use super::linear::numbers;

/// How far from the slope, in shares of the largest gradient of its tensor: room for some hundred roundings of f32, one upon
/// another. It is wiring that this looks for; products and the attention's gradients are held to bounds of their own.
const SHARE: f64 = 1e-4;
/// The cube of it, times a third derivative, is what a slope is off by.
const STEP: f32 = 1.0 / 4096.0;
/// Elements of each tensor that are compared.
const SAMPLES: usize = 24;

/// Norms of heads or of the whole, a mask, lengths; more tokens than a block, one row, and none.
pub(super) fn check(device: &Device) -> Result<(), String> {
    for (config, element) in [
        (normed(NormKind::Layer, true), Element::F32),
        (normed_heads(NormKind::Rms), Element::F16),
        (LayerConfig::new(8, 5, 2), Element::F32),
    ] {
        for [batch, q_len, kv_len] in [[2, 5, 70], [1, 1, 9], [2, 3, 0], [1, 0, 3]] {
            one(device, &config, element, [batch, q_len, kv_len])
                .map_err(|error| format!("width {}, batch {batch}, {q_len} of {kv_len}: {error}", config.width))?;
        }
    }
    Ok(())
}

type Taken<'a> = Vec<(&'static str, &'a [f32])>;

fn one(
    device: &Device,
    config: &LayerConfig,
    element: Element,
    [batch, q_len, kv_len]: [usize; 3],
) -> Result<(), String> {
    let given = weights(config, element);
    let layer = CrossAttention::new(config.clone(), given.clone()).map_err(|error| error.to_string())?;
    let states = numbers(5, batch * q_len * config.width);
    let context = numbers(6, batch * kv_len * config.context_width);
    let d_output = numbers(7, states.len());
    let bits: Vec<bool> = (0..batch * kv_len).map(|n| n % 3 != 1).collect();
    let keys = u32::try_from(kv_len).map_err(|error| error.to_string())?;
    let kv_lens: Vec<u32> = (0..batch).map(|b| if b == 0 { keys } else { keys / 4 * 3 }).collect();
    let options = LayerOptions {
        mask: Some(LayerMask { data: (&bits).into(), shape: [batch, 1, 1, kv_len] }),
        kv_lens: Some((&kv_lens).into()),
        ..LayerOptions::default()
    };
    let on_device = on(&layer, device)?;
    let (output, saved) =
        on_device.forward_saving_blocking(batch, &states, &context, &options).map_err(|error| error.to_string())?;
    if output != on_device.forward_blocking(batch, &states, &context, &options).map_err(|error| error.to_string())? {
        return Err("another output than without a backward".to_owned());
    }
    let found = on_device.backward_blocking(&saved, &d_output).map_err(|error| error.to_string())?;
    if found != on_device.backward_blocking(&saved, &d_output).map_err(|error| error.to_string())? {
        return Err("other gradients the second time".to_owned());
    }

    let allowed = |b: usize, _: usize, _: usize, j: usize| bits[b * kv_len + j] && j < kv_lens[b] as usize;
    let loss = |weights: LayerWeights, states: &[f32], context: &[f32]| {
        let layer = CrossAttention::new(config.clone(), weights).map_err(|error| error.to_string())?;
        let exactly = |x: f64| x;
        let (output, _) = written_out(&layer, [batch; 2], [states, context], &allowed, &exactly, &exactly);
        Ok::<_, String>(output.iter().zip(&d_output).map(|(o, &d)| o * f64::from(d)).sum::<f64>())
    };
    let wide = in_f32(&given);
    let names = tensors(&found).len();
    for which in 0..names {
        let (name, gradient) = tensors(&found)[which];
        let mut changed = LayerGradients { states: states.clone(), context: context.clone(), weights: wide.clone() };
        if gradient.len() != tensors(&changed)[which].1.len() {
            return Err(format!("{name} has {} elements, not {}", gradient.len(), tensors(&changed)[which].1.len()));
        }
        let largest = gradient.iter().fold(0.0f64, |most, &d| most.max(f64::from(d).abs()));
        for n in (0..gradient.len()).step_by(gradient.len().div_ceil(SAMPLES).max(1)) {
            let was = tensors(&changed)[which].1[n];
            let mut ends = [0.0; 2];
            for (end, x) in ends.iter_mut().zip([was - STEP, was + STEP]) {
                set(&mut changed, which, n, x);
                *end = loss(changed.weights.clone(), &changed.states, &changed.context)?;
            }
            set(&mut changed, which, n, was);
            let slope = (ends[1] - ends[0]) / (f64::from(was + STEP) - f64::from(was - STEP));
            let off = (f64::from(gradient[n]) - slope).abs();
            if off.is_nan() || off > SHARE * largest + 1e-6 {
                return Err(format!("{name}, element {n}: {}, but the slope is {slope}", gradient[n]));
            }
        }
    }
    Ok(())
}

/// The same weights as f32, to be moved by less than f16 can.
fn in_f32(weights: &LayerWeights) -> LayerWeights {
    let wide = |of: &Projection| Projection { weight: TensorData::F32(of.weight.to_f32()), bias: of.bias.clone() };
    LayerWeights {
        query: wide(&weights.query),
        key: wide(&weights.key),
        value: wide(&weights.value),
        output: wide(&weights.output),
        ..weights.clone()
    }
}

/// All that a layer has gradients of, in order.
fn tensors(of: &LayerGradients) -> Taken<'_> {
    let LayerGradients { states, context, weights } = of;
    let mut taken: Taken<'_> = vec![("states", states), ("context", context)];
    let projections = [&weights.query, &weights.key, &weights.value, &weights.output];
    for (name, projection) in ["query", "key", "value", "output"].into_iter().zip(projections) {
        if let TensorData::F32(weight) = &projection.weight {
            taken.push((name, weight));
        }
        taken.extend(projection.bias.as_ref().map(|bias| (name, &bias[..])));
    }
    for (name, norm) in [("query_norm", &weights.query_norm), ("key_norm", &weights.key_norm)] {
        if let Some(norm) = norm {
            taken.push((name, &norm.weight));
            taken.extend(norm.bias.as_ref().map(|bias| (name, &bias[..])));
        }
    }
    taken
}

fn set(of: &mut LayerGradients, which: usize, n: usize, x: f32) {
    let LayerGradients { states, context, weights } = of;
    let mut taken: Vec<&mut Vec<f32>> = vec![states, context];
    for projection in [&mut weights.query, &mut weights.key, &mut weights.value, &mut weights.output] {
        if let TensorData::F32(weight) = &mut projection.weight {
            taken.push(weight);
        }
        taken.extend(projection.bias.as_mut());
    }
    for norm in [&mut weights.query_norm, &mut weights.key_norm].into_iter().flatten() {
        taken.push(&mut norm.weight);
        taken.extend(norm.bias.as_mut());
    }
    taken[which][n] = x;
}
