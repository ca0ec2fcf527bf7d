//! Pools of passages on the CPU.

use cross_attention::pool::Storage;
use cross_attention::{Device, Element};
use proptest::prelude::*;

use crate::common::pools::{self, Step};
use crate::properties::config;

#[test]
fn lists() {
    for device in [Device::Cpu, Device::Oracle] {
        for element in Element::ALL {
            pools::lists(&device, Storage::Device, element).expect("right");
        }
    }
}

#[test]
fn freed_pages_hide_what_they_held() {
    pools::poison(&Device::Cpu, Storage::Host).expect("right");
}

#[test]
fn large_common_parts_and_caps() {
    for device in [Device::Cpu, Device::Oracle] {
        pools::large_and_capped(&device, Storage::Host).expect("right");
    }
}

#[test]
fn storages_agree() {
    pools::storages_agree(&Device::Cpu).expect("right");
}

#[test]
fn refusals_change_nothing() {
    pools::refusals(&Device::Cpu).expect("right");
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..30usize).prop_map(Step::Append),
        2 => any::<usize>().prop_map(Step::Remove),
        2 => (0..50usize).prop_map(Step::Attend),
    ]
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn sequences(steps in proptest::collection::vec(step(), 1..25)) {
        pools::sequence(&Device::Cpu, Storage::Host, &steps).map_err(TestCaseError::fail)?;
    }
}
