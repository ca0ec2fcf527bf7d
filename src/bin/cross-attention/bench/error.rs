//! What `bench` alone refuses.

use crate::text::ShownPath as _;
use std::path::PathBuf;

/// Why a case cannot be timed, or rows of timings cannot be read, compared or drawn.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    #[error("--fail-if-slower is about two files of rows: --compare OLD NEW")]
    NothingToCompare,
    #[error("--save adds rows to a file, and - is none; --json prints them, and a shell's > keeps what is printed")]
    SaveToStdout,
    #[error("--plot draws into a file, and - is none; name it .svg or .png")]
    PlotToStdout,
    #[error("--file reads a file in two goes, its header and later its numbers, and - is standard input; name a file")]
    FileFromStdin,
    #[error("OLD and NEW are both standard input; one of them can be")]
    CompareStdinTwice,
    #[error("cannot read {}", path.shown())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} is longer than {most} bytes, which no list of shapes or rows is", path.shown())]
    Long { path: PathBuf, most: u64 },
    #[error("{} is no list of shapes: {reason}; needs JSON such as {}", path.shown(), super::shapes::SAMPLE)]
    Shapes { path: PathBuf, reason: String },
    #[error("{}: shape {place}{name}: {reason}", path.shown())]
    Shape { path: PathBuf, place: usize, name: String, reason: String },
    #[error("{reason}")]
    Refused { reason: String },
    #[error("inputs and results would take {bytes} bytes, more memory than there is")]
    Memory { bytes: u128 },
    #[error("{}: line {line} is no row of `bench --save` or `bench --json`: {reason}", path.shown())]
    Row { path: PathBuf, line: usize, reason: String },
    #[error("{} holds no row of timings", path.shown())]
    NoRows { path: PathBuf },
    #[error(
        "no row of {} has its like in {}; rows are compared where workload, shape, element types, terms, device, adapter and \
         backend are the same", old.shown(), new.shown()
    )]
    NothingInCommon { old: PathBuf, new: PathBuf },
    #[cfg(not(feature = "mpi"))]
    #[error(
        "this program was built without MPI; cargo install --path . --features cli,mpi builds it in, where an MPI and libclang are"
    )]
    NoMpi,
    #[cfg(feature = "mpi")]
    #[error("MPI does not begin in this process; start it as mpirun -n 4 cross-attention bench --mpi")]
    NoMpiRun,
    #[cfg(feature = "mpi")]
    #[error("standard input goes to the first rank alone, and all ranks read the shapes; name a file")]
    StdinOfRanks,
    #[cfg(feature = "mpi")]
    #[error("the ranks were asked for different cases; give them the same flags, and the same file of shapes")]
    OtherCases,
    #[cfg(feature = "mpi")]
    #[error("another rank could not go on, and says why")]
    OtherRank,
    #[error("{} names no form of a picture; name it .svg or .png", path.shown())]
    PlotFormat { path: PathBuf },
    #[error("nothing was timed, so {} is not drawn", path.shown())]
    NothingToPlot { path: PathBuf },
}
