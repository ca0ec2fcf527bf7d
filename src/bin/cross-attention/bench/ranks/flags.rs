//! The flags of `bench --mpi`, which are there with and without the feature.

use clap::ValueEnum;

/// Keys that are shared out over the ranks of an MPI run.
#[derive(Clone, Debug, clap::Args)]
pub(in crate::bench) struct RankFlags {
    /// Share the keys of each case out over the ranks that mpirun started (mpirun -n 4 cross-attention bench gqa --mpi), and
    /// time each way of bringing their results together
    #[arg(long, conflicts_with_all = ["file", "pages", "probs", "backward", "kernel", "tune_cache", "pipeline_cache", "plot"])]
    pub(in crate::bench) mpi: bool,
    /// Ways to time [default: all three]
    #[arg(long, value_enum, num_args = 1.., requires = "mpi", value_name = "WAY")]
    pub(in crate::bench) way: Vec<WayFlag>,
    /// Bring the result to every rank, and not to the first alone
    #[arg(long, requires = "mpi")]
    pub(in crate::bench) on_all: bool,
    /// Of the model's network: microseconds that an empty message takes [default: 5]
    #[arg(long, requires = "mpi", value_parser = positive, value_name = "US")]
    pub(in crate::bench) latency_us: Option<f64>,
    /// Of the model's network: gigabytes a second of a machine's link [default: 12.5]
    #[arg(long, requires = "mpi", value_parser = positive, value_name = "GB")]
    pub(in crate::bench) gb_per_s: Option<f64>,
}

/// How the results of ranks are brought together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(in crate::bench) enum WayFlag {
    Gather,
    Tree,
    Ring,
}

fn positive(text: &str) -> Result<f64, &'static str> {
    let number: Option<f64> = text.parse().ok().filter(|number: &f64| number.is_finite() && *number > 0.0);
    number.ok_or("needs a finite number above 0")
}
