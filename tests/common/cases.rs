//! The case table: every implementation runs every case.
//!
//! The fused kernels walk keys in blocks of 64 and rows in groups of up to 16, so lengths sit around those.
//! Heads are `[q_heads, kv_heads]`, lengths `[q_len, kv_len]`, widths `[head_dim, v_head_dim]`.

use cross_attention::Diagonal::{BottomRight, EndOfKeys, Fixed, TopLeft};
use cross_attention::Element::{Bf16, F16, F32};
use cross_attention::{Diagonal, Layout, ScoreStage};

use super::case::{Case, arranged};
use super::pairs;
use super::recipe::{Ranges, Scores, Tensor};

pub(crate) fn all() -> Vec<Case> {
    let families = [
        lengths(),
        heads(),
        widths(),
        layouts(),
        beams(),
        numbers(),
        biases(),
        masks(),
        diagonals(),
        windows(),
        storage(),
        bfloats(),
        bytes(),
        pages(),
        extremes(),
        long_keys(),
        padding(),
        common_parts(),
        near_the_end(),
        wide_heads(),
        not_a_number(),
        poisoned(),
        scores(),
        pairs::cases(),
    ];
    families.into_iter().flatten().collect()
}

fn lengths() -> Vec<Case> {
    let mut cases = Vec::new();
    for kv_len in [1, 15, 16, 17, 63, 64, 65, 127, 128, 129] {
        let guards = "the last block of keys, full, short by one and over by one";
        cases.push(Case::new(format!("kv_len_{kv_len}"), guards, 1, [2, 2], [3, kv_len], [8, 8]));
    }
    for q_len in [1, 2, 4, 5, 7, 8, 9, 15, 16, 17, 33, 65] {
        let guards = "the last group of rows, full, short by one and over by one";
        cases.push(Case::new(format!("q_len_{q_len}"), guards, 1, [2, 1], [q_len, 20], [8, 8]));
    }
    let case = Case::new;
    cases.extend([
        case("one_by_one", "one row, one key, one element", 1, [1, 1], [1, 1], [1, 1]),
        case("q_longer_than_kv", "more rows than keys", 2, [2, 2], [33, 5], [16, 16]),
        case("q_longer_bottom_right", "leading rows see nothing", 1, [2, 2], [33, 5], [8, 8]).causal(BottomRight),
        case("long_decode", "one row over many blocks", 1, [4, 2], [1, 1000], [64, 64]),
        case(
            "longer_than_loops",
            "more keys than llvmpipe lets loops of an invocation run, which it leaves without a word",
            1,
            [1, 1],
            [1, 600_000],
            [1, 1],
        ),
        case("wide_batch", "more batch entries and heads than rows", 37, [6, 3], [2, 5], [8, 8]),
        case("no_queries", "an empty output", 2, [2, 2], [0, 5], [8, 8]),
        case("no_batch", "an empty output", 0, [2, 2], [3, 5], [8, 8]),
        case("no_keys", "rows of zeros", 2, [2, 2], [3, 0], [8, 8]),
        case("no_keys_f16", "rows of zeros in f16, an odd number of them", 1, [1, 1], [3, 0], [5, 5]).f16(),
        case("no_keys_sinks", "zeros and lse = sink", 1, [3, 3], [3, 0], [8, 8]).sinks(0.0),
        case("no_keys_wild_sinks", "zeros and lse = sink, whatever the sink", 1, [4, 4], [3, 0], [8, 8]).wild_sinks(),
        case(
            "wild_sinks_kv_lens",
            "a sink that is no number reaches the rows with keys, and no other",
            2,
            [4, 2],
            [9, 70],
            [8, 8],
        )
        .wild_sinks()
        .kv_lens(&[0, 70]),
        case("wild_sinks_decode", "the same for few rows and many keys", 2, [4, 2], [1, 300], [8, 8])
            .wild_sinks()
            .kv_lens(&[0, 300]),
        case(
            "wild_sinks_blank_rows",
            "rows that a mask leaves no key, beside rows with keys",
            1,
            [4, 4],
            [9, 70],
            [8, 8],
        )
        .wild_sinks()
        .mask("11qk")
        .blank_rows(),
        case("no_keys_all_terms", "terms with nothing to act on", 2, [2, 1], [3, 0], [8, 8])
            .bias(F32, "bhqk")
            .mask("b11k")
            .kv_lens(&[0, 0])
            .ranges(Ranges::Wild)
            .alibi()
            .causal(BottomRight)
            .scores(ScoreStage::Probs),
        case("no_queries_all_terms", "terms with nothing to act on", 2, [2, 1], [0, 3], [8, 8])
            .bias(F16, "bhqk")
            .mask("11qk")
            .kv_lens(&[2, 0])
            .ranges(Ranges::Wild)
            .sinks(0.0)
            .scores(ScoreStage::Masked),
    ]);
    cases
}

fn heads() -> Vec<Case> {
    let case = Case::new;
    vec![
        case("heads_mha", "every query head has its own keys", 2, [3, 3], [5, 19], [16, 16]),
        case("heads_gqa_of_3", "a group that is no power of two", 2, [6, 2], [5, 19], [16, 16]),
        case(
            "heads_gqa_of_8",
            "a group that fills a row block, and what heads have of their own",
            1,
            [16, 2],
            [1, 70],
            [16, 16],
        )
        .alibi()
        .sinks(0.0),
        case("heads_mqa", "all query heads share one head of keys", 2, [5, 1], [5, 19], [16, 16]),
        case("causal_gqa_odd", "a diagonal counted in rows, not in rows times heads", 3, [6, 2], [5, 19], [40, 40])
            .causal(BottomRight),
    ]
}

fn widths() -> Vec<Case> {
    let mut cases = Vec::new();
    for width in [1, 3, 5, 8, 16, 31, 40, 59, 64, 72, 80, 96, 111, 128, 160, 192, 256, 320, 576] {
        let guards = "a width, multiple of 4 or not, of the tile or not";
        cases.push(Case::new(format!("head_dim_{width}"), guards, 1, [2, 1], [3, 17], [width, width]));
    }
    for [width, v_width] in
        [[32, 160], [192, 128], [576, 512], [512, 576], [1, 7], [7, 1], [40, 64], [64, 3], [5, 320], [1, 576], [576, 1]]
    {
        let name = format!("head_dim_{width}_v_{v_width}");
        cases.push(Case::new(name, "values wider or narrower than keys", 1, [2, 1], [3, 17], [width, v_width]));
    }
    cases
}

