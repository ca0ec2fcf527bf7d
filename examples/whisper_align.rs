//! The decoder of Whisper tiny.en over ten seconds of encoded speech: predicts every next token, finds out when each word
//! was said from the weights of eight cross-attention heads, and draws them.
//!
//! ```sh
//! cargo run --release --features cli --example whisper_align -- --device auto --output alignment.svg
//! ```
//!
//! Cross-attention runs on the device that is named, self-attention on the same; the rest is plain code. Keys and values
//! of the sound are projected once. Times come from the heads that the model's authors publish as those that follow the
//! sound, by dynamic time warping, as in the authors' own program.

#![expect(clippy::cast_possible_truncation, reason = "numbers that are small")]

#[path = "common/dense.rs"]
mod dense;
#[path = "common/flags.rs"]
mod flags;
#[allow(dead_code, reason = "other examples and the program draw more")]
#[path = "common/picture.rs"]
mod picture;
#[path = "common/tensors.rs"]
mod tensors;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use cross_attention::weights::{Keys, Select, WeightsSpec};
use cross_attention::{
    AttentionInputs, AttentionProblem, AttentionSpec, Device, Diagonal, KernelChoice, Layout, TensorSpec,
};
use dense::{LayerNorm, Linear, add, largest, product};
use flags::{DeviceFlag, Failure, say};
use picture::OutputFlag;
use picture::draw::heat::{Figure, HeatMap, Mark};
use picture::draw::scale::Spacing;
use picture::draw::scene::Scene;
use serde::Deserialize;
use tensors::{Tensors, read_json};

const WIDTH: usize = 384;
const HEADS: usize = 6;
const LAYERS: usize = 4;
/// Frames of encoded sound.
const FRAMES: usize = 1500;
/// Start of transcript, no time stamps: what is given before the text.
const PROMPT: usize = 2;

/// Whisper's decoder over ten seconds of speech: which token comes next, and when each word was said
#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    device: DeviceFlag,
    #[command(flatten)]
    output: OutputFlag,
    /// Folder with model.safetensors and transcript.json
    #[arg(long, value_name = "FOLDER", hide_default_value = true, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/whisper-tiny-en"))]
    data: PathBuf,
}

#[derive(Deserialize)]
struct Transcript {
    tokens: Vec<i32>,
    token_text: Vec<String>,
    alignment_heads: Vec<[usize; 2]>,
    frames_with_speech: usize,
    seconds_per_frame: f64,
    words: Vec<Word>,
}

#[derive(Deserialize)]
struct Word {
    word: String,
    tokens: Vec<i32>,
    start: f64,
    end: f64,
}

struct Layer {
    self_norm: LayerNorm,
    self_in: Linear,
    self_out: Linear,
    cross_norm: LayerNorm,
    cross_query: Linear,
    cross_context: Linear,
    cross_out: Linear,
    ffn_norm: LayerNorm,
    ffn_in: Linear,
    ffn_out: Linear,
}

impl Layer {
    fn open(file: &Tensors, number: usize) -> Result<Self, Failure> {
        let at = |name: &str| format!("decoder/layer_{number}/{name}");
        let norm = |name: &str| LayerNorm::open(file, &at(&format!("{name}/gamma")), &at(&format!("{name}/beta")));
        let linear = |name: &str| Linear::open(file, &at(name), '/');
        Ok(Self {
            self_norm: norm("self_attention/layer_norm")?,
            self_in: linear("self_attention/linear_0")?,
            self_out: linear("self_attention/linear_1")?,
            cross_norm: norm("attention/layer_norm")?,
            cross_query: linear("attention/linear_0")?,
            cross_context: linear("attention/linear_1")?,
            cross_out: linear("attention/linear_2")?,
            ffn_norm: norm("ffn/layer_norm")?,
            ffn_in: linear("ffn/linear_0")?,
            ffn_out: linear("ffn/linear_1")?,
        })
    }
}

fn main() -> ExitCode {
    flags::end(run(&Flags::parse()))
}

