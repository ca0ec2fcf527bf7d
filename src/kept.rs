//! Prepared attentions that are kept for the next call with the same problem.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::Error;
use crate::problem::AttentionProblem;

/// How many are kept; beyond that the one made first is let go.
const MOST: usize = 64;

/// Problems with what was prepared for them.
#[derive(Debug)]
pub(crate) struct Kept<T> {
    entries: Mutex<Vec<(AttentionProblem, Arc<T>)>>,
}

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self { entries: Mutex::default() }
    }
}

impl<T> Kept<T> {
    /// What was prepared for a problem; `make` is awaited only where there is nothing yet.
    pub(crate) async fn get(
        &self,
        problem: &AttentionProblem,
        make: impl Future<Output = Result<T, Error>>,
    ) -> Result<Arc<T>, Error> {
        let found = self.lock().iter().find(|(known, _)| known == problem).map(|(_, made)| Arc::clone(made));
        if let Some(made) = found {
            return Ok(made);
        }
        let made = Arc::new(make.await?);
        let mut entries = self.lock();
        if entries.len() >= MOST {
            entries.remove(0);
        }
        entries.push((problem.clone(), Arc::clone(&made)));
        Ok(made)
    }

    /// How many are kept now.
    pub(crate) fn len(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(AttentionProblem, Arc<T>)>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
