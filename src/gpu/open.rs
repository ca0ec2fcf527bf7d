//! A device to compute on, its queue, its capabilities and the pipelines made so far.

use std::sync::Arc;

use super::error::{Faults, GpuError, checked};
use super::pipelines::Pipelines;
use super::probe;
use crate::caps::{CooperativeMatrix, DeviceCaps, SubgroupFault};

/// A device with its queue and everything that was made on it. Cheap to clone; clones share pipelines.
#[derive(Clone, Debug)]
pub struct Gpu {
    inner: Arc<Inner>,
}

impl Gpu {
    /// Whether both are clones of one. wgpu's own comparison counts within an instance: of two instances, the first devices
    /// are equal to it.
    pub(crate) fn is_clone_of(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }
}

#[derive(Debug)]
struct Inner {
    device: wgpu::Device,
    queue: wgpu::Queue,
    info: wgpu::AdapterInfo,
    caps: DeviceCaps,
    pipelines: Pipelines,
    faults: Faults,
    #[cfg(target_arch = "wasm32")]
    late: super::error::Late,
    #[cfg(feature = "threads")]
    poller: super::arrival::Poller,
    /// Bound where a tensor is empty, for a binding may not be: one to read, one to write.
    empty_read: wgpu::Buffer,
    empty_written: wgpu::Buffer,
}

impl Gpu {
    /// The features that are asked of an adapter where it has them. No kernel needs any.
    pub const FEATURES: wgpu::Features = wgpu::Features::TIMESTAMP_QUERY
        .union(wgpu::Features::SUBGROUP)
        .union(wgpu::Features::SHADER_F16)
        .union(wgpu::Features::PIPELINE_CACHE);

    /// Computes on a device of the caller's.
    ///
    /// Ask the adapter for the features in [`FEATURES`](Self::FEATURES) that it has, and for its own limits: a device that was
    /// opened with wgpu's defaults has no subgroups and 16 KiB of workgroup memory, and plans for it leave out what needs more.
    /// The text of a [`Plan`](crate::Plan) says so.
    ///
    /// Where the device has subgroups, some invocations are asked first how they lie in them, and natively the device is
    /// polled until they answer; the answer is in [`caps`](Self::caps). Its callbacks are left alone, so it is the caller's own
    /// that tell of a loss: calls on a lost device may succeed and give nothing.
    ///
    /// ```no_run
    /// # pollster::block_on(async {
    /// use cross_attention::{gpu::Gpu, wgpu};
    /// let adapter = wgpu::Instance::default().request_adapter(&wgpu::RequestAdapterOptions::default()).await?;
    /// let wanted = wgpu::DeviceDescriptor {
    ///     required_features: adapter.features() & Gpu::FEATURES,
    ///     required_limits: adapter.limits(),
    ///     ..wgpu::DeviceDescriptor::default()
    /// };
    /// let (device, queue) = adapter.request_device(&wanted).await?;
    /// let gpu = Gpu::from_device(device, queue).await?;
    /// println!("{:?}", gpu.caps().subgroups);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// # })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`GpuError`] if not even a buffer of 16 bytes can be made on it.
    pub async fn from_device(device: wgpu::Device, queue: wgpu::Queue) -> Result<Self, GpuError> {
        Self::new(device, queue, Faults::default(), None).await
    }

    /// The same, blocking.
    ///
    /// # Errors
    /// As [`from_device`](Self::from_device).
    #[cfg(feature = "threads")]
    pub fn from_device_blocking(device: wgpu::Device, queue: wgpu::Queue) -> Result<Self, GpuError> {
        pollster::block_on(Self::from_device(device, queue))
    }

    /// Takes over a device that nobody else uses: its faults become values.
    pub(super) async fn own(
        device: wgpu::Device,
        queue: wgpu::Queue,
        cooperative_matrix: Option<CooperativeMatrix>,
    ) -> Result<Self, GpuError> {
        let faults = Faults::of(&device);
        Self::new(device, queue, faults, cooperative_matrix).await
    }