fn layouts() -> Vec<Case> {
    type Lay = fn([usize; 4]) -> Layout;
    let case = |name: &str, guards| Case::new(name, guards, 2, [4, 2], [5, 19], [12, 20]);
    let square = |name: &str, guards| Case::new(name, guards, 2, [3, 3], [7, 7], [16, 16]);
    let offset = |by: usize| move |shape: [usize; 4]| Layout::bhld(shape).with_offset(by);
    let gaps: Lay = |shape| arranged(shape, [0, 1, 2, 3], [9, 7, 4, 0], 0);
    let spread: Lay = |shape| arranged(shape, [0, 2, 1, 3], [3, 0, 5, 1], 7);
    let columns: Lay = |shape| arranged(shape, [0, 1, 3, 2], [0, 0, 0, 0], 0);
    let batch_inside: Lay = |shape| arranged(shape, [2, 1, 3, 0], [0, 2, 0, 1], 3);
    let reused: Lay = |shape| Layout::bhld([1, shape[1], shape[2], shape[3]]);
    vec![
        case("layout_blhd", "heads inside tokens").laid([Layout::blhd; 4]),
        case("layout_bhld_to_blhd", "an output in another memory order than the query").laid([
            Layout::bhld,
            Layout::bhld,
            Layout::bhld,
            Layout::blhd,
        ]),
        square("layout_packed_qkv", "query, key and value side by side").laid([
            |shape| Layout::packed(shape, 3, 0),
            |shape| Layout::packed(shape, 3, 1),
            |shape| Layout::packed(shape, 3, 2),
            Layout::blhd,
        ]),
        square("layout_packed_kv", "key and value side by side").laid([
            Layout::blhd,
            |shape| Layout::packed(shape, 2, 0),
            |shape| Layout::packed(shape, 2, 1),
            Layout::blhd,
        ]),
        case("layout_row_pitch", "rows, heads and batch entries with gaps between").laid([gaps; 4]),
        case("layout_strided_dim", "elements of a row apart from each other").laid([spread; 4]),
        case("layout_columns", "rows that run across the memory order").laid([columns; 4]),
        case("layout_batch_inside", "the batch as the fastest axis").laid([batch_inside; 4]),
        case("layout_offsets", "tensors that start inside a buffer, at odd places").spec(|spec| {
            spec.query.layout = offset(5)(spec.query.layout.shape);
            spec.key.layout = offset(64)(spec.key.layout.shape);
            spec.value.layout = offset(1)(spec.value.layout.shape);
            spec.output.layout = offset(3)(spec.output.layout.shape);
        }),
        case("layout_all_differ", "each tensor read through its own layout").laid([
            spread,
            columns,
            batch_inside,
            gaps,
        ]),
        case("broadcast_batch", "one context for the whole batch").spec(|spec| {
            spec.key.layout = reused(spec.key.layout.shape);
            spec.value.layout = reused(spec.value.layout.shape);
        }),
        case("broadcast_batch_by_stride", "the same, said with a stride of 0").spec(|spec| {
            spec.key.layout.strides[0] = 0;
            spec.value.layout.strides[0] = 0;
        }),
        case("broadcast_value_only", "keys of each batch entry, shared values").spec(|spec| {
            spec.value.layout = reused(spec.value.layout.shape);
        }),
        case("broadcast_heads_by_stride", "heads that share keys by a stride of 0").spec(|spec| {
            spec.key.layout.strides[1] = 0;
            spec.value.layout.strides[1] = 0;
        }),
        case("broadcast_query", "one query row for all heads and rows").spec(|spec| {
            spec.query.layout.strides[1] = 0;
            spec.query.layout.strides[2] = 0;
        }),
        case("broadcast_keys", "one key for the whole sequence").spec(|spec| spec.key.layout.strides[2] = 0),
        case("layout_bias_and_mask", "bias and mask with gaps, offsets and another memory order")
            .bias(F32, "bhqk")
            .mask("bhqk")
            .spec(|spec| {
                let bias = spec.bias.as_mut().expect("asked for above");
                bias.layout = arranged(bias.layout.shape, [1, 0, 3, 2], [2, 0, 1, 3], 11);
                spec.mask = spec.mask.map(|mask| arranged(mask.shape, [0, 1, 2, 3], [1, 3, 5, 1], 3));
            }),
        case("layout_mask_columns", "a mask stored key by key").mask("b1qk").spec(|spec| {
            spec.mask = spec.mask.map(|mask| arranged(mask.shape, [0, 1, 3, 2], [0, 0, 0, 1], 1));
        }),
    ]
}

/// Batch entries, or heads, that read the same keys and values: kernels may take their rows together.
fn beams() -> Vec<Case> {
    let shared = |case: Case, axes: &[usize]| {
        case.spec(|spec| {
            for &axis in axes {
                spec.key.layout.strides[axis] = 0;
                spec.value.layout.strides[axis] = 0;
            }
        })
    };
    let case = |name: &str, guards, batch, heads, q_len, kv_len| {
        Case::new(name, guards, batch, heads, [q_len, kv_len], [16, 12])
    };
    vec![
        shared(case("beams", "beams of one context", 5, [4, 2], 1, 300), &[0]),
        shared(case("beams_gaps", "heads inside tokens, rows of no whole vec4", 3, [4, 2], 2, 300), &[])
            .laid([Layout::blhd; 4])
            .spec(|spec| {
                spec.key.layout.strides[0] = 0;
                spec.value.layout.strides[0] = 0;
                spec.query.layout = arranged(spec.query.layout.shape, [1, 0, 2, 3], [3, 1, 0, 1], 5);
            }),
        shared(case("beams_many_rows", "more rows than one workgroup takes", 9, [6, 3], 2, 300), &[0]),
        shared(case("beams_heads", "heads that share keys by a stride of 0 as well", 3, [4, 4], 2, 300), &[0, 1]),
        shared(
            case("beams_heads_only", "heads that share keys by a stride of 0, entries that do not", 2, [6, 3], 2, 300),
            &[1],
        ),
        shared(case("beams_kv_lens", "a key length for each beam", 4, [2, 1], 1, 300), &[0]).kv_lens(&[300, 0, 7, 255]),
        shared(case("beams_terms", "terms of each beam", 3, [4, 2], 2, 300), &[0])
            .bias(F32, "bhqk")
            .bias_forbids(0.1)
            .mask("b1qk")
            .kv_lens(&[300, 64, 180])
            .ranges(Ranges::Wild)
            .alibi()
            .causal(EndOfKeys)
            .sinks(0.0),
        shared(case("beams_poisoned", "keys that one beam may not see and another may", 3, [2, 1], 2, 300), &[0])
            .mask("b1qk")
            .kv_lens(&[290, 70, 0])
            .poisoned(),
        shared(case("beams_nan_in_query", "reaches one row of one beam", 4, [2, 2], 1, 300), &[0]).planted(
            Tensor::Query,
            [2, 1, 0, 3],
            f32::NAN,
        ),
        shared(case("beams_nan_in_key", "reaches the rows of the beams that see the key", 3, [2, 1], 2, 300), &[0])
            .kv_lens(&[290, 70, 0])
            .planted(Tensor::Key, [0, 0, 100, 3], f32::NAN),
        shared(case("beams_f16", "beams in f16", 4, [2, 1], 1, 300), &[0]).f16(),
    ]
}

