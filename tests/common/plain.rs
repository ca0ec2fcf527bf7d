//! Attention of one row written out in f64, and how far f32 may be off.

/// Rounding error of one f32 operation.
const U: f64 = 1.0 / (1u64 << 24) as f64;

/// One key with its value, as one row sees it.
#[derive(Clone, Copy)]
pub(crate) struct Seen<'a> {
    pub(crate) key: &'a [f32],
    pub(crate) value: &'a [f32],
    /// Added to the score.
    pub(crate) bias: f64,
    /// Times the weight, after the softmax.
    pub(crate) after: f64,
}

/// The right answer for one row.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) output: Vec<f64>,
    pub(crate) lse: f64,
    /// What an element of the output, and the lse, may be off by when parts were merged.
    pub(crate) may: [f64; 2],
    /// The same for the row's mass, relative to it.
    pub(crate) may_mass: f64,
}

/// Scores, softmax and weighted sum, over the keys that the row sees.
///
/// An error `e` of all scores moves a weight by a factor of `exp(2 e)` at most. A dot product of `d` terms is off by
/// `sqrt(d) u sum |q k|`, and rounded again by scale, bias and the subtraction of the maximum; an exponential by
/// `3 + 2 |x|` ulp; sums over `n` keys by `sqrt(2 n) u`; a logarithm by `2^-21`. States carry maximum and sum, so a merge
/// weighs parts by two exponentials more, and an lse is rounded by `u |lse|` once, which nothing else depends on.
pub(crate) fn row(query: &[f32], keys: &[Seen<'_>], scale: f64, width: usize) -> Row {
    let dot = |key: &[f32]| {
        query.iter().zip(key).fold((0.0, 0.0), |(sum, size), (&q, &k)| {
            let product = f64::from(q) * f64::from(k);
            (sum + product, size + product.abs())
        })
    };
    let scores: Vec<f64> = keys.iter().map(|seen| scale * dot(seen.key).0 + seen.bias).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY {
        return Row { output: vec![0.0; width], lse: max, may: [0.0; 2], may_mass: 0.0 };
    }
    let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
    let lse = max + sum.ln();
    let (mut output, mut size, mut exponentials, mut dots) = (vec![0.0; width], 0.0f64, 0.0, 0.0f64);
    for (seen, score) in keys.iter().zip(&scores).filter(|(_, score)| **score > f64::NEG_INFINITY) {
        let prob = (score - max).exp() / sum;
        for (x, &value) in output.iter_mut().zip(seen.value) {
            let value = seen.after * f64::from(value);
            *x += prob * value;
            size = size.max(value.abs());
        }
        exponentials += prob * (3.0 + 2.0 * (score - max).abs()) * 2.0 * U;
        let rounded = (query.len() as f64).sqrt() * scale.abs() * dot(seen.key).1 + 4.0 * score.abs() + max.abs();
        dots = dots.max(U * rounded);
    }
    let sums = (2.0 * keys.len() as f64).sqrt() * U;
    let of_lse = dots + exponentials + sums + 2f64.powi(-21) + 4.0 * U * (lse.abs() + max.abs());
    let of_mass = 2.0 * (dots + 2.0 * exponentials + sums) + 16.0 * U;
    let may = [2.0 * of_mass * size + f64::from(f32::MIN_POSITIVE), 2.0 * of_lse];
    Row { output, lse, may, may_mass: of_mass }
}

impl Row {
    /// Compares a row's output and lse with what they should be.
    pub(crate) fn compare(&self, output: &[f32], lse: f32) -> Result<(), String> {
        let off = |got: f32, want: f64, may: f64| {
            let same = f64::from(got).to_bits() == want.to_bits();
            let near = (f64::from(got) - want).abs() <= may;
            if same || near { Ok(()) } else { Err(format!("got {got}, want {want}, may be off by {may}")) }
        };
        for (d, (&got, &want)) in output.iter().zip(&self.output).enumerate() {
            off(got, want, self.may[0]).map_err(|error| format!("output[{d}]: {error}"))?;
        }
        off(lse, self.lse, self.may[1]).map_err(|error| format!("lse: {error}"))
    }
}

/// Numbers between -size and size, the same for the same seed.
pub(crate) fn numbers(seed: u64, len: usize, size: f32) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..len).map(|_| (2.0 * random.f32() - 1.0) * size).collect()
}
