//! Faults of drivers that trials run into: data beside the case table.

use std::collections::BTreeMap;
use std::sync::Mutex;

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
    /// Whether a kernel may get by without meeting it. Where none may, a trial that passes fails the run; where some may, a
    /// trial that all kernels pass does.
    pub(crate) may_pass: bool,
}

const KNOWN: [KnownFault; 1] = [KnownFault {
    adapter: "SwiftShader",
    driver: "",
    trials: &[
        "wild_sinks_kv_lens",
        "wild_sinks_decode",
        "wild_sinks_blank_rows",
        "nan_in_query",
        "nan_in_query_of_72",
        "nan_in_key",
        "nan_in_bias",
        "nan_in_f16_key",
        "nan_in_key_scale",
        "beams_nan_in_key",
        "inf_in_bias",
    ],
    // in outputs, in chosen weights
    messages: &["want NaN", "should be NaN"],
    about: "its exp gives a number for NaN, as WGSL allows",
    may_pass: true,
}];

/// For each adapter and trial: with how many kernels it failed as it is known to, and with how many it passed.
static MET: Mutex<BTreeMap<(String, String), [usize; 2]>> = Mutex::new(BTreeMap::new());

pub(crate) fn met(adapter: &Adapter, trial: &str, passed: bool) {
    let mut met = MET.lock().expect("counting does not fail");
    met.entry((adapter.slug.clone(), trial.to_owned())).or_default()[usize::from(passed)] += 1;
}

/// Trials that are listed and that every kernel passed: to be taken off the list.
pub(crate) fn gone() -> Vec<String> {
    let met = MET.lock().expect("counting does not fail");
    let gone = met.iter().filter(|(_, [failed, passed])| *failed == 0 && *passed > 0);
    gone.map(|((slug, trial), _)| format!("{slug}: {trial}")).collect()
}

pub(crate) fn find(adapter: &Adapter, trial: &str) -> Option<&'static KnownFault> {
    let info = adapter.context.info();
    // a case whose keys are cut meets what it meets whole
    let trial = trial.strip_prefix("cut_keys_").unwrap_or(trial);
    KNOWN.iter().find(|fault| {
        info.name.contains(fault.adapter) && info.driver_info.contains(fault.driver) && fault.trials.contains(&trial)
    })
}
