//! Keys cut over ranges because one head's do not fit a binding, and blocks of keys left out under a mask.

use cross_attention::{DeviceCaps, Element, Kernel, Layout, Plan, TensorData, TensorSpec};
use libtest_mimic::Trial;
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;

use super::adapters::Adapter;
use super::parts::planned_for;
use super::trials::{run_with, trial};
use crate::common::case::Case;
use crate::common::{cases, check, random};

/// Every term, position and rule that a range of keys could get wrong, and rows that see nothing of a range.
const CASES: [&str; 54] = [
    "kv_len_129",
    "long_decode",
    "heads_gqa_of_8",
    "causal_gqa_odd",
    "causal_end_of_keys",
    "causal_square_65",
    "alibi_causal",
    "alibi_end_of_keys",
    "window_both_end_of_keys",
    "window_over_blocks",
    "kv_lens",
    "kv_lens_zero",
    "ranges_segments",
    "ranges_wild",
    "mask_blank_rows",
    "mask_sparse",
    "masks_together",
    "bias_f16",
    "bias_forbids_rows",
    "layout_blhd",
    "layout_columns",
    "layout_strided_dim",
    "layout_bias_and_mask",
    "f16_wide",
    "f16_odd_strides",
    "f16_overflow",
    "sinks_empty_rows",
    "wild_sinks_blank_rows",
    "rising_row",
    "logits_all_1e4",
    "nan_in_value",
    "inf_in_bias",
    "poison_behind_kv_lens",
    "poison_in_f16_bias",
    "scores_scaled_all_terms",
    "scores_masked_all_terms",
    "scores_probs_all_terms",
    "beams_terms",
    "long_3000",
    "long_causal_top_left",
    "long_window",
    "long_ranges_segments",
    "long_mask_sparse",
    "long_kv_lens",
    "long_all_terms",
    "padded_1e9_short_rows",
    "padded_1e9_long_equal_rows",
    "padded_min_short_equal_rows",
    "padded_min_long_rows",
    "common_1e4_long_bias",
    "common_1e6_short_bias",
    "common_1e6_long_keys",
    "values_3e38_long",
    "wide_258_1_300",
];

/// Random cases a kernel, half of them with many keys.
const RANDOM_CASES: usize = 12;

pub(crate) fn trials(adapter: &Adapter, kernel: Kernel) -> Vec<Trial> {
    let cases = cases();
    let mut trials = Vec::new();
    for case in &cases {
        let (on, case) = (adapter.clone(), case.clone());
        let caps = one_range_fits(adapter.context.caps(), &case, 2);
        let name = format!("cut_keys_{}", case.name);
        trials.push(trial(adapter, kernel.name(), &name, move || planned_for(&on, kernel, &caps, &case)));
    }
    let mut runner = TestRunner::new(random::config(1));
    let (short, long) = (random::case(), random::long_case());
    let mut n = 0;
    let random = std::iter::repeat_with(|| {
        n += 1;
        let tree = if n % 2 == 0 {
            short.new_tree(&mut runner).map(|tree| tree.current())
        } else {
            long.new_tree(&mut runner).map(|tree| tree.current())
        };
        tree.expect("nothing is filtered out")
    });
    // in many layouts not even one key fits
    let cut = random.take(40 * RANDOM_CASES).filter_map(|case| {
        let caps = one_range_fits(adapter.context.caps(), &case, 3);
        let plan = Plan::new(&case.problem(), &caps, Some(kernel)).ok()?;
        (plan.key_parts() > 1).then_some((case, caps))
    });
    for (n, (case, caps)) in cut.take(RANDOM_CASES).enumerate() {
        let on = adapter.clone();
        let name = format!("cut_keys_random_{n:02}");
        trials.push(trial(adapter, kernel.name(), &name, move || planned_for(&on, kernel, &caps, &case)));
    }
    let on = adapter.clone();
    trials.push(trial(adapter, kernel.name(), "keys_are_cut", move || keys_are_cut(&on, kernel, &cases)));
    if kernel == Kernel::Tiled {
        let on = adapter.clone();
        trials.push(trial(adapter, kernel.name(), "mask_as_bias", move || mask_as_bias(&on, kernel)));
    }
    trials
}

