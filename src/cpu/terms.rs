//! What bears on the scores of one row in f32: its keys, masks, and the terms of a score.

use std::ops::Range;

use crate::inputs::AttentionInputs;
use crate::problem::AttentionProblem;
use crate::tensor::TensorRef;

/// Masks and score terms of row `[b, h, i]`.
pub(super) struct RowTerms<'a> {
    /// The keys left by key length, causal mask, window and row range.
    pub(super) keys: Range<usize>,
    scale: f32,
    softcap: Option<f32>,
    /// data, position of key 0, stride of keys
    bias: Option<(TensorRef<'a>, usize, usize)>,
    mask: Option<(&'a [bool], usize, usize)>,
    slope: Option<f32>,
    /// `i + offset`
    diagonal: i64,
}

impl<'a> RowTerms<'a> {
    pub(super) fn new(problem: &AttentionProblem, inputs: &AttentionInputs<'a>, [b, h, i]: [usize; 3]) -> Self {
        let spec = problem.spec();
        Self {
            keys: inputs.row_keys(problem, b, i),
            scale: problem.scale(),
            softcap: spec.softcap,
            bias: inputs.terms.bias.zip(spec.bias.as_ref()).map(|(data, bias)| {
                let layout = &bias.layout;
                (data, layout.index([b, h, i, 0]), layout.strides[3])
            }),
            mask: inputs
                .terms
                .mask
                .zip(spec.mask.as_ref())
                .map(|(data, layout)| (data, layout.index([b, h, i, 0]), layout.strides[3])),
            slope: inputs.slope(problem, b, h),
            diagonal: inputs.diagonal(problem, b, i),
        }
    }

    /// Whether the row may see a key of `self.keys`: by the boolean mask, and by a bias of -inf.
    pub(super) fn allows(&self, j: usize) -> bool {
        self.mask.is_none_or(|(mask, start, stride)| mask[start + j * stride])
            && self.bias.is_none_or(|(bias, start, stride)| bias.get(start + j * stride) != f32::NEG_INFINITY)
    }

    pub(super) fn scaled(&self, dot: f32) -> f32 {
        self.scale * dot
    }

    pub(super) fn capped(&self, dot: f32) -> f32 {
        let score = self.scaled(dot);
        self.softcap.map_or(score, |cap| cap * (score / cap).tanh())
    }

    /// The score of key `j` with all its terms.
    pub(super) fn score(&self, j: usize, dot: f32) -> f32 {
        let mut score = self.capped(dot);
        if let Some((bias, start, stride)) = self.bias {
            score += bias.get(start + j * stride);
        }
        if let Some(slope) = self.slope {
            score -= slope * (self.diagonal - j as i64).unsigned_abs() as f32;
        }
        score
    }
}
