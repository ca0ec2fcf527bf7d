//! The fused kernel: online softmax over blocks of keys in f32, never holding the scores.
//!
//! FlashAttention-2, Dao 2023 (arXiv:2307.08691), Algorithm 1. A task is a block of query rows of one head. Blocks of
//! keys start at multiples of `BLOCK_KV`, so the bits of a row depend neither on its neighbours nor on the threads.

use crate::inputs::AttentionInputs;
use crate::problem::{AttentionProblem, ScoreStage};

use super::Task;
use super::terms::{RowTerms, Rows};

/// Query rows of a task: as often a block of keys is used from the cache.
pub(super) const BLOCK_Q: usize = 32;
/// Keys of a block: at `head_dim` 64, keys and values are 32 KiB.
const BLOCK_KV: usize = 64;
/// Sums of a dot product that are added up side by side.
const LANES: usize = 8;

pub(super) fn compute(problem: &AttentionProblem, inputs: &AttentionInputs<'_>, task: Task<'_>) {
    let spec = problem.spec();
    let (kv_len, v_head_dim) = (problem.kv_len(), problem.v_head_dim());
    let rows = task.lse.len();
    let (b, h) = (task.b, task.h);
    let kv_head = [b, h / problem.group_size()];

    let terms: Vec<_> = (0..rows).map(|r| RowTerms::new(problem, inputs, [b, h, task.first_row + r])).collect();
    let (mut query_scratch, mut key_scratch, mut value_scratch) = (Vec::new(), Vec::new(), Vec::new());
    let row_range = task.first_row..task.first_row + rows;
    let query = Rows::new(inputs.query, &spec.query.layout, [b, h], row_range, &mut query_scratch);

    let sink = inputs.sinks.map_or(f32::NEG_INFINITY, |sinks| sinks[h]);
    let mut states = vec![RowState::new(sink); rows];
    let (first_key, last_key) = terms
        .iter()
        .filter(|terms| !terms.keys.is_empty())
        .fold((kv_len, 0), |(first, last), terms| (first.min(terms.keys.start), last.max(terms.keys.end)));

    let mut block_acc = vec![0.0f32; v_head_dim];
    for block in (first_key / BLOCK_KV * BLOCK_KV..last_key).step_by(BLOCK_KV) {
        let end = (block + BLOCK_KV).min(last_key);
        let key = Rows::new(inputs.key, &spec.key.layout, kv_head, block..end, &mut key_scratch);
        let value = Rows::new(inputs.value, &spec.value.layout, kv_head, block..end, &mut value_scratch);
        for (r, (terms, state)) in terms.iter().zip(&mut states).enumerate() {
            let live = LiveKeys::new(terms, block, end);
            if live.keys().is_empty() {
                continue;
            }
            let mut scores = [0.0; BLOCK_KV];
            let scores = &mut scores[..live.keys().len()];
            dots(query.get(r), &key, live.keys(), scores);
            for (&j, score) in live.keys().iter().zip(&mut *scores) {
                *score = terms.score(block + j, *score);
            }
            if matches!(spec.scores, Some(ScoreStage::Masked | ScoreStage::Probs)) {
                for (&j, &score) in live.keys().iter().zip(&*scores) {
                    task.scores[r * kv_len + block + j] = score;
                }
            }
            let acc = &mut task.output[r * v_head_dim..][..v_head_dim];
            state.step(scores, acc);
            // a sum of its own for each block: two short sums round far less than one over all keys
            block_acc.fill(0.0);
            add_weighted(&mut block_acc, scores, &value, live.keys());
            acc.iter_mut().zip(&block_acc).for_each(|(x, block)| *x += block);
        }
    }

    for (r, state) in states.iter().enumerate() {
        task.lse[r] = state.finish(&mut task.output[r * v_head_dim..][..v_head_dim]);
    }
    match spec.scores {
        None => {}
        Some(stage @ (ScoreStage::Scaled | ScoreStage::Capped)) => {
            for block in (0..kv_len).step_by(BLOCK_KV) {
                let end = (block + BLOCK_KV).min(kv_len);
                let key = Rows::new(inputs.key, &spec.key.layout, kv_head, block..end, &mut key_scratch);
                let all: Vec<usize> = (0..end - block).collect();
                for (r, terms) in terms.iter().enumerate() {
                    let scores = &mut task.scores[r * kv_len..][block..end];
                    dots(query.get(r), &key, &all, scores);
                    for score in scores {
                        *score = if stage == ScoreStage::Scaled { terms.scaled(*score) } else { terms.capped(*score) };
                    }
                }
            }
        }
        Some(stage @ (ScoreStage::Masked | ScoreStage::Probs)) => {
            for (r, terms) in terms.iter().enumerate() {
                let scores = &mut task.scores[r * kv_len..][..kv_len];
                for (j, score) in scores.iter_mut().enumerate() {
                    let allowed = terms.keys.contains(&j) && terms.allows(j);
                    *score = match (stage, allowed) {
                        (ScoreStage::Probs, true) => prob(*score, task.lse[r]),
                        (ScoreStage::Probs, false) => 0.0,
                        (_, true) => *score,
                        (_, false) => f32::NEG_INFINITY,
                    };
                }
            }
        }
    }
}

