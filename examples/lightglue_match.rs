//! Key points of two views of one photograph, NASA's portrait of an astronaut and the same turned, attend to each other in
//! both directions, as a middle layer of `LightGlue` has them do; pairs that look at each other most are drawn as lines.
//!
//! ```sh
//! cargo run --release --features cli --example lightglue_match -- --device auto --output matches.svg
//! ```
//!
//! Queries and keys are the model's own on 600 and 517 key points. A pair is taken if each is the other's best by the mean
//! weight of the heads, times the same in the other direction; what the whole model finds, four layers later, is compared.

#[path = "common/flags.rs"]
mod flags;
#[allow(dead_code, reason = "other examples and the program draw more")]
#[path = "common/picture.rs"]
mod picture;
#[path = "common/tensors.rs"]
mod tensors;

use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use cross_attention::weights::{HeadReduce, WeightsSpec};
use cross_attention::{AttentionInputs, AttentionProblem, AttentionSpec, Device};
use flags::{DeviceFlag, Failure, say};
use picture::OutputFlag;
use picture::draw::scene::{Anchor, Color, Image, Scene, Style};
use serde::Deserialize;
use tensors::{Tensors, read, read_json};

const HEADS: usize = 4;
const DIM: usize = 64;
/// A pair's weight there times the weight back, at least.
const SURE: f32 = 0.1;
/// Off the true place, at most, in pixels.
const NEAR: f64 = 3.0;

/// Key points of two views of one photograph find each other by attention in both directions
#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    device: DeviceFlag,
    #[command(flatten)]
    output: OutputFlag,
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
    flags::end(run(&Flags::parse()))
}

fn run(flags: &Flags) -> Result<(), Failure> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let data = root.join("examples/data/lightglue");
    let layer = Tensors::open(&root.join("tests/golden/lightglue/layer4.safetensors"))?;
    let points = Tensors::open(&data.join("keypoints.safetensors"))?;
    let published: Published = read_json(&data.join("matches.json"))?;
    let output = flags.output.open("lightglue_match")?;
    let device = flags.device.begin([
        "Key points of two views of one photograph attend to each other in both directions, as in a middle layer of LightGlue;",
        "pairs that look at each other most are drawn as lines, and compared with the true places.",
    ])?;

    let sides = [points.f32("keypoints0")?, points.f32("keypoints1")?];
    let (left, right) = (sides[0].len() / 2, sides[1].len() / 2);
    let qk = [layer.f32("qk0")?, layer.f32("qk1")?];
    let values = [layer.f32("v0")?, layer.f32("v1")?];
    let there = looks(&device, [left, right], &qk[0], &qk[1], &values[1], &layer.f32("out0")?)?;
    let back = looks(&device, [right, left], &qk[1], &qk[0], &values[0], &layer.f32("out1")?)?;

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
    say!("{} pairs of {left} and {right} key points, {near} within {NEAR} pixels of the truth", pairs.len());
    say!("{known} of the {} matches that the whole model finds are among them", published.matches.len());

    let views = [("left.jpg", 0), ("right.jpg", 1)].map(|(name, side)| (open(&data.join(name)), &sides[side][..]));
    let lines = pairs.iter().map(|pair| Match { pair: *pair, near: off(pair) < NEAR }).collect::<Vec<_>>();
    let [(left, left_points), (right, right_points)] = views;
    output.write(&draw([(left?, left_points), (right?, right_points)], &lines))
}

/// A pair of key points, and whether the second is where the first is seen.
struct Match {
    pair: [usize; 2],
    near: bool,
}

fn open(path: &Path) -> Result<Image, Failure> {
    let decoded = image::load_from_memory(&read(path)?);
    let rgb = decoded.map_err(|error| format!("{} cannot be read: {error}", path.display()))?.to_rgb8();
    Ok(Image { size: [rgb.width() as usize, rgb.height() as usize], pixels: rgb.into_raw() })
}

/// Both views side by side, with their key points and the lines between them.
fn draw([(left, left_points), (right, right_points)]: [(Image, &[f32]); 2], lines: &[Match]) -> Scene {
    const PAD: f64 = 16.0;
    const BETWEEN: f64 = 24.0;
    const TOP: f64 = 76.0;
    const POINT: Color = [255, 224, 64];
    let [near, far]: [Color; 2] = [[64, 224, 112], [255, 80, 64]];
    let title = "Key points of two views of one photograph, matched by LightGlue's cross-attention";
    let mut scene = Scene::new(title);
    let width = 2.0 * PAD + (left.size[0] + right.size[0]) as f64 + BETWEEN;
    let bottom = TOP + left.size[1].max(right.size[1]) as f64;
    scene.paragraph(title, [PAD, 12.0], width - 2.0 * PAD, Style::bold(Anchor::Start));
    let places = [[PAD, TOP], [PAD + left.size[0] as f64 + BETWEEN, TOP]];
    let captions = ["NASA's portrait of an astronaut", "the same, turned and seen aslant"];
    let [count, there] = [lines.len(), lines.iter().filter(|of| of.near).count()];
    for (((view, points), place), caption) in
        [(left, left_points), (right, right_points)].into_iter().zip(places).zip(captions)
    {
        let caption = format!("{caption}, {} key points", points.len() / 2);
        scene.text(&caption, [place[0], TOP - 14.0], Style::plain(Anchor::Start));
        scene.image(place, view.size.map(|side| side as f64), view);
        for point in points.as_chunks::<2>().0 {
            dot(&mut scene, at(place, point), 1.5, POINT);
        }
    }
    // first the lines that are right, so that the few others are seen; each with a dark edge, as photographs have all colors
    for wanted in [true, false] {
        for of in lines.iter().filter(|of| of.near == wanted) {
            let color = if of.near { near } else { far };
            let ends = [(left_points, places[0], of.pair[0]), (right_points, places[1], of.pair[1])]
                .map(|(points, place, point)| at(place, &points.as_chunks::<2>().0[point]));
            scene.line(ends.to_vec(), [24; 3], 3.0);
            scene.line(ends.to_vec(), color, 1.6);
            for end in ends {
                dot(&mut scene, end, 3.5, [24; 3]);
                dot(&mut scene, end, 2.5, color);
            }
        }
    }
    let mut x = PAD;
    let wrong = count - there;
    for (color, text) in [
        (near, format!("{there} pairs within {NEAR} pixels of the true place")),
        (far, format!("{wrong} pairs further off")),
        (POINT, "key point without a pair".to_owned()),
    ] {
        scene.rect([x, bottom + 16.0], [24.0, 12.0], [24; 3]);
        scene.rect([x + 2.0, bottom + 18.0], [20.0, 8.0], color);
        scene.text(&text, [x + 32.0, bottom + 22.0], Style::plain(Anchor::Start));
        x += 72.0 + 8.0 * text.len() as f64;
    }
    let pixels = |side: f64| format!("{side:.0}").parse().unwrap_or(1);
    scene.size = [pixels(width), pixels(bottom + 44.0)];
    scene
}

/// The place of a key point in the picture.
fn at([left, top]: [f64; 2], [x, y]: &[f32; 2]) -> [f64; 2] {
    [left + f64::from(*x), top + f64::from(*y)]
}

fn dot(scene: &mut Scene, [x, y]: [f64; 2], radius: f64, color: Color) {
    scene.rect([x - radius, y - radius], [2.0 * radius; 2], color);
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
    say!("{from} to {to}: output at most {off:.1e} off the exact one");
    Ok(result.weights)
}
