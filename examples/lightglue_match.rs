//! Key points of two photographs of one person attend to each other, in both directions, as a middle layer of `LightGlue` has
//! them do; pairs that look at each other most are drawn as lines over the photographs.
//!
//! ```sh
//! cargo run --release --features cli --example lightglue_match -- --device auto --out matches.png
//! ```
//!
//! Queries and keys are the model's own on 600 and 517 key points. A pair is taken if each is the other's best by the mean
//! weight of the heads, times the same in the other direction; what the whole model finds, four layers later, is compared.

#![expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "pixels")]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "an example shows what it does")]

#[path = "common/tensors.rs"]
mod tensors;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use cross_attention::weights::{HeadReduce, WeightsSpec};
use cross_attention::{AttentionInputs, AttentionProblem, AttentionSpec, Device, DeviceRequest};
use image::{Rgb, RgbImage, imageops};
use serde::Deserialize;
use tensors::{Failure, Tensors};

const HEADS: usize = 4;
const DIM: usize = 64;
/// A pair's weight there times the weight back, at least.
const SURE: f32 = 0.1;
/// Off the true place, at most, in pixels.
const NEAR: f64 = 3.0;

#[derive(Parser)]
struct Flags {
    /// auto, cpu, oracle, gpu, or part of an adapter's name
    #[arg(long, default_value = "auto")]
    device: DeviceRequest,
    /// Where to draw the photographs and the lines between them
    #[arg(long, default_value = "matches.png")]
    out: PathBuf,
}

#[derive(Deserialize)]
struct Published {
    homography_left_to_right: [[f64; 3]; 3],
    matches: Vec<Pair>,
}

#[derive(Deserialize)]
struct Pair {
    left: usize,
    right: usize,
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

fn run() -> Result<(), Failure> {
    let flags = Flags::parse();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let data = root.join("examples/data/lightglue");
    let layer = Tensors::open(&root.join("tests/golden/lightglue/layer4.safetensors"))?;
    let points = Tensors::open(&data.join("keypoints.safetensors"))?;
    let published: Published = serde_json::from_str(&std::fs::read_to_string(data.join("matches.json"))?)?;
    let choice = Device::choose_blocking(&flags.device)?;
    println!("device: {} ({})", choice.device.name(), choice.reason);

    let sides = [points.f32("keypoints0")?, points.f32("keypoints1")?];
    let (left, right) = (sides[0].len() / 2, sides[1].len() / 2);
    let qk = [layer.f32("qk0")?, layer.f32("qk1")?];
    let values = [layer.f32("v0")?, layer.f32("v1")?];
    let there = looks(&choice.device, [left, right], &qk[0], &qk[1], &values[1], &layer.f32("out0")?)?;
    let back = looks(&choice.device, [right, left], &qk[1], &qk[0], &values[0], &layer.f32("out1")?)?;

    let both = |i: usize, j: usize| there[i * right + j] * back[j * left + i];
    let best = |n: usize, of: &dyn Fn(usize) -> f32| (0..n).fold(0, |best, k| if of(k) > of(best) { k } else { best });
    let pairs: Vec<[usize; 2]> = (0..left)
        .map(|i| [i, best(right, &|j| both(i, j))])
        .filter(|&[i, j]| best(left, &|i| both(i, j)) == i && both(i, j) > SURE)
        .collect();
    let off = |&[i, j]: &[usize; 2]| {
        let [x, y] = [0, 1].map(|k| f64::from(sides[0][2 * i + k]));
        let [u, v, w] = published.homography_left_to_right.map(|row| row[0] * x + row[1] * y + row[2]);
        let [x, y] = [0, 1].map(|k| f64::from(sides[1][2 * j + k]));
        (u / w - x).hypot(v / w - y)
    };
    let near = pairs.iter().filter(|pair| off(pair) < NEAR).count();
    let known = published.matches.iter().filter(|m| pairs.contains(&[m.left, m.right])).count();
    println!("{} pairs of {left} and {right} key points, {near} within {NEAR} pixels of the truth", pairs.len());
    println!("{known} of the {} matches that the whole model finds are among them", published.matches.len());

    let photos = [image::open(data.join("left.jpg"))?.to_rgb8(), image::open(data.join("right.jpg"))?.to_rgb8()];
    let [a, b] = &photos;
    let mut picture = RgbImage::new(a.width() + b.width(), a.height().max(b.height()));
    imageops::replace(&mut picture, a, 0, 0);
    imageops::replace(&mut picture, b, i64::from(a.width()), 0);
    for pair in &pairs {
        let at = |side: usize, point: usize| [sides[side][2 * point], sides[side][2 * point + 1]];
        let ([x, y], [u, v]) = (at(0, pair[0]), at(1, pair[1]));
        let color = if off(pair) < NEAR { Rgb([80, 220, 100]) } else { Rgb([240, 70, 60]) };
        line(&mut picture, [x, y], [u + a.width() as f32, v], color);
    }
    picture.save(&flags.out)?;
    println!("drawn: {} (green: near the truth, red: not)", flags.out.display());
    Ok(())
}

/// How much each query looks at each key, `[query][key]`, mean over the heads. The output is compared with the exact one.
fn looks(
    device: &Device,
    [from, to]: [usize; 2],
    query: &[f32],
    key: &[f32],
    value: &[f32],
    exact: &[f32],
) -> Result<Vec<f32>, Failure> {
    let problem = AttentionProblem::new(AttentionSpec::new([1, HEADS, from, DIM], [1, HEADS, to, DIM]))?;
    let inputs = AttentionInputs::new(query, key, value);
    let wanted = WeightsSpec { reduce: HeadReduce::Mean, ..WeightsSpec::default() };
    let result = device.attention_with_weights_blocking(&problem, &inputs, &wanted)?;
    let off = result.attention.output.to_f32().iter().zip(exact).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("{from} to {to}: output at most {off:.1e} off the exact one");
    Ok(result.weights)
}

/// A line of one pixel.
fn line(picture: &mut RgbImage, [x, y]: [f32; 2], [u, v]: [f32; 2], color: Rgb<u8>) {
    let steps = (u - x).abs().max((v - y).abs()).ceil().max(1.0);
    for step in 0..=steps as u32 {
        let t = step as f32 / steps;
        let (px, py) = (x + t * (u - x), y + t * (v - y));
        if let Some(pixel) = picture.get_pixel_mut_checked(px as u32, py as u32) {
            *pixel = color;
        }
    }
}
