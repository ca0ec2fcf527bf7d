//! Named attentions of real models, with inputs made from a seed.

use crate::inputs::{AttentionData, AttentionInputs};
use crate::problem::{AttentionProblem, AttentionSpec};
use crate::tensor::{Layout, TensorData, TensorSpec};
use crate::terms::Terms;

/// A shape with a name: the same in tests, benches and the program.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    /// What it is asked for by.
    pub name: &'static str,
    /// Which model computes it, and where the numbers are from.
    pub about: &'static str,
    /// The attention, f32, without masks.
    pub spec: AttentionSpec,
}

/// Which values [`inputs_with`] makes. Each shows another kind of fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum InputRecipe {
    /// Normally distributed, as after a layer norm: scores spread by about 1.
    #[default]
    Normal,
    /// Scores rise from key to key, so that every block of keys has a new maximum.
    Rising,
    /// One key of each head, at the edge of a block, holds nearly all the weight.
    Dominant,
    /// Values tell their key, head and column; scores spread by several units.
    Numbered,
    /// Scores close to each other around 1e4 (even rows) or -1e4 (odd rows).
    Extreme,
}

impl InputRecipe {
    /// Every recipe.
    pub const ALL: [Self; 5] = [Self::Normal, Self::Rising, Self::Dominant, Self::Numbered, Self::Extreme];
}

