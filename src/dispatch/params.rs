//! `Params` of the attention shaders, and what of a problem goes into it (shaders/common/params.wgsl).

use super::uniforms::uniform;
use super::{Bindings, Part, RowDataMap, RowStatsMap, Slot, Unsupported};
use crate::problem::{AlibiSlopes, AttentionProblem, Diagonal};
use crate::tensor::Element;
use crate::terms::Terms;

/// Positions within a kernel, and differences of them, stay below this in magnitude, so that sums of three fit `i32`.
const MAX_POSITION: i64 = 1 << 29;

uniform! {
    /// The uniform at binding 0 of every attention shader.
    #[doc(hidden)]
    pub struct Params {
        query_strides: [u32; 4],
        key_strides: [u32; 4],
        value_strides: [u32; 4],
        output_strides: [u32; 4],
        bias_strides: [u32; 4],
        mask_strides: [u32; 4],
        scores_strides: [u32; 4],
        key_scale_strides: [u32; 4],
        value_scale_strides: [u32; 4],
        d_output_strides: [u32; 4],
        query_offset: u32,
        key_offset: u32,
        value_offset: u32,
        output_offset: u32,
        bias_offset: u32,
        mask_offset: u32,
        scores_offset: u32,
        lse_offset: u32,
        lse_strides: [u32; 2],
        row_stats_strides: [u32; 2],
        batch_base: u32,
        head_base: u32,
        row_base: u32,
        key_base: u32,
        batch: u32,
        q_len: u32,
        kv_len: u32,
        q_len_whole: u32,
        kv_len_whole: u32,
        group_size: u32,
        begin_shift: i32,
        end_shift: i32,
        diagonal_shift: i32,
        kv_lens_at: u32,
        row_start_at: u32,
        row_end_at: u32,
        alibi_at: u32,
        sinks_at: u32,
        scale: f32,
        exponent_scale: f32,
        softcap: f32,
        negative_infinity: f32,
        headroom: f32,
        headroom_inverse: f32,
        splits: u32,
        alibi_batch_stride: u32,
        key_scale_offset: u32,
        value_scale_offset: u32,
        block_table_at: u32,
        table_len: u32,
        page_shift: u32,
        last_page: u32,
        d_output_offset: u32,
        d_lse_offset: u32,
        row_stats_at: u32,
        chosen_at: u32,
        accumulate: u32,
    }
    padded by 3
}

impl Params {
    /// The parameters of one dispatch over `part`, whose buffers are bound as `bindings` says.
    pub(crate) fn new(problem: &AttentionProblem, part: &Part, bindings: &Bindings<'_>) -> Self {
        let spec = problem.spec();
        let Terms { kv_lens, row_start, row_end, alibi_slopes, sinks, block_table, .. } = RowDataMap::new(problem).at;
        let [pages, _, page_len, _] = if spec.paged.is_some() { spec.key.layout.shape } else { [1; 4] };
        let shifts = Shifts::new(problem);
        let mut params = Self {
            batch_base: narrow(part.batch.start),
            head_base: narrow(part.heads.start),
            row_base: narrow(part.rows.start),
            key_base: narrow(part.keys.start),
            batch: narrow(part.batch.len()),
            q_len: narrow(part.rows.len()),
            kv_len: narrow(part.keys.len()),
            q_len_whole: narrow(problem.q_len()),
            kv_len_whole: narrow(problem.kv_len()),
            group_size: narrow(problem.group_size()),
            begin_shift: shifts.begin,
            end_shift: shifts.end,
            diagonal_shift: shifts.diagonal,
            kv_lens_at: kv_lens.unwrap_or(0),
            row_start_at: row_start.unwrap_or(0),
            row_end_at: row_end.unwrap_or(0),
            alibi_at: alibi_slopes.unwrap_or(0),
            sinks_at: sinks.unwrap_or(0),
            scale: problem.scale(),
            exponent_scale: problem.exponent_scale().unwrap_or(0.0),
            softcap: spec.softcap.unwrap_or(0.0),
            negative_infinity: f32::NEG_INFINITY,
            headroom: 1.0,
            headroom_inverse: 1.0,
            splits: 1,
            alibi_batch_stride: match spec.alibi_slopes {
                Some(AlibiSlopes::PerBatchAndHead) => narrow(problem.q_heads()),
                Some(AlibiSlopes::PerHead) | None => 0,
            },
            block_table_at: block_table.unwrap_or(0),
            table_len: spec.paged.map_or(0, |paged| narrow(paged.table_len)),
            // a single page may be of any length: its number is 0
            page_shift: if spec.paged.is_some_and(|paged| paged.table_len == 1) { 31 } else { page_len.max(1).ilog2() },
            last_page: narrow(pages.max(1) - 1),
            ..Self::default()
        };
        for binding in bindings.iter() {
            let strides = binding.strides.map(narrow);
            let offset = narrow(binding.offset);
            match binding.slot {
                Slot::Query => (params.query_strides, params.query_offset) = (strides, offset),
                Slot::Key => (params.key_strides, params.key_offset) = (strides, offset),
                Slot::Value => (params.value_strides, params.value_offset) = (strides, offset),
                Slot::Bias => (params.bias_strides, params.bias_offset) = (strides, offset),
                Slot::Mask => (params.mask_strides, params.mask_offset) = (strides, offset),
                Slot::KeyScale => (params.key_scale_strides, params.key_scale_offset) = (strides, offset),
                Slot::ValueScale => (params.value_scale_strides, params.value_scale_offset) = (strides, offset),
                Slot::Output
                | Slot::PartOutput
                | Slot::Weights
                | Slot::DQuery
                | Slot::DKey
                | Slot::DValue
                | Slot::DBias
                | Slot::DAlibiSlopes
                | Slot::DSinks
                | Slot::DScale => (params.output_strides, params.output_offset) = (strides, offset),
                Slot::Lse | Slot::PartRowState => {
                    (params.lse_strides, params.lse_offset) = ([strides[0], strides[1]], offset);
                }
                Slot::Scores | Slot::Workspace | Slot::States | Slot::Gradients => {
                    (params.scores_strides, params.scores_offset) = (strides, offset);
                }
                Slot::DOutput => (params.d_output_strides, params.d_output_offset) = (strides, offset),
                Slot::DLse => params.d_lse_offset = offset,
                Slot::RowData | Slot::Selection | Slot::DWeights => {}
            }
        }
        params
    }

