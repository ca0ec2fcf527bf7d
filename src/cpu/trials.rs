//! Trials of the CPU kernels where f32 is short of digits or of range: large parts that all scores share, padding values,
//! huge values, wide heads, far positions, odd strides. Bounds come from the arithmetic, not from another kernel.

use super::*;
use crate::AlibiSlopes;
use crate::Terms;
use crate::problem::{AttentionSpec, Diagonal, ScoreStage};
use crate::tensor::TensorSpec;
use crate::weights::{WeightsProblem, WeightsSpec};

/// Rounding error of one f32 operation, relative to its result.
const U: f64 = 1.0 / (1u64 << 24) as f64;

/// Numbers that look random (`SplitMix64`).
struct Noise(fastrand::Rng);

impl Noise {
    fn new(seed: u64) -> Self {
        Self(fastrand::Rng::with_seed(seed))
    }

    /// Whole numbers from `-most` to `most`: sums and products of a few are exact.
    fn whole(&mut self, len: usize, most: i16) -> Vec<f32> {
        (0..len).map(|_| f32::from(self.0.i16(-most..=most))).collect()
    }

    /// From -1 to 1.
    fn even(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| 2.0 * self.0.f32() - 1.0).collect()
    }
}

/// What every way to compute on this machine gives.
fn all_ways(problem: &AttentionProblem, inputs: &AttentionInputs<'_>) -> Vec<(String, AttentionOutput)> {
    let mut all = vec![("cpu_plain".to_owned(), attention_with(CpuKernel::Plain, problem, inputs).unwrap())];
    for level in SimdLevel::available() {
        all.push((format!("cpu_fused, {level}"), attention_at(level, problem, inputs).unwrap()));
    }
    all
}

/// How far an output may be off, relative to `sum p |v|`, where the scores are exact: two errors of `exp` (2 ulp each, of a
/// weight and of the sum), and the sums of blocks of 128 keys and over blocks, of values and of weights. Errors of a sum of n
/// terms go as `sqrt(n)`; four times that is out of reach (Higham and Mary 2019, theorem 2.4).
fn relative(kv_len: usize) -> f64 {
    8.0 * U + 2.0 * 4.0 * (128.0 + kv_len as f64 / 128.0).sqrt() * U
}

/// Compares output, maximum and sum, and probabilities with the oracle; scores must be exact in f32.
fn compare_exact(name: &str, problem: &AttentionProblem, inputs: &AttentionInputs<'_>) {
    let bound = relative(problem.kv_len());
    for (way, got) in all_ways(problem, inputs) {
        let (output, state, probs) = (got.output.to_f32(), got.row_state.unwrap(), got.scores.unwrap());
        for row in 0..problem.rows() {
            let (b, h, i) = row_place(problem, row);
            let want = reference::row(problem, inputs, b, h, i);
            let shift = f64::from(state.row_max[row]);
            let sum = f64::from(state.row_sum[row]);
            let probs = &probs[row * problem.kv_len()..][..problem.kv_len()];
            let total: f64 = probs.iter().map(|&p| f64::from(p)).sum();
            let whole: f64 = want.probs.iter().sum();
            assert!((total - whole).abs() <= bound, "{name}, {way}, row {row}: probabilities add up to {total}");
            for (j, &p) in want.probs.iter().enumerate() {
                assert!((f64::from(probs[j]) - p).abs() <= bound * p + 1e-37, "{name}, {way}, row {row}, key {j}");
                let weight = if want.allowed[j] && sum != 0.0 { (want.scores[j] - shift).exp() / sum } else { 0.0 };
                let message = || format!("{name}, {way}, row {row}, key {j}: {weight:e} by the state, {p:e} is right");
                assert!((weight - p).abs() <= bound * p + 1e-37, "{}", message());
            }
            let kv_head = h / problem.group_size();
            for d in 0..problem.v_head_dim() {
                let value = |j: usize| {
                    let at = problem.spec().value.layout.index([b, kv_head, j, d]);
                    f64::from(inputs.value.get(at))
                };
                let magnitude: f64 = want.probs.iter().enumerate().map(|(j, p)| p * value(j).abs()).sum();
                let got = f64::from(output[row * problem.v_head_dim() + d]);
                let off = (got - want.output[d]).abs();
                let allowed = bound * magnitude + 1e-37;
                assert!(off <= allowed, "{name}, {way}, row {row}, column {d}: {got}, not {}", want.output[d]);
            }
        }
    }
}

