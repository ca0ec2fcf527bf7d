//! A complete small encoder-decoder: five well-known substances go in as SMILES of different lengths, the model writes an
//! analogue of each. Source rows are padded to one length; key lengths keep the padding out.
//!
//! ```sh
//! cargo run --release --features cli --example annalog -- --device auto
//! ```
//!
//! Every attention (encoder, decoder, decoder to encoder) runs on the device that is named; the logits are compared with
//! the published ones, and each next token with what the model wrote.

#[path = "common/dense.rs"]
mod dense;
#[path = "common/flags.rs"]
mod flags;
#[path = "common/tensors.rs"]
mod tensors;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use cross_attention::{
    AttentionInputs, AttentionProblem, AttentionSpec, Diagonal, KernelChoice, Layout, PreparedAttention, TensorSpec,
};
use dense::{LayerNorm, Linear, add, largest};
use flags::{DeviceFlag, Failure, say};
use serde::Deserialize;
use tensors::{Tensors, read_json};

const WIDTH: usize = 256;
const HEADS: usize = 8;
const LAYERS: usize = 3;
/// How far a logit may be from the published one, which was computed in f64: 61.6 is the largest, and some twenty layers of
/// f32 lie before it.
const CLOSE: f32 = 1e-3;

/// A small encoder-decoder writes an analogue of each of five substances, every attention on the device
#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    device: DeviceFlag,
    /// Folder with model.safetensors, batch.safetensors and batch.json
    #[arg(long, value_name = "FOLDER", hide_default_value = true, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/annalog"))]
    data: PathBuf,
}

#[derive(Deserialize)]
struct Batch {
    vocabulary: Vec<String>,
    molecules: Vec<Molecule>,
    source_lengths: Vec<u32>,
    pad: i32,
    eos: i32,
}

#[derive(Deserialize)]
struct Molecule {
    name: String,
    source: String,
    greedy_output: String,
}

/// An attention with its projections and the norm behind it.
struct Attention {
    projections: [Linear; 4],
    norm: LayerNorm,
}

impl Attention {
    fn open(file: &Tensors, at: &str, name: &str, norm: &str) -> Result<Self, Failure> {
        let linear = |part: &str| Linear::open(file, &format!("{at}.{name}.fc_{part}"), '.');
        Ok(Self {
            projections: [linear("q")?, linear("k")?, linear("v")?, linear("o")?],
            norm: open_norm(file, &format!("{at}.{norm}"))?,
        })
    }

    fn apply(
        &self,
        x: &mut Vec<f32>,
        context: &[f32],
        prepared: &PreparedAttention,
        lens: Option<&[u32]>,
    ) -> Result<(), Failure> {
        let [q, k, v, o] = &self.projections;
        let (query, key, value) = (q.apply(x), k.apply(context), v.apply(context));
        let mut inputs = AttentionInputs::new(&query, &key, &value);
        inputs.terms.kv_lens = lens;
        add(x, &o.apply(&prepared.run_blocking(&inputs)?.output.to_f32()));
        *x = self.norm.apply(x);
        Ok(())
    }
}

struct FeedForward {
    inner: Linear,
    outer: Linear,
    norm: LayerNorm,
}

impl FeedForward {
    fn open(file: &Tensors, at: &str) -> Result<Self, Failure> {
        Ok(Self {
            inner: Linear::open(file, &format!("{at}.positionwise_feedforward.fc_1"), '.')?,
            outer: Linear::open(file, &format!("{at}.positionwise_feedforward.fc_2"), '.')?,
            norm: open_norm(file, &format!("{at}.ff_layer_norm"))?,
        })
    }

    fn apply(&self, x: &mut Vec<f32>) {
        let inner: Vec<f32> = self.inner.apply(x).into_iter().map(|x| x.max(0.0)).collect();
        add(x, &self.outer.apply(&inner));
        *x = self.norm.apply(x);
    }
}

fn open_norm(file: &Tensors, name: &str) -> Result<LayerNorm, Failure> {
    LayerNorm::open(file, &format!("{name}.weight"), &format!("{name}.bias"))
}