fn cases() -> Vec<Case> {
    let table = cases::all();
    let named = |name: &str| table.iter().find(|case| case.name == name).expect("a case of the table").clone();
    CASES.map(named).into()
}

/// Capabilities with bindings for about one `of_keys`-th of the keys of one head.
fn one_range_fits(of: &DeviceCaps, case: &Case, of_keys: usize) -> DeviceCaps {
    let span = |tensor: &TensorSpec| {
        let [_, _, len, dim] = tensor.layout.shape;
        let head = Layout { shape: [1, 1, len, dim], strides: tensor.layout.strides, offset: 0 };
        head.extent().expect("cases are small") * tensor.element.size_bytes()
    };
    let bytes = span(&case.spec.key).max(span(&case.spec.value)) / of_keys;
    DeviceCaps { max_storage_buffer_binding_size: bytes as u64, ..of.clone() }
}

/// The limits above cut the keys of nearly all cases, else those trials guard nothing. Where bindings begin at multiples of
/// 256 bytes, ranges are rounded up, and one case more stays whole.
fn keys_are_cut(adapter: &Adapter, kernel: Kernel, cases: &[Case]) -> Result<(), String> {
    let uncut = |case: &&Case| {
        // what the kernel refuses uncut is another trial's concern
        let taken = kernel.supports(&case.problem(), adapter.context.caps()).is_ok();
        let caps = one_range_fits(adapter.context.caps(), case, 2);
        taken && !Plan::new(&case.problem(), &caps, Some(kernel)).is_ok_and(|plan| plan.key_parts() > 1)
    };
    let names: Vec<&str> = cases.iter().filter(uncut).map(|case| case.name.as_str()).collect();
    let most = if adapter.context.caps().min_storage_buffer_offset_alignment < 256 { 4 } else { 5 };
    if names.len() <= most { Ok(()) } else { Err(format!("keys are not cut in {}", names.join(", "))) }
}

/// A boolean mask, under which blocks of keys may be left out, gives the bits of a bias of 0 and -inf, under which none is.
fn mask_as_bias(adapter: &Adapter, kernel: Kernel) -> Result<(), String> {
    let table = cases::all();
    for name in ["mask_block_diagonal", "mask_segments_sinks", "mask_sparse"] {
        let case = table.iter().find(|case| case.name == name).expect("a case of the table");
        let data = case.data();
        let layout = case.spec.mask.expect("it has a mask");
        // a bias in both, for without one scores may be taken in another way
        let masked = case.clone().spec(|spec| spec.bias = Some(TensorSpec::f32(layout)));
        let mut with_zeros = data.clone();
        let zeros = vec![0.0; data.terms.mask.as_ref().map_or(0, Vec::len)];
        with_zeros.terms.bias = Some(TensorData::from_f32(Element::F32, zeros));
        let masked = run_with(adapter, kernel)(&masked.problem(), &with_zeros.as_inputs())?;
        let biased = case.clone().spec(|spec| {
            spec.mask = None;
            spec.bias = Some(TensorSpec::f32(layout));
        });
        let mut as_bias = data.clone();
        let mask = as_bias.terms.mask.take().expect("it has a mask");
        let numbers = mask.iter().map(|&allowed| if allowed { 0.0 } else { f32::NEG_INFINITY }).collect();
        as_bias.terms.bias = Some(TensorData::from_f32(Element::F32, numbers));
        let biased = run_with(adapter, kernel)(&biased.problem(), &as_bias.as_inputs())?;
        check::same_bits(&masked, &biased).map_err(|error| format!("{case}\nas a bias: {error}"))?;
    }
    Ok(())
}
