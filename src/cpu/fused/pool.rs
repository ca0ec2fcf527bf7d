//! Tasks on the threads of the pool that a call is made from, each with a workspace.

#[cfg(feature = "threads")]
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Workspaces, made once and used again.
#[derive(Debug)]
pub(super) struct Pool<T>(Mutex<Vec<T>>);

impl<T: Send> Pool<T> {
    pub(super) fn new(held: Vec<T>) -> Self {
        Self(Mutex::new(held))
    }

    /// Runs tasks `0..n`, each with a workspace, on the pool that this is called from, or one after another.
    pub(super) fn for_each(
        &self,
        n: usize,
        serial: bool,
        make: impl Fn() -> T + Send + Sync,
        task: impl Fn(usize, &mut T) + Send + Sync,
    ) {
        let one = |number: usize| {
            let held = self.lock().pop();
            let mut scratch = held.unwrap_or_else(&make);
            task(number, &mut scratch);
            self.lock().push(scratch);
        };
        #[cfg(feature = "threads")]
        if !serial && n > 1 {
            let next = AtomicUsize::new(0);
            let work = || {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= n {
                        return;
                    }
                    one(number);
                }
            };
            let helpers = rayon::current_num_threads().min(n) - 1;
            // either way the thread that calls begins at once: waking another takes longer than many a task
            if rayon::current_thread_index().is_some() {
                share(helpers, &work);
            } else {
                rayon::in_place_scope(|scope| {
                    for _ in 0..helpers {
                        scope.spawn(|_| work());
                    }
                    work();
                });
            }
            return;
        }
        let _ = serial;
        (0..n).for_each(one);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does work on this thread and offers it to `helpers` others. Within a pool this allocates nothing, and who finds that
/// nobody came need not wait.
#[cfg(feature = "threads")]
fn share(helpers: usize, work: &(impl Fn() + Sync)) {
    match helpers {
        0 => work(),
        _ => {
            rayon::join(work, || share(helpers - 1, work));
        }
    }
}
