//! Faults of drivers that trials run into: data beside the case table.

use super::adapters::Adapter;

pub(crate) struct KnownFault {
    /// Parts of the adapter's name and of its driver's version that are affected.
    pub(crate) adapter: &'static str,
    pub(crate) driver: &'static str,
    /// The start of the trial's name after the adapter: `fused/head_dim_576`.
    pub(crate) trial: &'static str,
    /// A part of the failure's message.
    pub(crate) message: &'static str,
    /// Where it was reported.
    pub(crate) link: &'static str,
}

/// None so far.
const KNOWN: [KnownFault; 0] = [];

pub(crate) fn find(adapter: &Adapter, trial: &str) -> Option<&'static KnownFault> {
    let info = adapter.context.info();
    KNOWN.iter().find(|fault| {
        info.name.contains(fault.adapter) && info.driver_info.contains(fault.driver) && trial.starts_with(fault.trial)
    })
}
