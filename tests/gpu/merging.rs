//! Merging on the device: partial attentions of a kernel, merged, are the whole; and as the CPU merges them.

use cross_attention::cpu::{self, MergedState, PartialState};
use cross_attention::{AttentionData, AttentionProblem, Kernel};
use libtest_mimic::Trial;

use super::adapters::Adapter;
use super::trials::{message, run_with, trial};
use crate::common::case::Case;
use crate::common::{cases, split};

const GROUP: &str = "merge";

/// Cases whose rows have keys on both sides of a split, on one, and on none.
const CASES: [&str; 9] = [
    "kv_len_129",
    "rising_row",
    "dominant_last_of_block",
    "sinks",
    "mask_blank_rows",
    "causal_gqa_odd",
    "kv_lens_zero",
    "logits_all_1e4",
    "head_dim_5_v_320",
];

pub(crate) fn trials(adapter: &Adapter) -> Vec<Trial> {
    let table = cases::all();
    let named = |name: &str| table.iter().find(|case| case.name == name).expect("a case of the table").clone();
    let mut trials = Vec::new();
    for case in CASES.map(named) {
        let on = adapter.clone();
        let name = format!("split_{}", case.name);
        trials.push(trial(adapter, GROUP, &name, move || split_and_merge(&on, &case)));
    }
    let on = adapter.clone();
    trials.push(trial(adapter, GROUP, "empty_states", move || empty_states(&on)));
    let on = adapter.clone();
    trials.push(trial(adapter, GROUP, "many_parts", move || many_parts(&on)));
    let on = adapter.clone();
    trials.push(trial(adapter, GROUP, "no_rows", move || {
        let merged = merge(&on, &[&MergedState { output: vec![], lse: vec![] }; 2], 8)?;
        if merged.lse.is_empty() && merged.output.is_empty() { Ok(()) } else { Err(format!("{merged:?}")) }
    }));
    trials
}

fn state(adapter: &Adapter, problem: &AttentionProblem, data: &AttentionData) -> Result<MergedState, String> {
    let output = run_with(adapter, Kernel::Fused)(problem, &data.as_inputs())?;
    Ok(MergedState { output: output.output.to_f32(), lse: output.lse.ok_or("lse was asked for")? })
}

fn parts<'a>(states: &[&'a MergedState]) -> Vec<PartialState<'a>> {
    states.iter().map(|state| PartialState { output: &state.output, lse: &state.lse }).collect()
}

fn merge(adapter: &Adapter, states: &[&MergedState], v_head_dim: usize) -> Result<MergedState, String> {
    adapter.context.merge_blocking(&parts(states), v_head_dim).map_err(|error| message(&error))
}

fn split_and_merge(adapter: &Adapter, case: &Case) -> Result<(), String> {
    let v_head_dim = case.problem().v_head_dim();
    let whole = state(adapter, &split::dense(case).problem(), &case.data())?;
    for at in [0, 1, case.problem().kv_len() / 2, 64] {
        let [a, b] = split::at(case, at).map(|part| state(adapter, &part.problem, &part.data));
        let (a, b) = (a?, b?);
        let merged = merge(adapter, &[&a, &b], v_head_dim)?;
        let by_cpu = cpu::merge(&parts(&[&a, &b]), v_head_dim).map_err(|error| error.to_string())?;
        for (other, name) in [(&whole, "the whole"), (&by_cpu, "merged on the CPU")] {
            split::compare(case, [&merged.output, &merged.lse], [&other.output, &other.lse])
                .map_err(|error| format!("split at {at}, against {name}: {error}"))?;
        }
    }
    Ok(())
}

/// States without keys are neutral, whatever their output holds; rows without any key are zeros.
fn empty_states(adapter: &Adapter) -> Result<(), String> {
    let case = Case::new("merge_empty", "states without keys", 1, [2, 2], [5, 20], [16, 8]).mask("11qk").blank_rows();
    let whole = state(adapter, &case.problem(), &case.data())?;
    let rows = whole.lse.len();
    let empty = MergedState { output: vec![f32::NAN; rows * 8], lse: vec![f32::NEG_INFINITY; rows] };
    let bits = |state: &MergedState| state.output.iter().chain(&state.lse).map(|x| x.to_bits()).collect::<Vec<_>>();
    for states in [vec![&whole, &empty], vec![&empty, &whole], vec![&empty, &whole, &empty]] {
        let merged = merge(adapter, &states, 8)?;
        if bits(&merged) != bits(&whole) {
            return Err(format!("an empty state changed\n{whole:?}\nto\n{merged:?}"));
        }
    }
    let nothing = merge(adapter, &[&empty, &empty], 8)?;
    let zeros = MergedState { output: vec![0.0; rows * 8], lse: empty.lse.clone() };
    if bits(&nothing) == bits(&zeros) { Ok(()) } else { Err(format!("two empty states gave {nothing:?}")) }
}

/// One part for every key.
fn many_parts(adapter: &Adapter) -> Result<(), String> {
    let case = Case::new("merge_many", "one part for every key", 1, [3, 3], [7, 23], [8, 5]);
    let data = case.data();
    let whole = state(adapter, &case.problem(), &data)?;
    let single = |j: usize| {
        let key = case.clone().spec(|spec| {
            for tensor in [&mut spec.key, &mut spec.value] {
                tensor.layout.offset = j * tensor.layout.strides[2];
                tensor.layout.shape[2] = 1;
            }
        });
        state(adapter, &key.problem(), &data)
    };
    let states = (0..23).map(single).collect::<Result<Vec<_>, _>>()?;
    let merged = merge(adapter, &states.iter().collect::<Vec<_>>(), 5)?;
    split::compare(&case, [&merged.output, &merged.lse], [&whole.output, &whole.lse])
}
