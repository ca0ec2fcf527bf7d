//! Cases in which any two settings of any two terms meet at least once.

use cross_attention::Diagonal::{BottomRight, EndOfKeys, Fixed, TopLeft};
use cross_attention::Element::{F16, F32};
use cross_attention::Layout;

use super::case::{Case, arranged};
use super::recipe::Ranges;

/// The settings of each term; the words make up the names of the cases.
const TERMS: [&[&str]; 15] = [
    &["mha", "gqa", "mqa"],
    &["", "few_keys", "many_keys"],
    &["", "blhd", "gaps"],
    &["", "f16", "q32kv16", "k16v32", "out16"],
    &["", "scale0", "negscale", "scale1"],
    &["", "cap"],
    &["", "bias", "bias16", "headbias16", "keybias", "infbias"],
    &["", "alibi"],
    &["", "keymask", "rowmask", "fullmask"],
    &["", "lens", "lens0"],
    &["", "segments", "wild"],
    &["", "topleft", "bottomright", "endofkeys", "past", "before", "uncut"],
    &["", "left", "right", "both"],
    &["", "sinks"],
    &["", "nolse"],
];

pub(crate) fn cases() -> Vec<Case> {
    let counts: Vec<usize> = TERMS.iter().map(|settings| settings.len()).collect();
    let rows = pairwise(&counts);
    rows.iter().enumerate().map(|(n, row)| case(n, row)).collect()
}

fn case(n: usize, row: &[usize]) -> Case {
    let words: Vec<&str> =
        TERMS.iter().zip(row).map(|(settings, &level)| settings[level]).filter(|word| !word.is_empty()).collect();
    let has = |word: &str| words.contains(&word);
    let either = |options: &[&str]| options.iter().position(|word| has(word));

    let heads = [[4, 4], [6, 2], [3, 1]][row[0]];
    let lens = [[5, 19], [19, 5], [9, 70]][row[1]];
    let mut case = Case::new(format!("pairs_{n:02}_{}", words.join("_")), "terms that meet", 2, heads, lens, [8, 12]);
    case = match either(&["blhd", "gaps"]) {
        Some(0) => case.laid([Layout::blhd; 4]),
        Some(_) => {
            let gaps: fn([usize; 4]) -> Layout = |shape| arranged(shape, [0, 2, 1, 3], [3, 0, 5, 1], 7);
            case.laid([gaps; 4])
        }
        None => case,
    };
    case = match either(&["f16", "q32kv16", "k16v32", "out16"]) {
        Some(0) => case.f16(),
        Some(1) => case.stored([F32, F16, F16, F32]),
        Some(2) => case.stored([F32, F16, F32, F32]),
        Some(_) => case.stored([F32, F32, F32, F16]),
        None => case,
    };
    case = match either(&["scale0", "negscale", "scale1"]) {
        Some(0) => case.scale(0.0),
        Some(1) => case.scale(-0.4),
        Some(_) => case.scale(1.0),
        None => case,
    };
    case = if has("cap") { case.softcap(4.0) } else { case };
    case = match either(&["bias", "bias16", "headbias16", "keybias", "infbias"]) {
        Some(0) => case.bias(F32, "bhqk"),
        Some(1) => case.bias(F16, "b1qk"),
        Some(2) => case.bias(F16, "1hqk"),
        Some(3) => case.bias(F32, "b11k"),
        Some(_) => case.bias(F32, "11qk").bias_forbids(0.4).blank_rows(),
        None => case,
    };
    case = if has("alibi") { case.alibi() } else { case };
    case = match either(&["keymask", "rowmask", "fullmask"]) {
        Some(0) => case.mask("b11k"),
        Some(1) => case.mask("11qk"),
        Some(_) => case.mask("bhqk").blank_rows(),
        None => case,
    };
    let kv_len = u32::try_from(lens[1]).expect("cases are small");
    case = match either(&["lens", "lens0"]) {
        Some(0) => case.kv_lens(&[kv_len / 2 + 1, kv_len]),
        Some(_) => case.kv_lens(&[kv_len - 1, 0]),
        None => case,
    };
    case = match either(&["segments", "wild"]) {
        Some(0) => case.ranges(Ranges::Segments(4)),
        Some(_) => case.ranges(Ranges::Wild),
        None => case,
    };
    case = match either(&["topleft", "bottomright", "endofkeys", "past", "before", "uncut"]) {
        Some(0) => case.causal(TopLeft),
        Some(1) => case.causal(BottomRight),
        Some(2) => case.causal(EndOfKeys),
        Some(3) => case.causal(Fixed(3)),
        Some(4) => case.causal(Fixed(-2)),
        Some(_) => case.offset(EndOfKeys),
        None => case,
    };
    case = match either(&["left", "right", "both"]) {
        Some(0) => case.windows(Some(3), None),
        Some(1) => case.windows(None, Some(2)),
        Some(_) => case.windows(Some(2), Some(4)),
        None => case,
    };
    case = if has("sinks") { case.sinks(0.0) } else { case };
    if has("nolse") { case.without_lse() } else { case }
}

/// Rows of settings, one number below `counts[n]` for each term `n`, so that all pairs are there: each row
/// starts from a pair still missing and takes for every other term what brings most missing pairs.
fn pairwise(counts: &[usize]) -> Vec<Vec<usize>> {
    let terms = counts.len();
    let mut missing = Vec::new();
    for a in 0..terms {
        for b in a + 1..terms {
            missing.extend((0..counts[a]).flat_map(|x| (0..counts[b]).map(move |y| [a, x, b, y])));
        }
    }
    let mut rows = Vec::new();
    while let Some(&[a, x, b, y]) = missing.first() {
        let mut row = vec![None; terms];
        row[a] = Some(x);
        row[b] = Some(y);
        for term in 0..terms {
            if row[term].is_some() {
                continue;
            }
            let gain = |level: usize| {
                let brings = |&&[a, x, b, y]: &&[usize; 4]| {
                    (a == term && x == level && row[b] == Some(y)) || (b == term && y == level && row[a] == Some(x))
                };
                missing.iter().filter(brings).count()
            };
            // on a tie another setting in every row
            let turn = rows.len();
            row[term] = (0..counts[term]).max_by_key(|&level| (gain(level), (level + turn) % counts[term]));
        }
        let row: Vec<usize> = row.into_iter().flatten().collect();
        missing.retain(|&[a, x, b, y]| row[a] != x || row[b] != y);
        rows.push(row);
    }
    rows
}
