//! Faults planted in results: the tolerance must reject each of them on some case of the table.

use cross_attention::cpu::{self, PartialState};
use cross_attention::verify::verify;
use cross_attention::{
    AttentionData, AttentionOutput, AttentionProblem, AttentionSpec, Diagonal, Element, Layout, ScoreStage, TensorData,
};

use crate::common::case::Case;
use crate::common::recipe::places;
use crate::common::{cases, split};

/// A wrong result for a case, or `None` where the fault has nothing to act on.
type Fault = fn(&Case) -> Option<AttentionOutput>;

const FAULTS: [(&str, Fault); 33] = [
    ("diagonal off by one", |case| {
        let diagonal = match case.spec.causal? {
            Diagonal::TopLeft => Diagonal::Fixed(1),
            Diagonal::Fixed(offset) => Diagonal::Fixed(offset.checked_sub(1)?),
            _ => return None,
        };
        misread(case, |spec| spec.causal = Some(diagonal))
    }),
    ("bottom right taken for top left", |case| {
        let asked = case.spec.causal == Some(Diagonal::BottomRight);
        asked.then(|| misread(case, |spec| spec.causal = Some(Diagonal::TopLeft)))?
    }),
    ("end of keys taken for bottom right", |case| {
        let asked = case.spec.causal == Some(Diagonal::EndOfKeys);
        asked.then(|| misread(case, |spec| spec.causal = Some(Diagonal::BottomRight)))?
    }),
    ("window one key too wide", |case| {
        let left = case.spec.window_left?.checked_add(1)?;
        misread(case, |spec| spec.window_left = Some(left))
    }),
    ("last key dropped", |case| drop_keys(case, |kv_len| Some(kv_len.checked_sub(1)?..kv_len))),
    ("first key of a block dropped", |case| drop_keys(case, |kv_len| (kv_len > 64).then_some(64..65))),
    ("last block dropped", |case| drop_keys(case, |kv_len| (kv_len > 64).then_some(kv_len / 64 * 64..kv_len))),
    ("scale left out", |case| misread(case, |spec| spec.scale = Some(1.0))),
    ("softcap left out", |case| case.spec.softcap.and_then(|_| misread(case, |spec| spec.softcap = None))),
    ("bias left out", |case| {
        case.spec.bias?;
        wrong(case, |spec| spec.bias = None, |data| data.terms.bias = None)
    }),
    ("mask left out", |case| {
        case.spec.mask?;
        wrong(case, |spec| spec.mask = None, |data| data.terms.mask = None)
    }),
    ("query lengths left out", |case| {
        case.spec.q_lens.then(|| wrong(case, |spec| spec.q_lens = false, |data| data.terms.q_lens = None))?
    }),
    ("key lengths left out", |case| {
        let unused = case.spec.kv_lens && case.spec.causal.is_none();
        unused.then(|| wrong(case, |spec| spec.kv_lens = false, |data| data.terms.kv_lens = None))?
    }),
    ("slopes left out", |case| {
        case.spec.alibi_slopes?;
        wrong(case, |spec| spec.alibi_slopes = None, |data| data.terms.alibi_slopes = None)
    }),
    ("sinks left out", |case| {
        case.spec.sinks.then(|| wrong(case, |spec| spec.sinks = false, |data| data.terms.sinks = None))?
    }),
    ("heads of a group swapped", swapped_heads),
    ("values one key late", |case| {
        let shape = case.spec.value.layout.shape;
        let fits = shape[2] > 1 && case.spec.value.layout == Layout::bhld(shape);
        let late = |data: &mut AttentionData| match &mut data.value {
            TensorData::F32(value) => value.rotate_right(shape[3]),
            TensorData::F16(value) => value.rotate_right(shape[3]),
            TensorData::Bf16(value) => value.rotate_right(shape[3]),
            TensorData::I8(value) => value.rotate_right(shape[3]),
            other => panic!("{other:?}"),
        };
        fits.then(|| wrong(case, |_| {}, late))?
    }),
    ("no rescale at a new maximum", no_rescale),
    ("a range of keys merged twice", |case| ranged(case, 2, |_, _| {})),
    ("a range of keys not merged", |case| ranged(case, 0, |_, _| {})),
    ("a sink in every range of keys", |case| {
        let sinks = case.spec.sinks.then(|| case.data().terms.sinks)?;
        ranged(case, 1, |spec, data| (spec.sinks, data.terms.sinks) = (true, sinks))
    }),
    ("a range's diagonal counted from its first key", |case| {
        let at = i32::try_from(case.problem().kv_len() / 2).ok()?;
        let asked = case.spec.causal == Some(Diagonal::TopLeft);
        asked.then(|| ranged(case, 1, |spec, _| spec.causal = Some(Diagonal::Fixed(at))))?
    }),
    ("result rounded to f16", |case| {
        let mut output = right(case)?;
        let TensorData::F32(numbers) = output.output else { return None };
        output.output = TensorData::F32(TensorData::from_f32(Element::F16, numbers).to_f32());
        Some(output)
    }),
    ("bf16 cut off, not rounded", |case| {
        let TensorData::Bf16(_) = right(case)?.output else { return None };
        let TensorData::F32(numbers) = misread(case, |spec| spec.output.element = Element::F32)?.output else {
            return None;
        };
        let cut = numbers.into_iter().map(|x| f32::from_bits(x.to_bits() & 0xffff_0000)).collect();
        Some(AttentionOutput { output: TensorData::from_f32(Element::Bf16, cut), ..right(case)? })
    }),
    ("the scale of a row's first block for all of it", |case| {
        let blocks = case.spec.value_scale?.layout.shape[3];
        let first = |spec: &mut AttentionSpec| {
            spec.value_scale.iter_mut().for_each(|scale| scale.layout.strides[3] = 0);
        };
        (blocks > 1).then(|| misread(case, first))?
    }),
    ("scales of keys left out", |case| {
        case.spec.key_scale?;
        let ones = |data: &mut AttentionData| {
            if let Some(scales) = &mut data.terms.key_scale {
                *scales = TensorData::from_f32(scales.as_ref().element(), vec![1.0; scales.as_ref().len()]);
            }
        };
        wrong(case, |_| {}, ones)
    }),
    ("the first entry's pages for all of the batch", |case| {
        let table_len = case.spec.paged?.table_len;
        let several = case.problem().batch() > 1 && !case.spec.kv_lens;
        let first = |data: &mut AttentionData| {
            if let Some(table) = &mut data.terms.block_table {
                let (first, others) = table.split_at_mut(table_len);
                others.chunks_exact_mut(table_len).for_each(|other| other.copy_from_slice(first));
            }
        };
        several.then(|| wrong(case, |_| {}, first))?
    }),
    ("two pages of an entry swapped", |case| {
        let paged = case.spec.paged?;
        let fits = paged.kv_len >= 2 * case.spec.key.layout.shape[2] && !case.spec.kv_lens;
        // as a set of keys the same: it takes a term that counts positions
        let swap = |data: &mut AttentionData| data.terms.block_table.iter_mut().for_each(|table| table.swap(0, 1));
        (fits && case.spec.bias.is_some()).then(|| wrong(case, |_| {}, swap))?
    }),
    ("positions counted within a page", |case| {
        let page_len = u32::try_from(case.spec.key.layout.shape[2]).ok()?;
        let asked = case.spec.paged.is_some() && case.spec.window_left.is_some_and(|left| left > page_len);
        asked.then(|| misread(case, |spec| spec.window_left = Some(page_len)))?
    }),
    ("output off by 1e-5 of itself", |case| {
        let mut output = right(case)?;
        let TensorData::F32(numbers) = &mut output.output else { return None };
        numbers.iter_mut().for_each(|x| *x *= 1.0 + 1e-5);
        Some(output)
    }),
    ("lse to base 2", |case| {
        let mut output = right(case)?;
        output.lse.as_mut()?.iter_mut().for_each(|lse| *lse *= std::f32::consts::LOG2_E);
        Some(output)
    }),
    ("scores of another stage", |case| {
        let stage = case.spec.scores.filter(|&stage| stage != ScoreStage::Probs)?;
        let other = if stage == ScoreStage::Masked { ScoreStage::Capped } else { ScoreStage::Masked };
        misread(case, |spec| spec.scores = Some(other))
    }),
    ("NaN where there is a number", |case| {
        let mut output = right(case)?;
        let TensorData::F32(numbers) = &mut output.output else { return None };
        *numbers.last_mut()? = f32::NAN;
        Some(output)
    }),
];

