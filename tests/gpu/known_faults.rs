//! Faults of drivers that trials run into: data beside the case table.

use super::adapters::Adapter;

pub(crate) struct KnownFault {
    /// Parts of the adapter's name and of its driver's version that are affected.
    adapter: &'static str,
    driver: &'static str,
    /// The names of the trials, without adapter and kernel.
    trials: &'static [&'static str],
    /// Parts of the failure's message, one of which is there.
    pub(crate) messages: &'static [&'static str],
    /// What is at fault, or where it was reported.
    pub(crate) about: &'static str,
    /// Whether a kernel may get by without meeting it. Where none may, a trial that passes asks to be taken off the list.
    pub(crate) may_pass: bool,
}

const KNOWN: [KnownFault; 1] = [KnownFault {
    adapter: "SwiftShader",
    driver: "",
    trials: &[
        "wild_sinks_kv_lens",
        "wild_sinks_decode",
        "wild_sinks_blank_rows",
        "nan_in_key",
        "nan_in_query",
        "nan_in_bias",
        "nan_in_f16_key",
        "beams_nan_in_key",
        "beams_nan_in_query",
        "inf_in_bias",
    ],
    // in outputs, in chosen weights
    messages: &["want NaN", "should be NaN"],
    about: "its exp gives a number for NaN, as WGSL allows",
    may_pass: true,
}];

pub(crate) fn find(adapter: &Adapter, trial: &str) -> Option<&'static KnownFault> {
    let info = adapter.context.info();
    // a case whose keys are cut meets what it meets whole
    let trial = trial.strip_prefix("cut_keys_").unwrap_or(trial);
    KNOWN.iter().find(|fault| {
        info.name.contains(fault.adapter) && info.driver_info.contains(fault.driver) && fault.trials.contains(&trial)
    })
}
