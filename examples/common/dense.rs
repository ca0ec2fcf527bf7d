//! What a transformer needs beside attention, in plain code: `[rows, width]` matrices as slices.

#![allow(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]

use rayon::prelude::*;

use super::tensors::Tensors;
use crate::flags::Failure;

/// `y = x W^T + b`, weights `[out, in]`.
pub(crate) struct Linear {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl Linear {
    /// `NAME/weight` and `NAME/bias`, or with a dot between.
    pub(crate) fn open(file: &Tensors, name: &str, separator: char) -> Result<Self, Failure> {
        let of = |what: &str| file.f32(&format!("{name}{separator}{what}"));
        Ok(Self { weight: of("weight")?, bias: of("bias")? })
    }

    pub(crate) fn apply(&self, x: &[f32]) -> Vec<f32> {
        let out = self.bias.len();
        let width = self.weight.len() / out;
        let rows = x.len() / width;
        let mut y = self.bias.repeat(rows);
        product(rows, width, out, x, &self.weight, &mut y);
        y
    }
}

/// `y[m][n] += x[m][k] w[n][k]`.
pub(crate) fn product(m: usize, k: usize, n: usize, x: &[f32], w: &[f32], y: &mut [f32]) {
    assert!(x.len() >= m * k && w.len() >= n * k && y.len() >= m * n);
    y.par_chunks_exact_mut(n).zip(x.par_chunks_exact(k)).take(m).for_each(|(y, x)| {
        for (y, w) in y.iter_mut().zip(w.chunks_exact(k)) {
            let mut sums = [0.0f32; 16];
            let ((x, x_rest), (w, w_rest)) = (x.as_chunks::<16>(), w.as_chunks::<16>());
            for (x, w) in x.iter().zip(w) {
                for lane in 0..16 {
                    sums[lane] += x[lane] * w[lane];
                }
            }
            *y += sums.iter().sum::<f32>() + x_rest.iter().zip(w_rest).map(|(x, w)| x * w).sum::<f32>();
        }
    });
}

/// Normalises each row to mean 0 and variance 1, then scales and shifts.
pub(crate) struct LayerNorm {
    gamma: Vec<f32>,
    beta: Vec<f32>,
}

impl LayerNorm {
    pub(crate) fn open(file: &Tensors, gamma: &str, beta: &str) -> Result<Self, Failure> {
        Ok(Self { gamma: file.f32(gamma)?, beta: file.f32(beta)? })
    }

    pub(crate) fn apply(&self, x: &[f32]) -> Vec<f32> {
        let width = self.gamma.len();
        let mut y = Vec::with_capacity(x.len());
        for row in x.chunks_exact(width) {
            let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / width as f64;
            let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / width as f64;
            let by = 1.0 / (variance + 1e-5).sqrt();
            for (d, &x) in row.iter().enumerate() {
                y.push(((f64::from(x) - mean) * by) as f32 * self.gamma[d] + self.beta[d]);
            }
        }
        y
    }
}

/// `x += y`.
pub(crate) fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// Index of the largest.
pub(crate) fn largest(x: &[f32]) -> usize {
    (0..x.len()).fold(0, |best, i| if x[i] > x[best] { i } else { best })
}