#[test]
fn every_planted_fault_is_rejected() {
    let cases = cases::all();
    for (name, fault) in FAULTS {
        let mut planted = 0;
        let rejected = cases.iter().find(|case| {
            fault(case).is_some_and(|output| {
                planted += 1;
                let report = verify(&case.problem(), &case.data().as_inputs(), &output).expect("the inputs fit");
                !report.passed()
            })
        });
        assert!(rejected.is_some(), "{name}: planted in {planted} cases, rejected in none");
    }
}

fn right(case: &Case) -> Option<AttentionOutput> {
    misread(case, |_| {})
}

/// The result of a problem read wrongly.
fn misread(case: &Case, change: impl FnOnce(&mut AttentionSpec)) -> Option<AttentionOutput> {
    wrong(case, change, |_| {})
}

/// The result of a problem and data read wrongly.
fn wrong(
    case: &Case,
    spec: impl FnOnce(&mut AttentionSpec),
    data: impl FnOnce(&mut AttentionData),
) -> Option<AttentionOutput> {
    let mut changed = case.data();
    data(&mut changed);
    let case = case.clone().spec(spec);
    Some(cpu::attention(&case.problem(), &changed.as_inputs()).expect("the data fits the changed problem"))
}

/// Two ranges of keys, the second changed and merged so often.
fn ranged(
    case: &Case,
    times: usize,
    change: impl FnOnce(&mut AttentionSpec, &mut AttentionData),
) -> Option<AttentionOutput> {
    if split::dense(case) != *case || case.problem().kv_len() < 2 {
        return None;
    }
    let [first, second] = split::at(case, case.problem().kv_len() / 2);
    let (mut spec, mut data) = (second.problem.spec().clone(), second.data);
    change(&mut spec, &mut data);
    let second = AttentionProblem::new(spec).expect("the whole case is sound");
    let mut states = vec![cpu::attention(&first.problem, &first.data.as_inputs()).expect("the data fits")];
    let second = cpu::attention(&second, &data.as_inputs()).expect("the data fits");
    states.extend(std::iter::repeat_n(second, times));
    let numbers: Vec<_> = states.iter().map(|state| (state.output.to_f32(), state.lse.as_deref())).collect();
    let parts: Option<Vec<_>> =
        numbers.iter().map(|(output, lse)| Some(PartialState { output, lse: (*lse)? })).collect();
    let merged = cpu::merge(&parts?, case.problem().v_head_dim()).expect("the parts fit");
    Some(AttentionOutput {
        output: TensorData::F32(merged.output),
        lse: Some(merged.lse),
        row_state: None,
        scores: None,
    })
}

