//! What can go wrong on a device, and the scopes that turn wgpu's errors into values.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// Why something failed on a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GpuError {
    /// The device has no memory left.
    #[error("the device is out of memory: {what} asked for {bytes} bytes")]
    OutOfMemory {
        /// What was being made.
        what: String,
        /// Bytes that were asked for; 0 where that is not known.
        bytes: u64,
    },
    /// The device is gone: unplugged, reset, or destroyed by its owner.
    #[error("the device was lost: {reason}; make a new one, its buffers are gone")]
    DeviceLost {
        /// The driver's words.
        reason: String,
    },
    /// wgpu refused what was asked of it: a bug of this crate, or a buffer of another device.
    #[error("wgpu refused {what}: {message}")]
    Validation {
        /// What was being done.
        what: String,
        /// wgpu's words.
        message: String,
    },
    /// The driver failed.
    #[error("the driver failed at {what}: {message}")]
    Internal {
        /// What was being done.
        what: String,
        /// wgpu's words.
        message: String,
    },
    /// A buffer is larger than the device allows.
    #[error("{what} takes {bytes} bytes, a buffer of this device holds at most {max}")]
    BufferTooLarge {
        /// What the buffer is for.
        what: String,
        /// Bytes that were asked for.
        bytes: u64,
        /// Bytes that are possible.
        max: u64,
    },
    /// A buffer of the caller's is smaller than the tensor in it.
    #[error("the buffer of {name} has {found} bytes, its tensor needs {needed}")]
    BufferTooSmall {
        /// Which tensor.
        name: &'static str,
        /// Bytes needed, a multiple of 4.
        needed: u64,
        /// Bytes there are from the slice's start on.
        found: u64,
    },
    /// A slice does not start where the device can bind it.
    #[error(
        "the slice of {name} starts at byte {offset}, needs a multiple of {alignment}; \
         smaller steps go into the layout's offset"
    )]
    Alignment {
        /// Which tensor.
        name: &'static str,
        /// Where the slice starts, in bytes.
        offset: u64,
        /// The device's alignment, in bytes.
        alignment: u32,
    },
    /// A buffer was made for other uses.
    #[error("the buffer of {name} was made without the usage {needed:?}, has {found:?}")]
    Usage {
        /// Which tensor.
        name: &'static str,
        /// The usage that is missing.
        needed: wgpu::BufferUsages,
        /// The usages it has.
        found: wgpu::BufferUsages,
    },
    /// The spec says it is given, and it is not.
    #[error("the buffer of {name} is missing; the spec says it is given")]
    Missing {
        /// Which tensor.
        name: &'static str,
    },
    /// It is given, and the spec does not say so.
    #[error("a buffer of {name} is given but the spec does not ask for it")]
    Unexpected {
        /// Which tensor.
        name: &'static str,
    },
    /// A buffer is read and written in one call.
    #[error("{written} is written to the buffer that {read} is read from; use another buffer")]
    Aliased {
        /// The tensor that is written.
        written: &'static str,
        /// The tensor that is read.
        read: &'static str,
    },
    /// A pass of the caller's cannot take the copies that a call needs first.
    #[error(
        "key lengths, row ranges, slopes or sinks must be copied first, which a compute pass cannot; \
         encode into a command encoder"
    )]
    NeedsEncoder,
    /// The device did not hand data back.
    #[error("reading {what} back failed: {message}")]
    ReadBack {
        /// What was read.
        what: String,
        /// wgpu's words.
        message: String,
    },
    /// The file of a pipeline cache is there and cannot be read.
    #[error("cannot read the pipeline cache {path}: {message}", path = .path.display())]
    CacheRead {
        /// The file.
        path: PathBuf,
        /// The system's words.
        message: String,
    },
    /// A pipeline cache cannot be written.
    #[error("cannot write the pipeline cache {path}: {message}", path = .path.display())]
    CacheWrite {
        /// The file.
        path: PathBuf,
        /// The system's words.
        message: String,
    },
    /// No device could be made from an adapter.
    #[error("adapter {adapter} gave no device: {message}")]
    RequestDevice {
        /// Name of the adapter.
        adapter: String,
        /// wgpu's words.
        message: String,
    },
    /// No adapter is what was asked for.
    #[error("no adapter is {wanted}; found: {found}")]
    NoAdapter {
        /// What was asked.
        wanted: String,
        /// The adapters there are.
        found: String,
    },
}

