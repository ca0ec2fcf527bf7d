//! Rows in and out of the layouts of a problem: queries turned into tiles, blocks of keys and values in f32, masks and
//! bias as one block, tiles turned back.

use half::slice::HalfFloatSliceExt;

use crate::cpu::simd::shared::RowMap;
use crate::cpu::simd::{self, Rows, SimdLevel, Strided, turn_in};
use crate::inputs::AttentionInputs;
use crate::problem::AttentionProblem;
use crate::stored::{RowPlace, StoredRows};
use crate::tensor::{TensorRef, TensorSpec};

use super::scratch::borrowed;

/// Whether some row may be kept from a key that another row of its tile sees.
pub(super) fn may_hide(problem: &AttentionProblem) -> bool {
    let spec = problem.spec();
    spec.mask.is_some() || spec.bias.is_some() || spec.kv_lens || by_position(problem)
}

fn by_position(problem: &AttentionProblem) -> bool {
    let spec = problem.spec();
    let by_diagonal = spec.causal.is_some() || spec.window_left.is_some() || spec.window_right.is_some();
    by_diagonal || spec.row_ranges || spec.q_lens
}

/// The keys that each row of a chunk may see by position: `[first, end]`, `[0, 0]` if none.
pub(super) fn fill_keys(
    problem: &AttentionProblem,
    inputs: &AttentionInputs<'_>,
    map: &RowMap,
    chunk: usize,
    keys: &mut [[usize; 2]],
) {
    if !by_position(problem) && !problem.spec().kv_lens {
        keys.fill([0, problem.kv_len()]);
        return;
    }
    for (r, keys) in keys.iter_mut().enumerate() {
        let [b, _, i] = map.place(chunk, r);
        let range = inputs.row_keys(problem, b, i);
        *keys = if range.is_empty() { [0, 0] } else { [range.start, range.end] };
    }
}

/// Keys or values of `tokens` of head `[b, h]` in f32: where they lie, or in `buffer`. There must be at least one.
pub(super) fn block<'a>(
    level: SimdLevel,
    stored: &StoredRows<'a, '_>,
    [b, h]: [usize; 2],
    tokens: std::ops::Range<usize>,
    buffer: &'a mut [f32],
) -> Strided<'a> {
    let (width, n) = (stored.width(), tokens.len());
    let [_, _, row_stride, stride] = stored.layout.strides;
    let in_one_piece = stored.in_one_piece(&tokens);
    if let (TensorRef::F32(data), true) = (stored.data, in_one_piece && (stride == 1 || width == 1)) {
        return Strided { data: &data[stored.place([b, h, tokens.start]).start..], stride: row_stride };
    }
    if in_one_piece && stride != 1 && row_stride < stride {
        // columns are closer together than rows
        for d in 0..width {
            for r in 0..n {
                buffer[r * width + d] = stored.get(stored.place([b, h, tokens.start + r]), d);
            }
        }
    } else {
        let mut rest = &mut buffer[..n * width];
        for piece in stored.pieces(tokens) {
            let (rows, behind) = rest.split_at_mut(piece.len() * width);
            load_piece(level, stored, [b, h, piece.start], rows);
            rest = behind;
        }
    }
    Strided { data: buffer, stride: width }
}

/// Rows of a block as they are stored, and what each is to be multiplied by (empty: nothing).
pub(super) struct InPlace<'a> {
    pub(super) rows: Rows<'a>,
    pub(super) scales: &'a [f32],
}

/// Scales that may go into scores and weights: from the smallest weight that counts (2^-24 of the largest, itself no less than
/// 2^-24) to the largest sum of bytes, nothing leaves the normal range of f32 that `byte * scale` would not.
const MULTIPLIED: std::ops::RangeInclusive<f32> = 1e-18..=1e18;

