//! Training of a cross-attention layer: a fresh one learns to give what a layer of a real model gives.
//!
//! ```sh
//! cargo run --release --features cli --example train_layer -- --device auto --output loss.svg
//! ```
//!
//! The data is real: five substances as SMILES go through the encoder of the model of `annalog.rs`, their analogues through
//! the self-attention of its first decoder layer. What then enters the cross-attention of that layer, padded to one length and with a
//! mask over the padding, is input here, and what comes out of it the target; the weights of the model are not used again. One substance is
//! left out of the training and only looked at: 110 rows are fitted by 263 168 weights, which says little of others. The seed gives the weights at the start, and with them the bits of
//! all that follows.

#![expect(clippy::cast_possible_truncation, reason = "rounding to f32, and powers of ten")]

#[allow(dead_code, reason = "another example asks for more")]
#[path = "common/dense.rs"]
mod dense;
#[path = "common/flags.rs"]
mod flags;
#[allow(dead_code, reason = "other examples and the program draw more")]
#[path = "common/picture.rs"]
mod picture;
#[path = "common/tensors.rs"]
mod tensors;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use cross_attention::layer::{CrossAttention, LayerConfig, LayerMask, LayerOn, LayerOptions, LayerWeights, Projection};
use cross_attention::{Device, Diagonal, TensorData};
use dense::{LayerNorm, Linear, add};
use flags::{DeviceFlag, Failure, say};
use picture::OutputFlag;
use picture::draw::scale::number;
use picture::draw::scene::{Anchor, Color, Scene, Style};
use serde::Deserialize;
use tensors::{Tensors, read_json};

const WIDTH: usize = 256;
const HEADS: usize = 8;
const LAYERS: usize = 3;
/// The molecule that is left out of the training.
const LEFT_OUT: usize = 3;
/// The error must fall by this factor at least.
const GOAL: f64 = 50.0;

/// A fresh cross-attention layer learns to give what a layer of a real model gives
#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    device: DeviceFlag,
    /// Steps of training
    #[arg(long, default_value_t = 300)]
    steps: usize,
    /// Step width of Adam at the start; falls to 0 along a half cosine
    #[arg(long, default_value_t = 0.01)]
    rate: f64,
    /// Of the weights at the start
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    output: OutputFlag,
    /// Folder with model.safetensors, batch.safetensors and batch.json
    #[arg(long, value_name = "FOLDER", hide_default_value = true, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/annalog"))]
    data: PathBuf,
}

#[derive(Deserialize)]
struct Batch {
    molecules: Vec<Molecule>,
    pad: i32,
}

#[derive(Deserialize)]
struct Molecule {
    name: String,
}

/// What enters the layer and what is to come out, `[count, len, WIDTH]`.
struct Data {
    count: usize,
    len: usize,
    states: Vec<f32>,
    context: Vec<f32>,
    target: Vec<f32>,
    /// Tokens of the context that are no padding, `[count, len]`.
    keep: Vec<bool>,
    /// The same of the states.
    keep_rows: Vec<bool>,
}

fn main() -> ExitCode {
    flags::end(run(&Flags::parse()))
}

