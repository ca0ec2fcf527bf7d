//! Prepared contexts on the CPU.

use cross_attention::{Device, Element};

use crate::common::{contexts, growing};

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

#[test]
fn growing_by_tokens() {
    for device in [Device::Cpu, Device::Oracle] {
        for element in Element::FLOATS {
            growing::steps(&device, element).expect("right");
        }
        growing::refusals(&device).expect("all are refused");
    }
}
