//! A linear map written out in f64, and how far f32 may be from it.

use cross_attention::TensorData;

/// Numbers from -1 to 1, the same for the same seed.
pub(crate) fn numbers(seed: u64, len: usize) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..len).map(|_| 2.0 * random.f32() - 1.0).collect()
}

/// `x W^T + b` and, for each element, the sum of the magnitudes that went into it.
pub(crate) fn exact(x: &[f64], weight: &[f64], bias: Option<&[f64]>, inner: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut y, mut magnitude) = (vec![], vec![]);
    for row in x.chunks_exact(inner) {
        for (n, column) in weight.chunks_exact(inner).enumerate() {
            let b = bias.map_or(0.0, |bias| bias[n]);
            y.push(row.iter().zip(column).map(|(x, w)| x * w).sum::<f64>() + b);
            magnitude.push(row.iter().zip(column).map(|(x, w)| (x * w).abs()).sum::<f64>() + b.abs());
        }
    }
    (y, magnitude)
}

pub(crate) fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Each sum of `roundings` roundings one upon another is off by at most that many times epsilon of the magnitudes.
pub(crate) fn compare(
    found: &[f32],
    x: &TensorData,
    weight: &TensorData,
    bias: Option<&[f32]>,
    inner: usize,
    roundings: usize,
) -> Result<(), String> {
    let bias = bias.map(wide);
    let (y, magnitude) = exact(&wide(&x.to_f32()), &wide(&weight.to_f32()), bias.as_deref(), inner);
    if found.len() != y.len() {
        return Err(format!("{} elements, not {}", found.len(), y.len()));
    }
    for (n, ((&found, want), magnitude)) in found.iter().zip(&y).zip(&magnitude).enumerate() {
        let bound = roundings as f64 * f64::from(f32::EPSILON) * magnitude;
        let off = (f64::from(found) - want).abs();
        if off.is_nan() || off > bound {
            return Err(format!("element {n} is {found}, not {want}: off by {off:e}, allowed {bound:e}"));
        }
    }
    Ok(())
}
