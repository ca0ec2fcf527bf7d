//! Keys and values of a context, projected once and kept.

use std::sync::Arc;

use super::{LayerConfig, Model};
use crate::device::Device;
use crate::engine::Tensor;
use crate::tensor::Element;

/// Keys and values of a context, projected by a layer and kept on its device. Clones share them.
#[derive(Clone, Debug)]
pub struct LayerContext {
    pub(super) kept: Arc<KeptContext>,
}

#[derive(Debug)]
pub(super) struct KeptContext {
    pub(super) model: Arc<Model>,
    pub(super) device: Device,
    pub(super) batch: usize,
    pub(super) kv_len: usize,
    pub(super) element: Element,
    /// Keys and values.
    pub(super) tensors: [Tensor<'static>; 2],
}

impl LayerContext {
    /// Entries of the batch.
    #[must_use]
    pub fn batch(&self) -> usize {
        self.kept.batch
    }

    /// Length of the context, in tokens.
    #[must_use]
    pub fn kv_len(&self) -> usize {
        self.kept.kv_len
    }

    /// How keys and values are stored.
    #[must_use]
    pub fn element(&self) -> Element {
        self.kept.element
    }

    /// Bytes that keys and values take.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let LayerConfig { kv_heads, head_dim, v_head_dim, .. } = self.kept.model.config;
        let elements = self.kept.batch * self.kept.kv_len * kv_heads * (head_dim + v_head_dim);
        elements as u64 * self.kept.element.size_bytes() as u64
    }
}
