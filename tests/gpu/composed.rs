//! What is built on attention: pools of passages, several sources, prepared contexts; as on the CPU.

use cross_attention::pool::Storage;
use cross_attention::sources::{Combine, Gate};
use cross_attention::{Device, Element};
use libtest_mimic::Trial;

use super::adapters::Adapter;
use super::trials::trial;
use crate::common::contexts;
use crate::common::pools::{self, Step};
use crate::common::several;

type Check = fn(&Device) -> Result<(), String>;

const POOL: [(&str, Check); 8] = [
    ("lists", |device| pools::lists(device, Storage::Device, Element::F32)),
    ("lists_f16", |device| pools::lists(device, Storage::Device, Element::F16)),
    ("lists_from_host", |device| pools::lists(device, Storage::Host, Element::F32)),
    ("freed_pages", |device| pools::poison(device, Storage::Device)),
    ("freed_pages_on_host", |device| pools::poison(device, Storage::Host)),
    ("storages_agree", pools::storages_agree),
    ("refusals", pools::refusals),
    ("sequence", |device| pools::sequence(device, Storage::Device, &steps())),
];

const CONTEXTS: [(&str, Check); 3] =
    [("all", contexts::all), ("fifty_calls", contexts::fifty_calls), ("refusals", contexts::refusals)];

/// Appends, removals and calls in turns that return nowhere soon.
fn steps() -> Vec<Step> {
    let step = |n: usize| match n * n % 7 {
        0 | 2 => Step::Append(n * 11 % 31),
        1 => Step::Remove(n * 5),
        _ => Step::Attend(n),
    };
    (0..40).map(|n| if n < 4 { Step::Append(n * 9) } else { step(n) }).collect()
}

pub(crate) fn trials(adapter: &Adapter) -> Vec<Trial> {
    let group = |name: &'static str, checks: &[(&'static str, Check)]| {
        let trials = checks.iter().map(|&(check_name, check)| {
            let device = Device::Gpu(adapter.context.clone());
            trial(adapter, name, check_name, move || check(&device))
        });
        trials.collect::<Vec<_>>()
    };
    let mut trials = group("pool", &POOL);
    trials.extend(group("sources", &[("refusals", several::refusals)]));
    trials.extend(group("contexts", &CONTEXTS));
    for combine in [Combine::Softmax, Combine::Sum] {
        for gate in [Gate::None, Gate::Scalar, Gate::Heads] {
            let device = Device::Gpu(adapter.context.clone());
            let name = format!("{combine:?}_{gate:?}").to_lowercase();
            trials.push(trial(adapter, "sources", &name, move || {
                several::fixed(combine, gate)
                    .iter()
                    .try_for_each(|asked| several::check(&device, asked).map_err(|error| format!("{asked:?}: {error}")))
            }));
        }
    }
    trials
}