    /// The same for values that may add up to more than f32 holds.
    pub(crate) fn for_large_values(self, problem: &AttentionProblem) -> Self {
        let headroom = headroom(problem);
        Self { headroom, headroom_inverse: 1.0 / headroom, ..self }
    }

    /// Where what is known of each row and of chosen weights lies behind the row data, and whether sums are added to what is there.
    pub(crate) fn for_gradients(self, map: &RowStatsMap, part: &Part, accumulate: bool) -> Self {
        let row_stats = map.of(part);
        let [batch, heads, ..] = row_stats.strides.map(narrow);
        let (row_stats_strides, row_stats_at) = ([batch, heads], narrow(row_stats.offset));
        let (chosen_at, accumulate) = (narrow(map.chosen_at), u32::from(accumulate));
        Self { row_stats_strides, row_stats_at, chosen_at, accumulate, ..self }
    }

    /// The same over so many entries of the batch.
    pub(crate) fn with_batch(self, batch: usize) -> Self {
        Self { batch: narrow(batch), ..self }
    }

    /// Parts that the keys are split into, or states that are merged.
    pub(crate) fn with_splits(self, splits: usize) -> Self {
        Self { splits: narrow(splits), ..self }
    }
}

/// What a probability of 1 is taken for where it weighs values in f32: a power of two with which even as many values as
/// there are keys, each near f32's end, add up to a finite sum. Values in f16 cannot come near it.
fn headroom(problem: &AttentionProblem) -> f32 {
    match problem.spec().value.element {
        // powers of two up to 2^30 are exact
        Element::F32 | Element::Bf16 | Element::I8 => 1.0 / problem.kv_len().next_power_of_two() as f32,
        Element::F16 => 1.0,
    }
}