fn drop_keys(case: &Case, keys: impl FnOnce(usize) -> Option<std::ops::Range<usize>>) -> Option<AttentionOutput> {
    let kv_len = case.problem().kv_len();
    let keys = keys(kv_len).filter(|_| case.spec.mask.is_none())?;
    wrong(
        case,
        |spec| spec.mask = Some(Layout::bhld([1, 1, 1, kv_len])),
        |data| data.terms.mask = Some((0..kv_len).map(|j| !keys.contains(&j)).collect()),
    )
}

/// Query head `h` reads head `h % kv_heads`, not `h / group_size`.
fn swapped_heads(case: &Case) -> Option<AttentionOutput> {
    let problem = case.problem();
    let (heads, kv_heads) = (problem.q_heads(), problem.kv_heads());
    if heads == kv_heads || kv_heads == 1 {
        return None;
    }
    let spread = |from: &TensorData, layout: Layout| {
        let [batch, _, len, dim] = layout.shape;
        let wide = [batch, heads, len, dim];
        let numbers = places(wide).map(|[b, h, j, d]| from.as_ref().get(layout.index([b, h % kv_heads, j, d])));
        (TensorData::from_f32(from.as_ref().element(), numbers.collect()), Layout::bhld(wide))
    };
    let data = case.data();
    let (key, key_layout) = spread(&data.key, case.spec.key.layout);
    let (value, value_layout) = spread(&data.value, case.spec.value.layout);
    let layouts = |spec: &mut AttentionSpec| (spec.key.layout, spec.value.layout) = (key_layout, value_layout);
    wrong(case, layouts, |data| (data.key, data.value) = (key, value))
}

/// Online softmax over blocks of 64 keys that keeps what it has summed when a block raises the maximum.
fn no_rescale(case: &Case) -> Option<AttentionOutput> {
    let plain =
        case.problem().group_size() == 1 && case.spec.output.layout == Layout::bhld(case.spec.output.layout.shape);
    if !plain || case.spec.sinks || case.spec.output.element != Element::F32 {
        return None;
    }
    let problem = case.clone().spec(|spec| spec.scores = Some(ScoreStage::Masked)).problem();
    let data = case.data();
    let mut output = cpu::attention(&problem, &data.as_inputs()).expect("the data fits");
    let (kv_len, v_head_dim) = (problem.kv_len(), problem.v_head_dim());
    let scores = output.scores.take()?;
    let of = problem.spec().value.layout;
    let mut numbers = Vec::new();
    for (row, scores) in scores.chunks(kv_len.max(1)).enumerate() {
        let [b, h] = [row / problem.q_len() / problem.q_heads(), row / problem.q_len() % problem.q_heads()];
        let (mut max, mut sum, mut acc) = (f32::NEG_INFINITY, 0.0, vec![0.0; v_head_dim]);
        for (block, scores) in scores.chunks(64).enumerate() {
            max = scores.iter().copied().fold(max, f32::max);
            for (j, score) in scores.iter().enumerate().filter(|(_, score)| **score != f32::NEG_INFINITY) {
                let weight = (score - max).exp();
                sum += weight;
                for (d, x) in acc.iter_mut().enumerate() {
                    *x += weight * data.value.as_ref().get(of.index([b, h, 64 * block + j, d]));
                }
            }
        }
        numbers.extend(acc.iter().map(|x| if sum == 0.0 { 0.0 } else { x / sum }));
    }
    output.output = TensorData::F32(numbers);
    output.scores = None;
    case.spec.scores.is_none().then_some(output)
}
