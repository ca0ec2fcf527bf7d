//! Guidance by attention maps: queries are moved until chosen words listen to a chosen part of a recording.
//!
//! ```sh
//! cargo run --release --features cli --example guide -- --device auto --words wisdom,belief --from 1.0 --to 1.5
//! ```
//!
//! Query, key and value are those with which Whisper writes down ten seconds of speech (`examples/data/whisper.safetensors`).
//! The objective is the mass of the weights of the chosen words on the chosen frames, mean over the heads; the gradient of these
//! weights alone is given to the backward, and that of the query asked for. Guidance of an image by its
//! prompt (Attend-and-Excite, arXiv:2301.13826; layout guidance, arXiv:2304.03373) takes the same step. Neither the weights nor their gradient
//! are ever held as a matrix.

#[path = "common/flags.rs"]
mod flags;
#[allow(dead_code, reason = "other examples and the program draw more")]
#[path = "common/picture.rs"]
mod picture;
#[path = "common/recording.rs"]
mod recording;
#[path = "common/tensors.rs"]
mod tensors;

use std::ops::Range;
use std::process::ExitCode;

use clap::Parser;
use cross_attention::backward::{BackwardInputs, BackwardProblem, BackwardSpec};
use cross_attention::weights::{HeadReduce, Keys, Select, WeightsSpec};
use cross_attention::{AttentionInputs, AttentionSpec, Device, Layout, TensorData, TensorRef, TensorSpec, f16};
use flags::{DeviceFlag, Failure, say};
use picture::OutputFlag;
use picture::draw::heat::{Figure, HeatMap, Mark};
use picture::draw::scale::Spacing;
use picture::draw::scene::Scene;
use recording::{FRAMES, HEADS, ROWS, RecordingFlag, SECONDS_PER_FRAME, SPEECH, WIDTH};

/// The mass that is to be reached.
const GOAL: f32 = 0.5;

/// Words of a transcript are made to listen to another part of the recording
#[derive(Debug, Parser)]
struct Flags {
    #[command(flatten)]
    device: DeviceFlag,
    /// The words to move, as they are written; each wherever it stands
    #[arg(long, value_delimiter = ',', default_value = "wisdom,belief")]
    words: Vec<String>,
    /// Start of the part of the recording that they are to listen to, in seconds
    #[arg(long, default_value_t = 1.0)]
    from: f64,
    /// Its end
    #[arg(long, default_value_t = 1.5)]
    to: f64,
    /// Length of a step of each head's query; these are 8 to 20 long
    #[arg(long, default_value_t = 0.5)]
    length: f32,
    /// Steps at most
    #[arg(long, default_value_t = 60)]
    steps: usize,
    #[command(flatten)]
    output: OutputFlag,
    #[command(flatten)]
    recording: RecordingFlag,
}

fn main() -> ExitCode {
    flags::end(run(&Flags::parse()))
}

fn run(flags: &Flags) -> Result<(), Failure> {
    let recording::Recording { mut query, key, value, words: tokens } = flags.recording.open()?;
    let rows = rows_of(&tokens, &flags.words)?;
    let frames = frame(flags.from)..frame(flags.to);
    let known = [flags.from, flags.to].iter().all(|seconds| seconds.is_finite() && *seconds >= 0.0);
    if !known || frames.is_empty() || frames.end > SPEECH {
        return Err(format!(
            "from {} s to {} s is no part of {SPEECH} frames of {SECONDS_PER_FRAME} s",
            flags.from, flags.to
        )
        .into());
    }

    if !(flags.length.is_finite() && flags.length > 0.0) {
        return Err(format!("a step of length {} leads nowhere; name one above 0, such as 0.5", flags.length).into());
    }
    let output = flags.output.open("guide")?;
    let device = &flags.device.begin([
        "Whisper's queries for some words are moved along the gradient of their attention weights, step by step,",
        "until the words listen to another part of the recording; the picture shows the weights before and after.",
    ])?;

    // the mean over the heads of what each of these rows gives to these frames
    let mass = WeightsSpec {
        reduce: HeadReduce::Mean,
        rows: Select::List(rows.clone()),
        keys: Keys::Segments(vec![frames.clone()]),
        ..WeightsSpec::default()
    };
    let queries = TensorSpec::f32(Layout::bhld([1, HEADS, ROWS, WIDTH]));
    let problem_of = |frames: usize| {
        let held = TensorSpec::f16(Layout::bhld([1, HEADS, frames, WIDTH]));
        let mut attention = AttentionSpec::from_tensors(queries, held, held);
        attention.scale = Some(0.125);
        let d_weights = Some(mass.clone());
        BackwardProblem::new(BackwardSpec { d_weights, d_key: None, d_value: None, ..BackwardSpec::new(attention) })
    };
    let problem = problem_of(FRAMES)?;
    let backward = device.prepare_backward_blocking(&problem)?;
    // what a recording 16 times as long would take
    let long = device.prepare_backward_blocking(&problem_of(16 * FRAMES)?)?;
    for (prepared, frames) in [(&backward, FRAMES), (&long, 16 * FRAMES)] {
        let plan = prepared.plan_text();
        let workspace = plan.lines().find_map(|line| line.strip_prefix("workspace")).unwrap_or("not told by the plan");
        let whole = 2 * 4 * HEADS * ROWS * frames;
        say!("{frames:>5} frames: workspace {}; all weights and their gradient: {whole} bytes", workspace.trim());
    }
    say!(
        "\n{} (rows {rows:?}) are to listen to {} s to {} s, frames {frames:?}",
        flags.words.join(", "),
        flags.from,
        flags.to
    );

    // of the output nothing is wanted, of the mass of each row the same
    let (d_output, d_weights) = (vec![0.0f32; query.len()], vec![1.0 / rows.len() as f32; rows.len()]);
    let mut maps = vec![map(device, &problem, &query, [&key, &value])?];
    let (mut masses, mut steps) = (vec![], 0);
    let (mut before, mut last) = (0.0, 0.0);
    for step in 0..=flags.steps {
        let inputs = AttentionInputs::new(&query, TensorRef::F16(&key), TensorRef::F16(&value));
        let forward = device.attention_with_weights_blocking(problem.forward(), &inputs, &mass)?;
        masses = forward.weights;
        steps = step;
        last = masses.iter().sum::<f32>() / masses.len() as f32;
        if step == 0 {
            before = last;
        }
        say!("step {step:>3}  mass {last:.4}");
        if last > GOAL {
            break;
        }
        let given = BackwardInputs {
            d_weights: Some(&d_weights),
            ..BackwardInputs::new(inputs, &forward.attention, &d_output)?
        };
        let gradients = backward.run_blocking(&given)?;
        let d_query = gradients.d_query.map(TensorData::into_f32).ok_or("the gradient of the query was asked for")?;
        climb(&mut query, &d_query, flags.length);
    }
    maps.push(map(device, &problem, &query, [&key, &value])?);

    say!();
    for (row, mass) in rows.iter().zip(&masses) {
        say!("{:>10} (row {row}) {mass:.4}", tokens[*row].trim());
    }
    say!("mean mass {before:.4} before, {last:.4} after {steps} steps");
    output.write(&draw(flags, &tokens, &rows, &frames, &maps, [before, last]))?;
    // so that a mass which is no number fails too
    if before < 0.1 && last > GOAL {
        Ok(())
    } else {
        Err(format!("from below 0.1 to above {GOAL} was the goal").into())
    }
}