/// Every workload.
#[must_use]
pub fn all() -> Vec<Workload> {
    // batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim
    #[rustfmt::skip]
    let shapes: [(&str, [usize; 7], &str); 31] = [
        ("sd15_64", [1, 8, 8, 4096, 77, 40, 40],
            "Stable Diffusion 1.5 at 512x512, latents of 64x64 to 77 prompt tokens (candle stable_diffusion/mod.rs)"),
        ("sdxl_32", [1, 20, 20, 1024, 77, 64, 64],
            "Stable Diffusion XL at 1024x1024, latents of 32x32 to 77 prompt tokens (candle stable_diffusion/mod.rs)"),
        ("whisper_decode", [1, 8, 8, 1, 1500, 64, 64],
            "Whisper base, one token to 30 s of audio (candle whisper/mod.rs)"),
        ("whisper_prefill", [1, 8, 8, 224, 1500, 64, 64],
            "Whisper base, a prompt of 224 tokens to 30 s of audio (candle whisper/mod.rs)"),
        ("square_1k", [1, 8, 8, 1024, 1024, 64, 64],
            "as many queries as keys, the shape that attention benchmarks use"),
        ("long_kv", [1, 8, 8, 16, 32768, 128, 128],
            "few queries to a very long context"),
        ("perceiver", [1, 8, 8, 256, 8192, 64, 64],
            "Perceiver, 256 latents to 8192 inputs (arXiv:2103.03206)"),
        ("gqa", [1, 32, 8, 128, 2048, 128, 128],
            "grouped heads, four query heads to a key/value head, as in Llama 3"),
        ("sd15_32", [2, 8, 8, 1024, 77, 80, 80],
            "Stable Diffusion 1.5 at 512x512, latents of 32x32, with guidance (candle stable_diffusion/mod.rs)"),
        ("sd15_16", [2, 8, 8, 256, 77, 160, 160],
            "Stable Diffusion 1.5 at 512x512, latents of 16x16, with guidance (candle stable_diffusion/mod.rs)"),
        ("sd15_8", [2, 8, 8, 64, 77, 160, 160],
            "Stable Diffusion 1.5 at 512x512, latents of 8x8, with guidance (candle stable_diffusion/mod.rs)"),
        ("sd21_96", [2, 5, 5, 9216, 77, 64, 64],
            "Stable Diffusion 2.1 at 768x768, latents of 96x96, with guidance (candle stable_diffusion/mod.rs)"),
        ("sd21_48", [2, 10, 10, 2304, 77, 64, 64],
            "Stable Diffusion 2.1 at 768x768, latents of 48x48, with guidance (candle stable_diffusion/mod.rs)"),
        ("sd21_24", [2, 20, 20, 576, 77, 64, 64],
            "Stable Diffusion 2.1 at 768x768, latents of 24x24, with guidance (candle stable_diffusion/mod.rs)"),
        ("sdxl_64", [2, 10, 10, 4096, 77, 64, 64],
            "Stable Diffusion XL at 1024x1024, latents of 64x64, with guidance (candle stable_diffusion/mod.rs)"),
        ("ip_adapter_4", [2, 8, 8, 4096, 4, 40, 40],
            "IP-Adapter on Stable Diffusion 1.5, 4 image tokens (diffusers attention_processor.py)"),
        ("wan_1b3", [1, 12, 12, 32760, 512, 128, 128],
            "Wan 2.1 T2V 1.3B, 81 frames of 480x832 to 512 prompt tokens (mlx-examples wan_t2v_1_3B.py)"),
        ("whisper_beam5", [5, 8, 8, 1, 1500, 64, 64],
            "Whisper base, one token of five beams that share 30 s of audio (candle whisper/mod.rs)"),
        ("whisper_align_448", [1, 8, 8, 448, 1500, 64, 64],
            "Whisper base, word timestamps of 448 tokens (huggingface/transformers#23205)"),
        ("bart_decode", [1, 16, 16, 1, 1024, 64, 64],
            "BART large, one token to 1024 (candle marian.rs)"),
        ("marian_decode", [1, 8, 8, 1, 512, 64, 64],
            "Marian base, one token to 512 (candle marian.rs)"),
        ("t5_decode", [8, 8, 8, 1, 512, 64, 64],
            "T5 small, one token of eight sequences to 512, scale 1 (candle t5.rs)"),
        ("flamingo_resampler", [1, 8, 8, 64, 320, 64, 64],
            "Flamingo, 64 latents to one image and themselves (open_flamingo helpers.py)"),
        ("mllama_prefill", [1, 32, 8, 512, 6404, 128, 128],
            "Llama 3.2 Vision, 512 text tokens to four image tiles (Hugging Face mllama configuration)"),
        ("qformer", [1, 12, 12, 32, 257, 64, 64],
            "BLIP-2 Q-Former, 32 queries to 257 image patches (Hugging Face blip-2 configuration)"),
        ("perceiver_io", [1, 8, 8, 256, 2048, 32, 160],
            "Perceiver IO on text, keys of width 32, values of 160 (Hugging Face perceiver configuration)"),
        ("sam_token_to_image", [1, 8, 8, 7, 4096, 16, 16],
            "Segment Anything, 7 prompt tokens to 64x64 patches (segment_anything/modeling/transformer.py)"),
        ("sam_image_to_token", [1, 8, 8, 4096, 7, 16, 16],
            "Segment Anything, 64x64 patches to 7 prompt tokens (segment_anything/modeling/transformer.py)"),
        ("detr", [1, 8, 8, 100, 850, 32, 32],
            "DETR decoder, 100 object queries to 25x34 image features (facebookresearch/detr)"),
        ("retro", [32, 8, 8, 64, 256, 64, 64],
            "RETRO, 32 chunks of 64 tokens, each to two neighbours of 128 (lucidrains/RETRO-pytorch)"),
        ("fid_decode", [1, 12, 12, 1, 25_000, 64, 64],
            "Fusion-in-Decoder base, an answer token to 100 passages of 250 (facebookresearch/FiD src/model.py)"),
    ];
    shapes
        .into_iter()
        .map(|(name, [batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim], about)| {
            let kv_batch = if name == "whisper_beam5" { 1 } else { batch };
            let mut spec = AttentionSpec::from_tensors(
                TensorSpec::f32(Layout::bhld([batch, q_heads, q_len, head_dim])),
                TensorSpec::f32(Layout::bhld([kv_batch, kv_heads, kv_len, head_dim])),
                TensorSpec::f32(Layout::bhld([kv_batch, kv_heads, kv_len, v_head_dim])),
            );
            if name == "t5_decode" {
                spec.scale = Some(1.0);
            }
            Workload { name, about, spec }
        })
        .collect()
}

