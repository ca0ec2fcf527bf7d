//! Commands in order, recorded for a device or computed on the host.

use super::PlaceError;
use super::inputs::element_of;
use super::tensor::Tensor;
use crate::device::Device;
use crate::error::Error;
use crate::gpu::Gpu;
use crate::slice::Kind;
use crate::tensor::{Element, TensorData};
use crate::terms::Terms;

/// Commands in order: on a device recorded into an encoder, on the host computed at once.
///
/// What a recording's commands write can be read, or given to others, once it is submitted. One that records into the
/// caller's encoder is submitted by the caller.
#[derive(Debug)]
pub struct Recording<'e> {
    on: On<'e>,
}

#[derive(Debug)]
enum On<'e> {
    Host(Device),
    Gpu { gpu: Gpu, encoder: Encoder<'e> },
}

#[derive(Debug)]
enum Encoder<'e> {
    Own(wgpu::CommandEncoder),
    Callers(&'e mut wgpu::CommandEncoder),
}

impl Recording<'static> {
    /// A recording that [`submit`](Self::submit) runs.
    #[must_use]
    pub fn new(device: &Device) -> Self {
        let on = match device {
            Device::Cpu | Device::Oracle => On::Host(device.clone()),
            Device::Gpu(gpu) => On::Gpu { gpu: gpu.clone(), encoder: Encoder::Own(encoder(gpu)) },
        };
        Self { on }
    }
}

impl<'e> Recording<'e> {
    /// Records into an encoder of the caller's on this device, between commands of theirs. Nothing is submitted.
    pub fn in_encoder(gpu: &Gpu, encoder: &'e mut wgpu::CommandEncoder) -> Self {
        Self { on: On::Gpu { gpu: gpu.clone(), encoder: Encoder::Callers(encoder) } }
    }

    /// The place that it is for.
    #[must_use]
    pub fn device(&self) -> Device {
        match &self.on {
            On::Host(device) => device.clone(),
            On::Gpu { gpu, .. } => Device::Gpu(gpu.clone()),
        }
    }

    /// Refuses to record what was prepared elsewhere.
    pub(crate) fn check_device(&self, prepared: &Device) -> Result<(), PlaceError> {
        let same = match (&self.on, prepared) {
            (On::Host(Device::Cpu), Device::Cpu) | (On::Host(Device::Oracle), Device::Oracle) => true,
            (On::Gpu { gpu, .. }, Device::Gpu(other)) => gpu.is_clone_of(other),
            _ => false,
        };
        if same {
            return Ok(());
        }
        Err(PlaceError::OtherRecording { prepared: prepared.name(), recording: self.device().name() })
    }

    /// The GPU and the encoder, where it is for a device.
    pub(super) fn gpu(&mut self) -> Option<(&Gpu, &mut wgpu::CommandEncoder)> {
        match &mut self.on {
            On::Host(_) => None,
            On::Gpu { gpu, encoder: Encoder::Own(encoder) } => Some((gpu, encoder)),
            On::Gpu { gpu, encoder: Encoder::Callers(encoder) } => Some((gpu, encoder)),
        }
    }

    /// The tensor where this recording runs: what is on the host is copied to a device.
    pub(crate) async fn place<'a>(&self, name: &'static str, tensor: &Tensor<'a>) -> Result<Tensor<'a>, Error> {
        match (&self.on, tensor.gpu()) {
            (On::Host(_), None) => Ok(tensor.clone()),
            (On::Host(device), Some(_)) => Err(PlaceError::OnDevice { name, device: device.name() }.into()),
            (On::Gpu { gpu, .. }, Some(of)) if gpu.is_clone_of(of) => Ok(tensor.clone()),
            (On::Gpu { gpu, .. }, Some(_)) => {
                Err(PlaceError::OtherDevice { name, device: gpu.info().name.clone() }.into())
            }
            (On::Gpu { gpu, .. }, None) => {
                // what is read may be held by a lock, which must not be waited with
                let upload = |write: &dyn Fn(&[u8])| {
                    if let Some(read) = tensor.host() {
                        write(read.slice().bytes());
                    }
                };
                let buffer = gpu.upload_from(name, tensor.bytes(), upload).await?;
                Ok(Tensor::on_device(gpu, buffer.slice(..), tensor.kind(), tensor.len())?)
            }
        }
    }