fn spec(rows: usize, kv_len: usize, dim: usize, v_dim: usize) -> AttentionSpec {
    let tensor = |len, dim| TensorSpec::f32(Layout::bhld([1, 1, len, dim]));
    let mut spec = AttentionSpec::from_tensors(tensor(rows, dim), tensor(kv_len, dim), tensor(kv_len, v_dim));
    (spec.lse, spec.row_state, spec.scores) = (true, true, Some(ScoreStage::Probs));
    spec
}

/// Every strategy, and the edges of a vector, a tile and a block.
const SHAPES: [[usize; 2]; 13] = [
    [1, 1],
    [1, 77],
    [1, 1500],
    [2, 3000],
    [3, 129],
    [4, 5000],
    [9, 300],
    [17, 3],
    [70, 16],
    [130, 7],
    [64, 17],
    [70, 130],
    [33, 1100],
];

#[test]
fn what_all_scores_share_in_a_bias_changes_nothing() {
    let mut noise = Noise::new(1);
    for [rows, kv_len] in SHAPES {
        for common in [0.0f32, 1e3, 1e4, -1e4, 1e6, -1e6, -1e9, f32::MIN] {
            let mut spec = spec(rows, kv_len, 4, 3);
            spec.scale = Some(1.0);
            spec.bias = Some(TensorSpec::f32(Layout::bhld([1, 1, 1, kv_len])));
            let problem = AttentionProblem::new(spec).unwrap();
            // beyond 2^24 a score has no room for anything else
            let most = if common.abs() > 1e7 { 0 } else { 2 };
            let (query, key) = (noise.whole(rows * 4, most), noise.whole(kv_len * 4, 1));
            let value = noise.even(kv_len * 3);
            let bias = vec![common; kv_len];
            let inputs = AttentionInputs {
                terms: Terms { bias: Some((&bias[..]).into()), ..Terms::default() },
                ..AttentionInputs::new(&query, &key, &value)
            };
            compare_exact(&format!("{rows} x {kv_len}, {common:e}"), &problem, &inputs);
            let state = attention(&problem, &inputs).unwrap().row_state.unwrap();
            let wanted = WeightsProblem::new(&problem, &WeightsSpec::default()).unwrap();
            let chosen = weights(&wanted, &inputs, &state).unwrap();
            for (row, weights) in chosen.chunks_exact(kv_len).enumerate() {
                let total: f64 = weights.iter().map(|&weight| f64::from(weight)).sum();
                assert!((total - 1.0).abs() <= relative(kv_len), "{rows} x {kv_len}, {common:e}, row {row}: {total}");
            }
        }
    }
}

#[test]
fn what_all_scores_share_in_the_products_changes_nothing() {
    let mut noise = Noise::new(2);
    for [rows, kv_len] in SHAPES {
        for common in [0u16, 32, 100, 200, 1000] {
            let mut spec = spec(rows, kv_len, 5, 3);
            // scores are halves of whole numbers up to 10^6
            spec.scale = Some(0.5);
            let problem = AttentionProblem::new(spec).unwrap();
            let (mut query, mut key) = (noise.whole(rows * 5, 2), noise.whole(kv_len * 5, 1));
            query.chunks_exact_mut(5).for_each(|row| row[4] = f32::from(common));
            key.chunks_exact_mut(5).for_each(|row| row[4] = f32::from(common));
            let value = noise.even(kv_len * 3);
            compare_exact(
                &format!("{rows} x {kv_len}, {common}"),
                &problem,
                &AttentionInputs::new(&query, &key, &value),
            );
        }
    }
}

#[test]
fn a_row_of_padding_and_a_sink() {
    let mut noise = Noise::new(3);
    for padding in [-1e4, -1e9, f32::MIN] {
        for [rows, kv_len] in SHAPES {
            let mut spec = spec(rows, kv_len, 4, 2);
            spec.scale = Some(1.0);
            spec.bias = Some(TensorSpec::f32(Layout::bhld([1, 1, rows, kv_len])));
            spec.sinks = kv_len % 2 == 0;
            let problem = AttentionProblem::new(spec).unwrap();
            let query = vec![0.0; rows * 4];
            let (key, value) = (noise.whole(kv_len * 4, 1), noise.even(kv_len * 2));
            // half of the keys of each row, and all of some rows
            let bias: Vec<f32> = (0..rows * kv_len)
                .map(
                    |n| if (n / kv_len).is_multiple_of(3) || noise.0.u64(..).is_multiple_of(2) { padding } else { 0.0 },
                )
                .collect();
            let sinks = [if rows.is_multiple_of(2) { padding } else { 1.0 }];
            let inputs = AttentionInputs {
                terms: Terms {
                    bias: Some((&bias[..]).into()),
                    sinks: problem.spec().sinks.then_some(&sinks[..]),
                    ..Terms::default()
                },
                ..AttentionInputs::new(&query, &key, &value)
            };
            compare_exact(&format!("{rows} x {kv_len}, {padding:e}"), &problem, &inputs);
        }
    }
}

