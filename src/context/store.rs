//! Keys and values of contexts, where they are attended to.

use super::q8::Blocks;
use super::{ContextError, ContextSpec, ContextStorage};
use crate::device::Device;
use crate::engine::{Kind, Recording, Tensor};
use crate::error::Error;
use crate::tensor::{Element, TensorData, TensorRef};

/// Key and value of each context, and on a device the memory that one of them is expanded to.
#[derive(Debug)]
pub(super) struct Store {
    held: Vec<[Held; 2]>,
    expanded: Option<[Tensor<'static>; 2]>,
}

/// One tensor of one context.
#[derive(Debug)]
enum Held {
    Tensor(Tensor<'static>),
    Blocks { quants: Tensor<'static>, scales: Tensor<'static> },
}

impl Held {
    /// Of elements from `first` on; errors name the element within the whole tensor.
    async fn new(
        recording: &Recording<'_>,
        name: &'static str,
        storage: ContextStorage,
        data: TensorRef<'_>,
        [first, len]: [usize; 2],
    ) -> Result<Self, Error> {
        let numbers: Vec<f32> = (first..first + len).map(|n| data.get(n)).collect();
        let tensor = |element, numbers| Tensor::held(TensorData::from_f32(element, numbers));
        Ok(match storage {
            ContextStorage::F32 => Self::Tensor(recording.place(name, &tensor(Element::F32, numbers)).await?),
            ContextStorage::F16 => Self::Tensor(recording.place(name, &tensor(Element::F16, numbers)).await?),
            ContextStorage::Q8_0 => {
                let blocks = Blocks::new(&numbers);
                let Blocks { quants, scales } =
                    blocks.map_err(|at| ContextError::NotStorable { name, at: first + at, value: numbers[at] })?;
                let scales = Tensor::held(TensorData::F16(scales));
                let quants = Tensor::held(TensorData::I8(quants));
                Self::Blocks {
                    quants: recording.place(name, &quants).await?,
                    scales: recording.place(name, &scales).await?,
                }
            }
        })
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::Tensor(data) => data.bytes(),
            Self::Blocks { quants, scales } => quants.bytes() + scales.bytes(),
        }
    }
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
        let recording = Recording::new(device);
        let mut held = vec![];
        for n in 0..contexts {
            held.push([
                Held::new(&recording, "key", storage, key, [n * key_len, key_len]).await?,
                Held::new(&recording, "value", storage, value, [n * value_len, value_len]).await?,
            ]);
        }
        let mut expanded = None;
        if storage == ContextStorage::Q8_0 && matches!(device, Device::Gpu(_)) {
            expanded = Some([
                recording.allocate("expanded keys", Kind::F32, key_len).await?,
                recording.allocate("expanded values", Kind::F32, value_len).await?,
            ]);
        }
        Ok(Self { held, expanded })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.held.iter().flatten().map(Held::bytes).sum()
    }

    pub(super) fn scratch_bytes(&self) -> u64 {
        self.expanded.iter().flatten().map(Tensor::bytes).sum()
    }

    /// Key and value of a context as attentions take them, expanded first where they are blocks.
    pub(super) async fn tensors(
        &self,
        recording: &mut Recording<'_>,
        context: usize,
    ) -> Result<[Tensor<'static>; 2], Error> {
        let [key, value] = &self.held[context];
        let [to_key, to_value] = match &self.expanded {
            Some([key, value]) => [Some(key), Some(value)],
            None => [None; 2],
        };
        Ok([expanded(recording, key, to_key).await?, expanded(recording, value, to_value).await?])
    }
}

async fn expanded(
    recording: &mut Recording<'_>,
    held: &Held,
    to: Option<&Tensor<'static>>,
) -> Result<Tensor<'static>, Error> {
    match held {
        Held::Tensor(data) => Ok(data.clone()),
        Held::Blocks { quants, scales } => recording.expand_q8([quants, scales], to).await,
    }
}