/// The workload of that name.
#[must_use]
pub fn find(name: &str) -> Option<Workload> {
    all().into_iter().find(|workload| workload.name == name)
}

/// Inputs for a problem, approximately normal. The same seed gives the same inputs on every machine.
#[must_use]
pub fn inputs(problem: &AttentionProblem, seed: &str) -> AttentionData {
    inputs_with(problem, seed, InputRecipe::Normal)
}

/// Inputs for a problem, after a recipe. The same seed gives the same inputs on every machine.
///
/// Whatever else the spec has is filled in too: a bias with some negative infinities; masks and row ranges with some
/// rows that see nothing and some that see all; key lengths of which one is full, one 0 and the rest random (a lone
/// one is random); ALiBi slopes as published; random sinks. Elements between those of a layout hold finite noise.
#[must_use]
pub fn inputs_with(problem: &AttentionProblem, seed: &str, recipe: InputRecipe) -> AttentionData {
    let spec = problem.spec();
    let (batch, q_len, kv_len) = (problem.batch(), problem.q_len(), problem.kv_len());
    let rng = |what: &str| Rng::new(seed, what);

    let mut query = normals(&spec.query, &mut rng("query"));
    let mut key = normals(&spec.key, &mut rng("key"));
    let mut value = normals(&spec.value, &mut rng("value"));
    shape_scores(problem, recipe, seed, &mut query, &mut key);
    if recipe == InputRecipe::Numbered {
        for_elements(&spec.value.layout, |at, index| {
            let [b, h, j, d] = at.map(|n| n as f32);
            let place = 1.0 + 6.0 * j / kv_len as f32 + 0.5 * h + 0.25 * b;
            value[index] = if at[3] % 2 == 0 { place } else { -place } + 0.01 * d;
        });
    }

    let bias = spec.bias.as_ref().map(|bias| {
        let mut data = normals(bias, &mut rng("bias"));
        let mut rng = rng("bias -inf");
        for_elements(&bias.layout, |[_, _, i, j], index| {
            if rng.below(12) == 0 || (i % 11 == 7 && bias.layout.strides[3] != 0) || (i % 5 == 3 && j == 0) {
                data[index] = f32::NEG_INFINITY;
            }
        });
        TensorData::from_f32(bias.element, data)
    });
    let mask = spec.mask.as_ref().map(|layout| {
        let mut rng = rng("mask");
        let mut data: Vec<bool> = (0..layout.extent().unwrap_or(0)).map(|_| rng.below(4) != 0).collect();
        for_elements(layout, |[_, h, i, _], index| match (i + h) % 7 {
            3 => data[index] = false,
            5 => data[index] = true,
            _ => {}
        });
        data
    });
    let lens = |name, all: usize| {
        let mut rng = rng(name);
        let mut some = || if all == 0 { 0 } else { 1 + rng.below(all) };
        let lens = (0..batch).map(|b| match b % 4 {
            1 => all,
            2 => 0,
            _ => some(),
        });
        lens.map(|len| u32::try_from(len).unwrap_or(u32::MAX)).collect::<Vec<_>>()
    };
    let q_lens = spec.q_lens.then(|| lens("q_lens", q_len));
    let kv_lens = spec.kv_lens.then(|| lens("kv_lens", kv_len));
    let (row_start, row_end) = spec
        .row_ranges
        .then(|| {
            let mut rng = rng("row_ranges");
            let mut position = || i32::try_from(rng.below(kv_len + 4)).unwrap_or(i32::MAX) - 2;
            let ranges = (0..batch * q_len).map(|row| {
                let (x, y) = (position(), position());
                match row % 6 {
                    1 => (i32::MIN, i32::MAX),
                    4 => (x.max(y), x.min(y)),
                    _ => (x.min(y), x.max(y)),
                }
            });
            ranges.unzip::<i32, i32, Vec<_>, Vec<_>>()
        })
        .unzip();
    let (key, key_scale) = stored(&spec.key, spec.key_scale.as_ref(), key);
    let (value, value_scale) = stored(&spec.value, spec.value_scale.as_ref(), value);
    let block_table = spec.paged.map(|paged| {
        let mut rng = rng("block_table");
        let [pages, _, page_len, _] = spec.key.layout.shape;
        // every page in turn, in any order; where there are not enough, some hold keys of several entries
        let mut left: Vec<usize> = vec![];
        let mut page = || {
            if left.is_empty() {
                left = (0..pages).collect();
            }
            if left.is_empty() { 0 } else { left.swap_remove(rng.below(left.len())) }
        };
        let mut table = vec![];
        for b in 0..batch {
            let keys = kv_lens.as_ref().map_or(kv_len, |lens: &Vec<u32>| lens[b] as usize);
            let used = keys.div_ceil(page_len.max(1));
            // behind the last page stands what is none
            let behind = [-1, i32::MAX, i32::MIN, 0, 1 << 20];
            let entry = |n: usize| if n < used { i32::try_from(page()).unwrap_or(0) } else { behind[n % behind.len()] };
            table.extend((0..paged.table_len).map(entry));
        }
        table
    });
    let heads = problem.q_heads();
    // the geometric series of Press et al. 2021 (arXiv:2108.12409)
    let slope = |h: usize| (-8.0 * (h + 1) as f32 / heads as f32).exp2();
    let alibi_slopes = problem.terms().alibi_slopes;
    let alibi_slopes = alibi_slopes.map(|slopes| (0..slopes.elements).map(|n| slope(n % heads)).collect());
    let sinks = spec.sinks.then(|| {
        let mut rng = rng("sinks");
        (0..heads).map(|_| rng.normal()).collect()
    });
    AttentionData {
        query: TensorData::from_f32(spec.query.element, query),
        key,
        value,
        terms: Terms {
            bias,
            mask,
            key_scale,
            value_scale,
            q_lens,
            kv_lens,
            row_start,
            row_end,
            alibi_slopes,
            sinks,
            block_table,
        },
    }
}

