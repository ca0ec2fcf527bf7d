//! A pool of passages, and attention to some of them.
//!
//! The passages are real: the keys and values with which Whisper listens to ten seconds of speech
//! (`examples/data/whisper.safetensors`), cut into passages of a second. Words that the model writes down attend to a
//! choice of passages, with one softmax over all of them. The table shows what share of each word's attention every
//! passage has: a word has most of its share in the second it is spoken in.
//!
//!     cargo run --features cli --example retrieval -- --passages 0,1,2,5 --device auto

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "an example shows what it does")]

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use cross_attention::pool::{GroupQuery, PassagePool, PoolAttention, PoolSpec, Storage};
use cross_attention::verify::verify;
use cross_attention::{
    AttentionInputs, AttentionOutput, AttentionProblem, AttentionSpec, Device, DeviceRequest, Element, Layout,
    TensorData, TensorRef, TensorSpec, f16,
};
use safetensors::SafeTensors;

const HEADS: usize = 6;
const WIDTH: usize = 64;
/// Frames of sound; speech ends before the last of them.
const FRAMES: usize = 1500;
const SPEECH: usize = 535;
const WORDS: usize = 39;
/// Heads of this layer that follow the sound.
const LISTENING: usize = 5;

/// Attention to some of the seconds of a recording.
#[derive(Debug, Parser)]
struct Args {
    /// The file with query, key and value
    #[arg(long, default_value = "examples/data/whisper.safetensors")]
    file: PathBuf,
    /// auto, cpu, gpu, or a part of an adapter's name
    #[arg(long, default_value = "auto")]
    device: DeviceRequest,
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
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let choice = Device::choose_blocking(&args.device)?;
    println!("device: {choice}\n");

    let bytes = std::fs::read(&args.file)?;
    let file = SafeTensors::deserialize(&bytes)?;
    let query: Vec<f32> = bytemuck::pod_collect_to_vec(file.tensor("query")?.data());
    let [key, value] = [file.tensor("key")?, file.tensor("value")?];
    let [key, value] = [key, value].map(|tensor| bytemuck::pod_collect_to_vec::<u8, f16>(tensor.data()));
    if query.len() != HEADS * WORDS * WIDTH || [&key, &value].iter().any(|data| data.len() != HEADS * FRAMES * WIDTH) {
        return Err("the file holds other shapes than [1, 6, 39, 64] and [1, 6, 1500, 64]".into());
    }
    let (_, header) = SafeTensors::read_metadata(&bytes)?;
    let labels =
        header.metadata().as_ref().and_then(|metadata| metadata.get("row_labels").cloned()).unwrap_or_default();
    let words: Vec<String> = serde_json::from_str(&labels)?;

    // the pool, f16 as the file is
    let storage = if args.host { Storage::Host } else { Storage::Device };
    let mut pool =
        PassagePool::new(&choice.device, PoolSpec { element: Element::F16, storage, ..PoolSpec::new(HEADS, WIDTH) })?;
    let frames = usize::from(args.frames);
    let cuts: Vec<_> = (0..SPEECH.div_ceil(frames)).map(|n| cut(frames, n)).collect();
    let mut ids = vec![];
    for &(first, len) in &cuts {
        let [key, value] = [&key, &value].map(|data| passage(data, first, len));
        ids.push(pool.append_blocking(&key, &value, len)?);
    }
    println!("{} passages in {} pages, {} bytes", pool.len(), pool.pages(), pool.bytes());

    let chosen = if args.passages.is_empty() { (0..ids.len()).collect() } else { args.passages };
    if let Some(wrong) = chosen.iter().find(|n| **n >= ids.len()) {
        return Err(format!("there is no passage {wrong}, the last is {}", ids.len() - 1).into());
    }
    let list: Vec<_> = chosen.iter().map(|&n| ids[n]).collect();
    let group = GroupQuery { query: (&query).into(), q_len: WORDS, passages: &list };
    let options = PoolAttention { scale: Some(0.125), ..PoolAttention::new(HEADS) };
    let result = pool.attend_blocking(&[group], &options)?.remove(0);

    let wide = words.iter().map(|word| format!("{word:?}").len()).max().unwrap_or_default();
    print!("\n{:>wide$}", "share of");
    chosen.iter().for_each(|n| print!("{:>7}", format!("{:.1}s", cuts[*n].0 as f32 / 50.0)));
    println!("   (mean of heads 0 to {})", LISTENING - 1);
    for (i, word) in words.iter().enumerate().take(WORDS) {
        print!("{:>wide$}", format!("{word:?}"));
        for p in 0..chosen.len() {
            let mass = |h: usize| result.mass[(p * HEADS + h) * WORDS + i];
            let mean = (0..LISTENING).map(mass).sum::<f32>() / LISTENING as f32;
            print!("{:>6.1}%", 100.0 * mean);
        }
        println!();
    }

    // the same over the concatenation of the chosen passages, judged by the oracle in f64
    let total: usize = chosen.iter().map(|&n| cuts[n].1).sum();
    let joined = |data: &[f16]| {
        let of_head = |h: usize| chosen.iter().flat_map(move |&n| rows(data, h, cut(frames, n)));
        (0..HEADS).flat_map(of_head).copied().collect::<Vec<f16>>()
    };
    let (key, value) = (joined(&key), joined(&value));
    let of = |len| Layout::bhld([1, HEADS, len, WIDTH]);
    let held = TensorSpec::f16(of(total));
    let mut spec = AttentionSpec::from_tensors(TensorSpec::f32(of(WORDS)), held, held);
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
    println!("\nagainst attention over the {total} frames put together: {report}");
    if report.passed() { Ok(()) } else { Err("the pool and the whole differ".into()) }
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
