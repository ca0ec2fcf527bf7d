//! Prepared contexts on the CPU.

use cross_attention::Device;

use crate::common::contexts;

#[test]
fn every_storage() {
    for device in [Device::Cpu, Device::Oracle] {
        contexts::all(&device).expect("right");
    }
}

#[test]
fn fifty_calls() {
    contexts::fifty_calls(&Device::Cpu).expect("the same bits");
}

#[test]
fn refusals() {
    contexts::refusals(&Device::Cpu).expect("all are refused");
}