/// Numbers as a tensor stores them: rounded, or as signed bytes beside scales with which the largest of a block is 127.
#[expect(clippy::cast_possible_truncation, reason = "between -127 and 127")]
fn stored(of: &TensorSpec, scale: Option<&TensorSpec>, numbers: Vec<f32>) -> (TensorData, Option<TensorData>) {
    let Some(scale) = scale else { return (TensorData::from_f32(of.element, numbers), None) };
    let block = of.layout.shape[3] / scale.layout.shape[3].max(1);
    let mut scales = vec![0.0f32; scale.layout.extent().unwrap_or(0)];
    for_elements(&of.layout, |[b, h, j, d], index| {
        let largest = &mut scales[scale.layout.index([b, h, j, d / block])];
        *largest = largest.max(numbers[index].abs() / 127.0);
    });
    let scales = TensorData::from_f32(scale.element, scales);
    let mut bytes: Vec<i8> = numbers.iter().map(|x| *x as i8).collect();
    for_elements(&of.layout, |[b, h, j, d], index| {
        let step = scales.as_ref().get(scale.layout.index([b, h, j, d / block]));
        bytes[index] = if step == 0.0 { 0 } else { (numbers[index] / step).round() as i8 };
    });
    (TensorData::I8(bytes), Some(scales))
}

