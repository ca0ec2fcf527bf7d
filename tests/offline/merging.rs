//! Attention over the keys in parts, merged, is the attention over all of them.

use cross_attention::cpu::{self, MergedState, PartialState};
use cross_attention::{AttentionData, AttentionProblem};
use proptest::prelude::*;

use crate::common::case::Case;
use crate::common::recipe::Scores;
use crate::common::{cases, random, split};
use crate::properties::config;

fn run(problem: &AttentionProblem, data: &AttentionData) -> MergedState {
    let output = cpu::attention(problem, &data.as_inputs()).expect("the data fits");
    MergedState { output: output.output.to_f32(), lse: output.lse.expect("asked for") }
}

fn borrowed(state: &MergedState) -> PartialState<'_> {
    PartialState { output: &state.output, lse: &state.lse }
}

fn merge(states: &[&MergedState], v_head_dim: usize) -> MergedState {
    let parts: Vec<_> = states.iter().map(|state| borrowed(state)).collect();
    cpu::merge(&parts, v_head_dim).expect("parts of one attention fit each other")
}

fn split_and_merge(case: &Case, at: usize) -> Result<(), String> {
    let v_head_dim = case.problem().v_head_dim();
    let whole = run(&split::dense(case).problem(), &case.data());
    let [a, b] = split::at(case, at).map(|part| run(&part.problem, &part.data));
    let merged = merge(&[&a, &b], v_head_dim);
    split::compare(case, [&merged.output, &merged.lse], [&whole.output, &whole.lse])
        .map_err(|error| format!("split at {at}: {error}"))
}

#[test]
fn any_split_of_the_table() {
    // nor can parts be weighed by an lse that a sink made infinite or NaN
    let has_nan = |case: &Case| !case.recipe.planted.is_empty() || case.recipe.wild_sinks;
    let mut failures = Vec::new();
    for case in cases::all().iter().filter(|case| !has_nan(case)) {
        let kv_len = case.problem().kv_len();
        for at in [0, 1, kv_len / 2, 64, kv_len] {
            failures.extend(split_and_merge(case, at).err());
        }
    }
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n\n"));
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_split_of_a_random_case(case in random::case(), at in 0..150usize) {
        split_and_merge(&case, at).map_err(TestCaseError::fail)?;
    }
}

#[test]
fn keys_cut_out_of_a_longer_buffer() {
    // as it is done in practice: each part is a view of the same keys and values
    let case = Case::new("merge_views", "parts that are views", 2, [4, 2], [3, 100], [16, 12]);
    let data = case.data();
    let whole = run(&case.problem(), &data);
    let view = |from: usize, to: usize| {
        let case = case.clone().spec(|spec| {
            for tensor in [&mut spec.key, &mut spec.value] {
                tensor.layout.offset = from * tensor.layout.strides[2];
                tensor.layout.shape[2] = to - from;
            }
        });
        run(&case.problem(), &data)
    };
    let parts = [view(0, 7), view(7, 64), view(64, 64), view(64, 100)];
    let merged = merge(&parts.each_ref(), 12);
    split::compare(&case, [&merged.output, &merged.lse], [&whole.output, &whole.lse]).unwrap();
}

#[test]
fn order_and_grouping_do_not_matter() {
    let case = Case::new("merge_order", "grouping of parts", 1, [2, 2], [7, 90], [16, 8]).drawn(Scores::Rising(0.3));
    let [first, rest] = split::at(&case, 30);
    let [second, third] = split::at(&case, 60);
    // keys 30..60: what is in both `rest` and `second`
    let mut middle = rest.data.clone();
    middle.terms.row_end = second.data.terms.row_end.clone();
    let a = run(&first.problem, &first.data);
    let b = run(&rest.problem, &middle);
    let c = run(&third.problem, &third.data);
    let whole = run(&case.problem(), &case.data());
    let left = merge(&[&merge(&[&a, &b], 8), &c], 8);
    let right = merge(&[&a, &merge(&[&b, &c], 8)], 8);
    for merged in [&left, &right, &merge(&[&c, &a, &b], 8), &merge(&[&b, &c, &a], 8)] {
        split::compare(&case, [&merged.output, &merged.lse], [&whole.output, &whole.lse]).unwrap();
    }
}

#[test]
fn empty_states_are_neutral() {
    let case = Case::new("merge_empty", "states without keys", 1, [2, 2], [5, 20], [16, 8]).mask("11qk").blank_rows();
    let whole = run(&case.problem(), &case.data());
    let rows = whole.lse.len();
    let empty = MergedState { output: vec![f32::NAN; rows * 8], lse: vec![f32::NEG_INFINITY; rows] };
    for states in [[&whole, &empty], [&empty, &whole]] {
        let merged = merge(&states, 8);
        let bits = |state: &MergedState| state.output.iter().chain(&state.lse).map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&merged), bits(&whole));
    }
    let nothing = merge(&[&empty, &empty], 8);
    assert!(nothing.output.iter().all(|x| x.to_bits() == 0));
    assert!(nothing.lse.iter().all(|&lse| lse == f32::NEG_INFINITY));
}