/// Keys or values of `tokens` of head `[b, h]` where they lie, if they lie in one piece with columns side by side and have at most
/// one scale a row. `scales` has room for one of each token.
pub(super) fn in_place<'a>(
    level: SimdLevel,
    stored: &StoredRows<'a, '_>,
    [b, h]: [usize; 2],
    tokens: std::ops::Range<usize>,
    scales: &'a mut [f32],
) -> Option<InPlace<'a>> {
    let [_, _, row_stride, stride] = stored.layout.strides;
    let one_scale = stored.scale.is_none_or(|scale| scale.block == stored.width());
    if !stored.in_one_piece(&tokens) || stride != 1 || !one_scale {
        return None;
    }
    let place = stored.place([b, h, tokens.start]);
    let scales: &[f32] = match stored.scale {
        Some(_) => {
            let scales = scales.get_mut(..tokens.len())?;
            load_scales(level, stored, place, tokens.len(), scales);
            if !scales.iter().all(|scale| MULTIPLIED.contains(&scale.abs()) || scale.abs() == 0.0) {
                return None;
            }
            scales
        }
        None => &[],
    };
    let rows = match stored.data {
        TensorRef::F32(data) => Rows::F32(Strided { data: &data[place.start..], stride: row_stride }),
        TensorRef::F16(data) => Rows::F16(Strided { data: &data[place.start..], stride: row_stride }),
        TensorRef::Bf16(data) => Rows::Bf16(Strided { data: &data[place.start..], stride: row_stride }),
        TensorRef::I8(data) => Rows::I8(Strided { data: &data[place.start..], stride: row_stride }),
    };
    Some(InPlace { rows, scales })
}

/// The rows of tokens that lie one stride apart, from one on, in f32.
fn load_piece(level: SimdLevel, stored: &StoredRows<'_, '_>, at: [usize; 3], rows: &mut [f32]) {
    let width = stored.width();
    let n = rows.len() / width.max(1);
    let place = stored.place(at);
    let [_, _, row_stride, stride] = stored.layout.strides;
    let data = stored.data;
    if n == 0 {
        return;
    }
    if stride != 1 {
        for (r, row) in rows.chunks_exact_mut(width).enumerate() {
            let place = stored.next(place, r);
            row.iter_mut().enumerate().for_each(|(d, x)| *x = stored.get(place, d));
        }
        return;
    }
    // what lies side by side is one long row
    let side_by_side = row_stride == width || n == 1;
    let [long_n, long_width] = if side_by_side { [1, n * width] } else { [n, width] };
    match data {
        TensorRef::F32(data) => {
            for (r, row) in rows.chunks_exact_mut(width).enumerate() {
                row.copy_from_slice(&data[place.start + r * row_stride..][..width]);
            }
        }
        TensorRef::F16(data) => {
            let bits = bytemuck::cast_slice(&data[place.start..]);
            simd::widen_f16(level, bits, row_stride, long_n, long_width, rows);
        }
        TensorRef::Bf16(data) => {
            let bits = bytemuck::cast_slice(&data[place.start..]);
            simd::widen_bf16(level, bits, row_stride, long_n, long_width, rows);
        }
        TensorRef::I8(data) => {
            let blocks = stored.scale.map_or(1, |scale| width / scale.block);
            let mut scales = [0.0; SCALES];
            // so many rows at once as there is room for their scales
            let most = (SCALES / blocks).max(1);
            for (part, rows) in rows.chunks_mut(most * width).enumerate() {
                let (first, n) = (part * most, rows.len() / width);
                if blocks > SCALES {
                    let place = stored.next(place, first);
                    rows.iter_mut().enumerate().for_each(|(d, x)| *x = stored.get(place, d));
                    continue;
                }
                let (place_of_first, scales) = (stored.next(place, first), &mut scales[..n * blocks]);
                load_scales(level, stored, place_of_first, n, scales);
                let bytes = &data[place.start + first * row_stride..];
                simd::widen_i8(level, bytes, row_stride, n, width, scales, width / blocks, rows);
            }
        }
    }
}

