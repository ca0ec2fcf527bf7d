//! The machine that a result comes from, for whoever compares it with another.

use sysinfo::{CpuRefreshKind, RefreshKind, System};

/// What is written where a build does not know it.
const UNKNOWN: &str = "unknown";

/// The processor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cpu {
    pub(crate) model: String,
    /// Cores of all sockets, where the system tells.
    pub(crate) cores: Option<usize>,
    /// Threads that computations run on.
    pub(crate) threads: usize,
}

impl Cpu {
    /// Asks the system.
    pub(crate) fn of_this_machine() -> Self {
        let system = System::new_with_specifics(RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing()));
        let model = system.cpus().first().map(|cpu| cpu.brand().trim().to_owned()).filter(|model| !model.is_empty());
        Self {
            model: model.unwrap_or_else(|| UNKNOWN.to_owned()),
            cores: System::physical_core_count(),
            threads: rayon::current_num_threads(),
        }
    }
}
