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
    /// A backend that this build does not have, or no build for this system.
    #[error("backend {wanted} is not built in, it takes {needed}; built in: {found}")]
    BackendNotBuilt {
        /// Name of the backend.
        wanted: &'static str,
        /// The feature of the crate, and the system.
        needed: &'static str,
        /// The backends that there are.
        found: String,
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

/// Runs `work` with every error of the device caught. An error outside a scope would end the process. The work is done when
/// this is called, and not when its errors are awaited: those of several works can be awaited together.
pub(super) fn checked<T, F: FnOnce() -> T>(
    device: &wgpu::Device,
    what: &str,
    bytes: u64,
    work: F,
) -> impl Future<Output = Result<T, GpuError>> + use<T, F> {
    let scopes = Scopes::open(device);
    let value = work();
    let errors = scopes.close(what, bytes);
    async move { errors.await.map(|()| value) }
}

/// The same where nothing can be awaited: natively the errors are known at once.
#[cfg(not(target_arch = "wasm32"))]
pub(super) fn checked_now<T>(device: &wgpu::Device, what: &str, work: impl FnOnce() -> T) -> Result<T, GpuError> {
    let mut done = std::pin::pin!(checked(device, what, 0, work));
    let mut task = std::task::Context::from_waker(std::task::Waker::noop());
    loop {
        if let std::task::Poll::Ready(result) = done.as_mut().poll(&mut task) {
            return result;
        }
    }
}

/// Errors of a browser's device that could not be awaited where they were caused: told by the next call that can.
#[cfg(target_arch = "wasm32")]
#[derive(Default)]
pub(super) struct Late(Mutex<Vec<LateError>>);

#[cfg(target_arch = "wasm32")]
type LateError = std::pin::Pin<Box<dyn Future<Output = Result<(), GpuError>>>>;

#[cfg(target_arch = "wasm32")]
impl std::fmt::Debug for Late {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Late({})", lock(&self.0).len())
    }
}

#[cfg(target_arch = "wasm32")]
impl Late {
    /// Does the work now; its errors are told later.
    pub(super) fn run<T>(&self, device: &wgpu::Device, what: &str, work: impl FnOnce() -> T) -> T {
        let scopes = Scopes::open(device);
        let value = work();
        lock(&self.0).push(Box::pin(scopes.close(what, 0)));
        value
    }

    /// The first error of what was done before.
    pub(super) async fn take(&self) -> Result<(), GpuError> {
        let errors = std::mem::take(&mut *lock(&self.0));
        let mut first = Ok(());
        for error in errors {
            first = first.and(error.await);
        }
        first
    }
}

/// Scopes for every kind of error, the most general kind first.
pub(super) struct Scopes([wgpu::ErrorScopeGuard; 3]);

impl Scopes {
    pub(super) fn open(device: &wgpu::Device) -> Self {
        use wgpu::ErrorFilter::{Internal, OutOfMemory, Validation};
        Self([OutOfMemory, Internal, Validation].map(|filter| device.push_error_scope(filter)))
    }

    /// The first error of what was done in them.
    pub(super) fn close(self, what: &str, bytes: u64) -> impl Future<Output = Result<(), GpuError>> + use<> {
        let what = what.to_owned();
        let [memory, internal, validation] = self.0;
        // the last that was opened is closed first
        let validation = validation.pop();
        let internal = internal.pop();
        let memory = memory.pop();
        async move {
            for error in [memory, internal, validation] {
                if let Some(error) = error.await {
                    return Err(translate(&what, bytes, &error));
                }
            }
            Ok(())
        }
    }
}