/// What a device of ours reported outside of any scope.
#[derive(Clone, Debug, Default)]
pub(super) struct Faults {
    /// Whether the device is ours, so that its callbacks are.
    heard: bool,
    lost: Arc<Mutex<Option<String>>>,
    uncaptured: Arc<Mutex<Option<GpuError>>>,
}

impl Faults {
    /// Listens to a device that is ours alone.
    pub(super) fn of(device: &wgpu::Device) -> Self {
        let faults = Self { heard: true, ..Self::default() };
        let lost = Arc::clone(&faults.lost);
        device.set_device_lost_callback(move |reason, message| {
            let text = if message.is_empty() { format!("{reason:?}") } else { message };
            lock(&lost).get_or_insert(text);
        });
        let uncaptured = Arc::clone(&faults.uncaptured);
        device.on_uncaptured_error(Arc::new(move |error| {
            lock(&uncaptured).get_or_insert(translate("work on the device", 0, &error));
        }));
        faults
    }

    pub(super) const fn are_heard(&self) -> bool {
        self.heard
    }

    /// The first fault since the last look; a lost device stays lost.
    pub(super) fn take(&self) -> Result<(), GpuError> {
        if let Some(reason) = lock(&self.lost).clone() {
            return Err(GpuError::DeviceLost { reason });
        }
        lock(&self.uncaptured).take().map_or(Ok(()), Err)
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn translate(what: &str, bytes: u64, error: &wgpu::Error) -> GpuError {
    let what = what.to_owned();
    match error {
        wgpu::Error::OutOfMemory { .. } => GpuError::OutOfMemory { what, bytes },
        wgpu::Error::Validation { description, .. } => GpuError::Validation { what, message: description.clone() },
        wgpu::Error::Internal { description, .. } => GpuError::Internal { what, message: description.clone() },
    }
}

/// Runs `work` with every error of the device caught. An error outside a scope would end the process.
pub(super) async fn checked<T>(
    device: &wgpu::Device,
    what: &str,
    bytes: u64,
    work: impl FnOnce() -> T,
) -> Result<T, GpuError> {
    let (value, pending) = scoped(device, work);
    for error in pending {
        if let Some(error) = error.await {
            return Err(translate(what, bytes, &error));
        }
    }
    Ok(value)
}

/// The same where nothing can be awaited: natively the errors are known at once; in a browser they come too late and are
/// dropped, and what was made is refused when it is used.
pub(super) fn checked_now<T>(device: &wgpu::Device, what: &str, work: impl FnOnce() -> T) -> Result<T, GpuError> {
    let (value, pending) = scoped(device, work);
    let mut task = std::task::Context::from_waker(std::task::Waker::noop());
    for error in pending {
        if let std::task::Poll::Ready(Some(error)) = std::pin::pin!(error).poll(&mut task) {
            return Err(translate(what, 0, &error));
        }
    }
    Ok(value)
}

/// What `work` gives, and the errors that it may have caused, the most general kind last.
fn scoped<T>(device: &wgpu::Device, work: impl FnOnce() -> T) -> (T, [impl Future<Output = Option<wgpu::Error>>; 3]) {
    let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
    let internal = device.push_error_scope(wgpu::ErrorFilter::Internal);
    let validation = device.push_error_scope(wgpu::ErrorFilter::Validation);
    let value = work();
    let validation = validation.pop();
    let internal = internal.pop();
    let memory = memory.pop();
    (value, [memory, internal, validation])
}
