//! Random calls and files: no panic, no abort, no memory beyond what the input justifies.
//!
//! `fuzz TARGET SECONDS SEED` runs inputs number `SEED`, `SEED + 1`, .. until the time is up; `fuzz TARGET 0 SEED` runs one.

mod draw;
mod targets;

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use draw::Draw;

/// More than any input here justifies, in bytes.
const MOST: usize = 256 << 20;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static SEED: AtomicU64 = AtomicU64::new(0);

/// Counts what is live, and ends the program where it is too much.
struct Counting;

unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() > MOST {
            // as on a machine without that much: who asks first whether it is there goes on, who does not aborts
            eprintln!("seed {}: refused {} bytes", SEED.load(Ordering::Relaxed), layout.size());
            return std::ptr::null_mut();
        }
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        if live > MOST {
            // what is said about it must not be counted
            LIVE.store(0, Ordering::Relaxed);
            let trace = std::backtrace::Backtrace::force_capture();
            let seed = SEED.load(Ordering::Relaxed);
            eprintln!("seed {seed}: {} bytes asked for, {live} live\n{trace}", layout.size());
            std::process::exit(3);
        }
        // as the caller says
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // as the caller says
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, seconds, seed] = &arguments[..] else {
        eprintln!("usage: fuzz TARGET SECONDS SEED; targets: {}", targets::ALL.map(|(name, _)| name).join(", "));
        return ExitCode::FAILURE;
    };
    let (Ok(seconds), Ok(first)) = (seconds.parse::<u64>(), seed.parse::<u64>()) else {
        eprintln!("SECONDS and SEED are whole numbers");
        return ExitCode::FAILURE;
    };
    let Some((_, target)) = targets::ALL.into_iter().find(|(target, _)| target == name) else {
        eprintln!("there is no target {name}");
        return ExitCode::FAILURE;
    };
    let (start, end) = (Instant::now(), Duration::from_secs(seconds));
    let mut seed = first;
    let mut slowest = (Duration::ZERO, first);
    loop {
        SEED.store(seed, Ordering::Relaxed);
        let began = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| target(&mut Draw::new(seed))));
        slowest = slowest.max((began.elapsed(), seed));
        match result {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                eprintln!("{name}, seed {seed}: {error}");
                return ExitCode::FAILURE;
            }
            Err(_) => {
                eprintln!("{name}, seed {seed}: a panic; again: fuzz/run 0 {seed} {name}");
                return ExitCode::FAILURE;
            }
        }
        seed += 1;
        if start.elapsed() >= end {
            break;
        }
    }
    println!("{name}: {} inputs, the slowest {:?} (seed {})", seed - first, slowest.0, slowest.1);
    ExitCode::SUCCESS
}
