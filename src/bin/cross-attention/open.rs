//! Opening the device that is asked for, with the pipelines that were compiled for it before.

use std::path::{Path, PathBuf};

use clap::Args;
use cross_attention::gpu::{PipelineCacheFault, PipelineCacheState};
use cross_attention::{Choice, Device};

use crate::error::Error;
use crate::options::DeviceFlags;
use crate::terminal::Terminal;

/// Where compiled pipelines are kept.
#[derive(Clone, Debug, Args)]
pub(crate) struct CacheFlag {
    /// Keep compiled pipelines in this file, where the device can (Vulkan); made if it is not there
    #[arg(long, value_name = "FILE")]
    pipeline_cache: Option<PathBuf>,
}

/// Chooses the device, and gives it the compiled pipelines. Says so where they are not used.
///
/// # Errors
/// A device that is not there; a file that can't be read.
pub(crate) fn open(device: &DeviceFlags, cache: &CacheFlag, terminal: &Terminal) -> Result<Choice, Error> {
    let choice = Device::choose_blocking(&device.device)?;
    if let Some(path) = &cache.pipeline_cache {
        let shown = path.display();
        let state = match &choice.device {
            Device::Gpu(context) => context.use_pipeline_cache(path).map_err(cross_attention::Error::from)?,
            Device::Cpu | Device::Oracle => PipelineCacheState::Unsupported,
        };
        match state {
            PipelineCacheState::New | PipelineCacheState::Loaded { .. } => {}
            PipelineCacheState::Ignored(PipelineCacheFault::NotACache) if !is_empty(path) => {
                return Err(Error::NotAPipelineCache { path: path.clone() });
            }
            state => terminal.note(format_args!("warning: pipeline cache {shown}: {state}")),
        }
    }
    Ok(choice)
}

fn is_empty(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|found| found.len() == 0)
}

/// Keeps the pipelines that were compiled.
///
/// # Errors
/// A file that can't be written.
pub(crate) fn close(device: &Device) -> Result<(), Error> {
    if let Device::Gpu(context) = device {
        context.save_pipeline_cache().map_err(cross_attention::Error::from)?;
    }
    Ok(())
}
