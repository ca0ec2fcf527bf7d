//! Random calls and files: no panic, no abort, no memory beyond what the input justifies.
//!
//! Each target runs the inputs number `FUZZ_SEED`, `FUZZ_SEED + 1`, .. for `FUZZ_SECONDS` (3 unless said), one input where
//! that is 0; before them what once met something, written out.
#![expect(unsafe_code, reason = "an allocator is unsafe to write; this one counts and passes on")]
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    reason = "a test fails by panicking, and says what it ran"
)]
#![expect(clippy::cast_possible_truncation, reason = "some of the bits that are drawn")]

mod draw;
mod targets;

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};

use draw::Draw;

/// More than any input here justifies, in bytes.
const MOST: usize = 256 << 20;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static SEED: AtomicU64 = AtomicU64::new(0);

/// Counts what is live, and ends the program where it is too much.
struct Counting;

// SAFETY: every call is passed on as it came, or refused
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
        // SAFETY: as the caller promised
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promised
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A whole number from the environment.
fn number(name: &str, unless_said: u64) -> u64 {
    std::env::var(name).map_or(unless_said, |text| text.parse().unwrap())
}

/// Runs inputs of a target from `first` on until the time is up.
fn run(name: &str, target: targets::Target, first: u64, time: Duration) -> Result<(), Failed> {
    for (_, met) in targets::MET.into_iter().filter(|(of, _)| *of == name) {
        met().map_err(Failed::from)?;
    }
    let start = Instant::now();
    let mut seed = first;
    let mut slowest = (Duration::ZERO, first);
    loop {
        SEED.store(seed, Ordering::Relaxed);
        let began = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| target(&mut Draw::new(seed))));
        slowest = slowest.max((began.elapsed(), seed));
        let fault = match result {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error),
            Err(_) => Some("a panic".to_owned()),
        };
        if let Some(fault) = fault {
            let again =
                format!("FUZZ_SECONDS=0 FUZZ_SEED={seed} cargo test --features cli --test fuzz -- --exact {name}");
            return Err(Failed::from(format!("seed {seed}: {fault}; again: {again}")));
        }
        seed += 1;
        if start.elapsed() >= time {
            break;
        }
    }
    eprintln!("{name}: {} inputs, the slowest {:?} (seed {})", seed - first, slowest.0, slowest.1);
    Ok(())
}

fn main() -> ExitCode {
    // one at a time: what is live is counted for the whole process
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    let (first, time) = (number("FUZZ_SEED", 1), Duration::from_secs(number("FUZZ_SECONDS", 3)));
    let trial = |(name, target)| Trial::test(name, move || run(name, target, first, time));
    libtest_mimic::run(&arguments, targets::ALL.into_iter().map(trial).collect()).exit_code()
}