/// Gives the scores the shape of the recipe, by query and key.
///
/// All but `Normal` and `Numbered` draw near one direction: query is `sign * (1 + noise)` and key is
/// `sign * target / (scale * head_dim)` plus noise, so that scaled scores come out near `target`.
fn shape_scores(problem: &AttentionProblem, recipe: InputRecipe, seed: &str, query: &mut [f32], key: &mut [f32]) {
    let spec = problem.spec();
    let (kv_heads, kv_len, head_dim) = (problem.kv_heads(), problem.kv_len(), problem.head_dim());
    let scale = if problem.scale() == 0.0 { 1.0 } else { problem.scale() };
    let dim = head_dim as f32;
    if recipe == InputRecipe::Normal {
        return;
    }
    if recipe == InputRecipe::Numbered {
        let spread = 3.0 / (scale.abs() * dim.sqrt());
        key.iter_mut().for_each(|x| *x *= spread);
        return;
    }
    let mut rng = Rng::new(seed, "direction");
    let signs: Vec<f32> = (0..head_dim).map(|_| if rng.below(2) == 0 { 1.0 } else { -1.0 }).collect();
    // spread of query elements around 1, spread of the scores that the noise in the keys makes
    let (query_noise, score_noise) = match recipe {
        InputRecipe::Rising => (0.1, 0.1),
        InputRecipe::Dominant => (0.3, 1.0),
        _ => (0.0, 2.0),
    };
    for_elements(&spec.query.layout, |[_, _, i, d], index| {
        let sign = if recipe == InputRecipe::Extreme && i % 2 == 1 { -signs[d] } else { signs[d] };
        query[index] = sign * (1.0 + query_noise * query[index]);
    });
    let slope = (60.0 / kv_len.max(1) as f32).min(0.08);
    let key_noise = score_noise / (scale.abs() * dim.sqrt());
    for_elements(&spec.key.layout, |[b, h, j, d], index| {
        let target = match recipe {
            InputRecipe::Rising => slope * j as f32,
            InputRecipe::Dominant if j == dominant_key(kv_len, b * kv_heads + h) => 12.0,
            InputRecipe::Extreme => 1e4,
            _ => 0.0,
        };
        let along = (target / (scale * dim)).clamp(-3e4, 3e4);
        key[index] = signs[d] * along + key_noise * key[index];
    });
}

/// The last key for the first head, then both sides of the edges of usual blocks, as far as there are so many keys.
fn dominant_key(kv_len: usize, head: usize) -> usize {
    let edges = [kv_len.saturating_sub(1), 63, 64, 0, 31, 32, 127, 128, 15, 16];
    let edge = edges[head % edges.len()];
    if edge < kv_len { edge } else { kv_len.saturating_sub(1) }
}

/// Floating point operations of one attention: `2 * pairs * (head_dim + v_head_dim)`, where `pairs` counts the pairs
/// of query row and key that key lengths, causal mask, window, row ranges and mask leave. The inputs must have passed
/// [`check`](AttentionInputs::check).
#[must_use]
pub fn flops(problem: &AttentionProblem, inputs: &AttentionInputs<'_>) -> f64 {
    let mut pairs = 0.0;
    for b in 0..problem.batch() {
        for i in 0..problem.q_len() {
            let keys = inputs.row_keys(problem, b, i);
            let Some((mask, layout)) = inputs.terms.mask.zip(problem.spec().mask.as_ref()) else {
                pairs += (problem.q_heads() * keys.len()) as f64;
                continue;
            };
            let seen = |h: usize| keys.clone().filter(|&j| mask[layout.index([b, h, i, j])]).count();
            pairs += if layout.strides[1] == 0 {
                (problem.q_heads() * seen(0)) as f64
            } else {
                (0..problem.q_heads()).map(seen).sum::<usize>() as f64
            };
        }
    }
    2.0 * pairs * (problem.head_dim() + problem.v_head_dim()) as f64
}

/// The least traffic of one attention: bytes of query, key, value, output, bias and mask, each moved once; what is
/// broadcast counts once. Keys and values count as in [`kv_bytes`].
#[must_use]
pub fn bytes(problem: &AttentionProblem) -> f64 {
    let spec = problem.spec();
    kv_bytes(problem)
        + tensor_bytes(&spec.query)
        + tensor_bytes(&spec.output)
        + spec.bias.as_ref().map_or(0.0, tensor_bytes)
        + spec.mask.as_ref().map_or(0.0, elements)
}

