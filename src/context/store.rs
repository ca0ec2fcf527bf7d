//! Keys and values of contexts, in host memory or on a device.

use std::borrow::Cow;

use super::q8::Blocks;
use super::{ContextError, ContextSpec, ContextStorage};
use crate::device::Device;
use crate::dispatch::Variant;
use crate::dispatch::uniforms::ExpandParams;
use crate::error::Error;
use crate::gpu::{Context, Uniform};
use crate::kernels::beside::small::grid;
use crate::tensor::{Element, TensorData, TensorRef};

/// Where contexts lie; key and value of each.
#[derive(Debug)]
pub(super) enum Store {
    Host(Vec<[Held; 2]>),
    Gpu(OnGpu),
}

/// One tensor of one context.
#[derive(Debug)]
pub(super) enum Held {
    Tensor(TensorData),
    Blocks(Blocks),
}

impl Held {
    /// Of elements from `first` on; errors name the element within the whole tensor.
    fn new(
        name: &'static str,
        storage: ContextStorage,
        data: TensorRef<'_>,
        [first, len]: [usize; 2],
    ) -> Result<Self, ContextError> {
        let numbers: Vec<f32> = (first..first + len).map(|n| data.get(n)).collect();
        Ok(match storage {
            ContextStorage::F32 => Self::Tensor(TensorData::F32(numbers)),
            ContextStorage::F16 => Self::Tensor(TensorData::from_f32(Element::F16, numbers)),
            ContextStorage::Q8_0 => Self::Blocks(Blocks::new(&numbers).map_err(|at| ContextError::NotStorable {
                name,
                at: first + at,
                value: numbers[at],
            })?),
        })
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::Tensor(data) => data.as_ref().as_bytes().len() as u64,
            Self::Blocks(blocks) => blocks.bytes(),
        }
    }
}

/// Contexts on a device.
#[derive(Debug)]
pub(super) struct OnGpu {
    context: Context,
    held: Vec<[OnDevice; 2]>,
    expand: Option<[Expand; 2]>,
    bytes: u64,
}

#[derive(Debug)]
enum OnDevice {
    Tensor(wgpu::Buffer),
    Blocks { quants: wgpu::Buffer, scales: wgpu::Buffer },
}

/// What expands a tensor of one context, and where to.
#[derive(Debug)]
struct Expand {
    params: wgpu::Buffer,
    grid: [u32; 3],
    to: wgpu::Buffer,
}

impl Store {
    pub(super) async fn new(
        device: &Device,
        spec: &ContextSpec,
        key: TensorRef<'_>,
        value: TensorRef<'_>,
    ) -> Result<Self, Error> {
        let ContextSpec { contexts, kv_heads, kv_len, head_dim, v_head_dim, storage } = *spec;
        let [key_len, value_len] = [head_dim, v_head_dim].map(|width| kv_heads * kv_len * width);
        let mut held = vec![];
        for n in 0..contexts {
            held.push([
                Held::new("key", storage, key, [n * key_len, key_len])?,
                Held::new("value", storage, value, [n * value_len, value_len])?,
            ]);
        }
        match device {
            Device::Cpu | Device::Oracle => Ok(Self::Host(held)),
            Device::Gpu(context) => {
                let expand = match storage {
                    ContextStorage::F32 | ContextStorage::F16 => None,
                    ContextStorage::Q8_0 => {
                        Some([Expand::new(context, key_len).await?, Expand::new(context, value_len).await?])
                    }
                };
                let bytes = held.iter().flatten().map(Held::bytes).sum();
                let mut on_device = vec![];
                for [key, value] in &held {
                    on_device.push([
                        OnDevice::new(context, "context keys", key).await?,
                        OnDevice::new(context, "context values", value).await?,
                    ]);
                }
                Ok(Self::Gpu(OnGpu { context: context.clone(), held: on_device, expand, bytes }))
            }
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Host(held) => held.iter().flatten().map(Held::bytes).sum(),
            Self::Gpu(on_gpu) => on_gpu.bytes,
        }
    }

    pub(super) fn scratch_bytes(&self) -> u64 {
        match self {
            Self::Host(_) => 0,
            Self::Gpu(on_gpu) => on_gpu.expand.iter().flatten().map(|expand| expand.to.size()).sum(),
        }
    }

    /// Key and value of a context in host memory; nothing where it is on a device.
    pub(super) fn on_host(&self, context: usize) -> [Cow<'_, TensorData>; 2] {
        match self {
            Self::Host(held) => held[context].each_ref().map(|held| match held {
                Held::Tensor(data) => Cow::Borrowed(data),
                Held::Blocks(blocks) => Cow::Owned(TensorData::F32(blocks.expand())),
            }),
            Self::Gpu(_) => [(); 2].map(|()| Cow::Owned(TensorData::zeros(Element::F32, 0))),
        }
    }
}

impl OnDevice {
    async fn new(context: &Context, name: &str, held: &Held) -> Result<Self, Error> {
        Ok(match held {
            Held::Tensor(data) => Self::Tensor(context.upload_tensor(name, data.as_ref()).await?),
            Held::Blocks(blocks) => Self::Blocks {
                quants: context.upload(name, &blocks.quants).await?,
                scales: context.upload(name, &blocks.scales).await?,
            },
        })
    }
}

impl Expand {
    async fn new(context: &Context, elements: usize) -> Result<Self, Error> {
        let words = elements / 4;
        let (blocks_per_row, grid) = grid("kv_heads * kv_len * width", words, elements, context.caps())
            .map_err(|reason| Error::MergePlan { reason })?;
        let params = ExpandParams { words: u32::try_from(words).unwrap_or(u32::MAX), blocks_per_row, padding: [0; 2] };
        Ok(Self {
            params: context.uniform("params", bytemuck::bytes_of(&params)).await?,
            grid,
            to: context.allocate("expanded context", elements as u64 * 4).await?,
        })
    }
}

impl OnGpu {
    pub(super) const fn context(&self) -> &Context {
        &self.context
    }

    /// Key and value of a context as attentions take them, recorded to be expanded first where they are blocks.
    pub(super) async fn tensors(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        context: usize,
    ) -> Result<[wgpu::Buffer; 2], Error> {
        let mut tensors = vec![];
        for (n, held) in self.held[context].iter().enumerate() {
            tensors.push(match (held, &self.expand) {
                (OnDevice::Blocks { quants, scales }, Some(expand)) => {
                    let Expand { params, grid, to } = &expand[n];
                    let bound = [quants, scales, to].map(|buffer| (buffer, buffer.size()));
                    let (variant, params) = (Variant::expand_q8(), Uniform::Kept(params));
                    self.context.encode_beside(encoder, &variant, params, &bound, *grid).await?;
                    to.clone()
                }
                (OnDevice::Tensor(buffer) | OnDevice::Blocks { quants: buffer, .. }, _) => buffer.clone(),
            });
        }
        let [key, value] = [0, 1].map(|n| tensors[n].clone());
        Ok([key, value])
    }
}
