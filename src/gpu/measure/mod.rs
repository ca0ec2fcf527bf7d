//! What is measured of a device and of the host: times of attentions, roofs, the cost of a call.

mod host_cost;
mod peak;
mod timing;

pub use host_cost::HostCost;
pub use timing::KernelTiming;
#[cfg(feature = "tune")]
pub(crate) use timing::Stopwatch;
