//! Ranks that end together: where one leaves early, the others would wait for it for ever.

use std::io::Write;

use mpi::environment::{Threading, is_finalized, threading_support};
use mpi::ffi;
use mpi::topology::Communicator;

use super::ShardedError;

/// Ends all ranks, unless this one comes to its end: dropped before [`done`](Self::done), by a panic, by `?` or by a return, it
/// says so on the terminal's error output and calls `MPI_Abort`. Where there is one rank it does nothing.
///
/// Put it behind the communicator at the top of `main`, so that it is dropped before MPI ends; [`run_together`] does. MPI ends the
/// ranks of the communicator, and most implementations all that were started together.
///
/// ```no_run
/// use cross_attention::sharded::EndTogether;
///
/// let universe = mpi::initialize().ok_or("MPI was begun before")?;
/// let world = universe.world();
/// let together = EndTogether::new(&world);
/// let keys: usize = std::env::args().nth(1).ok_or("how many keys?")?.parse()?;
/// // ... attend with the other ranks
/// together.done();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "dropped at once it ends all ranks"]
pub struct EndTogether<'c, C: Communicator> {
    comm: Option<Shown<'c, C>>,
}

struct Shown<'c, C>(&'c C);

impl<C> std::fmt::Debug for Shown<'_, C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a communicator")
    }
}

impl<'c, C: Communicator> EndTogether<'c, C> {
    /// From now on the ranks of this communicator wait for this one.
    pub const fn new(comm: &'c C) -> Self {
        Self { comm: Some(Shown(comm)) }
    }

    /// This rank has come to its end; nobody waits for it.
    pub fn done(mut self) {
        self.comm = None;
    }
}

impl<C: Communicator> Drop for EndTogether<'_, C> {
    fn drop(&mut self) {
        let Some(Shown(comm)) = self.comm.take() else { return };
        // behind MPI's end nobody waits, and nobody can be called
        if is_finalized() || comm.size() == 1 {
            return;
        }
        let left = if std::thread::panicking() { "panicked" } else { "left before its end" };
        say(comm, format_args!("{left}; all ranks are ended, for they would wait for it"));
        comm.abort(1);
    }
}

/// Runs what this rank does together with the others. Its error, or a panic, is told on the terminal's error output with the
/// number of the rank, and ends all ranks by `MPI_Abort`; a single rank ends with exit status 1.
///
/// ```no_run
/// use cross_attention::sharded::run_together;
///
/// let universe = mpi::initialize().ok_or("MPI was begun before")?;
/// let world = universe.world();
/// let keys = run_together(&world, || std::env::args().nth(1).unwrap_or_default().parse::<usize>());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn run_together<T, E: std::fmt::Display>(comm: &impl Communicator, body: impl FnOnce() -> Result<T, E>) -> T {
    let together = EndTogether::new(comm);
    let result = body();
    together.done();
    match result {
        Ok(made) => made,
        Err(error) => {
            say(comm, format_args!("{error}"));
            if comm.size() == 1 { std::process::exit(1) } else { comm.abort(1) }
        }
    }
}

/// A line with the number of the rank. Where nobody can be told, nobody is.
fn say(comm: &impl Communicator, what: std::fmt::Arguments<'_>) {
    let line = format!("rank {} of {}: {what}\n", comm.rank(), comm.size());
    let mut to = std::io::stderr().lock();
    let _ = to.write_all(line.as_bytes());
    let _ = to.flush();
}

/// Whether MPI may be called on this thread.
pub(super) fn check_thread() -> Result<(), ShardedError> {
    let level = match threading_support() {
        Threading::Single => "single",
        Threading::Funneled => "funneled",
        Threading::Serialized | Threading::Multiple => return Ok(()),
    };
    if is_main_thread() { Ok(()) } else { Err(ShardedError::Thread { level }) }
}

#[expect(unsafe_code, reason = "MPI writes the answer through a pointer")]
fn is_main_thread() -> bool {
    let mut is_main = 0;
    // SAFETY: any thread may ask, and the pointer is that of a number
    unsafe {
        ffi::MPI_Is_thread_main(&raw mut is_main);
    }
    is_main != 0
}
