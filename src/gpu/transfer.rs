//! Host memory to the device and back.

use super::arrival::arrival;
use super::error::GpuError;
use super::open::Gpu;
use crate::tensor::TensorRef;

/// The uses of every buffer that this crate makes for tensors.
const TENSOR: wgpu::BufferUsages =
    wgpu::BufferUsages::STORAGE.union(wgpu::BufferUsages::COPY_DST).union(wgpu::BufferUsages::COPY_SRC);

/// Bytes that are uploaded at a time.
const UPLOAD_PART: usize = 32 << 20;

impl Gpu {
    /// A buffer of zeros for a tensor of `bytes` bytes, rounded up to a multiple of 4.
    ///
    /// # Errors
    /// [`GpuError::BufferTooLarge`] beyond the device's limit, [`GpuError::OutOfMemory`].
    pub async fn allocate(&self, name: &str, bytes: u64) -> Result<wgpu::Buffer, GpuError> {
        self.buffer(name, bytes, TENSOR).await
    }

    /// Copies elements to a new buffer. Works for `f32`, `f16`, `u32`, `i32` and bytes.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate).
    pub async fn upload<T: bytemuck::NoUninit>(&self, name: &str, data: &[T]) -> Result<wgpu::Buffer, GpuError> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        self.upload_from(name, bytes.len() as u64, |write| write(bytes)).await
    }

    /// Copies to a new buffer of `len` bytes what `give` gives to be written, without waiting in between.
    pub(crate) async fn upload_from(
        &self,
        name: &str,
        len: u64,
        give: impl FnOnce(&dyn Fn(&[u8])),
    ) -> Result<wgpu::Buffer, GpuError> {
        let descriptor = self.descriptor(name, len, TENSOR)?;
        self.checked(name, len, || {
            let buffer = self.device().create_buffer(&descriptor);
            give(&|bytes| self.write(&buffer, bytes));
            buffer
        })
        .await
    }

    /// Writes to the start of a buffer; errors are those of the scope around this.
    fn write(&self, buffer: &wgpu::Buffer, bytes: &[u8]) {
        let (whole, rest) = bytes.split_at(bytes.len() / 4 * 4);
        // every write is staged by wgpu until it is submitted and done: one of all there is would double it
        for (n, part) in whole.chunks(UPLOAD_PART).enumerate() {
            self.queue().write_buffer(buffer, (n * UPLOAD_PART) as u64, part);
            if whole.len() > UPLOAD_PART {
                self.queue().submit([]);
            }
        }
        if !rest.is_empty() {
            let mut word = [0u8; 4];
            word[..rest.len()].copy_from_slice(rest);
            self.queue().write_buffer(buffer, whole.len() as u64, &word);
        }
    }

    /// Copies a tensor's elements to a new buffer.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate).
    pub async fn upload_tensor(&self, name: &str, data: TensorRef<'_>) -> Result<wgpu::Buffer, GpuError> {
        self.upload(name, data.as_bytes()).await
    }

    /// Reads `len` elements from the start of a slice back to the host. Natively a thread polls the device while the call is
    /// awaited, so that it ends by itself in any executor; callbacks of the caller's may run on that thread.
    ///
    /// # Errors
    /// [`GpuError::BufferTooSmall`], [`GpuError::Usage`] (the buffer needs `COPY_SRC`), [`GpuError::DeviceLost`],
    /// [`GpuError::OutOfMemory`].
    pub async fn read<T: bytemuck::Pod>(
        &self,
        name: &'static str,
        slice: wgpu::BufferSlice<'_>,
        len: usize,
    ) -> Result<Vec<T>, GpuError> {
        let wanted = len.saturating_mul(size_of::<T>());
        let needed = (wanted as u64).checked_next_multiple_of(4).unwrap_or(u64::MAX);
        if slice.size() < needed {
            return Err(GpuError::BufferTooSmall { name, needed, found: slice.size() });
        }
        if !slice.buffer().usage().contains(wgpu::BufferUsages::COPY_SRC) {
            let found = slice.buffer().usage();
            return Err(GpuError::Usage { name, needed: wgpu::BufferUsages::COPY_SRC, found });
        }
        if len == 0 {
            return Ok(vec![]);
        }
        let uses = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let descriptor = self.descriptor("read-back", needed, uses)?;
        let (sender, arrival) = arrival(Some(self));
        let staging = self.checked(name, needed, || {
            let staging = self.device().create_buffer(&descriptor);
            let mut encoder = self.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            encoder.copy_buffer_to_buffer(slice.buffer(), slice.offset(), &staging, 0, needed);
            self.queue().submit([encoder.finish()]);
            staging.slice(..).map_async(wgpu::MapMode::Read, move |result| sender.arrive(result.is_ok()));
            staging
        });
        let staging = staging.await?;
        let arrived = arrival.wait().await;
        self.check_faults()?;
        let failed = |message: String| GpuError::ReadBack { what: name.to_owned(), message };
        if !arrived {
            return self.or_lost(Err(failed("the buffer could not be mapped".to_owned())));
        }
        let mut data = vec![T::zeroed(); len];
        // a device that was destroyed since then has taken the buffer with it
        let view = staging.slice(..).get_mapped_range().map_err(|error| failed(error.to_string()));
        let view = self.or_lost(view)?;
        bytemuck::cast_slice_mut(&mut data).copy_from_slice(&view[..wanted]);
        drop(view);
        self.checked_now(name, || {
            staging.unmap();
            // where a garbage collector owns it, it would stay
            staging.destroy();
        })?;
        Ok(data)
    }

    /// The same, blocking.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    #[cfg(feature = "threads")]
    pub fn read_blocking<T: bytemuck::Pod>(
        &self,
        name: &'static str,
        slice: wgpu::BufferSlice<'_>,
        len: usize,
    ) -> Result<Vec<T>, GpuError> {
        self.block_on(self.read(name, slice, len))
    }

    /// [`allocate`](Self::allocate), blocking.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate).
    #[cfg(feature = "threads")]
    pub fn allocate_blocking(&self, name: &str, bytes: u64) -> Result<wgpu::Buffer, GpuError> {
        self.block_on(self.allocate(name, bytes))
    }

    /// [`upload`](Self::upload), blocking.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    #[cfg(feature = "threads")]
    pub fn upload_blocking<T: bytemuck::NoUninit>(&self, name: &str, data: &[T]) -> Result<wgpu::Buffer, GpuError> {
        self.block_on(self.upload(name, data))
    }

    /// Fills a buffer with bits that are NaN in every element type.
    #[cfg(feature = "tune")]
    pub(crate) async fn fill_with_nan(&self, buffer: &wgpu::Buffer) -> Result<(), GpuError> {
        let size = buffer.size();
        let chunk = vec![0xff; usize::try_from(size.min(1 << 20)).unwrap_or(0)];
        self.checked("a buffer of NaN", size, || {
            let mut start = 0;
            while start < size {
                let bytes = (size - start).min(1 << 20);
                self.queue().write_buffer(buffer, start, &chunk[..usize::try_from(bytes).unwrap_or(0)]);
                start += bytes;
            }
        })
        .await
    }

    pub(super) async fn buffer(
        &self,
        name: &str,
        bytes: u64,
        usage: wgpu::BufferUsages,
    ) -> Result<wgpu::Buffer, GpuError> {
        let descriptor = self.descriptor(name, bytes, usage)?;
        self.checked(name, descriptor.size, || self.device().create_buffer(&descriptor)).await
    }

    fn descriptor<'a>(
        &self,
        name: &'a str,
        bytes: u64,
        usage: wgpu::BufferUsages,
    ) -> Result<wgpu::BufferDescriptor<'a>, GpuError> {
        self.check_faults()?;
        // a buffer without bytes could not be bound
        let size = bytes.max(4).checked_next_multiple_of(4).unwrap_or(u64::MAX);
        let max = self.caps().max_buffer_size;
        if size > max {
            return Err(GpuError::BufferTooLarge { what: name.to_owned(), bytes: size, max });
        }
        Ok(wgpu::BufferDescriptor { label: Some(name), size, usage, mapped_at_creation: false })
    }
}
