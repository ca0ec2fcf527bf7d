//! Why a sharded attention was refused, or failed: the same on every rank.

use mpi::topology::Rank;

/// Why an attention over several ranks was refused or failed. Ranks compare what they have before they wait for one another, so
/// every rank gets the same error; only [`Thread`](Self::Thread) is of one rank alone.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ShardedError {
    /// A rank refused its own part, or failed in it.
    #[error("rank {rank}: {message}")]
    Rank {
        /// The first rank that did.
        rank: Rank,
        /// What its error says.
        message: String,
    },
    /// Two ranks ask for different attentions.
    #[error("{what} is {found} on rank {rank}, needs {wanted} as on the ranks before")]
    Disagree {
        /// What differs.
        what: String,
        /// The first rank that differs from those before it.
        rank: Rank,
        /// What it has.
        found: String,
        /// What those have.
        wanted: String,
    },
    /// A rank that takes part in no sharded attention was named.
    #[error("there is no rank {rank}, needs 0 to {last}")]
    NoRank {
        /// The rank that was named.
        rank: Rank,
        /// The last one that there is.
        last: Rank,
    },
    /// An option that an attention over shards does not have.
    #[error("{name} is not there over shards of the keys: {reason}")]
    NotSharded {
        /// Of the spec.
        name: &'static str,
        /// What would do.
        reason: &'static str,
    },
    /// Queries and results that do not go together with a way.
    #[error("way {way} does not go with {what}: {reason}")]
    Way {
        /// The way that was asked for.
        way: &'static str,
        /// What it does not go with.
        what: &'static str,
        /// Why, and what would do.
        reason: &'static str,
    },
    /// The keys of all ranks are more than positions can count.
    #[error("{what} takes {found} keys in all, at most {max} do where terms know positions")]
    TooMany {
        /// What needs positions.
        what: &'static str,
        /// Keys of all ranks.
        found: u64,
        /// Keys that would do.
        max: u64,
    },
    /// A tensor is missing, or there is one too many, on this rank.
    #[error("{name} {problem}")]
    Given {
        /// Which tensor.
        name: &'static str,
        /// What is wrong, and what would do.
        problem: &'static str,
    },
    /// Queries are of each rank's own, and a bias or mask does not have the rows of all of them.
    #[error(
        "{name} has {found} rows; with queries of each rank's own it lies with the keys, and needs 1 row or {wanted}: those of \
         all ranks, in rank order"
    )]
    Rows {
        /// `bias` or `mask`.
        name: &'static str,
        /// Rows of its layout.
        found: usize,
        /// Rows of all ranks together.
        wanted: usize,
    },
    /// MPI may not be called on this thread. Nothing was sent, so that no other rank hears of it.
    #[error(
        "MPI was begun with threading level {level}, which lets only the thread that began it call it; call from there, or begin it \
         by initialize_with_threading(Threading::Serialized)"
    )]
    Thread {
        /// `single` or `funneled`.
        level: &'static str,
    },
    /// A message of a single row would be longer than MPI counts.
    #[error("a row of {width} numbers is more than a message holds, at most {max}")]
    Width {
        /// Numbers of a row.
        width: usize,
        /// Numbers that would do.
        max: usize,
    },
}