fn numbers() -> Vec<Case> {
    let case = |name: &str, guards| Case::new(name, guards, 2, [4, 2], [5, 70], [16, 16]);
    vec![
        case("scale_zero", "a scale that makes all keys equal").scale(0.0),
        case("scale_negative", "a scale that turns the order round").scale(-0.3),
        case("scale_one", "a scale given as 1, not taken as the default").scale(1.0),
        case("softcap", "a cap below the spread of the scores").softcap(2.0),
        case("softcap_tiny", "a cap that flattens nearly all").softcap(0.05),
        case("softcap_huge", "a cap far above the scores").softcap(1e4),
        case("softcap_negative_scale", "the cap comes after the scale").scale(-1.5).softcap(3.0),
        case("sinks", "a logit without a value").sinks(0.0),
        case("sinks_large", "sinks that take nearly all weight").sinks(30.0),
        case("sinks_small", "sinks that take nearly none").sinks(-40.0),
        case("sinks_empty_rows", "zeros and lse = sink where a row sees no key").sinks(1.0).mask("11qk").blank_rows(),
        case("rising_row", "a new maximum in every block").drawn(Scores::Rising(0.4)),
        case("falling_row", "the maximum in the first block, all else small").drawn(Scores::Rising(-0.4)),
        case("dominant_first", "one key at the start of the first block").drawn(Scores::Dominant(0)),
        case("dominant_last_of_block", "one key at the end of a block").drawn(Scores::Dominant(63)),
        case("dominant_first_of_block", "one key at the start of a block").drawn(Scores::Dominant(64)),
        case("dominant_last", "the very last key").drawn(Scores::Dominant(69)),
        case("equal_scores", "a plain mean of the values").drawn(Scores::Equal),
    ]
}

fn biases() -> Vec<Case> {
    let mut cases = Vec::new();
    for n in 0..16 {
        // bias and mask over complementary axes, so that each of the 16 patterns is met by both
        let axes = |bits: usize| -> String {
            "bhqk".chars().enumerate().map(|(axis, letter)| if bits >> axis & 1 == 1 { letter } else { '1' }).collect()
        };
        let (bias, mask) = (axes(n), axes(15 - n));
        let name = format!("bias_{bias}_mask_{mask}");
        let guards = "bias and mask broadcast over any axis";
        let element = if n.count_ones() % 2 == 0 { F32 } else { F16 };
        cases.push(Case::new(name, guards, 2, [4, 2], [5, 19], [8, 8]).bias(element, &bias).mask(&mask));
    }
    let case = |name: &str, guards| Case::new(name, guards, 2, [2, 1], [5, 67], [8, 8]);
    cases.extend([
        case("bias_f32", "a bias alone").bias(F32, "bhqk"),
        case("bias_f16", "a bias alone, in f16, with rows of odd length").bias(F16, "bhqk"),
        case("bias_after_softcap", "the cap does not hold the bias").bias(F32, "bhqk").softcap(1.0),
        case("bias_forbids", "-inf in a bias is a mask").bias(F32, "bhqk").bias_forbids(0.5),
        case("bias_forbids_f16", "-inf in an f16 bias is a mask").bias(F16, "b1qk").bias_forbids(0.5),
        case("bias_forbids_rows", "rows whose whole bias is -inf").bias(F32, "11qk").bias_forbids(0.3).blank_rows(),
        case("bias_forbids_all", "no key anywhere").bias(F32, "1111").bias_forbids(1.0),
        case("bias_cap_forbids", "a cap does not bring back what -inf forbids")
            .bias(F32, "bhqk")
            .bias_forbids(0.5)
            .softcap(2.0),
        case("bias_very_negative", "a bias that is a mask in all but name is not one")
            .bias(F32, "11qk")
            .planted(Tensor::Bias, [0, 0, 0, 3], -1e9)
            .planted(Tensor::Bias, [0, 0, 1, 66], -f32::MAX),
        case("bias_odd_f16_layout", "an f16 bias with odd offset and strides").bias(F16, "bhqk").spec(|spec| {
            let bias = spec.bias.as_mut().expect("asked for above");
            bias.layout = arranged(bias.layout.shape, [0, 2, 1, 3], [1, 1, 3, 0], 5);
        }),
    ]);
    cases
}

fn masks() -> Vec<Case> {
    let case = |name: &str, guards| Case::new(name, guards, 3, [4, 2], [6, 67], [8, 8]);
    let segments = |name: &str, guards| Case::new(name, guards, 1, [2, 1], [130, 150], [8, 12]);
    let mut cases = vec![
        case("mask_full", "a mask alone").mask("bhqk"),
        case("mask_keys", "padding said with a mask").mask("b11k"),
        case("mask_sparse", "whole blocks without a key").mask("11qk"),
        case("mask_blank_rows", "rows that see nothing between rows that do").mask("bhqk").blank_rows(),
        case("mask_nothing_left", "no key for any row").mask("1111"),
        case("kv_lens", "key lengths of each batch entry").kv_lens(&[1, 67, 30]),
        case("kv_lens_at_blocks", "key lengths around a block").kv_lens(&[63, 64, 65]),
        case("kv_lens_zero", "a batch entry without keys between others").kv_lens(&[67, 0, 5]),
        case("q_lens", "query lengths of each batch entry").q_lens(&[1, 6, 4]),
        case("q_lens_zero", "a batch entry without rows between others").q_lens(&[6, 0, 5]),
        case("q_lens_sinks", "no sink behind the length").q_lens(&[2, 0, 6]).kv_lens(&[0, 9, 67]).sinks(1.0),
        case("q_lens_end_of_keys", "diagonals where rows and keys end")
            .q_lens(&[6, 2, 0])
            .kv_lens(&[67, 30, 5])
            .causal(EndOfKeys),
        case("q_lens_alibi", "distances where rows and keys end, slopes of each entry")
            .q_lens(&[3, 6, 1])
            .kv_lens(&[10, 66, 1])
            .alibi_by_batch()
            .offset(EndOfKeys)
            .windows(Some(40), Some(3)),
        case("q_lens_probs", "weights of rows that are not there").q_lens(&[2, 6, 0]).scores(ScoreStage::Probs),
        segments("q_lens_blocks", "blocks of rows behind the length").q_lens(&[65]).sinks(0.0).poisoned(),
        case("ranges_segments", "sequences packed into one").ranges(Ranges::Segments(16)),
        case("ranges_wild", "ranges that are empty, turned round, negative, past the end").ranges(Ranges::Wild),
        case("ranges_empty", "ranges without a key").ranges(Ranges::Empty),
        segments("mask_block_diagonal", "blocks of keys that no row of a block of rows sees").mask_segments("11qk", 40),
        segments("mask_segments_poisoned", "the same with what must not be read")
            .mask_segments("b1qk", 40)
            .blank_rows()
            .poisoned(),
        segments("mask_segments_diagonal", "blocks that mask and diagonal leave together")
            .mask_segments("11qk", 50)
            .causal(BottomRight)
            .windows(Some(20), None),
        segments("mask_segments_sinks", "rows whose only blocks are left out")
            .mask_segments("11qk", 40)
            .blank_rows()
            .sinks(0.0),
        case("masks_together", "all that forbids a key, at once")
            .mask("b1qk")
            .kv_lens(&[40, 67, 9])
            .ranges(Ranges::Wild)
            .causal(EndOfKeys)
            .windows(Some(30), None)
            .bias(F32, "1hqk")
            .bias_forbids(0.2),
    ];
    for (name, keeps) in [("mask_sparse", 0.04), ("mask_nothing_left", 0.0)] {
        let case = cases.iter_mut().find(|case| case.name == name).expect("listed above");
        case.recipe.mask_keeps = keeps;
    }
    cases
}

