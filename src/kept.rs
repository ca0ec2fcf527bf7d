//! Prepared attentions that are kept for the next call with the same problem.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::device::PreparedAttention;
use crate::error::Error;
use crate::gpu::GpuAttention;
use crate::problem::AttentionProblem;

/// Bytes of all that is kept, at most, but for what was used last, however large.
const MOST_BYTES: u64 = 256 << 20;
/// What keeping anything costs beside its memory for tensors: plan, problem, bindings of parameters.
const ENTRY_BYTES: u64 = 1 << 20;

/// Something that holds memory as long as it is kept.
pub(crate) trait Holds {
    /// Bytes of host or device memory, besides the little that everything takes.
    fn held_bytes(&self) -> u64;
}

impl Holds for GpuAttention {
    fn held_bytes(&self) -> u64 {
        self.held_bytes()
    }
}

impl Holds for PreparedAttention {
    fn held_bytes(&self) -> u64 {
        match self {
            Self::Cpu(prepared) => prepared.held_bytes(),
            Self::CpuPlain(_) | Self::Oracle(_) => 0,
            Self::Gpu(prepared) => prepared.held_bytes(),
        }
    }
}

/// Problems with what was prepared for them, up to some bytes; what was not used for longest is let go first.
#[derive(Debug)]
pub(crate) struct Kept<T> {
    /// What was used last stands last.
    entries: Mutex<VecDeque<(AttentionProblem, Arc<T>)>>,
    most_bytes: u64,
}

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self { entries: Mutex::default(), most_bytes: MOST_BYTES }
    }
}

impl<T: Holds> Kept<T> {
    /// What was prepared for a problem; `make` is awaited only where there is nothing yet.
    pub(crate) async fn get(
        &self,
        problem: &AttentionProblem,
        make: impl Future<Output = Result<T, Error>>,
    ) -> Result<Arc<T>, Error> {
        if let Some(made) = self.find(&mut self.lock(), problem) {
            return Ok(made);
        }
        let made = Arc::new(make.await?);
        let mut entries = self.lock();
        // another thread may have made it meanwhile
        if let Some(made) = self.find(&mut entries, problem) {
            return Ok(made);
        }
        entries.push_back((problem.clone(), Arc::clone(&made)));
        // what is used by a call now grows and is counted when something is added next
        let bytes = |(_, made): &(_, Arc<T>)| ENTRY_BYTES.saturating_add(made.held_bytes());
        let mut all = entries.iter().fold(0u64, |sum, entry| sum.saturating_add(bytes(entry)));
        while all > self.most_bytes && entries.len() > 1 {
            if let Some(oldest) = entries.pop_front() {
                all = all.saturating_sub(bytes(&oldest));
            }
        }
        Ok(made)
    }

    /// How many are kept now.
    pub(crate) fn len(&self) -> usize {
        self.lock().len()
    }

    /// The one of a problem, which is now the last that was used.
    fn find(&self, entries: &mut VecDeque<(AttentionProblem, Arc<T>)>, problem: &AttentionProblem) -> Option<Arc<T>> {
        let at = entries.iter().position(|(known, _)| known == problem)?;
        let found = entries.remove(at)?;
        let made = Arc::clone(&found.1);
        entries.push_back(found);
        Some(made)
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<(AttentionProblem, Arc<T>)>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[cfg(feature = "threads")]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::problem::AttentionSpec;

    #[derive(Debug)]
    struct Weight(AtomicU64);

    impl Holds for Weight {
        fn held_bytes(&self) -> u64 {
            self.0.load(Ordering::Relaxed)
        }
    }

    fn problem(keys: usize) -> AttentionProblem {
        AttentionProblem::new(AttentionSpec::new([1, 1, 1, 4], [1, 1, keys, 4])).unwrap()
    }

    fn kept(most: u64) -> Kept<Weight> {
        Kept { most_bytes: most, ..Kept::default() }
    }

    /// Asks for a problem; whether it had to be made.
    fn ask(kept: &Kept<Weight>, keys: usize, bytes: u64) -> bool {
        let mut made = false;
        let make = async {
            made = true;
            Ok(Weight(AtomicU64::new(bytes)))
        };
        pollster::block_on(kept.get(&problem(keys), make)).unwrap();
        made
    }

    #[test]
    fn what_was_not_used_for_longest_goes_first() {
        // three of this size and what each takes beside
        let kept = kept(3 * (1000 + ENTRY_BYTES));
        for keys in 1..=3 {
            assert!(ask(&kept, keys, 1000));
        }
        assert!(!ask(&kept, 1, 1000));
        assert!(ask(&kept, 4, 1000));
        // 2 was used before 3 and 1
        assert_eq!(kept.len(), 3);
        for keys in [1, 3, 4] {
            assert!(!ask(&kept, keys, 1000), "{keys}");
        }
        assert!(ask(&kept, 2, 1000));
        assert!(ask(&kept, 1, 1000));
    }

    #[test]
    fn bytes_count_and_not_how_many() {
        let kept = kept(100 * ENTRY_BYTES);
        assert!((1..=90).all(|keys| ask(&kept, keys, 0)));
        assert_eq!(kept.len(), 90);
        // one that takes as much as 60 others, and one that takes more than there is for all
        assert!(ask(&kept, 91, 60 * ENTRY_BYTES));
        assert_eq!(kept.len(), 40);
        assert!(ask(&kept, 92, 500 * ENTRY_BYTES));
        assert_eq!(kept.len(), 1);
        assert!(!ask(&kept, 92, 0));
        assert!(ask(&kept, 93, 0));
        assert_eq!(kept.len(), 1);
        // a count that overflows is a count that is too large
        assert!(ask(&kept, 94, u64::MAX) && ask(&kept, 95, u64::MAX));
        assert_eq!(kept.len(), 1);
    }

    #[test]
    fn what_grows_in_use_is_counted_as_it_is() {
        let kept = kept(10 * ENTRY_BYTES);
        let grows = async { Ok(Weight(AtomicU64::new(0))) };
        let grown = pollster::block_on(kept.get(&problem(1), grows)).unwrap();
        assert!((2..=5).all(|keys| ask(&kept, keys, 0)));
        grown.0.store(9 * ENTRY_BYTES, Ordering::Relaxed);
        assert!(ask(&kept, 6, 0));
        assert_eq!(kept.len(), 5, "the first alone was too large");
    }

    #[test]
    fn two_that_make_the_same_at_once_keep_one() {
        let kept = kept(1 << 30);
        let inner = async {
            // another call gets there first
            assert!(ask(&kept, 1, 7));
            Ok(Weight(AtomicU64::new(9)))
        };
        let got = pollster::block_on(kept.get(&problem(1), inner)).unwrap();
        assert_eq!((got.held_bytes(), kept.len()), (7, 1));
    }

    #[test]
    fn what_cannot_be_made_is_not_kept() {
        let kept = kept(1 << 30);
        let fails = async { Err(Error::UnknownKernel { name: String::new() }) };
        assert!(pollster::block_on(kept.get(&problem(1), fails)).is_err());
        assert_eq!(kept.len(), 0);
        assert!(ask(&kept, 1, 0));
    }
}
