//! A pool of passages, and attention to some of them.
//!
//! The passages are real: the keys and values with which Whisper listens to ten seconds of speech
//! (`examples/data/whisper.safetensors`), cut into passages of a second. Words that the model writes down attend to a
//! choice of passages, with one softmax over all of them. The table shows what share of each word's attention every
//! passage has: a word has most of its share in the second it is spoken in.
//!
//!     cargo run --features cli --example retrieval -- --passages 0,1,2,5 --device auto

#[path = "common/flags.rs"]
mod flags;
#[allow(dead_code, reason = "other examples and the program draw more")]
#[path = "common/picture.rs"]
mod picture;
#[path = "common/recording.rs"]
mod recording;
#[path = "common/tensors.rs"]
mod tensors;

use std::process::ExitCode;

use clap::Parser;
use cross_attention::pool::{GroupQuery, PassagePool, PoolAttention, PoolSpec, Storage};
use cross_attention::verify::verify;
use cross_attention::{
    AttentionInputs, AttentionOutput, AttentionProblem, AttentionSpec, Element, Layout, TensorData, TensorRef,
    TensorSpec, f16,
};
use flags::{DeviceFlag, Failure, say};
use picture::OutputFlag;
use picture::draw::heat::{Figure, HeatMap};
use picture::draw::scale::Spacing;
use picture::draw::scene::Scene;
use recording::{FRAMES, HEADS, ROWS, Recording, RecordingFlag, SECONDS_PER_FRAME, SPEECH, WIDTH};

/// Heads of this layer that follow the sound.
const LISTENING: usize = 5;

/// Words of a transcript attend to a choice of passages of the recording, kept in a pool
#[derive(Debug, Parser)]
struct Flags {
    #[command(flatten)]
    device: DeviceFlag,
    #[command(flatten)]
    output: OutputFlag,
    #[command(flatten)]
    recording: RecordingFlag,
    /// The passages to attend to, by their numbers; all if not given
    #[arg(long, value_delimiter = ',')]
    passages: Vec<usize>,
    /// Frames of a passage, 50 a second
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..))]
    frames: u16,
    /// Keep the pool in host memory
    #[arg(long)]
    host: bool,
}

fn main() -> ExitCode {
    flags::end(run(&Flags::parse()))
}

