//! What bears on the scores of one row in f32: its keys, masks, and the terms of a score.

use std::ops::Range;

use crate::inputs::AttentionInputs;
use crate::problem::AttentionProblem;
use crate::tensor::{Layout, TensorRef};

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
        let kv_len = inputs.kv_len(problem, b);
        let mut keys = problem.row_keys(i, kv_len);
        let row = b * problem.q_len() + i;
        if let Some(start) = inputs.row_start {
            keys.start = keys.start.max(clamped(start[row]));
        }
        if let Some(end) = inputs.row_end {
            keys.end = keys.end.min(clamped(end[row]));
        }
        keys.end = keys.end.max(keys.start);
        Self {
            keys,
            scale: problem.scale(),
            softcap: spec.softcap,
            bias: inputs.bias.zip(spec.bias.as_ref()).map(|(data, bias)| {
                let layout = &bias.layout;
                (data, layout.index([b, h, i, 0]), layout.strides[3])
            }),
            mask: inputs
                .mask
                .zip(spec.mask.as_ref())
                .map(|(data, layout)| (data, layout.index([b, h, i, 0]), layout.strides[3])),
            slope: inputs.alibi_slopes.map(|slopes| slopes[h]),
            diagonal: i as i64 + problem.offset(kv_len),
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

/// Rows of a tensor in f32: borrowed where the elements of a row are neighbours and f32, else copied.
pub(super) struct Rows<'a> {
    data: &'a [f32],
    stride: usize,
    width: usize,
}

impl<'a> Rows<'a> {
    /// Rows `rows` of head `[b, h]`.
    pub(super) fn new(
        data: TensorRef<'a>,
        layout: &Layout,
        [b, h]: [usize; 2],
        rows: Range<usize>,
        scratch: &'a mut Vec<f32>,
    ) -> Self {
        let width = layout.shape[3];
        if rows.is_empty() {
            return Self { data: &[], stride: width, width };
        }
        let start = layout.index([b, h, rows.start, 0]);
        let contiguous = layout.strides[3] == 1 || width == 1;
        match data {
            TensorRef::F32(data) if contiguous => {
                return Self { data: &data[start..], stride: layout.strides[2], width };
            }
            _ => {}
        }
        scratch.resize(rows.len() * width, 0.0);
        for (n, row) in scratch.chunks_exact_mut(width).enumerate() {
            load_row(data, start + n * layout.strides[2], layout.strides[3], row);
        }
        Self { data: scratch, stride: width, width }
    }

    /// The `n`-th of the rows.
    pub(super) fn get(&self, n: usize) -> &'a [f32] {
        &self.data[n * self.stride..][..self.width]
    }
}

fn load_row(data: TensorRef<'_>, start: usize, stride: usize, row: &mut [f32]) {
    use half::slice::HalfFloatSliceExt;
    match data {
        TensorRef::F16(data) if stride == 1 => data[start..start + row.len()].convert_to_f32_slice(row),
        _ => {
            for (d, x) in row.iter_mut().enumerate() {
                *x = data.get(start + d * stride);
            }
        }
    }
}

/// A position that may lie before the first key, as an index.
fn clamped(position: i32) -> usize {
    usize::try_from(position).unwrap_or(0)
}