    async fn new(
        device: wgpu::Device,
        queue: wgpu::Queue,
        faults: Faults,
        cooperative_matrix: Option<CooperativeMatrix>,
    ) -> Result<Self, GpuError> {
        let info = device.adapter_info();
        let mut caps = DeviceCaps { cooperative_matrix, ..DeviceCaps::of(&info, device.features(), &device.limits()) };
        if let Some(sizes) = caps.subgroups {
            caps.subgroup_fault = probe::subgroup_fault(&device, &queue, sizes).await?;
            if caps.subgroup_fault.is_some() {
                caps.subgroups = None;
            }
        } else if info.backend == wgpu::Backend::BrowserWebGpu {
            caps.subgroup_fault = Some(SubgroupFault::Browser);
        }
        let empty = || {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("empty tensor"),
                size: 16,
                usage: wgpu::BufferUsages::STORAGE,
                mapped_at_creation: false,
            })
        };
        let (empty_read, empty_written) = checked(&device, "an empty buffer", 16, || (empty(), empty())).await?;
        let pipelines = Pipelines::default();
        let inner = Inner {
            device,
            queue,
            info,
            caps,
            pipelines,
            faults,
            #[cfg(target_arch = "wasm32")]
            late: super::error::Late::default(),
            #[cfg(feature = "threads")]
            poller: super::arrival::Poller::default(),
            empty_read,
            empty_written,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &wgpu::Device {
        &self.inner.device
    }

    /// The device's queue.
    #[must_use]
    pub fn queue(&self) -> &wgpu::Queue {
        &self.inner.queue
    }

    /// Name, backend and driver of the adapter.
    #[must_use]
    pub fn info(&self) -> &wgpu::AdapterInfo {
        &self.inner.info
    }

    /// What the device can do.
    #[must_use]
    pub fn caps(&self) -> &DeviceCaps {
        &self.inner.caps
    }

    /// Number of pipelines made so far.
    #[must_use]
    pub fn pipelines(&self) -> usize {
        self.inner.pipelines.made()
    }

    pub(super) fn pipeline_store(&self) -> &Pipelines {
        &self.inner.pipelines
    }

    #[cfg(feature = "threads")]
    pub(super) fn poller(&self) -> &super::arrival::Poller {
        &self.inner.poller
    }

    pub(super) fn empty_buffer(&self, written: bool) -> &wgpu::Buffer {
        if written { &self.inner.empty_written } else { &self.inner.empty_read }
    }

    /// Runs `work` with every error of the device caught; a lost device is told apart from a refusal.
    pub(crate) async fn checked<T>(&self, what: &str, bytes: u64, work: impl FnOnce() -> T) -> Result<T, GpuError> {
        // begun before anything is awaited, so that calls that are awaited together are on their way together
        let pending = checked(self.device(), what, bytes, work);
        #[cfg(target_arch = "wasm32")]
        self.or_lost(self.inner.late.take().await)?;
        self.or_lost(pending.await)
    }

    /// The same where nothing can be awaited. In a browser errors come later: the next call that awaits tells them.
    pub(crate) fn checked_now<T>(&self, what: &str, work: impl FnOnce() -> T) -> Result<T, GpuError> {
        #[cfg(target_arch = "wasm32")]
        return Ok(self.inner.late.run(self.device(), what, work));
        #[cfg(not(target_arch = "wasm32"))]
        self.or_lost(super::error::checked_now(self.device(), what, work))
    }

    /// A lost device refuses what is tried, or takes it and gives nothing: where something failed, the loss is what counts.
    /// One that was destroyed tells so only when it has nothing left to do.
    pub(super) fn or_lost<T>(&self, result: Result<T, GpuError>) -> Result<T, GpuError> {
        if result.is_err() {
            self.poll(wgpu::PollType::wait_indefinitely());
            self.check_there()?;
        }
        result
    }

    /// What was told of the device, or what a look at it shows: the poll of another thread may have taken the news of a loss
    /// and not told it yet.
    fn check_there(&self) -> Result<(), GpuError> {
        self.check_faults()?;
        if self.inner.faults.are_heard() && self.makes_nothing() {
            // the reason may have come meanwhile
            self.check_faults()?;
            return Err(GpuError::DeviceLost { reason: "nothing that is made on it can be used".to_owned() });
        }
        Ok(())
    }

    /// Whether a buffer can be made, as far as the device says, but not used: so it is with a device that is lost. A browser
    /// says so itself, and of other errors later.
    #[cfg(target_arch = "wasm32")]
    #[expect(clippy::unused_self, reason = "natively the device is asked")]
    const fn makes_nothing(&self) -> bool {
        false
    }

    /// Whether a buffer can be made, as far as the device says, but not used: so it is with a device that is lost.
    #[cfg(not(target_arch = "wasm32"))]
    fn makes_nothing(&self) -> bool {
        use super::error::checked_now;
        let make = || {
            self.device().create_buffer(&wgpu::BufferDescriptor {
                label: Some("probe"),
                size: 16,
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        };
        checked_now(self.device(), "a probe", make).is_ok_and(|probe| {
            checked_now(self.device(), "a probe", || probe.map_async(wgpu::MapMode::Read, .., |_| ())).is_err()
        })
    }

    /// Lets a device of ours tell what it has to; what the poll says of itself adds nothing.
    fn poll(&self, how: wgpu::PollType) {
        if self.inner.faults.are_heard() {
            let _ = self.device().poll(how);
        }
    }

    /// Looks whether a device of ours is lost, which is told in a callback of a poll.
    pub(crate) fn check_alive(&self) -> Result<(), GpuError> {
        self.poll(wgpu::PollType::Poll);
        self.check_there()
    }

    /// What a device of ours reported since the last look.
    pub(crate) fn check_faults(&self) -> Result<(), GpuError> {
        self.inner.faults.take()
    }

    /// Waits for a future that needs the device to make progress.
    #[cfg(feature = "threads")]
    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        let mut future = std::pin::pin!(future);
        let mut task = std::task::Context::from_waker(std::task::Waker::noop());
        loop {
            let polled = super::arrival::polling_here(|| future.as_mut().poll(&mut task));
            if let std::task::Poll::Ready(value) = polled {
                return value;
            }
            // what the future waits for arrives in a callback of this poll; if polling fails, the callback brings the
            // error
            if self.device().poll(wgpu::PollType::wait_indefinitely()).is_err() {
                std::thread::yield_now();
            }
        }
    }
}
