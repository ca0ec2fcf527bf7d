//! Pipelines that outlive the process: what a driver compiled, kept in a file of the caller's.

#[allow(
    unsafe_code,
    reason = "a driver's own data can only be given back to it by an unsafe call; why it may be: there"
)]
mod data;
mod file;

use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use file::{Intact, Owner};

use crate::files::{OutputFile, open_regular};
use crate::gpu::error::GpuError;
use crate::gpu::open::Gpu;
use crate::gpu::pipelines::DriverCache;

/// A file larger than this is not one of ours, in bytes.
const MAX_BYTES: u64 = 1 << 30;

/// What became of the file that [`Gpu::use_pipeline_cache`] was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PipelineCacheState {
    /// Its pipelines are used.
    Loaded {
        /// Bytes of the driver's data.
        bytes: usize,
    },
    /// There was none; pipelines are compiled, and can be saved to it.
    New,
    /// It is not used, and is replaced when pipelines are saved, unless it is something else than a pipeline cache: a
    /// warning to pass on.
    Ignored(PipelineCacheFault),
    /// The device has no pipeline caches: only Vulkan has, and a device of the caller's only if it was made with
    /// [`wgpu::Features::PIPELINE_CACHE`].
    Unsupported,
}

impl std::fmt::Display for PipelineCacheState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Loaded { bytes } => write!(f, "{bytes} bytes of compiled pipelines are used"),
            Self::New => f.write_str("there is none yet"),
            Self::Ignored(fault) => write!(f, "not used: {fault}"),
            Self::Unsupported => f.write_str("not used: this device has no pipeline caches"),
        }
    }
}

/// Why a file of pipelines is not used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PipelineCacheFault {
    /// Something else, or of another format.
    #[error("it is not a pipeline cache of this version of the format")]
    NotACache,
    /// Cut off, or changed since it was written.
    #[error("it is damaged")]
    Damaged,
    /// More than a gigabyte.
    #[error("it is larger than {max} bytes")]
    TooLarge {
        /// The most that is read.
        max: u64,
    },
    /// Written for another device.
    #[error("it was written for {found}, this is {wanted}")]
    OtherAdapter {
        /// The device that it was written for.
        found: String,
        /// This device.
        wanted: String,
    },
    /// Written by another version of the driver or of this crate.
    #[error("it was written by {found}, this is {wanted}")]
    OtherVersion {
        /// What wrote it.
        found: String,
        /// What there is now.
        wanted: String,
    },
    /// wgpu or the driver do not want the data.
    #[error("the driver refuses it: {message}")]
    Refused {
        /// wgpu's words.
        message: String,
    },
}

impl Gpu {
    /// Takes compiled pipelines from a file, if it is there, and remembers it for
    /// [`save_pipeline_cache`](Self::save_pipeline_cache). Concerns pipelines that are made from now on.
    ///
    /// A file that was damaged, or written for another adapter, driver or version of this crate, is not used, and the
    /// state says so. A checksum is no signature: keep the file where only its user can write.
    ///
    /// # Errors
    /// [`GpuError::CacheRead`] if the file is there and cannot be read; [`GpuError::OutOfMemory`],
    /// [`GpuError::DeviceLost`].
    pub fn use_pipeline_cache(&self, path: impl Into<PathBuf>) -> Result<PipelineCacheState, GpuError> {
        let path = path.into();
        let file = read(&path)?;
        if !self.device().features().contains(wgpu::Features::PIPELINE_CACHE) {
            return Ok(PipelineCacheState::Unsupported);
        }
        let (cache, state) = self.open_cache(file)?;
        self.pipeline_store().set_driver_cache(DriverCache { cache, path });
        Ok(state)
    }

    fn open_cache(&self, file: Stored) -> Result<(wgpu::PipelineCache, PipelineCacheState), GpuError> {
        let state = match &file {
            Stored::Nothing => PipelineCacheState::New,
            Stored::TooLarge => PipelineCacheState::Ignored(PipelineCacheFault::TooLarge { max: MAX_BYTES }),
            Stored::File(bytes) => match Intact::read(bytes, &Owner::of(self.info())) {
                Err(fault) => PipelineCacheState::Ignored(fault),
                Ok(data) => match self.checked_now("a pipeline cache", || data::create(self.device(), Some(data))) {
                    Ok(cache) => return Ok((cache, PipelineCacheState::Loaded { bytes: data.bytes().len() })),
                    Err(GpuError::Validation { message, .. } | GpuError::Internal { message, .. }) => {
                        PipelineCacheState::Ignored(PipelineCacheFault::Refused { message })
                    }
                    Err(error) => return Err(error),
                },
            },
        };
        let empty = self.checked_now("a pipeline cache", || data::create(self.device(), None))?;
        Ok((empty, state))
    }

    /// Writes the pipelines made so far to the file of [`use_pipeline_cache`](Self::use_pipeline_cache), in one step:
    /// whoever reads it meanwhile finds the old file or the new one. A file that is no pipeline cache stays. The number
    /// of bytes written; `None` where no file was named or the device has no pipeline caches.
    ///
    /// # Errors
    /// [`GpuError::CacheWrite`].
    pub fn save_pipeline_cache(&self) -> Result<Option<u64>, GpuError> {
        let Some(DriverCache { cache, path }) = self.pipeline_store().driver_cache() else { return Ok(None) };
        let Some(data) = cache.get_data() else { return Ok(None) };
        let file = file::write(&data, &Owner::of(self.info()));
        let written = OutputFile::write(&path, file::PIPELINE_CACHE, &file);
        written.map_err(|error| GpuError::CacheWrite { path: path.clone(), message: error.reason(&path) })?;
        Ok(Some(file.len() as u64))
    }
}

enum Stored {
    Nothing,
    TooLarge,
    File(Vec<u8>),
}

fn read(path: &Path) -> Result<Stored, GpuError> {
    let failed = |error: std::io::Error| GpuError::CacheRead { path: path.to_owned(), message: error.to_string() };
    let file = match open_regular(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Stored::Nothing),
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = vec![];
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    Ok(if bytes.len() as u64 > MAX_BYTES { Stored::TooLarge } else { Stored::File(bytes) })
}