const DIAGONALS: [(&str, Diagonal); 6] = [
    ("top_left", TopLeft),
    ("bottom_right", BottomRight),
    ("end_of_keys", EndOfKeys),
    ("past_7", Fixed(7)),
    ("before_2", Fixed(-2)),
    ("far_before", Fixed(-100)),
];

fn diagonals() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, diagonal) in DIAGONALS {
        let case = |name: String, guards| Case::new(name, guards, 2, [2, 1], [6, 21], [8, 8]).kv_lens(&[3, 20]);
        cases.extend([
            case(format!("causal_{name}"), "where the diagonal lies").causal(diagonal),
            case(format!("alibi_{name}"), "distances are counted from the diagonal").alibi().offset(diagonal),
        ]);
    }
    let case = Case::new;
    cases.extend([
        case("causal_no_lens", "end_of_keys without key lengths is bottom_right", 1, [2, 2], [6, 21], [8, 8])
            .causal(EndOfKeys),
        case("causal_q_longer", "the last rows see all", 1, [2, 2], [21, 6], [8, 8]).causal(TopLeft),
        case("causal_square_65", "a diagonal through a full block and a short one", 1, [1, 1], [65, 65], [16, 16])
            .causal(BottomRight),
        case("causal_offset_min", "offsets as far as an i32 goes", 1, [2, 2], [3, 9], [8, 8]).causal(Fixed(i32::MIN)),
        case("causal_offset_max", "offsets as far as an i32 goes", 1, [2, 2], [3, 9], [8, 8]).causal(Fixed(i32::MAX)),
        case("alibi_causal", "slopes and a diagonal, one head without a slope", 2, [8, 2], [6, 70], [8, 8])
            .alibi()
            .causal(BottomRight),
        case("alibi_by_batch", "slopes of each batch entry", 3, [4, 2], [6, 40], [8, 8]).alibi_by_batch(),
        case("alibi_alone", "distances to both sides of the top left diagonal", 1, [4, 4], [9, 9], [8, 8]).alibi(),
        case("alibi_after_softcap", "the cap does not hold the slopes", 1, [4, 4], [9, 70], [8, 8])
            .alibi()
            .softcap(1.0),
    ]);
    cases
}

fn windows() -> Vec<Case> {
    let case = |name: String, guards| Case::new(name, guards, 2, [2, 1], [9, 70], [8, 8]).kv_lens(&[70, 12]);
    let mut cases = Vec::new();
    for (name, diagonal) in DIAGONALS {
        cases.extend([
            case(format!("window_left_causal_{name}"), "the last few keys").causal(diagonal).windows(Some(3), None),
            case(format!("window_both_{name}"), "keys around a row").offset(diagonal).windows(Some(2), Some(4)),
        ]);
    }
    let case = |name: &str, guards| case(name.to_string(), guards);
    cases.extend([
        case("window_left", "keys from a few before, all behind").offset(BottomRight).windows(Some(5), None),
        case("window_right", "all keys before, a few behind").offset(BottomRight).windows(None, Some(5)),
        case("window_right_causal", "a causal mask is stricter than a window").causal(EndOfKeys).windows(None, Some(5)),
        case("window_diagonal_only", "one key for each row").offset(TopLeft).windows(Some(0), Some(0)),
        case("window_unbounded", "windows as far as a u32 goes")
            .offset(EndOfKeys)
            .windows(Some(u32::MAX), Some(u32::MAX)),
        case("window_over_blocks", "first blocks skipped, last blocks skipped")
            .offset(Fixed(40))
            .windows(Some(20), Some(10)),
        case("window_offset_extremes", "sums of an offset and a window past an i32")
            .offset(Fixed(i32::MAX))
            .windows(Some(u32::MAX), Some(u32::MAX)),
    ]);
    cases
}

fn storage() -> Vec<Case> {
    let mut cases = Vec::new();
    for n in 0..16 {
        let element = |bit: usize| if n >> bit & 1 == 1 { F16 } else { F32 };
        let stored = [element(3), element(2), element(1), element(0)];
        let [query, key, value, output] = stored.map(cross_attention::Element::name);
        let name = format!("stored_q_{query}_k_{key}_v_{value}_out_{output}");
        let guards = "each tensor has an element type of its own; odd widths";
        cases.push(Case::new(name, guards, 2, [3, 1], [3, 19], [5, 7]).stored(stored));
    }
    let case = |name: &str, guards| Case::new(name, guards, 2, [4, 2], [5, 19], [12, 20]).f16();
    cases.extend([
        case("f16_even", "f16 without gaps, even widths"),
        case("f16_odd_offsets", "f16 tensors that start in the middle of a word").spec(|spec| {
            for tensor in [&mut spec.query, &mut spec.key, &mut spec.value, &mut spec.output] {
                tensor.layout.offset = 3;
            }
        }),
        case("f16_odd_strides", "f16 elements with odd distances")
            .laid([|shape| arranged(shape, [0, 2, 1, 3], [3, 0, 5, 2], 1); 4]),
        case("f16_columns", "f16 rows that run across the memory order")
            .laid([|shape| arranged(shape, [0, 1, 3, 2], [0, 0, 0, 0], 0); 4]),
        case("f16_blhd", "f16 with heads inside tokens").laid([Layout::blhd; 4]),
        case("f16_output_gaps", "f16 rows with gaps, which stay as they are").laid([
            Layout::bhld,
            Layout::bhld,
            Layout::bhld,
            |shape| arranged(shape, [0, 1, 2, 3], [0, 3, 3, 0], 1),
        ]),
        Case::new("f16_wide", "more than two blocks of keys, in f16", 1, [8, 2], [9, 130], [64, 64]).f16(),
        case("f16_overflow", "results past f16's range become infinite").stored([F32, F32, F32, F16]).value_size(1e5),
        case("f16_subnormal_values", "values below f16's smallest normal number")
            .stored([F32, F32, F16, F32])
            .value_size(1e-5),
        case("f16_subnormal_results", "results below f16's smallest normal number")
            .stored([F32, F32, F32, F16])
            .value_size(1e-5),
    ]);
    cases
}