#[test]
fn values_near_the_end_of_the_range_stay_in_it() {
    let mut noise = Noise::new(4);
    for [rows, kv_len] in SHAPES.into_iter().chain([[1, 40], [3, 40], [64, 40]]) {
        let mut spec = spec(rows, kv_len, 4, 3);
        spec.scale = Some(0.25);
        let problem = AttentionProblem::new(spec).unwrap();
        let (query, key) = (noise.whole(rows * 4, 1), noise.whole(kv_len * 4, 1));
        let value: Vec<f32> = noise.even(kv_len * 3).iter().map(|x| x.signum() * 3e38).collect();
        let same = vec![3e38; kv_len * 3];
        for value in [&value, &same] {
            compare_exact(&format!("{rows} x {kv_len}"), &problem, &AttentionInputs::new(&query, &key, value));
        }
    }
}

#[test]
fn a_far_position_is_rounded_once() {
    for offset in [1 << 24, (1 << 25) + 3, (1 << 29) + 77, -(1 << 25) - 5] {
        for rows in [1, 9, 40] {
            let mut spec = spec(rows, 300, 4, 2);
            (spec.alibi_slopes, spec.offset) = (Some(AlibiSlopes::PerHead), Some(Diagonal::Fixed(offset)));
            let problem = AttentionProblem::new(spec).unwrap();
            let (query, key, value) = (vec![0.0f32; rows * 4], vec![0.0f32; 1200], Noise::new(5).even(600));
            for slope in [1.0, 0.3, -0.7] {
                let slopes = [slope];
                let inputs = AttentionInputs {
                    terms: Terms { alibi_slopes: Some(&slopes), ..Terms::default() },
                    ..AttentionInputs::new(&query, &key, &value)
                };
                for (way, got) in all_ways(&problem, &inputs) {
                    for (i, &lse) in got.lse.unwrap().iter().enumerate() {
                        let want = reference::row(&problem, &inputs, 0, 0, i).lse;
                        // the distance and the product round in each score, and the sum of a maximum and a logarithm
                        let allowed = 3.5 * U * want.abs();
                        let message = format!("{way}, {offset}, {slope}, row {i}: {lse}, not {want}");
                        assert!((f64::from(lse) - want).abs() <= allowed, "{message}");
                    }
                }
            }
        }
    }
}

/// The direct algorithm in f32 with one sum a dot product, as a row of outputs.
fn direct(query: &[f32], key: &[f32], value: &[f32], dim: usize) -> Vec<f32> {
    let scale = 1.0 / (dim as f32).sqrt();
    let dots = key.chunks_exact(dim).map(|key| query.iter().zip(key).fold(0.0f32, |sum, (q, k)| sum + q * k) * scale);
    let scores: Vec<f32> = dots.collect();
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f32 = weights.iter().sum();
    let width = value.len() / scores.len();
    let column = |d| weights.iter().zip(value.iter().skip(d).step_by(width)).map(|(w, v)| w / sum * v).sum();
    (0..width).map(column).collect()
}

#[test]
fn wide_heads_round_less_than_one_long_sum() {
    for (dim, kv_len) in [(224, 48), (258, 48), (512, 48), (224, 12), (512, 12)] {
        let (rows, v_dim) = (64, 8);
        let mut noise = Noise::new(6);
        // products that are mostly positive: logits of about 40
        let size = (40.0 * 4.0 / (dim as f32).sqrt()).sqrt();
        let mut sized = |len| noise.even(len).iter().map(|x| size * (0.5 + 0.5 * x)).collect::<Vec<f32>>();
        let (query, key) = (sized(rows * dim), sized(kv_len * dim));
        let value = noise.even(kv_len * v_dim);
        let mut spec = spec(rows, kv_len, dim, v_dim);
        (spec.scores, spec.row_state) = (None, false);
        let problem = AttentionProblem::new(spec).unwrap();
        let inputs = AttentionInputs::new(&query, &key, &value);
        let want = reference::attention(&problem, &inputs).unwrap();
        let rms = |got: &[f32]| {
            let squares = got.iter().zip(&want.output).map(|(&got, want)| (f64::from(got) - want).powi(2));
            (squares.sum::<f64>() / want.output.len() as f64).sqrt()
        };
        let one_sum: Vec<f32> = query.chunks_exact(dim).flat_map(|query| direct(query, &key, &value, dim)).collect();
        for (way, got) in all_ways(&problem, &inputs) {
            let (blocks, one_sum) = (rms(&got.output.to_f32()), rms(&one_sum));
            assert!(blocks < 0.75 * one_sum, "{way}, {dim} x {kv_len}: {blocks:.2e}, one long sum {one_sum:.2e}");
        }
    }
}