fn run(flags: &Flags) -> Result<(), Failure> {
    if !(flags.rate.is_finite() && flags.rate > 0.0) {
        return Err(format!("a step width of {} teaches nothing; name one above 0, such as 0.01", flags.rate).into());
    }
    let batch: Batch = read_json(&flags.data.join("batch.json"))?;
    let output = flags.output.open("train_layer")?;
    let device = flags.device.begin([
        "A fresh cross-attention layer learns, by its gradients and Adam, to give what a layer of a real model gives;",
        "the picture shows its error over the steps, on what it is trained on and on a substance that is left out.",
    ])?;
    let data = collect(&device, &flags.data, batch.pad)?;
    let name = &batch.molecules.get(LEFT_OUT).ok_or("the batch has too few molecules")?.name;

    let rows = |left_out: bool| -> Vec<usize> {
        let wanted = |row: &usize| data.keep_rows[*row] && (row / data.len == LEFT_OUT) == left_out;
        (0..data.count * data.len).filter(wanted).collect()
    };
    let (trained, left_out) = (rows(false), rows(true));
    let constant = variance(&data.target, &trained);
    say!("{} rows to train on, {} of {name} left out", trained.len(), left_out.len());
    say!("mean square of the target about its mean: {constant:.3e}\n");

    let mut parts = fresh(flags.seed);
    let mut adam = Adam::new(&parts);
    let options = padding(&data.keep, [data.count, data.len]);
    let mut curves = [vec![], vec![]];
    let begin = Instant::now();
    say!("{:>5} {:>12} {:>12}", "step", "error", name);
    for step in 0..=flags.steps {
        let layer = CrossAttention::new(config(), weights(&parts))?.on_blocking(&device)?;
        let (given, saved) = layer.forward_saving_blocking(data.count, &data.states, &data.context, &options)?;
        let error = [&trained, &left_out].map(|rows| mean_square(&given, &data.target, rows));
        curves.iter_mut().zip(error).for_each(|(curve, error)| curve.push(error));
        if step.is_multiple_of(25) || step == flags.steps {
            say!("{step:>5} {:>12.3e} {:>12.3e}", error[0], error[1]);
        }
        if step == flags.steps {
            break;
        }
        let gradients = layer.backward_blocking(&saved, &slope(&given, &data.target, &trained))?;
        // the gradient of what the mask hides is no number near zero, but zero
        let hidden = gradients.context.chunks_exact(WIDTH).zip(&data.keep).filter(|(_, keep)| !**keep);
        if hidden.flat_map(|(token, _)| token).any(|d| *d != 0.0) {
            return Err("the padding of the context has a gradient".into());
        }
        let progress = step as f64 / flags.steps as f64;
        let rate = 0.5 * flags.rate * (1.0 + (std::f64::consts::PI * progress).cos());
        adam.step(&mut parts, &taken(gradients.weights), rate);
    }
    let seconds = begin.elapsed().as_secs_f64();

    let [first, last] = [curves[0][0], curves[0][flags.steps]];
    let bytes: Vec<u8> = parts.iter().flatten().flat_map(|weight| weight.to_le_bytes()).collect();
    say!("\n{} steps in {seconds:.1} s, {:.1} ms each", flags.steps, 1e3 * seconds / flags.steps.max(1) as f64);
    say!("the error fell by a factor of {:.0}; crc32 of the weights: {:08x}", first / last, crc32fast::hash(&bytes));
    let names = ["trained on".to_owned(), format!("{name}, left out")];
    output.write(&plot(&curves, &names, constant))?;
    // so that an error which is no number fails too
    if first / last >= GOAL { Ok(()) } else { Err(format!("a factor of {GOAL} was the goal").into()) }
}

fn config() -> LayerConfig {
    LayerConfig::new(WIDTH, WIDTH, HEADS)
}

/// No row sees the padding.
fn padding(keep: &[bool], [count, len]: [usize; 2]) -> LayerOptions<'_> {
    LayerOptions { mask: Some(LayerMask { data: keep.into(), shape: [count, 1, 1, len] }), ..LayerOptions::default() }
}

/// Runs the model up to the cross-attention of the first decoder layer, and that layer's own weights for the target.
fn collect(device: &Device, folder: &Path, pad: i32) -> Result<Data, Failure> {
    let model = Tensors::open(&folder.join("model.safetensors"))?;
    let file = Tensors::open(&folder.join("batch.safetensors"))?;
    let (source, written) = (file.i32("src")?, file.i32("trg")?);
    let shape = file.shape("src")?;
    let (count, len) = (shape[0], shape[1]);
    let text = |tokens: &[i32]| tokens.iter().map(|&token| token != pad).collect::<Vec<_>>();
    let (keep, keep_rows) = (text(&source), text(&written));
    let options = padding(&keep, [count, len]);

    let mut context = embed(&model, "encoder", &source, len)?;
    for n in 0..LAYERS {
        let at = format!("encoder.layers.{n}");
        let layer = open_layer(device, &model, &format!("{at}.self_attention"))?;
        let seen = layer.forward_blocking(count, &context, &context, &options)?;
        add(&mut context, &seen);
        context = open_norm(&model, &format!("{at}.self_attn_layer_norm"))?.apply(&context);
        let linear = |name: &str| Linear::open(&model, &format!("{at}.positionwise_feedforward.{name}"), '.');
        let inner: Vec<f32> = linear("fc_1")?.apply(&context).into_iter().map(|x| x.max(0.0)).collect();
        add(&mut context, &linear("fc_2")?.apply(&inner));
        context = open_norm(&model, &format!("{at}.ff_layer_norm"))?.apply(&context);
    }
    let mut states = embed(&model, "decoder", &written, len)?;
    // padding stands behind the text, where a causal mask hides it from every row that counts
    let causal = LayerOptions { causal: Some(Diagonal::TopLeft), ..LayerOptions::default() };
    let seen = open_layer(device, &model, "decoder.layers.0.self_attention")?
        .forward_blocking(count, &states, &states, &causal)?;
    add(&mut states, &seen);
    states = open_norm(&model, "decoder.layers.0.self_attn_layer_norm")?.apply(&states);
    let target = open_layer(device, &model, "decoder.layers.0.encoder_attention")?
        .forward_blocking(count, &states, &context, &options)?;
    Ok(Data { count, len, states, context, target, keep, keep_rows })
}

