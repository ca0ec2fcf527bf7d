//! An allocator that counts, for tests of what is allocated; a test that wants it includes this file by its path.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

fn taken(bytes: usize) {
    ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    let held = HELD.fetch_add(bytes, Ordering::Relaxed) + bytes;
    MOST.fetch_max(held, Ordering::Relaxed);
}

// SAFETY: every call is passed on as it came
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, block: Layout) -> *mut u8 {
        taken(block.size());
        // SAFETY: as the caller promised
        unsafe { System.alloc(block) }
    }

    unsafe fn realloc(&self, at: *mut u8, block: Layout, size: usize) -> *mut u8 {
        taken(size);
        HELD.fetch_sub(block.size(), Ordering::Relaxed);
        // SAFETY: as the caller promised
        unsafe { System.realloc(at, block, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, block: Layout) {
        HELD.fetch_sub(block.size(), Ordering::Relaxed);
        // SAFETY: as the caller promised
        unsafe { System.dealloc(at, block) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Allocations so far.
pub(crate) fn allocations() -> usize {
    ALLOCATIONS.load(Ordering::Relaxed)
}

/// The most bytes that were held at once during some work, beyond those before it.
pub(crate) fn most_held(work: impl FnOnce()) -> usize {
    let before = HELD.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    work();
    MOST.load(Ordering::Relaxed) - before
}