fn bfloats() -> Vec<Case> {
    let case = |name: &str, guards| Case::new(name, guards, 2, [4, 2], [5, 19], [12, 20]).stored([Bf16; 4]);
    vec![
        case("bf16", "bf16 without gaps"),
        case("bf16_odd_offsets", "bf16 tensors that start in the middle of a word").spec(|spec| {
            for tensor in [&mut spec.query, &mut spec.key, &mut spec.value, &mut spec.output] {
                tensor.layout.offset = 3;
            }
        }),
        case("bf16_columns", "bf16 rows that run across the memory order")
            .laid([|shape| arranged(shape, [0, 1, 3, 2], [0, 0, 0, 0], 0); 4]),
        case("bf16_output_gaps", "bf16 rows with gaps, which stay as they are").laid([
            Layout::bhld,
            Layout::bhld,
            Layout::bhld,
            |shape| arranged(shape, [0, 1, 2, 3], [0, 3, 3, 0], 1),
        ]),
        case("bf16_among_others", "each tensor has an element type of its own").stored([F16, Bf16, F32, Bf16]),
        case("bf16_bias", "a bias in bf16, with rows of odd length").bias(Bf16, "bhqk").bias_forbids(0.3),
        Case::new("bf16_wide", "more than two blocks of keys, in bf16", 1, [8, 2], [9, 130], [64, 64])
            .stored([Bf16; 4]),
        Case::new("bf16_decode", "a row over many keys in bf16", 1, [2, 1], [1, 1100], [64, 32]).stored([Bf16; 4]),
        case("bf16_large", "numbers that f16 does not hold").value_size(1e30),
        case("bf16_small", "numbers that f16 does not hold").value_size(1e-30),
        case("bf16_poison", "masked keys and values in bf16").kv_lens(&[3, 19]).mask("b11k").poisoned(),
        case("bf16_not_a_number", "NaN of a value stays NaN where it is seen, and infinity infinity")
            .planted(Tensor::Value, [0, 0, 3, 1], f32::NAN)
            .planted(Tensor::Value, [1, 1, 3, 2], f32::NEG_INFINITY),
    ]
}

fn bytes() -> Vec<Case> {
    let case = |name: &str, guards| Case::new(name, guards, 2, [4, 2], [5, 70], [64, 32]);
    vec![
        case("i8_by_row", "bytes with a scale a row").i8(F32, [1, 1]),
        case("i8_by_32", "bytes with a scale of f16 for 32 columns, as q8_0").i8(F16, [2, 1]),
        case("i8_key", "keys in bytes, values not").key_i8(F16, 2).stored_beside([F16, Bf16, Bf16]),
        case("i8_value", "values in bytes, keys not").value_i8(F32, 4),
        Case::new("i8_odd", "blocks and widths that are no words", 2, [3, 1], [5, 19], [15, 21]).i8(F16, [3, 7]),
        Case::new("i8_blocks_of_2", "blocks within a word", 1, [2, 2], [5, 19], [8, 12]).i8(F32, [4, 6]),
        Case::new("i8_decode", "a row over many keys in bytes", 1, [4, 1], [1, 1100], [64, 64]).i8(F16, [2, 2]),
        Case::new("i8_handful", "many rows over a handful of keys in bytes", 1, [2, 2], [130, 5], [40, 40])
            .i8(F32, [1, 5]),
        case("i8_laid", "bytes and scales with gaps, across the memory order").i8(F16, [4, 2]).spec(|spec| {
            let anyhow = |of: &mut Layout, n: usize| *of = arranged(of.shape, [0, 2, 1, 3], [1, 3, 0, n], 5);
            anyhow(&mut spec.key.layout, 1);
            anyhow(&mut spec.value.layout, 0);
            for (scale, n) in [&mut spec.key_scale, &mut spec.value_scale].into_iter().flatten().zip([0, 2]) {
                anyhow(&mut scale.layout, n);
            }
        }),
        case("i8_one_context", "bytes and scales that all entries share").i8(F32, [2, 2]).spec(|spec| {
            let scales = [&mut spec.key_scale, &mut spec.value_scale].into_iter().flatten();
            [&mut spec.key, &mut spec.value].into_iter().chain(scales).for_each(|of| of.layout.shape[0] = 1);
        }),
        case("i8_all_terms", "everything else beside bytes")
            .i8(F16, [2, 2])
            .bias(F32, "bhqk")
            .mask("b1qk")
            .kv_lens(&[70, 20])
            .alibi()
            .causal(BottomRight)
            .sinks(0.0)
            .softcap(4.0)
            .poisoned(),
        case("i8_scores", "scores of keys in bytes").i8(F16, [2, 2]).scores(ScoreStage::Scaled),
        case("i8_probs", "weights of keys in bytes").i8(F32, [1, 1]).kv_lens(&[70, 20]).scores(ScoreStage::Probs),
        case("i8_small_scales", "scales that are subnormal in f16").i8(F16, [2, 2]).value_size(1e-4),
        case("i8_large_scales", "scales near the end of f32, whose products are not").i8(F32, [2, 1]).value_size(5e37),
        case("i8_wild_scales", "a scale that is NaN or infinite makes such numbers of its block, also of a byte of 0")
            .i8(F32, [2, 2])
            .planted(Tensor::ValueScale, [0, 0, 3, 1], f32::NAN)
            .planted(Tensor::ValueScale, [1, 1, 3, 0], f32::INFINITY),
        case("nan_in_key_scale", "a scale of keys that is NaN makes NaN of the rows that see one of its keys")
            .i8(F32, [2, 2])
            .planted(Tensor::KeyScale, [1, 0, 5, 0], f32::NAN),
    ]
}

