//! The file that tuned choices are kept in.

use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::class::{DeviceKey, ProblemClass};
use crate::caps::DeviceCaps;
use crate::dispatch::PlanChoice;
use crate::error::Error;
use crate::files::{Ours, OutputError, OutputFile, open_regular};
use crate::gpu::{Gpu, GpuAttention};
use crate::plan::{Plan, PlanError};
use crate::problem::AttentionProblem;
use crate::timing::TimingSource;

/// A tuned choice, and what it holds for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TuneEntry {
    /// The device it was timed on.
    pub device: DeviceKey,
    /// The problems it is for.
    pub class: ProblemClass,
    /// The choice.
    pub choice: PlanChoice,
    /// Median time of the problem that was tuned, in milliseconds.
    pub median_ms: f64,
    /// The same for the choice that the plan's rules make, if it was timed.
    pub planned_ms: Option<f64>,
    /// The clock.
    pub timing: TimingSource,
}

impl TuneEntry {
    /// `tuned on this device: 0.120 ms, the plan's own choice 0.150 ms (timestamps)`.
    #[must_use]
    pub fn why(&self) -> String {
        let own = self.planned_ms.map_or_else(String::new, |ms| format!(", the plan's own choice {ms:.3} ms"));
        format!("tuned on this device: {:.3} ms{own} ({})", self.median_ms, self.timing)
    }
}

/// Tuned choices for one device, read from a file or just found.
///
/// The file may hold those of other devices too; they are kept and written back.
#[derive(Clone, Debug, PartialEq)]
pub struct TuneCache {
    device: DeviceKey,
    entries: Vec<TuneEntry>,
    others: Vec<TuneEntry>,
}

/// Why a file, or a part of one, is not used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TuneWarning {
    /// There is no such file.
    #[error("there is no tune cache {path:?}")]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The file cannot be read.
    #[error("the tune cache {path:?} cannot be read and is ignored: {message}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's words.
        message: String,
    },
    /// The file is not a tune cache, or not a whole one.
    #[error("{path:?} is not a tune cache of this version and is ignored: {message}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// An entry is not sound.
    #[error("entry {index} of the tune cache is ignored: {message}")]
    Entry {
        /// Its place in the file, from 0.
        index: usize,
        /// What is wrong.
        message: String,
    },
    /// Entries are for this device with another driver or another version of the crate.
    #[error("{count} entries of the tune cache are stale and ignored: timed with {found}, this is {now}; tune again")]
    Stale {
        /// How many.
        count: usize,
        /// Driver and crate version of the first of them.
        found: String,
        /// Driver and crate version now.
        now: String,
    },
    /// All entries are for other devices.
    #[error("the tune cache is for {found}, not for {now}, and is ignored; tune on this device")]
    Foreign {
        /// The device of the first entry.
        found: Box<DeviceKey>,
        /// This device.
        now: Box<DeviceKey>,
    },
    /// A choice does not fit the problem or the device.
    #[error("a tuned choice is ignored: {reason}")]
    Choice {
        /// Why.
        reason: PlanError,
    },
}

/// What a cache says about a problem.
#[derive(Clone, Debug, PartialEq)]
pub enum Lookup {
    /// The plan is this entry's choice.
    Tuned(Box<TuneEntry>),
    /// The class of the problem was not tuned on this device; the plan follows the rules.
    Untuned,
    /// There is a choice, and it is not used; the plan follows the rules.
    Ignored(TuneWarning),
}

/// What the file says it is.
const FORMAT: &str = "cross-attention tune cache";
/// What a file must be that is replaced: any version, whole or not.
const TUNE_CACHE: Ours = Ours {
    what: "a tune cache",
    is: |head| head.first() == Some(&b'{') && head.windows(FORMAT.len()).any(|at| at == FORMAT.as_bytes()),
};
/// The version of its form.
const VERSION: u64 = 1;
/// Bytes of a file, at most: some 50 thousand entries.
const MAX_BYTES: u64 = 32 << 20;