/// The scales of `n` rows of one piece in f32, those of a row side by side.
fn load_scales(level: SimdLevel, stored: &StoredRows<'_, '_>, first: RowPlace, n: usize, scales: &mut [f32]) {
    match stored.scale_run(first, scales.len()) {
        Some(TensorRef::F32(run)) => scales.copy_from_slice(run),
        Some(TensorRef::F16(run)) => {
            simd::widen_f16(level, bytemuck::cast_slice(run), 0, 1, scales.len(), scales);
        }
        _ => stored.scales(first, n, scales),
    }
}

/// Scales that are made f32 at once.
const SCALES: usize = 256;

fn load_row(data: TensorRef<'_>, start: usize, stride: usize, row: &mut [f32]) {
    match data {
        TensorRef::F32(data) if stride == 1 => row.copy_from_slice(&data[start..start + row.len()]),
        TensorRef::F16(data) if stride == 1 => data[start..start + row.len()].convert_to_f32_slice(row),
        TensorRef::Bf16(data) if stride == 1 => data[start..start + row.len()].convert_to_f32_slice(row),
        _ => row.iter_mut().enumerate().for_each(|(d, x)| *x = data.get(start + d * stride)),
    }
}

/// The rows of a tile of a tensor `[batch, q_heads, q_len, columns]` as `[columns][width]`, zero where there is no row.
#[expect(clippy::too_many_arguments, reason = "sizes and workspace")]
pub(super) fn turn_rows(
    level: SimdLevel,
    tensor: &TensorSpec,
    data: TensorRef<'_>,
    places: impl Fn(usize) -> [usize; 3],
    rows: usize,
    width: usize,
    out: &mut [f32],
    lines: &mut [f32],
) {
    let dim = tensor.layout.shape[3];
    if rows < width {
        out[..dim * width].fill(0.0);
    }
    // rows of one head, as most tiles have them, are a stride apart
    let [b, h, i] = places(0);
    let (origin, stride) = (tensor.layout.index([b, h, i, 0]), tensor.layout.strides[2]);
    let one_head = places(rows - 1) == [b, h, i + rows - 1];
    for first in (0..rows).step_by(4) {
        let n = 4.min(rows - first);
        let start = |r: usize| {
            if one_head {
                return origin + (first + r) * stride;
            }
            let [b, h, i] = places(first + r);
            tensor.layout.index([b, h, i, 0])
        };
        if let (TensorRef::F32(data), true, 4) = (data, borrowed(tensor), n) {
            turn_in(level, [0, 1, 2, 3].map(|r| &data[start(r)..][..dim]), width, first, out);
            continue;
        }
        for (r, line) in lines.chunks_exact_mut(dim).take(n).enumerate() {
            load_row(data, start(r), tensor.layout.strides[3], line);
        }
        turn_lines(level, lines, dim, n, width, first, out);
    }
}

/// Rows of such a tensor as they are, `[row][columns]`.
pub(super) fn copy_rows(
    tensor: &TensorSpec,
    data: TensorRef<'_>,
    places: impl Fn(usize) -> [usize; 3],
    rows: usize,
    out: &mut [f32],
) {
    let layout = &tensor.layout;
    for (r, row) in out.chunks_exact_mut(layout.shape[3]).take(rows).enumerate() {
        let [b, h, i] = places(r);
        load_row(data, layout.index([b, h, i, 0]), layout.strides[3], row);
    }
}

/// Rows of such a tensor, at least one, where they lie, if they lie one stride apart and are f32.
pub(super) fn rows_in_place<'a>(
    tensor: &TensorSpec,
    data: TensorRef<'a>,
    places: impl Fn(usize) -> [usize; 3],
    rows: usize,
) -> Option<Strided<'a>> {
    let [b, h, i] = places(0);
    match data {
        TensorRef::F32(data) if borrowed(tensor) && places(rows - 1) == [b, h, i + rows - 1] => {
            Some(Strided { data: &data[tensor.layout.index([b, h, i, 0])..], stride: tensor.layout.strides[2] })
        }
        _ => None,
    }
}