    /// The same tensor from the start of a buffer on, where a command takes whole buffers: copied where it is not.
    pub(crate) async fn at_start<'a>(&mut self, name: &'static str, tensor: &Tensor<'a>) -> Result<Tensor<'a>, Error> {
        if tensor.buffer_slice().is_none_or(|slice| slice.offset() == 0) {
            return Ok(tensor.clone());
        }
        let copy = self.allocate(name, tensor.kind(), tensor.len()).await?;
        self.copy(tensor, &copy, 0)?;
        Ok(copy)
    }

    /// All terms where this recording runs.
    pub(crate) async fn place_terms<'a>(&self, terms: &Terms<Tensor<'a>>) -> Result<Terms<Tensor<'a>>, Error> {
        let mut placed = Terms::default();
        for (to, (name, tensor)) in placed.places().into_iter().zip(terms.list()) {
            if let Some(tensor) = tensor {
                *to = Some(self.place(name, tensor).await?);
            }
        }
        Ok(placed)
    }

    /// A tensor of zeros to be written.
    pub(crate) async fn allocate(&self, name: &'static str, kind: Kind, len: usize) -> Result<Tensor<'static>, Error> {
        match &self.on {
            On::Gpu { gpu, .. } => {
                let buffer = gpu.allocate(name, len as u64 * kind.size_bytes() as u64).await?;
                Ok(Tensor::on_device(gpu, buffer.slice(..), kind, len)?)
            }
            On::Host(_) => {
                // what is computed on the host is one of these
                let element = kind.element().unwrap_or(Element::F32);
                let bytes = len as u128 * element.size_bytes() as u128;
                // asked for and given back: what cannot be allocated would end the process
                if usize::try_from(bytes).map_or(true, |n| Vec::<u8>::new().try_reserve_exact(n).is_err()) {
                    return Err(Error::HostMemory { bytes });
                }
                Ok(Tensor::held(TensorData::zeros(element, len)))
            }
        }
    }

    /// Runs what is recorded; later commands go into a new recording. In an encoder of the caller's nothing happens: what
    /// follows is recorded behind.
    ///
    /// # Errors
    /// [`Error::Gpu`].
    pub(crate) async fn flush(&mut self, what: &str) -> Result<(), Error> {
        if let On::Gpu { gpu, encoder: Encoder::Own(own) } = &mut self.on {
            let full = std::mem::replace(own, encoder(gpu));
            submit(gpu, full, what).await?;
        }
        Ok(())
    }

    /// Runs what was recorded, where the encoder is its own.
    ///
    /// # Errors
    /// [`Error::Gpu`].
    pub async fn submit(self) -> Result<(), Error> {
        match self.on {
            On::Gpu { gpu, encoder: Encoder::Own(encoder) } => submit(&gpu, encoder, "a submission").await,
            On::Host(_) | On::Gpu { .. } => Ok(()),
        }
    }
}

fn encoder(gpu: &Gpu) -> wgpu::CommandEncoder {
    gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default())
}

async fn submit(gpu: &Gpu, encoder: wgpu::CommandEncoder, what: &str) -> Result<(), Error> {
    gpu.check_faults()?;
    gpu.checked(what, 0, || gpu.queue().submit([encoder.finish()])).await?;
    Ok(())
}

impl Tensor<'_> {
    /// All elements in host memory. Those of a device are there once what writes them is submitted.
    ///
    /// # Errors
    /// [`Error::Gpu`]; [`InputError::Element`](crate::InputError::Element) where the elements are none that a tensor of an attention has.
    pub async fn read(&self, name: &'static str) -> Result<TensorData, Error> {
        let element = element_of(name, self)?;
        let (Some(gpu), Some(slice)) = (self.gpu(), self.buffer_slice()) else {
            let data = self.host().map(|read| read.tensor().to_owned());
            return Ok(data.unwrap_or_else(|| TensorData::zeros(element, 0)));
        };
        Ok(match element {
            Element::F32 => TensorData::F32(gpu.read(name, slice, self.len()).await?),
            Element::F16 => TensorData::F16(gpu.read(name, slice, self.len()).await?),
            Element::Bf16 => TensorData::Bf16(gpu.read(name, slice, self.len()).await?),
            Element::I8 => TensorData::I8(gpu.read(name, slice, self.len()).await?),
        })
    }

    pub(crate) async fn read_f32(&self, name: &'static str) -> Result<Vec<f32>, Error> {
        Ok(self.read(name).await?.into_f32())
    }
}