/// The rows whose token is one of the words.
fn rows_of(tokens: &[String], words: &[String]) -> Result<Vec<usize>, Failure> {
    for word in words {
        if !tokens.iter().any(|token| token.trim() == word) {
            return Err(format!("no token is {word:?}; there are {tokens:?}").into());
        }
    }
    Ok((0..tokens.len()).filter(|row| words.iter().any(|word| tokens[*row].trim() == word)).collect())
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "below 0 is 0")]
fn frame(seconds: f64) -> usize {
    (seconds / SECONDS_PER_FRAME).round() as usize
}

/// Moves the query of each row and head by the same length along its gradient. Where that is zero, as of all rows that are not
/// chosen, it stays.
#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
fn climb(query: &mut [f32], gradient: &[f32], length: f32) {
    for (query, gradient) in query.chunks_exact_mut(WIDTH).zip(gradient.chunks_exact(WIDTH)) {
        let norm = gradient.iter().map(|&d| f64::from(d).powi(2)).sum::<f64>().sqrt();
        if norm > 0.0 {
            query.iter_mut().zip(gradient).for_each(|(q, &d)| *q += (f64::from(length) * f64::from(d) / norm) as f32);
        }
    }
}

/// What is drawn: the mean over the heads of every row's weights, on the frames with speech.
fn map(
    device: &Device,
    problem: &BackwardProblem,
    query: &[f32],
    [key, value]: [&[f16]; 2],
) -> Result<Vec<f32>, Failure> {
    let shown =
        WeightsSpec { reduce: HeadReduce::Mean, keys: Keys::Each(Select::Range(0..SPEECH)), ..WeightsSpec::default() };
    let inputs = AttentionInputs::new(query, TensorRef::F16(key), TensorRef::F16(value));
    Ok(device.attention_with_weights_blocking(problem.forward(), &inputs, &shown)?.weights)
}

/// The maps, a row for each token, seconds to the right; what was asked is framed.
fn draw(
    flags: &Flags,
    tokens: &[String],
    rows: &[usize],
    frames: &Range<usize>,
    maps: &[Vec<f32>],
    masses: [f32; 2],
) -> Scene {
    let labels: Vec<String> = tokens.iter().map(|token| token.trim().to_owned()).collect();
    let ticks: Vec<_> =
        (0..=10u32).map(|second| (f64::from(second) / SECONDS_PER_FRAME, format!("{second} s"))).collect();
    let marks: Vec<Mark> = rows.iter().map(|&row| Mark { rows: row..row + 1, columns: frames.clone() }).collect();
    let mut panels = vec![];
    for ((when, values), mass) in ["before", "after"].into_iter().zip(maps).zip(masses) {
        panels.push(HeatMap {
            title: format!("{when}: the frames hold {:.1} % of these words' weight", 100.0 * mass),
            values,
            columns: SPEECH,
            row_labels: &labels,
            ticks: &ticks,
            axes: ["token", "time in the recording"],
            marks: &marks,
            ..HeatMap::default()
        });
    }
    let (words, from, to) = (flags.words.join(" and "), flags.from, flags.to);
    Figure {
        title: format!("Guidance: {words} are made to listen to {from} s to {to} s of the recording"),
        notes: vec![format!(
            "attention of Whisper tiny.en, mean over {HEADS} heads; only the queries of these words are moved"
        )],
        panels,
        unit: "weight",
        spacing: Spacing::Sqrt,
        each: false,
        marks: "what is asked",
    }
    .scene()
}
