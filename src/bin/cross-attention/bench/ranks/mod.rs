//! `bench --mpi`: keys shared out over ranks, and what each way of bringing their results together takes.

mod flags;
#[cfg(feature = "mpi")]
mod report;
#[cfg(feature = "mpi")]
mod run;
#[cfg(feature = "mpi")]
mod shard;

pub(super) use flags::RankFlags;
#[cfg(feature = "mpi")]
pub(super) use run::bench;

/// A program that was built without MPI says so.
#[cfg(not(feature = "mpi"))]
pub(super) const fn bench(
    _args: &super::Args,
    _started: std::time::Instant,
    _terminal: &mut crate::terminal::Terminal,
) -> Result<bool, crate::error::Error> {
    Err(crate::error::Error::Bench(super::error::BenchError::NoMpi))
}
