//! Tests that need no GPU: the oracle and the CPU kernels over the case table, over data from others, and over
//! random specs; what is refused; and that the tolerance rejects faults.

#![expect(clippy::expect_used, reason = "a test that cannot go on stops")]

#[path = "../common/mod.rs"]
mod common;

mod backward;
#[cfg(feature = "native")]
mod contexts;
mod floors;
mod golden;
#[cfg(feature = "native")]
mod host;
#[cfg(feature = "native")]
mod joined;
#[cfg(all(feature = "layer", feature = "native"))]
mod layer;
mod merging;
mod needs;
mod plan;
mod planted;
#[cfg(feature = "native")]
mod pools;
mod probe;
mod properties;
mod refusals;
#[cfg(feature = "native")]
mod several;
mod shaders;
mod table;
mod tolerance;
#[cfg(feature = "tune")]
mod tune;
mod weights;
