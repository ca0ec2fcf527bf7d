//! A state that is made once, and lent to one call at a time.

use std::sync::{Mutex, TryLockError};

/// Calls with the state that is held, or with one that is made for the call.
pub(super) fn with_held<S, E>(
    held: &Mutex<Option<S>>,
    make: impl FnOnce() -> Result<S, E>,
    call: impl FnOnce(&mut S),
) -> Result<(), E> {
    let mut fresh = None;
    let mut lock;
    // a call that overlaps another gets a state of its own; waiting here could block a thread of the pool
    let state = match held.try_lock() {
        Ok(state) => {
            lock = state;
            &mut *lock
        }
        Err(TryLockError::Poisoned(poisoned)) => {
            lock = poisoned.into_inner();
            &mut *lock
        }
        Err(TryLockError::WouldBlock) => &mut fresh,
    };
    let state = match state {
        Some(state) => state,
        none => none.insert(make()?),
    };
    call(state);
    Ok(())
}