fn pages() -> Vec<Case> {
    let case = |name: &str, guards| Case::new(name, guards, 2, [4, 2], [5, 70], [16, 24]);
    let long = |name: &str, guards| Case::new(name, guards, 2, [2, 1], [2, 1100], [16, 16]);
    vec![
        case("pages_of_1", "a page for each key").paged(1),
        case("pages_of_16", "pages, the last one not full").paged(16).poisoned(),
        case("pages_of_256", "all keys in one page").paged(256).poisoned(),
        case("pages_heads_inside", "pages [pages, page_len, kv_heads, head_dim]").paged(8).spec(|spec| {
            for tensor in [&mut spec.key, &mut spec.value] {
                tensor.layout = Layout::blhd(tensor.layout.shape);
            }
        }),
        case("pages_laid", "pages in any memory order, with gaps").paged(4).laid([
            Layout::bhld,
            |shape| arranged(shape, [2, 0, 3, 1], [3, 1, 0, 0], 5),
            |shape| arranged(shape, [1, 3, 0, 2], [0, 1, 2, 0], 3),
            Layout::bhld,
        ]),
        case("pages_shared", "entries of the batch read the same pages").paged(32).pages(3),
        case("pages_kv_lens", "no page behind the last key is looked at").paged(8).kv_lens(&[70, 19]).poisoned(),
        case("pages_no_keys", "entries without a page").paged(8).kv_lens(&[0, 70]).sinks(0.5).poisoned(),
        case("pages_by_position", "positions count along the sequence, not the page")
            .paged(16)
            .kv_lens(&[70, 33])
            .causal(EndOfKeys)
            .windows(Some(40), None)
            .alibi()
            .poisoned(),
        case("pages_bias_mask", "bias and mask count along the sequence")
            .paged(16)
            .bias(F16, "bhqk")
            .mask("b1qk")
            .poisoned(),
        case("pages_ranges", "ranges count along the sequence").paged(4).ranges(Ranges::Segments(9)).poisoned(),
        case("pages_scores", "scores of pages, all of them").paged(16).kv_lens(&[70, 5]).scores(ScoreStage::Scaled),
        Case::new("pages_as_contexts", "each entry has one page, of any length", 4, [4, 2], [5, 70], [16, 24])
            .contexts(3),
        case("pages_probs", "weights of pages").paged(16).kv_lens(&[70, 5]).scores(ScoreStage::Probs).poisoned(),
        case("pages_f16", "pages in f16").stored([F32, F16, F16, F32]).paged(16),
        case("pages_i8", "pages in bytes, with scales in pages")
            .paged(16)
            .i8(F16, [1, 3])
            .kv_lens(&[64, 70])
            .poisoned(),
        long("pages_long", "keys in pages split among workgroups").paged(16).poisoned(),
        long("pages_long_i8", "pages in bytes split among workgroups")
            .paged(64)
            .i8(F32, [1, 1])
            .kv_lens(&[1100, 300])
            .poisoned(),
        Case::new("pages_many_rows", "many rows over many pages", 1, [2, 1], [70, 160], [40, 40]).paged(32),
    ]
}

fn extremes() -> Vec<Case> {
    let case = |name: &str, guards| Case::new(name, guards, 1, [2, 1], [5, 70], [16, 16]);
    vec![
        case("logits_1e4", "logits around ten thousand, either sign").drawn(Scores::Spread(1e4)),
        case("logits_all_1e4", "logits all near ten thousand").drawn(Scores::Shifted(1e4)),
        case("logits_all_minus_1e4", "logits all near minus ten thousand").drawn(Scores::Shifted(-1e4)),
        case("logits_minus_1e4_sinks", "a sink far above all logits").drawn(Scores::Shifted(-1e4)).sinks(0.0),
        case("logits_1e4_masked", "the largest logits are not allowed")
            .drawn(Scores::Rising(150.0))
            .causal(Fixed(2))
            .mask("11qk")
            .blank_rows(),
        case("logits_1e4_capped", "large logits under a cap").drawn(Scores::Spread(1e4)).softcap(20.0),
        case("values_1e30", "large values").value_size(1e30),
        case("values_1e_minus_30", "small values").value_size(1e-30),
    ]
}

/// Keys enough to be split among workgroups, and parts of them that some row, or every row, sees nothing of.
fn long_keys() -> Vec<Case> {
    let case = |name: &str, guards, q_len, kv_len| Case::new(name, guards, 1, [2, 1], [q_len, kv_len], [8, 8]);
    let mut cases = Vec::new();
    for kv_len in [1025, 1537, 2049, 3000, 3073, 4097] {
        let name = format!("long_{kv_len}");
        cases.push(case(&name, "parts of the keys of unlike lengths, the last of them empty by rounding", 1, kv_len));
    }
    cases.extend([
        case("long_causal_top_left", "parts of the keys that no row sees", 2, 1500).causal(TopLeft),
        case("long_causal_half", "half of the parts see nothing", 3, 3000).causal(Fixed(1400)),
        case("long_causal_before", "the first row sees no key in any part", 3, 1100).causal(Fixed(-1)),
        case("long_window", "one part of many, by a window", 2, 3000).offset(Fixed(1000)).windows(Some(20), Some(10)),
        case("long_window_last", "a window at the very end", 2, 3000).offset(BottomRight).windows(Some(5), None),
        case("long_ranges_segments", "rows that see other parts than their neighbours", 4, 2500)
            .ranges(Ranges::Segments(600)),
        case("long_ranges_wild", "ranges that lie anywhere", 5, 2500).ranges(Ranges::Wild),
        case("long_mask_sparse", "a key here and there", 2, 3000).mask("11qk").mask_keeps(0.002),
        case("long_mask_blank_rows", "rows that see nothing in any part", 4, 1600).mask("11qk").blank_rows(),
        case("long_mask_segment", "a mask that leaves one part", 2, 3000).mask_segments("11qk", 700),
        case("long_bias_forbids", "a bias that leaves a key here and there", 2, 3000)
            .bias(F32, "11qk")
            .bias_forbids(0.998),
        case("long_bias_f16_rows", "rows that a bias leaves nothing", 4, 1500).bias(F16, "1hqk").blank_rows(),
        case("long_sinks_causal", "a sink beside parts that see nothing", 2, 1500).causal(TopLeft).sinks(0.0),
        case("long_alibi", "distances over all parts", 2, 2000).alibi().offset(BottomRight),
        case("long_scores_probs", "weights over all parts", 2, 1500).causal(Fixed(300)).scores(ScoreStage::Probs),
        case("long_f16", "the same in f16", 2, 2500).f16().causal(Fixed(1100)),
        case("long_dominant", "one key of many", 2, 3000).drawn(Scores::Dominant(2999)),
        case("long_rising", "a new maximum in every part", 2, 2100).drawn(Scores::Rising(0.05)),
        Case::new("long_kv_lens", "key lengths that leave parts empty", 3, [4, 2], [1, 1300], [8, 8])
            .kv_lens(&[1, 1300, 0]),
        Case::new("long_kv_lens_end", "diagonals from the end of the keys", 2, [2, 1], [3, 1300], [8, 8])
            .kv_lens(&[2, 700])
            .causal(EndOfKeys),
        Case::new("long_q_lens", "rows behind the length over many parts", 3, [4, 2], [3, 1300], [8, 8])
            .q_lens(&[1, 3, 0])
            .kv_lens(&[1300, 40, 700])
            .causal(EndOfKeys)
            .sinks(0.5)
            .poisoned(),
        Case::new("long_gqa", "a group of heads over many parts", 1, [8, 2], [1, 1400], [16, 16]),
        Case::new("long_poisoned", "parts that must not be read", 2, [2, 1], [2, 1400], [8, 8])
            .kv_lens(&[3, 900])
            .poisoned(),
        Case::new("long_all_terms", "every term over many parts", 2, [4, 2], [2, 1200], [8, 12])
            .softcap(5.0)
            .bias(F32, "b1qk")
            .bias_forbids(0.5)
            .mask("1h1k")
            .kv_lens(&[1200, 40])
            .ranges(Ranges::Wild)
            .alibi()
            .causal(EndOfKeys)
            .sinks(-1.0),
    ]);
    cases
}