/// Bytes of keys and values of one attention as they are stored, with their scales and the table of their pages, each read
/// once; what all entries of a batch share counts once. Key lengths are not looked at.
#[must_use]
pub fn kv_bytes(problem: &AttentionProblem) -> f64 {
    let spec = problem.spec();
    let tensors = [Some(&spec.key), Some(&spec.value), spec.key_scale.as_ref(), spec.value_scale.as_ref()];
    let Some(paged) = spec.paged else { return tensors.into_iter().flatten().map(tensor_bytes).sum() };
    let rows = (problem.batch() * problem.kv_heads() * problem.kv_len()) as f64;
    let of_row = |tensor: &TensorSpec| (tensor.layout.shape[3] * tensor.element.size_bytes()) as f64;
    let table = (problem.batch() * paged.table_len * size_of::<i32>()) as f64;
    rows * tensors.into_iter().flatten().map(of_row).sum::<f64>() + table
}

/// Elements of a layout, those that repeat counted once.
fn elements(layout: &Layout) -> f64 {
    let axes = layout.shape.iter().zip(layout.strides);
    axes.map(|(&n, stride)| if stride == 0 { n.min(1) } else { n } as f64).product()
}

fn tensor_bytes(tensor: &TensorSpec) -> f64 {
    elements(&tensor.layout) * tensor.element.size_bytes() as f64
}

/// As many normal values as the tensor reaches over, gaps included.
fn normals(tensor: &TensorSpec, rng: &mut Rng) -> Vec<f32> {
    (0..tensor.layout.extent().unwrap_or(0)).map(|_| rng.normal()).collect()
}

/// Calls `each` with place and position of every element, once where an axis repeats.
fn for_elements(layout: &Layout, mut each: impl FnMut([usize; 4], usize)) {
    let n = |axis: usize| if layout.strides[axis] == 0 { layout.shape[axis].min(1) } else { layout.shape[axis] };
    for b in 0..n(0) {
        for h in 0..n(1) {
            for i in 0..n(2) {
                let start = layout.index([b, h, i, 0]);
                for d in 0..n(3) {
                    each([b, h, i, d], start + d * layout.strides[3]);
                }
            }
        }
    }
}

/// `SplitMix64` (Steele, Lea and Flood 2014), started from the names of a seed and of a tensor.
struct Rng(u64);

impl Rng {
    fn new(seed: &str, what: &str) -> Self {
        // FNV-1a; the 0 keeps "a" + "bc" apart from "ab" + "c"
        let hash = seed
            .bytes()
            .chain([0])
            .chain(what.bytes())
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        Self(hash)
    }

