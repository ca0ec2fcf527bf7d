//! What is wanted, in words: a device, a kernel.

use std::str::FromStr;

use crate::cpu::CpuKernel;
use crate::dispatch::Kernel;
use crate::error::Error;

/// Which device is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceRequest {
    /// A GPU if there is one, else the CPU. A software driver is taken only if `WGPU_ADAPTER_NAME` names it.
    #[default]
    Auto,
    /// The CPU path.
    Cpu,
    /// The oracle: f64, slow, exact as far as f64 goes.
    Oracle,
    /// A GPU, or an error.
    Gpu,
    /// The adapter whose name contains this, in any case; also a software driver.
    Named(String),
    /// The adapter at this place of [`gpu::adapters`](crate::gpu::adapters), counted from 0; also a software driver.
    Number(usize),
    /// The first adapter of this backend; also a software driver.
    Backend(wgpu::Backend),
}

impl FromStr for DeviceRequest {
    type Err = DeviceRequestError;

    /// In any case: `auto`, `cpu`, `oracle`, `gpu`; a number, which is an adapter's place in the list; a backend, `vulkan`,
    /// `metal`, `dx12`, `gl` or `webgpu`; else a part of an adapter's name.
    fn from_str(text: &str) -> Result<Self, DeviceRequestError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(DeviceRequestError::Empty);
        }
        if text.bytes().all(|byte| byte.is_ascii_digit()) {
            let number = text.parse().map_err(|_| DeviceRequestError::Number { found: text.to_owned() })?;
            return Ok(Self::Number(number));
        }
        let backends = wgpu::Backend::ALL.into_iter().filter(|backend| *backend != wgpu::Backend::Noop);
        let backend = backends.into_iter().find(|backend| text.eq_ignore_ascii_case(backend.to_str()));
        Ok(match (text.to_ascii_lowercase().as_str(), backend) {
            ("auto", _) => Self::Auto,
            ("cpu", _) => Self::Cpu,
            ("oracle", _) => Self::Oracle,
            ("gpu", _) => Self::Gpu,
            (_, Some(backend)) => Self::Backend(backend),
            (_, None) => Self::Named(text.to_owned()),
        })
    }
}

impl std::fmt::Display for DeviceRequest {
    /// What is read back as the same, unless a name is one of the other words.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Oracle => f.write_str("oracle"),
            Self::Gpu => f.write_str("gpu"),
            Self::Named(name) => f.write_str(name),
            Self::Number(number) => write!(f, "{number}"),
            Self::Backend(backend) => f.write_str(backend.to_str()),
        }
    }
}

/// Why a text is no [`DeviceRequest`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceRequestError {
    /// There is nothing in it.
    #[error("a device has no name; needs auto, cpu, oracle, gpu, an adapter's number, a backend, or part of a name")]
    Empty,
    /// A number that no list has.
    #[error("{found} is no adapter's number; they count from 0")]
    Number {
        /// The number.
        found: String,
    },
}

/// Which kernel is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KernelChoice {
    /// What the plan finds best.
    #[default]
    Auto,
    /// This kernel on a GPU.
    Gpu(Kernel),
    /// This kernel on the CPU.
    Cpu(CpuKernel),
}

impl FromStr for KernelChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let gpu = text.parse().ok().map(Self::Gpu);
        let cpu = CpuKernel::ALL.into_iter().find(|kernel| kernel.name() == text).map(Self::Cpu);
        gpu.or(cpu).ok_or_else(|| Error::UnknownKernel { name: text.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_back() {
        let requests = [
            DeviceRequest::Auto,
            DeviceRequest::Cpu,
            DeviceRequest::Oracle,
            DeviceRequest::Gpu,
            DeviceRequest::Named("llvmpipe (LLVM 15)".to_owned()),
            DeviceRequest::Number(12),
            DeviceRequest::Backend(wgpu::Backend::Vulkan),
            DeviceRequest::Backend(wgpu::Backend::BrowserWebGpu),
        ];
        for request in requests {
            assert_eq!(request.to_string().parse(), Ok(request));
        }
    }
}
