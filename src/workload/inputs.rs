//! Inputs for a problem, made from a seed.

use super::rng::Rng;
use crate::inputs::AttentionData;
use crate::problem::AttentionProblem;
use crate::tensor::{Layout, TensorData, TensorSpec};
use crate::terms::Terms;

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
