//! Tuning on the device at hand: the choices of a plan tried, checked and timed, and the best ones kept in a file.
//!
//! The rules of [`Plan::new`](crate::Plan::new) know a device's kind and limits, not its cores, caches or compiler. Tuning
//! is asked for, never done by itself: [`Gpu::tune`](crate::gpu::Gpu::tune) runs
//! [`Plan::candidates`](crate::Plan::candidates) for a problem, [`TuneCache`] keeps what was found, and
//! [`Gpu::prepare_tuned`](crate::gpu::Gpu::prepare_tuned) uses it.
//!
//! ```no_run
//! use std::path::Path;
//! use std::time::Duration;
//! use cross_attention::gpu::Gpu;
//! use cross_attention::tune::{DeviceKey, TuneCache, TuneOptions};
//! use cross_attention::{AttentionProblem, AttentionSpec};
//!
//! # fn example(gpu: &Gpu) -> Result<(), Box<dyn std::error::Error>> {
//! let problem = AttentionProblem::new(AttentionSpec::new([1, 8, 1, 64], [1, 8, 1500, 64]))?;
//! let path = Path::new("tune.json");
//! // once
//! let options = TuneOptions { budget: Duration::from_secs(5), ..TuneOptions::default() };
//! let report = gpu.tune_blocking(&problem, &options, &mut |_| {})?;
//! let (mut cache, warnings) = TuneCache::load(path, &DeviceKey::of(gpu.info()));
//! warnings.iter().for_each(|warning| eprintln!("{warning}"));
//! if let Some(entry) = report.entry() {
//!     cache.insert(entry);
//!     cache.save(path)?;
//! }
//! // from then on
//! let (prepared, lookup) = gpu.prepare_tuned_blocking(&problem, &cache)?;
//! # Ok(())
//! # }
//! ```
//!
//! A file is never trusted: what is not for this device, driver, crate version and class of problem is not used, what does
//! not fit the problem is not used, and each time a [`TuneWarning`] says so.

mod cache;
mod class;
mod report;
mod tuner;

pub use cache::{Lookup, TuneCache, TuneEntry, TuneWarning};
pub use class::{DeviceKey, ProblemClass};
pub use report::{Outcome, TuneCandidate, TuneProgress, TuneReport};
pub use tuner::TuneOptions;