    const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Mean 0, variance 1, within +-3.5: the sum of four uniform values of 16 bits.
    fn normal(&mut self) -> f32 {
        let bits = self.next();
        let sum = (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
        // each has variance 2^32 / 12
        (sum as f32 - 131_070.0) * (3f32.sqrt() / 65_536.0)
    }

    const fn below(&mut self, n: usize) -> usize {
        (((self.next() >> 32) * (n as u64)) >> 32) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AlibiSlopes;
    use crate::Diagonal;

    #[test]
    fn workloads_are_sound_and_named_once() {
        let all = all();
        for (n, workload) in all.iter().enumerate() {
            assert!(AttentionProblem::new(workload.spec.clone()).is_ok(), "{}", workload.name);
            assert!(all[..n].iter().all(|other| other.name != workload.name), "{}", workload.name);
        }
        for name in
            ["sd15_64", "sdxl_32", "whisper_decode", "whisper_prefill", "square_1k", "long_kv", "perceiver", "gqa"]
        {
            assert!(find(name).is_some(), "{name}");
        }
        assert_eq!(find("none"), None);
    }

    fn is(found: f64, wanted: u32) {
        assert!((found - f64::from(wanted)).abs() < 0.5, "{found}, not {wanted}");
    }

    #[test]
    fn flops_and_bytes_of_a_known_shape() {
        let problem = AttentionProblem::new(find("sd15_64").unwrap().spec).unwrap();
        let data = inputs(&problem, "sd15_64");
        is(flops(&problem, &data.as_inputs()), 4 * 8 * 4096 * 77 * 40);
        is(bytes(&problem), 4 * 2 * 8 * (4096 + 77) * 40);
        let beams = AttentionProblem::new(find("whisper_beam5").unwrap().spec).unwrap();
        is(bytes(&beams), 4 * 2 * 8 * (5 + 1500) * 64);
    }

    #[test]
    fn flops_count_what_the_masks_leave() {
        let mut spec = AttentionSpec::new([2, 2, 4, 8], [2, 1, 6, 8]);
        spec.causal = Some(Diagonal::TopLeft);
        spec.row_ranges = true;
        spec.kv_lens = true;
        spec.mask = Some(Layout::bhld([1, 2, 1, 6]));
        let problem = AttentionProblem::new(spec).unwrap();
        let mut data = inputs(&problem, "flops");
        data.terms.kv_lens = Some(vec![6, 2]);
        data.terms.row_start = Some(vec![1; 8]);
        data.terms.row_end = Some(vec![3; 8]);
        data.terms.mask = Some(vec![true, true, false, true, true, true, true, true, true, true, true, true]);
        // keys 1 and 2 below the diagonal: rows see 0 1 2 2, in batch entry 1 just key 1; head 0 does not see key 2
        let pairs = (3 + 5) + (3 + 3);
        is(flops(&problem, &data.as_inputs()), 2 * pairs * 16);
    }

    #[test]
    fn inputs_follow_the_seed_and_fit_the_problem() {
        let mut spec = AttentionSpec::new([5, 4, 9, 8], [5, 2, 70, 8]);
        spec.query = TensorSpec::f16(Layout::packed([5, 4, 9, 8], 3, 1).with_offset(5));
        spec.bias = Some(TensorSpec::f16(Layout::bhld([1, 4, 9, 70])));
        spec.mask = Some(Layout::bhld([5, 1, 9, 70]));
        (spec.q_lens, spec.kv_lens, spec.row_ranges, spec.sinks) = (true, true, true, true);
        spec.alibi_slopes = Some(AlibiSlopes::PerBatchAndHead);
        let problem = AttentionProblem::new(spec).unwrap();
        for recipe in InputRecipe::ALL {
            let data = inputs_with(&problem, "seed", recipe);
            data.as_inputs().check(&problem).unwrap();
            assert_eq!(data.query.as_ref().len(), problem.spec().query.layout.extent().unwrap());
            assert!(data.query.to_f32().iter().chain(&data.key.to_f32()).all(|x| x.is_finite()));
            assert_eq!(data, inputs_with(&problem, "seed", recipe));
            assert_ne!(data, inputs_with(&problem, "seeds", recipe));
            let lens = data.terms.kv_lens.unwrap();
            assert!(lens.contains(&70) && lens.contains(&0));
            let mask = data.terms.mask.unwrap();
            assert!(mask.chunks(70).any(|row| row.iter().all(|&x| !x)));
        }
    }

    #[test]
    fn normal_values_are_normal() {
        let mut rng = Rng::new("normal", "");
        let values: Vec<f64> = (0..100_000).map(|_| f64::from(rng.normal())).collect();
        let moment = |n: i32| values.iter().map(|x| x.powi(n)).sum::<f64>() / values.len() as f64;
        assert!(moment(1).abs() < 0.02 && (moment(2) - 1.0).abs() < 0.02 && moment(3).abs() < 0.03, "{}", moment(2));
    }
}
