//! Tests that need no GPU: the oracle and the CPU kernels over the case table, over data from others, and over
//! random specs; what is refused; and that the tolerance rejects faults.

#[path = "../common/mod.rs"]
mod common;

mod golden;
mod merging;
mod planted;
mod properties;
mod refusals;
mod table;