/// Rows of such a tensor where they lie, or as they are in `buffer`.
pub(super) fn rows_of<'a>(
    tensor: &TensorSpec,
    data: TensorRef<'a>,
    places: impl Fn(usize) -> [usize; 3],
    rows: usize,
    buffer: &'a mut [f32],
) -> Strided<'a> {
    if let Some(rows) = rows_in_place(tensor, data, &places, rows) {
        return rows;
    }
    copy_rows(tensor, data, places, rows, buffer);
    Strided { data: buffer, stride: tensor.layout.shape[3] }
}

/// Turns the first `n` of four lines of `len` into lanes `lane..lane + n` of `out`.
fn turn_lines(level: SimdLevel, lines: &[f32], len: usize, n: usize, width: usize, lane: usize, out: &mut [f32]) {
    if n == 4 {
        turn_in(level, [0, 1, 2, 3].map(|r| &lines[r * len..][..len]), width, lane, out);
        return;
    }
    for (r, line) in lines.chunks_exact(len).take(n).enumerate() {
        for (d, &x) in line.iter().enumerate() {
            out[d * width + lane + r] = x;
        }
    }
}

/// Most rows of a tile: four vectors of 16 lanes.
const MAX_TILE_ROWS: usize = 64;

/// What masks and bias leave of a block of keys for the rows of a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    Nothing,
    Everything,
    /// What is added is the same for all rows.
    Alike,
    Some,
    /// Nothing is added, and `bits[key]` has a bit for each row that sees it.
    Bits,
}

