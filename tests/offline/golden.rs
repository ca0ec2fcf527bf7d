//! Results of others: ONNX's cases, and attention of trained models.

use crate::common::{check, onnx, real};
use crate::table::{all, implementations};

#[test]
fn onnx_cases() {
    let cases = onnx::all();
    assert_eq!(cases.len(), 93, "ONNX 1.23.2 has 93 cases of Attention");
    for (name, run) in implementations() {
        all(&name, &cases, |case| check::onnx(case, &run));
    }
}

#[test]
fn attention_of_trained_models() {
    let captures = real::all();
    for (name, run) in implementations() {
        all(&name, &captures, |capture| check::capture(capture, &run, check::Extent::Whole));
    }
}