fn run(flags: &Flags) -> Result<(), Failure> {
    let file = Tensors::open(&flags.data.join("model.safetensors"))?;
    let transcript: Transcript = read_json(&flags.data.join("transcript.json"))?;
    let output = flags.output.open("whisper_align")?;
    let device = flags.device.begin([
        "Whisper's decoder hears ten seconds of speech, predicts each next token of the text, and the weights of",
        "eight of its cross-attention heads tell when each word was said; the picture shows them over time.",
    ])?;

    let tokens = &transcript.tokens;
    let sound = file.f32("encoder_output")?;
    let layers = (0..LAYERS).map(|n| Layer::open(&file, n)).collect::<Result<Vec<_>, _>>()?;
    let (hidden, weights) = decode(&device, &file, &layers, tokens, &sound, &transcript)?;

    // the largest product with an embedding names the next token
    let rows = file.i32("embedding_rows/ids")?;
    let embedding = file.f32("embedding_rows/weight")?;
    let mut logits = vec![0.0; tokens.len() * rows.len()];
    product(tokens.len(), WIDTH, rows.len(), &hidden, &embedding, &mut logits);
    let next: Vec<i32> = logits.chunks_exact(rows.len()).map(|row| rows[largest(row)]).collect();
    let (told, asked) = (&next[PROMPT - 1..tokens.len() - 1], &tokens[PROMPT..]);
    let right = told.iter().zip(asked).filter(|(a, b)| a == b).count();
    say!("next token right in {right} of {} places", asked.len());

    let speech = transcript.frames_with_speech;
    let matrix = alignment(&weights, transcript.alignment_heads.len(), tokens.len(), speech);
    let starts = warp(&matrix, tokens.len() - PROMPT, speech);
    let mut at = 0;
    let mut worst = 0f64;
    say!("\n{:>7} {:>7}  word", "start", "end");
    for word in &transcript.words {
        let start = starts[at] as f64 * transcript.seconds_per_frame;
        at += word.tokens.len();
        let end = starts[at] as f64 * transcript.seconds_per_frame;
        worst = worst.max((start - word.start).abs()).max((end - word.end).abs());
        say!("{start:6.2}s {end:6.2}s {}", word.word);
    }
    say!("\nat most {worst:.2} s off the published times");
    output.write(&draw(&matrix, &starts, &transcript))?;
    if right != asked.len() {
        return Err(format!("{} of {} next tokens are wrong", asked.len() - right, asked.len()).into());
    }
    Ok(())
}

/// The decoder on all tokens at once, each of which sees those before it. Also the weights of the alignment heads,
/// `[head][token][frame]`.
fn decode(
    device: &Device,
    file: &Tensors,
    layers: &[Layer],
    tokens: &[i32],
    sound: &[f32],
    transcript: &Transcript,
) -> Result<(Vec<f32>, Vec<f32>), Failure> {
    let len = tokens.len();
    // heads lie inside a row, as the projections leave them
    let tensor = |len, parts, part| {
        let layout = Layout::packed([1, HEADS, len, WIDTH / HEADS], parts, part);
        TensorSpec::f32(layout)
    };
    let mut own = AttentionSpec::from_tensors(tensor(len, 3, 0), tensor(len, 3, 1), tensor(len, 3, 2));
    own.causal = Some(Diagonal::TopLeft);
    own.output = tensor(len, 1, 0);
    let own = device.prepare_blocking(&AttentionProblem::new(own)?, KernelChoice::Auto)?;
    let mut cross = AttentionSpec::from_tensors(tensor(len, 1, 0), tensor(FRAMES, 2, 0), tensor(FRAMES, 2, 1));
    cross.output = tensor(len, 1, 0);
    let cross_problem = AttentionProblem::new(cross)?;
    let cross = device.prepare_blocking(&cross_problem, KernelChoice::Auto)?;

    let rows = file.i32("embedding_rows/ids")?;
    let embedding = file.f32("embedding_rows/weight")?;
    let mut x = file.f32("decoder/position_encodings/encodings")?;
    for (i, token) in tokens.iter().enumerate() {
        let row = rows.iter().position(|id| id == token).ok_or_else(|| format!("token {token} has no embedding"))?;
        add(&mut x[i * WIDTH..(i + 1) * WIDTH], &embedding[row * WIDTH..][..WIDTH]);
    }
    let mut weights = vec![];
    for (number, layer) in layers.iter().enumerate() {
        let qkv = layer.self_in.apply(&layer.self_norm.apply(&x));
        let seen = own.run_blocking(&AttentionInputs::new(&qkv, &qkv, &qkv))?;
        add(&mut x, &layer.self_out.apply(&seen.output.to_f32()));

        let query = layer.cross_query.apply(&layer.cross_norm.apply(&x));
        let context = layer.cross_context.apply(sound);
        let inputs = AttentionInputs::new(&query, &context, &context);
        let heads: Vec<usize> =
            transcript.alignment_heads.iter().filter(|of| of[0] == number).map(|of| of[1]).collect();
        let heard = if heads.is_empty() {
            cross.run_blocking(&inputs)?
        } else {
            // only what the times are found from: these heads, on the frames with speech
            let wanted = WeightsSpec {
                heads: Select::List(heads),
                keys: Keys::Each(Select::Range(0..transcript.frames_with_speech)),
                ..WeightsSpec::default()
            };
            let both = device.attention_with_weights_blocking(&cross_problem, &inputs, &wanted)?;
            weights.extend(both.weights);
            both.attention
        };
        add(&mut x, &layer.cross_out.apply(&heard.output.to_f32()));

        let inner: Vec<f32> = layer.ffn_in.apply(&layer.ffn_norm.apply(&x)).into_iter().map(gelu).collect();
        add(&mut x, &layer.ffn_out.apply(&inner));
    }
    let norm = LayerNorm::open(file, "decoder/layer_norm/gamma", "decoder/layer_norm/beta")?;
    Ok((norm.apply(&x), weights))
}

fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// One row for each token of text and the end: the weights of each token over the frames of speech alone, each frame's over all
/// tokens brought to mean 0 and deviation 1, smoothed over 7 frames by their median, averaged over the heads.
fn alignment(weights: &[f32], heads: usize, len: usize, frames: usize) -> Vec<f32> {
    let mut mean = vec![0.0; (len - PROMPT) * frames];
    for head in weights.chunks_exact(len * frames) {
        let mut head = head.to_vec();
        // what lies behind the speech is left out of the softmax
        for row in head.chunks_exact_mut(frames) {
            let sum: f32 = row.iter().sum();
            row.iter_mut().for_each(|weight| *weight /= sum);
        }
        let mut normal = head.clone();
        for frame in 0..frames {
            let column = || (0..len).map(|i| f64::from(head[i * frames + frame]));
            let middle = column().sum::<f64>() / len as f64;
            let deviation = (column().map(|x| (x - middle).powi(2)).sum::<f64>() / len as f64).sqrt();
            for i in 0..len {
                normal[i * frames + frame] = ((f64::from(head[i * frames + frame]) - middle) / deviation) as f32;
            }
        }
        // the row of a token looks for the one behind it
        for i in PROMPT - 1..len - 1 {
            let row = &normal[i * frames..(i + 1) * frames];
            for frame in 0..frames {
                mean[(i + 1 - PROMPT) * frames + frame] += median(row, frame) / heads as f32;
            }
        }
    }
    mean
}

/// Of the 7 frames around one; at the ends the row is mirrored.
fn median(row: &[f32], frame: usize) -> f32 {
    let last = row.len() - 1;
    let mut near = [0.0; 7];
    for (x, at) in near.iter_mut().zip(frame..) {
        // counted from 3 frames before the first
        let at = at.abs_diff(3).min(2 * last - at.abs_diff(3).min(2 * last));
        *x = row[at];
    }
    near.sort_by(f32::total_cmp);
    near[3]
}

/// The first frame of every token, along the path with the largest sum from the first token and frame to the last.
fn warp(matrix: &[f32], tokens: usize, frames: usize) -> Vec<usize> {
    let (width, mut cost) = (frames + 1, vec![f64::INFINITY; (tokens + 1) * (frames + 1)]);
    let mut from = vec![0u8; cost.len()];
    cost[0] = 0.0;
    for j in 1..=frames {
        for i in 1..=tokens {
            let before = [cost[(i - 1) * width + j - 1], cost[(i - 1) * width + j], cost[i * width + j - 1]];
            let best = if before[0] < before[1] && before[0] < before[2] {
                0
            } else if before[1] < before[0] && before[1] < before[2] {
                1
            } else {
                2
            };
            cost[i * width + j] = before[best] - f64::from(matrix[(i - 1) * frames + j - 1]);
            from[i * width + j] = best as u8;
        }
    }
    let (mut i, mut j) = (tokens, frames);
    let mut starts = vec![0; tokens];
    while i > 0 && j > 0 {
        starts[i - 1] = j - 1;
        match from[i * width + j] {
            0 => (i, j) = (i - 1, j - 1),
            1 => i -= 1,
            _ => j -= 1,
        }
    }
    starts
}

/// One row for each token of text, seconds to the right; a frame around the time that was found for it.
fn draw(matrix: &[f32], starts: &[usize], transcript: &Transcript) -> Scene {
    let frames = transcript.frames_with_speech;
    let seconds = frames as f64 * transcript.seconds_per_frame;
    let tick = |second: u32| (f64::from(second) / transcript.seconds_per_frame, format!("{second} s"));
    let ends = starts.iter().skip(1).copied().chain([frames]);
    let mark = |(row, (&start, end)): (usize, (&usize, usize))| Mark { rows: row..row + 1, columns: start..end };
    let marks: Vec<Mark> = starts.iter().zip(ends).enumerate().map(mark).collect();
    let panel = HeatMap {
        values: matrix,
        columns: frames,
        row_labels: &transcript.token_text[PROMPT..],
        ticks: &(0..).take_while(|&second| f64::from(second) < seconds).map(tick).collect::<Vec<_>>(),
        axes: ["token", "time in the recording"],
        marks: &marks,
        ..HeatMap::default()
    };
    Figure {
        title: "When each token was said: where Whisper tiny.en listens while it writes it".to_owned(),
        notes: vec![format!(
            "mean over the {} heads that follow the sound; of each head, a frame's weights over all tokens are brought to \
             mean 0 and deviation 1; what is below the mean is drawn as 0",
            transcript.alignment_heads.len()
        )],
        panels: vec![panel],
        unit: "deviations above the mean",
        spacing: Spacing::Linear,
        each: false,
        marks: "the time found for a token",
    }
    .scene()
}