/// `exp(score - lse)`, zero in a row without mass.
pub(super) fn prob(score: f32, lse: f32) -> f32 {
    if lse == f32::NEG_INFINITY { 0.0 } else { (score - lse).exp() }
}

/// The allowed keys of a row in a block, counted from its start. No other key is computed with.
struct LiveKeys {
    keys: [usize; BLOCK_KV],
    len: usize,
}

impl LiveKeys {
    fn new(terms: &RowTerms<'_>, block: usize, end: usize) -> Self {
        let mut live = Self { keys: [0; BLOCK_KV], len: 0 };
        for j in terms.keys.start.max(block)..terms.keys.end.min(end) {
            if terms.allows(j) {
                live.keys[live.len] = j - block;
                live.len += 1;
            }
        }
        live
    }

    fn keys(&self) -> &[usize] {
        &self.keys[..self.len]
    }
}

/// Running maximum and sum of a row. A sink stands in front of the keys, as a score without a value.
#[derive(Clone, Copy)]
struct RowState {
    row_max: f32,
    row_sum: f32,
}

impl RowState {
    const fn new(sink: f32) -> Self {
        let row_sum = match sink {
            f32::NEG_INFINITY => 0.0,
            sink if sink.is_finite() => 1.0,
            _ => f32::NAN,
        };
        Self { row_max: sink, row_sum }
    }

    /// Takes in the scores of a block, turns them into weights, and rescales `acc` to the new maximum.
    fn step(&mut self, scores: &mut [f32], acc: &mut [f32]) {
        let row_max = scores.iter().copied().fold(self.row_max, f32::max);
        // while all scores are -inf there is no maximum to subtract, and -inf - -inf would be NaN
        let shift = if row_max == f32::NEG_INFINITY { 0.0 } else { row_max };
        if row_max > self.row_max {
            let rescale = (self.row_max - shift).exp();
            self.row_sum *= rescale;
            acc.iter_mut().for_each(|x| *x *= rescale);
        }
        self.row_max = row_max;
        let mut block_sum = 0.0;
        for score in scores {
            *score = (*score - shift).exp();
            block_sum += *score;
        }
        self.row_sum += block_sum;
    }

    /// Normalises `acc`, returns the log-sum-exp.
    fn finish(self, acc: &mut [f32]) -> f32 {
        if self.row_sum == 0.0 {
            acc.fill(0.0);
            return f32::NEG_INFINITY;
        }
        acc.iter_mut().for_each(|x| *x /= self.row_sum);
        self.row_max + self.row_sum.ln()
    }
}

/// Dot products of a query row with the keys of a block.
fn dots(query: &[f32], key: &Rows<'_>, keys: &[usize], out: &mut [f32]) {
    let (fours, rest) = keys.as_chunks::<4>();
    let (out_fours, out_rest) = out.as_chunks_mut::<4>();
    for (&js, out) in fours.iter().zip(out_fours) {
        *out = dot(query, js.map(|j| key.get(j)));
    }
    for (&j, out) in rest.iter().zip(out_rest) {
        [*out] = dot(query, [key.get(j)]);
    }
}

/// Dot products of one row with `N` others, the same bits for every `N`: eight sums each.
#[inline]
fn dot<const N: usize>(a: &[f32], b: [&[f32]; N]) -> [f32; N] {
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let sums = lane_sums(a_chunks, b.map(|b| b.as_chunks::<LANES>().0));
    std::array::from_fn(|n| {
        let s = sums[n];
        let total = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
        a_rest.iter().zip(&b[n][a.len() - a_rest.len()..]).fold(total, |sum, (x, y)| sum + x * y)
    })
}

/// Not inlined: seen together with the sums over lanes, LLVM vectorises across `b`, with shuffles in the loop.
#[inline(never)]
fn lane_sums<const N: usize>(a: &[[f32; LANES]], b: [&[[f32; LANES]]; N]) -> [[f32; LANES]; N] {
    let b = b.map(|b| &b[..a.len()]);
    let mut sums = [[0.0f32; LANES]; N];
    for (c, a) in a.iter().enumerate() {
        for (sums, b) in sums.iter_mut().zip(b) {
            for lane in 0..LANES {
                sums[lane] += a[lane] * b[c][lane];
            }
        }
    }
    sums
}

/// `acc += weights[n] * value[keys[n]]` for each n in order, four keys at a time.
fn add_weighted(acc: &mut [f32], weights: &[f32], value: &Rows<'_>, keys: &[usize]) {
    let (fours, rest) = keys.as_chunks::<4>();
    let (weight_fours, weight_rest) = weights.as_chunks::<4>();
    for (&js, &w) in fours.iter().zip(weight_fours) {
        let v = js.map(|j| &value.get(j)[..acc.len()]);
        for (d, x) in acc.iter_mut().enumerate() {
            *x = (((*x + w[0] * v[0][d]) + w[1] * v[1][d]) + w[2] * v[2][d]) + w[3] * v[3][d];
        }
    }
    for (&j, &w) in rest.iter().zip(weight_rest) {
        for (x, v) in acc.iter_mut().zip(value.get(j)) {
            *x += w * v;
        }
    }
}