/// Numbers that models put where a key should not be seen: rows that see nothing else must still weigh those keys alike.
fn padding() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, padding) in [("1e4", -1e4), ("1e9", -1e9), ("min", f32::MIN)] {
        for (kind, kv_len) in [("short", 70), ("long", 1300)] {
            let case = |what: &str, guards| {
                Case::new(format!("padded_{name}_{kind}_{what}"), guards, 1, [2, 1], [4, kv_len], [8, 8])
                    .bias(F32, "1hqk")
            };
            cases.extend([
                case("keys", "padding beside keys that are seen").padded(padding, 0.5),
                case("rows", "rows of nothing but padding").padded(padding, 0.3).blank_rows(),
                case("equal_rows", "rows of nothing but padding, keys all alike")
                    .padded(padding, 1.0)
                    .drawn(Scores::Equal),
            ]);
        }
        let case = |what: &str, guards, kv_len| {
            Case::new(format!("padded_{name}_{what}"), guards, 2, [2, 1], [3, kv_len], [8, 8]).bias(F32, "b1qk")
        };
        cases.extend([
            case("probs", "weights of padding add up to 1", 77)
                .padded(padding, 0.9)
                .blank_rows()
                .scores(ScoreStage::Probs),
            case("equal_probs", "weights of equal keys are equal", 77)
                .padded(padding, 1.0)
                .drawn(Scores::Equal)
                .scores(ScoreStage::Probs),
            case("sinks", "a sink takes all that padding leaves", 1100).padded(padding, 1.0).sinks(0.0),
            case("masked", "padding and a mask", 1100).padded(padding, 0.5).blank_rows().mask("11qk").mask_keeps(0.3),
        ]);
    }
    let halves = Case::new("padded_f16", "padding in f16", 1, [2, 1], [4, 1100], [8, 8]).bias(F16, "11qk");
    cases.push(halves.padded(-1e4, 0.7).blank_rows());
    cases
}

/// What all scores of a row have in common must not cost anything that plain f32 does not lose.
fn common_parts() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, common) in [("1e4", 1e4), ("minus_1e4", -1e4), ("1e6", 1e6), ("minus_1e6", -1e6)] {
        for (kind, kv_len) in [("short", 70), ("long", 1300)] {
            let case = |what: &str, guards| {
                Case::new(format!("common_{name}_{kind}_{what}"), guards, 1, [2, 1], [2, kv_len], [16, 8])
            };
            cases.extend([
                case("bias", "a bias with a large common part").bias(F32, "11qk").common(common),
                case("keys", "dot products with a large common part").drawn(Scores::Shifted(common)),
            ]);
        }
        let case = |what: &str, guards| {
            Case::new(format!("common_{name}_{what}"), guards, 1, [2, 1], [3, 77], [8, 8])
                .bias(F32, "1hqk")
                .common(common)
        };
        cases.extend([
            case("probs", "weights under a large common part").scores(ScoreStage::Probs),
            case("capped", "a cap below the bias").softcap(4.0),
            case("alibi", "slopes beside a large common part").alibi(),
        ]);
    }
    // a scale that is a power of 2 rounds nothing, and below ln 2 kernels may work in base 2: what is off comes from that
    for (name, common) in [("1e3", 1024.0), ("2e4", 20480.0)] {
        let case = Case::new(format!("exact_{name}"), "scores that plain f32 has exactly", 1, [2, 1], [2, 90], [16, 8]);
        cases.push(case.scale(0.5).drawn(Scores::Exact(common)));
    }
    cases
}

/// Values that unnormalised sums overflow on, though the result does not.
fn near_the_end() -> Vec<Case> {
    let case = |name: &str, guards, kv_len| Case::new(name, guards, 1, [2, 1], [3, kv_len], [8, 8]).value_size(1e38);
    vec![
        case("values_3e38", "a mean of large values", 40).drawn(Scores::Equal),
        case("values_3e38_spread", "large values under any weights", 70),
        case("values_3e38_long", "large values in many parts", 1300).drawn(Scores::Equal),
        case("values_3e38_sinks", "a sink beside large values", 40).sinks(1.0),
        case("values_3e38_masked", "large values, some of them not seen", 70).mask("11qk").blank_rows(),
    ]
}

/// Long dot products: a sum over all of a head in one chain loses what blocks do not.
fn wide_heads() -> Vec<Case> {
    let case = |width: usize, q_len: usize, kv_len: usize| {
        let name = format!("wide_{width}_{q_len}_{kv_len}");
        let guards = "dot products of many terms, logits around 40";
        Case::new(name, guards, 1, [2, 1], [q_len, kv_len], [width, width]).drawn(Scores::Spread(40.0))
    };
    vec![case(224, 4, 77), case(258, 4, 77), case(224, 17, 40), case(258, 1, 300)]
}