fn open_layer(device: &Device, model: &Tensors, name: &str) -> Result<LayerOn, Failure> {
    let mut parts = vec![];
    for projection in ["fc_q", "fc_k", "fc_v", "fc_o"] {
        for part in ["weight", "bias"] {
            parts.push(model.f32(&format!("{name}.{projection}.{part}"))?);
        }
    }
    let parts = parts.try_into().map_err(|_| "a layer has eight parts")?;
    Ok(CrossAttention::new(config(), weights(&parts))?.on_blocking(device)?)
}

fn open_norm(model: &Tensors, name: &str) -> Result<LayerNorm, Failure> {
    LayerNorm::open(model, &format!("{name}.weight"), &format!("{name}.bias"))
}

/// Token embeddings times 16, the root of the width, and positions.
fn embed(model: &Tensors, side: &str, tokens: &[i32], len: usize) -> Result<Vec<f32>, Failure> {
    let of_token = model.f32(&format!("{side}.tok_embedding.weight"))?;
    let of_place = model.f32(&format!("{side}.pos_embedding.weight"))?;
    let mut x = Vec::with_capacity(tokens.len() * WIDTH);
    for (n, &token) in tokens.iter().enumerate() {
        let (token, place) = (usize::try_from(token)? * WIDTH, n % len * WIDTH);
        x.extend((0..WIDTH).map(|d| 16.0 * of_token[token + d] + of_place[place + d]));
    }
    Ok(x)
}

/// Weight and bias of query, key, value and output, one after another.
type Parts = [Vec<f32>; 8];

/// Evenly distributed up to the root of the inverse width, as is usual for linear layers.
fn fresh(seed: u64) -> Parts {
    let mut random = fastrand::Rng::with_seed(seed);
    let most = 1.0 / (WIDTH as f32).sqrt();
    std::array::from_fn(|n| {
        let len = if n % 2 == 0 { WIDTH * WIDTH } else { WIDTH };
        (0..len).map(|_| most * (2.0 * random.f32() - 1.0)).collect()
    })
}

fn weights(parts: &Parts) -> LayerWeights {
    let [query, key, value, output] = [0, 2, 4, 6]
        .map(|n| Projection { weight: TensorData::F32(parts[n].clone()), bias: Some(parts[n + 1].clone()) });
    LayerWeights { query, key, value, output, query_norm: None, key_norm: None }
}

fn taken(weights: LayerWeights) -> Parts {
    let LayerWeights { query, key, value, output, .. } = weights;
    let [a, b, c, d] = [query, key, value, output].map(|of| (of.weight.into_f32(), of.bias.unwrap_or_default()));
    [a.0, a.1, b.0, b.1, c.0, c.1, d.0, d.1]
}

/// Adam (Kingma and Ba 2014, arXiv:1412.6980).
struct Adam {
    steps: i32,
    mean: Parts,
    square: Parts,
}

impl Adam {
    fn new(parts: &Parts) -> Self {
        let zeros = || std::array::from_fn(|n| vec![0.0; parts[n].len()]);
        Self { steps: 0, mean: zeros(), square: zeros() }
    }

    fn step(&mut self, parts: &mut Parts, gradients: &Parts, rate: f64) {
        self.steps += 1;
        let [for_mean, for_square] = [0.9f64, 0.999].map(|beta| 1.0 / (1.0 - beta.powi(self.steps)));
        let (rate, for_square) = ((rate * for_mean) as f32, for_square as f32);
        for n in 0..parts.len() {
            for (i, &gradient) in gradients[n].iter().enumerate() {
                let (mean, square) = (&mut self.mean[n][i], &mut self.square[n][i]);
                *mean = 0.9 * *mean + 0.1 * gradient;
                *square = 0.999 * *square + 0.001 * gradient * gradient;
                // a bias of the key raises all scores of a row alike: its gradient is rounding, far below the 1e-8
                parts[n][i] -= rate * *mean / ((for_square * *square).sqrt() + 1e-8);
            }
        }
    }
}

/// Of the difference, over these rows.
fn mean_square(output: &[f32], target: &[f32], rows: &[usize]) -> f64 {
    let row = |row: usize| output[row * WIDTH..][..WIDTH].iter().zip(&target[row * WIDTH..][..WIDTH]);
    let sum: f64 = rows.iter().flat_map(|&n| row(n)).map(|(o, t)| (f64::from(*o) - f64::from(*t)).powi(2)).sum();
    sum / (rows.len() * WIDTH) as f64
}