fn run(flags: &Flags) -> Result<(), Failure> {
    let Recording { query, key, value, words } = flags.recording.open()?;
    let output = flags.output.open("retrieval")?;
    let device = flags.device.begin([
        "A recording is cut into passages, which a pool keeps as Whisper's keys and values; the words of its transcript attend",
        "to a choice of them with one softmax, and the table and the picture show what share each passage has.",
    ])?;

    // the pool, f16 as the file is
    let storage = if flags.host { Storage::Host } else { Storage::Device };
    let mut pool =
        PassagePool::new(&device, PoolSpec { element: Element::F16, storage, ..PoolSpec::new(HEADS, WIDTH) })?;
    let frames = usize::from(flags.frames);
    let cuts: Vec<_> = (0..SPEECH.div_ceil(frames)).map(|n| cut(frames, n)).collect();
    let mut ids = vec![];
    for &(first, len) in &cuts {
        let [key, value] = [&key, &value].map(|data| passage(data, first, len));
        ids.push(pool.append_blocking(&key, &value, len)?);
    }
    say!("{} passages in {} pages, {} bytes", pool.len(), pool.pages(), pool.bytes());

    let chosen = if flags.passages.is_empty() { (0..ids.len()).collect() } else { flags.passages.clone() };
    if let Some(wrong) = chosen.iter().find(|n| **n >= ids.len()) {
        return Err(format!("there is no passage {wrong}, the last is {}", ids.len() - 1).into());
    }
    let list: Vec<_> = chosen.iter().map(|&n| ids[n]).collect();
    let group = GroupQuery { query: (&query).into(), q_len: ROWS, passages: &list };
    let options = PoolAttention { scale: Some(0.125), ..PoolAttention::new(HEADS) };
    let result = pool.attend_blocking(&[group], &options)?.remove(0);

    let mean = |p: usize, row: usize| {
        let mass = |h: usize| result.mass[(p * HEADS + h) * ROWS + row];
        (0..LISTENING).map(mass).sum::<f32>() / LISTENING as f32
    };
    let shares: Vec<f32> =
        (0..ROWS).flat_map(|row| (0..chosen.len()).map(move |p| (p, row))).map(|(p, row)| mean(p, row)).collect();
    let starts: Vec<f64> = chosen.iter().map(|&n| cuts[n].0 as f64 * SECONDS_PER_FRAME).collect();
    let wide = words.iter().map(|word| format!("{word:?}").len()).max().unwrap_or_default();
    let heads: String = starts.iter().map(|start| format!("{:>7}", format!("{start:.1}s"))).collect();
    say!("\n{:>wide$}{heads}   (mean of heads 0 to {})", "share of", LISTENING - 1);
    for (word, shares) in words.iter().zip(shares.chunks(chosen.len())) {
        let shares: String = shares.iter().map(|share| format!("{:>6.1}%", 100.0 * share)).collect();
        say!("{:>wide$}{shares}", format!("{word:?}"));
    }
    output.write(&draw(&shares, &words, &starts, frames))?;

    // the same over the concatenation of the chosen passages, judged by the oracle in f64
    let total: usize = chosen.iter().map(|&n| cuts[n].1).sum();
    let joined = |data: &[f16]| {
        let of_head = |h: usize| chosen.iter().flat_map(move |&n| rows(data, h, cut(frames, n)));
        (0..HEADS).flat_map(of_head).copied().collect::<Vec<f16>>()
    };
    let (key, value) = (joined(&key), joined(&value));
    let of = |len| Layout::bhld([1, HEADS, len, WIDTH]);
    let held = TensorSpec::f16(of(total));
    let mut spec = AttentionSpec::from_tensors(TensorSpec::f32(of(ROWS)), held, held);
    (spec.scale, spec.lse) = (Some(0.125), true);
    let problem = AttentionProblem::new(spec)?;
    let inputs = AttentionInputs::new(&query, TensorRef::F16(&key), TensorRef::F16(&value));
    let output = AttentionOutput {
        output: TensorData::F32(result.output),
        lse: Some(result.lse),
        row_state: None,
        scores: None,
    };
    let report = verify(&problem, &inputs, &output)?;
    say!("\nagainst attention over the {total} frames put together: {report}");
    if report.passed() { Ok(()) } else { Err("the pool and the whole differ".into()) }
}

/// A row for each word, a column for each passage.
fn draw(shares: &[f32], words: &[String], starts: &[f64], frames: usize) -> Scene {
    let labels: Vec<String> = words.iter().map(|word| word.trim().to_owned()).collect();
    let tick = |(n, start): (usize, &f64)| (n as f64 + 0.5, format!("{start:.1} s"));
    let ticks: Vec<_> = starts.iter().enumerate().map(tick).collect();
    let panel = HeatMap {
        values: shares,
        columns: starts.len(),
        row_labels: &labels,
        ticks: &ticks,
        axes: ["word", "passage, by the time it starts at"],
        ..HeatMap::default()
    };
    let length = frames as f64 * SECONDS_PER_FRAME;
    Figure {
        title: format!("Which {length} s of a recording each word of its transcript attends to"),
        notes: vec![format!(
            "Whisper tiny.en, one softmax over all of these passages, mean of heads 0 to {}",
            LISTENING - 1
        )],
        panels: vec![panel],
        unit: "share of a word's attention",
        spacing: Spacing::Linear,
        each: false,
        marks: "",
    }
    .scene()
}

/// Frames `first..first + len` of every head, `[heads, len, width]`.
fn passage(data: &[f16], first: usize, len: usize) -> Vec<f16> {
    (0..HEADS).flat_map(|h| rows(data, h, (first, len))).copied().collect()
}

fn rows(data: &[f16], head: usize, (first, len): (usize, usize)) -> &[f16] {
    &data[(head * FRAMES + first) * WIDTH..][..len * WIDTH]
}

/// First frame and length of passage `n`.
fn cut(frames: usize, n: usize) -> (usize, usize) {
    (n * frames, frames.min(SPEECH - n * frames))
}