/// The file; entries one by one, so that one that is not sound spares the others.
#[derive(Debug, Serialize, Deserialize)]
struct File {
    format: String,
    version: u64,
    entries: Vec<Value>,
}

impl TuneCache {
    /// No choices yet.
    #[must_use]
    pub const fn new(device: DeviceKey) -> Self {
        Self { device, entries: vec![], others: vec![] }
    }

    /// Reads the choices for a device from a file. Whatever is wrong with it makes a warning, and the cache is empty or
    /// lacks the entry.
    #[must_use]
    pub fn load(path: &Path, device: &DeviceKey) -> (Self, Vec<TuneWarning>) {
        let text = match read(path) {
            Ok(text) => text,
            Err(warning) => return (Self::new(device.clone()), vec![warning]),
        };
        Self::parse(path, &text, device)
    }

    fn parse(path: &Path, text: &str, device: &DeviceKey) -> (Self, Vec<TuneWarning>) {
        let mut cache = Self::new(device.clone());
        let format = |message: String| vec![TuneWarning::Format { path: path.to_owned(), message }];
        let file: File = match serde_json::from_str(text) {
            Ok(file) => file,
            Err(error) => return (cache, format(error.to_string())),
        };
        if file.format != FORMAT || file.version != VERSION {
            let message = format!(
                "format {:?} version {}, needs {FORMAT:?} version {VERSION}",
                file.format.chars().take(80).collect::<String>(),
                file.version
            );
            return (cache, format(message));
        }
        let mut warnings = vec![];
        let mut stale = vec![];
        for (index, value) in file.entries.into_iter().enumerate() {
            match serde_json::from_value::<TuneEntry>(value) {
                Err(error) => warnings.push(TuneWarning::Entry { index, message: error.to_string() }),
                Ok(entry) if !is_time(entry.median_ms) || !entry.planned_ms.is_none_or(is_time) => {
                    let message = "its times are not above 0".to_owned();
                    warnings.push(TuneWarning::Entry { index, message });
                }
                Ok(entry) if entry.device == *device => cache.insert(entry),
                Ok(entry) if entry.device.same_adapter(device) => stale.push(entry),
                Ok(entry) => cache.others.push(entry),
            }
        }
        if let Some(first) = stale.first() {
            let (found, now) = (first.device.versions(), device.versions());
            warnings.push(TuneWarning::Stale { count: stale.len(), found, now });
        }
        let nothing_for_this = cache.entries.is_empty() && stale.is_empty();
        if let Some(first) = cache.others.first().filter(|_| nothing_for_this) {
            warnings
                .push(TuneWarning::Foreign { found: Box::new(first.device.clone()), now: Box::new(device.clone()) });
        }
        (cache, warnings)
    }

    /// The device that the choices are for.
    #[must_use]
    pub const fn device(&self) -> &DeviceKey {
        &self.device
    }

    /// The choices for this device.
    #[must_use]
    pub fn entries(&self) -> &[TuneEntry] {
        &self.entries
    }

    /// Takes an entry in, in place of one for the same device and class.
    pub fn insert(&mut self, entry: TuneEntry) {
        let list = if entry.device == self.device { &mut self.entries } else { &mut self.others };
        list.retain(|other| other.device != entry.device || other.class != entry.class);
        list.push(entry);
    }

    /// The entry for the class of a problem. Whether its choice fits this very problem is for
    /// [`plan`](Self::plan) to find out.
    #[must_use]
    pub fn choice(&self, problem: &AttentionProblem) -> Option<&TuneEntry> {
        let class = ProblemClass::of(problem);
        self.entries.iter().find(|entry| entry.class == class)
    }