fn main() -> ExitCode {
    flags::end(run(&Flags::parse()))
}

fn run(flags: &Flags) -> Result<(), Failure> {
    let model = Tensors::open(&flags.data.join("model.safetensors"))?;
    let file = Tensors::open(&flags.data.join("batch.safetensors"))?;
    let batch: Batch = read_json(&flags.data.join("batch.json"))?;
    let device = flags.device.begin([
        "Five substances, written as SMILES, go through a small encoder-decoder, which writes an analogue of each.",
        "All of its attentions run on the device; its logits are compared with the published ones.",
    ])?;

    let (source, target) = (file.i32("src")?, file.i32("trg")?);
    let shape = file.shape("src")?;
    let (count, len) = (shape[0], shape[1]);
    // queries, keys and values as the projections leave them: heads inside a row
    let tensor = TensorSpec::f32(Layout::blhd([count, HEADS, len, WIDTH / HEADS]));
    let mut padded = AttentionSpec::from_tensors(tensor, tensor, tensor);
    padded.output = tensor;
    let mut causal = padded.clone();
    padded.kv_lens = true;
    // padding stands behind the text, where a causal mask hides it from every row that counts
    causal.causal = Some(Diagonal::TopLeft);
    let padded = device.prepare_blocking(&AttentionProblem::new(padded)?, KernelChoice::Auto)?;
    let causal = device.prepare_blocking(&AttentionProblem::new(causal)?, KernelChoice::Auto)?;
    let lens = Some(batch.source_lengths.as_slice());

    let mut states = embed(&model, "encoder", &source, len)?;
    for n in 0..LAYERS {
        let at = format!("encoder.layers.{n}");
        let own = states.clone();
        Attention::open(&model, &at, "self_attention", "self_attn_layer_norm")?.apply(
            &mut states,
            &own,
            &padded,
            lens,
        )?;
        FeedForward::open(&model, &at)?.apply(&mut states);
    }
    let mut x = embed(&model, "decoder", &target, len)?;
    for n in 0..LAYERS {
        let at = format!("decoder.layers.{n}");
        let own = x.clone();
        Attention::open(&model, &at, "self_attention", "self_attn_layer_norm")?.apply(&mut x, &own, &causal, None)?;
        Attention::open(&model, &at, "encoder_attention", "enc_attn_layer_norm")?
            .apply(&mut x, &states, &padded, lens)?;
        FeedForward::open(&model, &at)?.apply(&mut x);
    }
    let logits = Linear::open(&model, "decoder.fc_out", '.')?.apply(&x);

    let words = batch.vocabulary.len();
    let (published, mut off, mut wrong) = (file.f32("logits")?, 0f32, 0);
    say!("{:<12} {:<38} {:<38} next tokens right", "substance", "read", "written");
    for (b, molecule) in batch.molecules.iter().enumerate() {
        let (mut right, mut places, mut written) = (0, 0, String::new());
        for i in 0..len - 1 {
            let row = (b * len + i) * words..(b * len + i + 1) * words;
            if target[b * len + i] == batch.pad || target[b * len + i] == batch.eos {
                break;
            }
            let worst = logits[row.clone()].iter().zip(&published[row.clone()]).map(|(a, b)| (a - b).abs());
            off = worst.fold(off, f32::max);
            let next = largest(&logits[row]);
            places += 1;
            right += usize::from(i32::try_from(next)? == target[b * len + i + 1]);
            if i32::try_from(next)? != batch.eos {
                written.push_str(&batch.vocabulary[next]);
            }
        }
        wrong += places - right;
        say!("{:<12} {:<38} {written:<38} {right} of {places}", molecule.name, molecule.source);
        if written != molecule.greedy_output {
            say!("{:<12} {:<38} {:<38} is what was to be expected", "", "", molecule.greedy_output);
        }
    }
    say!("\nlogits at most {off:.1e} off the published ones");
    if wrong > 0 || off > CLOSE {
        return Err(format!("{wrong} next tokens wrong, logits {off} off, {CLOSE} allowed").into());
    }
    Ok(())
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