/// Its gradient; rows that do not count get zeros.
fn slope(output: &[f32], target: &[f32], rows: &[usize]) -> Vec<f32> {
    let mut slope = vec![0.0; output.len()];
    let by = 2.0 / (rows.len() * WIDTH) as f32;
    for at in rows.iter().flat_map(|row| row * WIDTH..(row + 1) * WIDTH) {
        slope[at] = by * (output[at] - target[at]);
    }
    slope
}

/// The error of the best output that is the same for every row.
fn variance(target: &[f32], rows: &[usize]) -> f64 {
    let mean = |d: usize| rows.iter().map(|row| f64::from(target[row * WIDTH + d])).sum::<f64>() / rows.len() as f64;
    let of = |d: usize| {
        let mean = mean(d);
        rows.iter().map(|row| (f64::from(target[row * WIDTH + d]) - mean).powi(2)).sum::<f64>()
    };
    (0..WIDTH).map(of).sum::<f64>() / (rows.len() * WIDTH) as f64
}

/// Errors over the steps, on a scale of powers of ten, and the error of a constant.
fn plot(curves: &[Vec<f64>; 2], names: &[String; 2], constant: f64) -> Scene {
    const PLOT: [f64; 2] = [760.0, 420.0];
    const LEFT: f64 = 88.0;
    const TOP: f64 = 64.0;
    const GRID: Color = [216; 3];
    const INK: Color = [0; 3];
    const GREY: Color = [112; 3];
    let title = "A cross-attention layer learns: its error over the steps of training";
    let mut scene = Scene::new(title);
    scene.size = [1130, 560];
    let steps = (curves[0].len() - 1).max(1) as f64;
    let all = || curves.iter().flatten().copied().chain([constant]).filter(|error| *error > 0.0).map(f64::log10);
    let (low, high) = all()
        .filter(|log| log.is_finite())
        .fold((0.0, f64::NEG_INFINITY), |(low, high): (f64, f64), log| (low.min(log), high.max(log)));
    let (low, high) = (low.floor(), high.max(low.floor() + 1.0) + 0.2);
    let x = |step: f64| LEFT + PLOT[0] * step / steps;
    let y = |log: f64| TOP + PLOT[1] * (high - log) / (high - low);
    let (right, bottom) = (x(steps), y(low));
    scene.text(title, [LEFT, 22.0], Style::bold(Anchor::Start));
    scene.text(
        "mean squared error, logarithmic scale",
        [LEFT, 46.0],
        Style { color: GREY, ..Style::plain(Anchor::Start) },
    );
    for decade in low as i32..=high.floor() as i32 {
        let at = y(decade.into());
        scene.line(vec![[LEFT, at], [right, at]], GRID, 1.0);
        let label = format!("{:.*}", decade.min(0).unsigned_abs() as usize, 10f64.powi(decade));
        scene.text(&label, [LEFT - 8.0, at], Style::plain(Anchor::End));
    }
    let mut last = f64::NEG_INFINITY;
    for step in
        (0..=6).map(|n| (steps * f64::from(n) / 6.0).round()).filter(|step| std::mem::replace(&mut last, *step) < *step)
    {
        scene.line(vec![[x(step), bottom], [x(step), bottom + 5.0]], INK, 1.0);
        scene.text(&format!("{step}"), [x(step), bottom + 16.0], Style::plain(Anchor::Middle));
    }
    scene.text("step", [(LEFT + right) / 2.0, bottom + 38.0], Style { color: GREY, ..Style::plain(Anchor::Middle) });
    scene.line(vec![[LEFT, TOP], [LEFT, bottom], [right, bottom]], INK, 1.0);
    scene.line(vec![[LEFT, y(constant.log10())], [right, y(constant.log10())]], GREY, 2.0);
    // each line is named at its end; names that would overlap are moved apart
    let mut ends = vec![(constant, "the best constant output".to_owned(), GREY)];
    for ((curve, name), color) in curves.iter().zip(names).zip([[24, 72, 168], [208, 88, 24]]) {
        let place = |(step, error): (usize, &f64)| [x(step as f64), y(error.log10())];
        let points: Vec<[f64; 2]> = curve.iter().enumerate().filter(|(_, error)| **error > 0.0).map(place).collect();
        if let Some([_, _]) = points.last() {
            scene.line(points, color, 2.0);
        }
        ends.push((curve.last().copied().filter(|error| *error > 0.0).unwrap_or(constant), name.clone(), color));
    }
    ends.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut free = TOP;
    for (error, name, color) in ends {
        let at = y(error.log10()).max(free);
        free = at + 20.0;
        scene.text(
            &format!("{name}: {}", number(error as f32)),
            [right + 10.0, at],
            Style { color, ..Style::plain(Anchor::Start) },
        );
    }
    scene
}