#[test]
fn any_stride_will_do_on_an_axis_of_one() {
    let far = usize::MAX / 2 + 1;
    for dim in [1, 5, 40] {
        let layout = Layout { strides: [far, far, far, 1], ..Layout::bhld([1, 1, 1, dim]) };
        let mut spec =
            AttentionSpec::from_tensors(TensorSpec::f32(layout), TensorSpec::f32(layout), TensorSpec::f32(layout));
        let single = Layout { strides: [far; 4], ..Layout::bhld([1; 4]) };
        (spec.bias, spec.mask) = (Some(TensorSpec::f32(single)), Some(single));
        let problem = AttentionProblem::new(spec).unwrap();
        let data = vec![0.5f32; dim];
        let inputs = AttentionInputs {
            terms: Terms { bias: Some((&[1.0f32][..]).into()), mask: Some(&[true]), ..Terms::default() },
            ..AttentionInputs::new(&data, &data, &data)
        };
        for (way, got) in all_ways(&problem, &inputs) {
            assert_eq!(got.output.to_f32()[..dim], data, "{way}");
        }
    }
}

/// Each of four terms alone and with others, on few rows and on few keys, against the oracle, at every level.
#[test]
fn terms_on_rows_as_they_are_stored() {
    let mut noise = Noise::new(7);
    for [rows, kv_len] in [[1, 5], [1, 300], [2, 130], [4, 260], [5, 1], [40, 4], [70, 16], [9, 13]] {
        for [dim, v_dim] in [[1, 3], [8, 8], [16, 16], [19, 9], [40, 40], [33, 65]] {
            for terms in 0..16u32 {
                let [softcap, bias, mask, windowed] = [0, 1, 2, 3].map(|bit| terms >> bit & 1 == 1);
                let mut spec = spec(rows, kv_len, dim, v_dim);
                (spec.scores, spec.row_state) = (None, false);
                spec.softcap = softcap.then_some(3.0);
                spec.bias = bias.then(|| TensorSpec::f32(Layout::bhld([1, 1, rows, kv_len])));
                spec.mask = mask.then(|| Layout::bhld([1, 1, rows, kv_len]));
                spec.causal = windowed.then_some(Diagonal::BottomRight);
                let problem = AttentionProblem::new(spec).unwrap();
                let (query, key) = (noise.even(rows * dim), noise.even(kv_len * dim));
                let mut value = noise.even(kv_len * v_dim);
                let bias = noise.even(rows * kv_len);
                let mask: Vec<bool> =
                    (0..rows * kv_len).map(|n| n % kv_len == 0 || !noise.0.u64(..).is_multiple_of(3)).collect();
                if mask.iter().skip(kv_len - 1).step_by(kv_len).all(|&allowed| !allowed) {
                    // nobody sees the last key, so nobody may notice
                    value[(kv_len - 1) * v_dim..].fill(f32::NAN);
                }
                let hides = problem.spec().mask.is_some();
                value.iter_mut().filter(|x| x.is_nan() && !hides).for_each(|x| *x = 1.0);
                let inputs = AttentionInputs {
                    terms: Terms {
                        bias: problem.spec().bias.is_some().then_some((&bias[..]).into()),
                        mask: hides.then_some(&mask[..]),
                        ..Terms::default()
                    },
                    ..AttentionInputs::new(&query, &key, &value)
                };
                let want = reference::attention(&problem, &inputs).unwrap();
                for (way, got) in all_ways(&problem, &inputs) {
                    let name = format!("{rows} x {kv_len}, {dim}, {v_dim}, terms {terms:04b}, {way}");
                    for (n, (got, want)) in got.output.to_f32().iter().zip(&want.output).enumerate() {
                        let off = (f64::from(*got) - want).abs();
                        assert!(off <= 2e-6, "{name}, element {n}: {got}, not {want}");
                    }
                    for (got, want) in got.lse.unwrap().iter().zip(&want.lse) {
                        assert!(
                            (f64::from(*got) - want).abs() <= 4e-6 || f64::from(*got).to_bits() == want.to_bits(),
                            "{name}: {got}, not {want}"
                        );
                    }
                }
            }
        }
    }
}