fn not_a_number() -> Vec<Case> {
    let case = |name: &str, guards| Case::new(name, guards, 2, [4, 2], [5, 70], [8, 8]);
    vec![
        case("nan_in_key", "reaches the rows that see the key, and no other").causal(Fixed(63)).planted(
            Tensor::Key,
            [1, 0, 66, 3],
            f32::NAN,
        ),
        case("nan_in_value", "reaches one column of the rows that see the key").causal(Fixed(63)).planted(
            Tensor::Value,
            [0, 1, 66, 3],
            f32::NAN,
        ),
        case("nan_in_value_of_no_weight", "a weight that underflows does not hide a NaN")
            .drawn(Scores::Rising(5.0))
            .mask("11qk")
            .planted(Tensor::Value, [0, 1, 0, 2], f32::NAN),
        case("nan_in_query", "reaches one row").planted(Tensor::Query, [1, 2, 3, 4], f32::NAN),
        Case::new(
            "nan_in_query_of_72",
            "columns behind a row's last are not the next row's first",
            1,
            [2, 1],
            [20, 70],
            [72, 72],
        )
        .planted(Tensor::Query, [0, 1, 3, 4], f32::NAN)
        .planted(Tensor::Query, [0, 0, 11, 0], f32::INFINITY),
        case("nan_in_bias", "reaches the rows that see the key").bias(F32, "1hqk").planted(
            Tensor::Bias,
            [0, 1, 2, 69],
            f32::NAN,
        ),
        Case::new(
            "nan_in_wide_value",
            "every group of columns keeps it from the rows it is masked for",
            1,
            [2, 1],
            [20, 70],
            [16, 272],
        )
        .mask("11qk")
        .planted(Tensor::Value, [0, 0, 9, 3], f32::NAN)
        .planted(Tensor::Value, [0, 0, 20, 40], f32::INFINITY)
        .planted(Tensor::Value, [0, 0, 33, 71], f32::NAN)
        .planted(Tensor::Value, [0, 0, 41, 100], f32::NAN)
        .planted(Tensor::Value, [0, 0, 52, 140], f32::NEG_INFINITY)
        .planted(Tensor::Value, [0, 0, 60, 200], f32::NAN)
        .planted(Tensor::Value, [0, 0, 69, 270], f32::NAN),
        Case::new(
            "nan_in_value_of_64",
            "four columns an invocation on a GPU, in two groups, and each keeps it from the rows it is masked for",
            1,
            [2, 1],
            [20, 70],
            [16, 64],
        )
        .mask("11qk")
        .planted(Tensor::Value, [0, 0, 9, 3], f32::NAN)
        .planted(Tensor::Value, [0, 0, 20, 20], f32::INFINITY)
        .planted(Tensor::Value, [0, 0, 33, 34], f32::NAN)
        .planted(Tensor::Value, [0, 0, 52, 49], f32::NEG_INFINITY)
        .planted(Tensor::Value, [0, 0, 69, 63], f32::NAN),
        case("inf_in_value", "an infinite value gives an infinite result").planted(
            Tensor::Value,
            [0, 0, 5, 1],
            f32::NEG_INFINITY,
        ),
        case("inf_in_bias", "a score of +inf gives NaN in its row").bias(F32, "bhqk").planted(
            Tensor::Bias,
            [1, 3, 4, 20],
            f32::INFINITY,
        ),
        case("nan_in_f16_key", "the same through f16").f16().causal(Fixed(63)).planted(
            Tensor::Key,
            [0, 1, 64, 7],
            f32::NAN,
        ),
    ]
}

fn poisoned() -> Vec<Case> {
    let case = |name: &str, guards| Case::new(name, guards, 2, [4, 2], [6, 70], [8, 8]).poisoned();
    let mut cases = vec![
        case("poison_behind_kv_lens", "keys behind the key length").kv_lens(&[5, 64]),
        case("poison_behind_q_lens", "queries behind the query length").q_lens(&[2, 6]).sinks(0.0),
        case("poison_behind_causal", "keys no row may see yet").causal(Fixed(20)),
        case("poison_outside_window", "keys outside of every window").offset(Fixed(30)).windows(Some(5), Some(5)),
        case("poison_outside_ranges", "keys outside of every range").ranges(Ranges::Segments(5)),
        case("poison_under_key_mask", "keys masked for all rows").mask("b11k"),
        case("poison_under_bias", "keys that a bias of -inf forbids").bias(F32, "b11k").bias_forbids(0.5),
        case("poison_in_bias", "the bias of pairs that are not allowed")
            .bias(F32, "bhqk")
            .mask("bhqk")
            .causal(EndOfKeys),
        case("poison_in_f16_bias", "the same in f16").bias(F16, "b1qk").mask("b1qk").kv_lens(&[30, 69]),
        case("poison_in_f16", "masked keys and values in f16").f16().kv_lens(&[3, 65]).mask("b11k"),
        case("poison_blank_rows", "queries and keys of rows that see nothing").mask("bhqk").blank_rows(),
        case("poison_no_keys_left", "a batch entry without keys").kv_lens(&[0, 70]).sinks(0.5),
        case("poison_capped_alibi", "not allowed, whatever a cap or a slope would make of it")
            .softcap(3.0)
            .alibi()
            .causal(BottomRight)
            .kv_lens(&[70, 10]),
        case("poison_masked_scores", "returned scores are -inf there").mask("b11k").scores(ScoreStage::Masked),
        case("poison_probs", "returned weights are zero there").mask("b11k").scores(ScoreStage::Probs),
    ];
    for case in &mut cases {
        case.recipe.mask_keeps = 0.4;
    }
    cases
}

fn scores() -> Vec<Case> {
    let mut cases = Vec::new();
    let stages = [
        ("scaled", ScoreStage::Scaled),
        ("capped", ScoreStage::Capped),
        ("masked", ScoreStage::Masked),
        ("probs", ScoreStage::Probs),
    ];
    for (name, stage) in stages {
        let case = |kind: &str, guards| {
            Case::new(format!("scores_{name}_{kind}"), guards, 2, [4, 2], [5, 67], [8, 12]).scores(stage)
        };
        cases.extend([
            case("plain", "scores of an attention without terms"),
            case("all_terms", "which terms are in the scores of this stage, and which are not")
                .softcap(3.0)
                .bias(F32, "bhqk")
                .bias_forbids(0.2)
                .alibi()
                .mask("b1qk")
                .blank_rows()
                .kv_lens(&[67, 20])
                .causal(BottomRight)
                .sinks(0.0),
            case("f16_no_lse", "scores are f32 whatever is stored; no lse asked").f16().without_lse(),
        ]);
    }
    cases.push(Case::new("no_lse", "output alone", 2, [4, 2], [5, 67], [8, 12]).causal(BottomRight).without_lse());
    cases
}
