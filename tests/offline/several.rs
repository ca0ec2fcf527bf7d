//! Several sources on the CPU.

use cross_attention::Device;
use cross_attention::sources::{Combine, Gate};
use proptest::prelude::*;

use crate::common::several::{self, Asked};
use crate::properties::config;

#[test]
fn every_term() {
    for device in [Device::Cpu, Device::Oracle] {
        for combine in [Combine::Softmax, Combine::Sum] {
            for gate in [Gate::None, Gate::Scalar, Gate::Heads] {
                for asked in several::fixed(combine, gate) {
                    several::check(&device, &asked).map_err(|error| format!("{asked:?}: {error}")).expect("right");
                }
            }
        }
    }
}

#[test]
fn bias_slopes_and_sinks() {
    for device in [Device::Cpu, Device::Oracle] {
        several::terms(&device).expect("right");
    }
}

#[test]
fn a_weight_of_0_leaves_a_source_out() {
    for device in [Device::Cpu, Device::Oracle] {
        several::left_out(&device).expect("right");
    }
}

#[test]
fn refusals() {
    several::refusals(&Device::Cpu).expect("all are refused");
}

fn asked() -> impl Strategy<Value = Asked> {
    let combine = prop_oneof![Just(Combine::Softmax), Just(Combine::Sum)];
    let gate = prop_oneof![Just(Gate::None), Just(Gate::Scalar), Just(Gate::Heads)];
    let source = (0..40usize, any::<[bool; 7]>());
    (proptest::collection::vec(source, 1..5), combine, gate, 0..1_000_000u64).prop_map(
        |(sources, combine, gate, seed)| {
            let (lens, terms) = sources.into_iter().unzip();
            Asked { lens, combine, gate, terms, seed }
        },
    )
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn random_splits(asked in asked()) {
        several::check(&Device::Cpu, &asked).map_err(TestCaseError::fail)?;
    }
}