/// Compares boolean mask and bias of keys `keys` for rows at `places`. With `Some`, `extra[key][row]` holds what is
/// added to the scores, with `Alike` `extra[key]`; negative infinity where the key is forbidden.
#[expect(clippy::too_many_arguments, reason = "sizes and workspace")]
pub(super) fn fill_extra(
    level: SimdLevel,
    problem: &AttentionProblem,
    inputs: &AttentionInputs<'_>,
    places: impl Fn(usize) -> [usize; 3],
    rows: usize,
    keys: std::ops::Range<usize>,
    width: usize,
    extra: &mut [f32],
    bits: &mut [u64],
    lines: &mut [f32],
) -> Seen {
    let spec = problem.spec();
    let mask = inputs.terms.mask.zip(spec.mask.as_ref());
    let bias = inputs.terms.bias.zip(spec.bias.as_ref());
    if mask.is_none() && bias.is_none() {
        return Seen::Everything;
    }
    let mut of_rows = [[0; 2]; MAX_TILE_ROWS];
    for (r, of_row) in of_rows.iter_mut().enumerate().take(rows) {
        let [b, h, i] = places(r);
        let at = [b, h, i, keys.start];
        *of_row = [mask.map_or(0, |(_, layout)| layout.index(at)), bias.map_or(0, |(_, bias)| bias.layout.index(at))];
    }
    let starts = |r: usize| of_rows[r];
    let n = keys.len();
    let first = starts(0);
    let same = of_rows[..rows].iter().all(|start| *start == first);
    if let (Some((mask, layout)), None, false) = (mask, bias, same)
        && layout.strides[3] == 1
    {
        return mask_bits(level, mask, of_rows.map(|[start, _]| start), rows, &mut bits[..n]);
    }
    if let Some((mask, layout)) = mask {
        let (mut any, mut all, mut last) = (false, true, usize::MAX);
        for r in 0..rows {
            let [start, _] = starts(r);
            if start != last {
                let (row_any, row_all) = any_and_all(level, mask, start, layout.strides[3], n);
                (any, all, last) = (any | row_any, all & row_all, start);
                if layout.strides[3] == 1 {
                    // the next block of keys of the row: rows are far apart, and no processor guesses that
                    simd::ask_for(level, bytemuck::cast_slice(behind(mask, start + n, n)));
                }
            }
        }
        if !any {
            return Seen::Nothing;
        }
        if all && bias.is_none() {
            return Seen::Everything;
        }
    }

    let fill = |r: usize, line: &mut [f32]| {
        let [mask_start, bias_start] = starts(r);
        match (bias, mask) {
            (Some((data, bias)), _) => load_row(data, bias_start, bias.layout.strides[3], line),
            (None, Some((mask, layout))) if layout.strides[3] == 1 => {
                simd::permit(level, &mask[mask_start..][..line.len()], line);
                return;
            }
            (None, _) => line.fill(0.0),
        }
        if let Some((mask, layout)) = mask {
            match layout.strides[3] {
                1 => simd::forbid(level, &mask[mask_start..][..line.len()], line),
                stride => {
                    for (j, x) in line.iter_mut().enumerate() {
                        *x = if mask[mask_start + j * stride] { *x } else { f32::NEG_INFINITY };
                    }
                }
            }
        }
    };
    // rows of a bias that can be turned from where they lie
    let direct = |r: usize| match bias {
        Some((TensorRef::F32(data), bias)) if mask.is_none() && bias.layout.strides[3] == 1 => {
            Some(&data[starts(r)[1]..][..n])
        }
        _ => None,
    };
    let next = |r: usize| match bias {
        Some((TensorRef::F32(data), _)) => behind(data, starts(r)[1] + n, n),
        _ => &[],
    };
    if same {
        fill(0, &mut extra[..n]);
        return Seen::Alike;
    }
    for first in (0..rows).step_by(4) {
        let count = 4.min(rows - first);
        if let (4, Some(_)) = (count, direct(first)) {
            turn_in(level, [0, 1, 2, 3].map(|r| direct(first + r).unwrap_or_default()), width, first, extra);
            // as for a mask
            for r in first..first + 4 {
                simd::ask_for(level, bytemuck::cast_slice(next(r)));
            }
            continue;
        }
        for (r, line) in lines.chunks_exact_mut(n).take(count).enumerate() {
            fill(first + r, line);
        }
        turn_lines(level, lines, n, count, width, first, extra);
    }
    Seen::Some
}

/// [`fill_extra`] for a boolean mask alone.
fn mask_bits(level: SimdLevel, mask: &[bool], starts: [usize; MAX_TILE_ROWS], rows: usize, bits: &mut [u64]) -> Seen {
    let n = bits.len();
    let starts = &starts[..rows];
    simd::row_bits(level, mask, starts, bits);
    let mut last = usize::MAX;
    for &start in starts {
        if start != last {
            // the next block of keys of the row: rows are far apart, and no processor guesses that
            simd::ask_for(level, bytemuck::cast_slice(behind(mask, start + n, n)));
        }
        last = start;
    }
    let every = u64::MAX >> (64 - rows);
    match bits.iter().fold((0, every), |(any, all), &bits| (any | bits, all & bits)) {
        (0, _) => Seen::Nothing,
        (_, all) if all == every => Seen::Everything,
        _ => Seen::Bits,
    }
}

/// Up to `n` elements from `start` on, as far as there are any.
fn behind<T>(data: &[T], start: usize, n: usize) -> &[T] {
    let start = start.min(data.len());
    &data[start..(start + n).min(data.len())]
}

fn any_and_all(level: SimdLevel, mask: &[bool], start: usize, stride: usize, n: usize) -> (bool, bool) {
    match stride {
        0 => (mask[start], mask[start]),
        1 => {
            let allowed = simd::count(level, &mask[start..][..n]);
            (allowed > 0, allowed == n)
        }
        _ => (0..n).fold((false, true), |(any, all), j| {
            let m = mask[start + j * stride];
            (any | m, all & m)
        }),
    }
}