/// Lengths, offsets and strides of a bound range; a binding is at most 4 GiB, so what is really used fits. A stride
/// that does not is one of an axis of length 1, never stepped along.
fn narrow(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// Causal mask and windows as the interval `i + begin ..  i + end` of keys of row `i`; with
/// [`Diagonal::EndOfKeys`] the number of keys of the batch entry comes on top, less that of its rows.
struct Shifts {
    begin: i32,
    end: i32,
    diagonal: i32,
}

impl Shifts {
    fn new(problem: &AttentionProblem) -> Self {
        let spec = problem.spec();
        let diagonal = diagonal_shift(problem);
        let begin = spec.window_left.map_or(-MAX_POSITION, |left| diagonal - i64::from(left));
        let mut end = spec.window_right.map_or(MAX_POSITION, |right| diagonal + i64::from(right) + 1);
        if spec.causal.is_some() {
            end = end.min(diagonal + 1);
        }
        // positions are below MAX_POSITION, so a shift beyond it means what the same shift cut to it means
        Self { begin: within(begin), end: within(end), diagonal: within(diagonal) }
    }
}

fn diagonal_shift(problem: &AttentionProblem) -> i64 {
    match problem.diagonal() {
        // the kernel adds the batch entry's keys and takes off its rows itself
        Diagonal::EndOfKeys => 0,
        Diagonal::TopLeft | Diagonal::BottomRight | Diagonal::Fixed(_) => {
            problem.offset(problem.q_len(), problem.kv_len())
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "cut to MAX_POSITION")]
fn within(shift: i64) -> i32 {
    shift.clamp(-MAX_POSITION, MAX_POSITION) as i32
}

/// Whether all positions fit the kernels' integers.
pub(crate) fn supports(problem: &AttentionProblem) -> Result<(), Unsupported> {
    if problem.scale().is_subnormal() {
        return Err(Unsupported::SmallScale { found: format!("{:e}", problem.scale()) });
    }
    let positions = problem.q_len() as i64 + problem.kv_len() as i64;
    if positions >= MAX_POSITION {
        return Err(Unsupported::Positions { name: "q_len + kv_len", found: positions, max: MAX_POSITION - 1 });
    }
    let diagonal = diagonal_shift(problem);
    if problem.spec().alibi_slopes.is_some() && diagonal.abs() >= MAX_POSITION {
        return Err(Unsupported::Positions { name: "offset", found: diagonal, max: MAX_POSITION - 1 });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::AttentionSpec;
    use crate::tensor::Layout;

    /// The shifts, as keys.wgsl adds them up, against the intervals of the problem.
    #[test]
    fn shifts_leave_each_row_its_keys() {
        let (q_len, kv_len) = (7usize, 11usize);
        let diagonals = [
            Diagonal::TopLeft,
            Diagonal::BottomRight,
            Diagonal::EndOfKeys,
            Diagonal::Fixed(-3),
            Diagonal::Fixed(i32::MAX),
            Diagonal::Fixed(i32::MIN),
        ];
        let windows = [None, Some(0), Some(4), Some(u32::MAX)];
        for diagonal in diagonals {
            for (left, right) in windows.iter().flat_map(|left| windows.map(|right| (*left, right))) {
                for causal in [false, true] {
                    let mut spec = AttentionSpec::new([1, 1, q_len, 8], [1, 1, kv_len, 8]);
                    (spec.window_left, spec.window_right, spec.kv_lens) = (left, right, true);
                    (spec.causal, spec.offset) = (causal.then_some(diagonal), Some(diagonal));
                    let problem = AttentionProblem::new(spec).unwrap();
                    let shifts = Shifts::new(&problem);
                    for (len, i) in [0, 4, 11].into_iter().flat_map(|len| (0..q_len).map(move |i| (len, i))) {
                        let narrow = |n: usize| i32::try_from(n).unwrap();
                        let from_end = if diagonal == Diagonal::EndOfKeys { narrow(len) - narrow(q_len) } else { 0 };
                        let position = narrow(i) + from_end;
                        let end = (position.checked_add(shifts.end).unwrap()).clamp(0, i32::try_from(len).unwrap());
                        let begin = position.checked_add(shifts.begin).unwrap().max(0).min(end);
                        let wanted = problem.row_keys(i, q_len, len);
                        let found = usize::try_from(begin).unwrap()..usize::try_from(end).unwrap();
                        // where there are none, it does not matter where
                        let same = found == wanted || found.is_empty() && wanted.is_empty();
                        assert!(same, "{found:?} for {wanted:?}: row {i} of {len} keys, {:?}", problem.spec());
                    }
                }
            }
        }
    }

    /// Multiplying by it and back is exact, and as many of it as there are keys are at most 1.
    #[test]
    fn headroom_is_a_power_of_two() {
        for kv_len in [0, 1, 2, 3, 77, 1500, 1 << 20] {
            let problem = AttentionProblem::new(AttentionSpec::new([1, 1, 2, 8], [1, 1, kv_len, 8])).unwrap();
            let part = Part::whole(&problem);
            let bindings = Bindings::new(&problem, &part, &crate::caps::DeviceCaps::webgpu_defaults());
            let Params { headroom, headroom_inverse, .. } =
                Params::new(&problem, &part, &bindings).for_large_values(&problem);
            assert!((headroom.to_bits() & 0x7f_ffff) == 0 && headroom * kv_len as f32 <= 1.0, "{kv_len}: {headroom}");
            assert_eq!((headroom * headroom_inverse).to_bits(), 1.0f32.to_bits(), "{kv_len}");
        }
    }

    #[test]
    fn positions_end_where_the_kernels_integers_do() {
        let of = |kv_len| {
            // one key, said to be as many
            let mut spec = AttentionSpec::new([1, 1, 1, 4], [1, 1, kv_len, 4]);
            for tensor in [&mut spec.key, &mut spec.value] {
                tensor.layout = Layout { strides: [0, 0, 0, 1], ..tensor.layout };
            }
            supports(&AttentionProblem::new(spec).unwrap())
        };
        let most = usize::try_from(MAX_POSITION).unwrap();
        assert_eq!(of(most - 2), Ok(()));
        assert!(matches!(of(most - 1), Err(Unsupported::Positions { name: "q_len + kv_len", .. })));
    }
}