    /// Plans a problem with the tuned choice for its class, where there is one that fits; else by the rules of
    /// [`Plan::new`]. Says which.
    ///
    /// # Errors
    /// [`PlanError::NoKernel`], as [`Plan::new`].
    pub fn plan(&self, problem: &AttentionProblem, caps: &DeviceCaps) -> Result<(Plan, Lookup), PlanError> {
        let lookup = match self.choice(problem) {
            None => Lookup::Untuned,
            Some(entry) => match Plan::because(problem, caps, &entry.choice, &entry.why()) {
                Ok(plan) => return Ok((plan, Lookup::Tuned(Box::new(entry.clone())))),
                Err(reason) => Lookup::Ignored(TuneWarning::Choice { reason }),
            },
        };
        Ok((Plan::new(problem, caps, None)?, lookup))
    }

    /// Writes the file, with the entries of other devices that were read from it, in one step: another program sees the
    /// old file or the new one. Entries that were stale or not sound are gone. A file that is no tune cache stays.
    ///
    /// # Errors
    /// As [`OutputFile`].
    pub fn save(&self, path: &Path) -> Result<(), OutputError> {
        let failed = |error: serde_json::Error| OutputError::Io { path: path.to_owned(), source: error.into() };
        let entries = self.entries.iter().chain(&self.others);
        let entries = entries.map(serde_json::to_value).collect::<Result<Vec<_>, _>>().map_err(failed)?;
        let file = File { format: FORMAT.to_owned(), version: VERSION, entries };
        let mut text = serde_json::to_vec_pretty(&file).map_err(failed)?;
        text.push(b'\n');
        OutputFile::write(path, TUNE_CACHE, &text)
    }
}

impl Gpu {
    /// [`prepare`](Self::prepare) with the tuned choice for the problem's class, where the cache has one that fits; else
    /// with the plan's own. Says which. A cache of another device is not used.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare).
    pub async fn prepare_tuned(
        &self,
        problem: &AttentionProblem,
        cache: &TuneCache,
    ) -> Result<(GpuAttention, Lookup), Error> {
        let (plan, lookup) = self.plan_tuned(problem, cache)?;
        Ok((self.prepare_plan(plan).await?, lookup))
    }

    /// [`prepare_tuned`](Self::prepare_tuned), blocking.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare).
    pub fn prepare_tuned_blocking(
        &self,
        problem: &AttentionProblem,
        cache: &TuneCache,
    ) -> Result<(GpuAttention, Lookup), Error> {
        self.block_on(self.prepare_tuned(problem, cache))
    }

    /// The plan of [`prepare_tuned`](Self::prepare_tuned), without making what it needs.
    ///
    /// # Errors
    /// [`PlanError::NoKernel`], as [`Plan::new`].
    pub fn plan_tuned(&self, problem: &AttentionProblem, cache: &TuneCache) -> Result<(Plan, Lookup), PlanError> {
        let here = DeviceKey::of(self.info());
        if *cache.device() == here {
            return cache.plan(problem, self.caps());
        }
        let warning = TuneWarning::Foreign { found: Box::new(cache.device().clone()), now: Box::new(here) };
        Ok((Plan::new(problem, self.caps(), None)?, Lookup::Ignored(warning)))
    }
}

fn read(path: &Path) -> Result<String, TuneWarning> {
    let unreadable = |error: std::io::Error| match error.kind() {
        ErrorKind::NotFound => TuneWarning::Missing { path: path.to_owned() },
        _ => TuneWarning::Unreadable { path: path.to_owned(), message: error.to_string() },
    };
    let mut bytes = vec![];
    let file = open_regular(path).map_err(unreadable)?;
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    let format = |message: String| TuneWarning::Format { path: path.to_owned(), message };
    if bytes.len() as u64 > MAX_BYTES {
        return Err(format(format!("it is larger than {MAX_BYTES} bytes")));
    }
    String::from_utf8(bytes).map_err(|error| format(error.to_string()))
}

fn is_time(millis: f64) -> bool {
    millis.is_finite() && millis > 0.0
}
