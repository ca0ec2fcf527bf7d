//! Tensors of a safetensors file as f32, also those in blocks of 32 (see `tools/example_data.py`).

#![allow(dead_code, reason = "no example reads tensors of every kind")]

use std::path::Path;

use cross_attention::f16;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::flags::Failure;

/// The bytes of a file of the repository, or of a folder that was named.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|error| {
        let path = path.display();
        format!("cannot read {path}: {error}; the data of examples is in examples/data of the repository").into()
    })
}

/// What a JSON file of the same folder says.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, Failure> {
    let known = serde_json::from_slice(&read(path)?);
    known.map_err(|error| format!("{} does not hold what the example needs: {error}", path.display()).into())
}

/// A file that was read.
pub(crate) struct Tensors {
    bytes: Vec<u8>,
    path: String,
}

impl Tensors {
    pub(crate) fn open(path: &Path) -> Result<Self, Failure> {
        let shown = path.display().to_string();
        let bytes = read(path)?;
        SafeTensors::deserialize(&bytes).map_err(|error| format!("{shown} is no safetensors file: {error}"))?;
        Ok(Self { bytes, path: shown })
    }

    fn view(&self, name: &str) -> Result<TensorView<'_>, Failure> {
        let all = SafeTensors::deserialize(&self.bytes)?;
        all.tensor(name).map_err(|error| format!("{} has no tensor {name}: {error}", self.path).into())
    }

    fn has(&self, name: &str) -> bool {
        self.view(name).is_ok()
    }

    /// Elements in f32, whatever they are stored as.
    pub(crate) fn f32(&self, name: &str) -> Result<Vec<f32>, Failure> {
        for (bits, suffix) in [(4, ".q4"), (8, ".q8")] {
            if self.has(&format!("{name}{suffix}")) {
                let blocks = self.view(&format!("{name}{suffix}"))?;
                let scales = halves(self.view(&format!("{name}.scale"))?.data());
                return Ok(expand(blocks.data(), &scales, bits));
            }
        }
        let view = self.view(name)?;
        match view.dtype() {
            Dtype::F16 => Ok(halves(view.data())),
            Dtype::F32 => Ok(view.data().as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect()),
            other => Err(format!("{}: {name} is {other:?}, needs F32 or F16", self.path).into()),
        }
    }

    pub(crate) fn i32(&self, name: &str) -> Result<Vec<i32>, Failure> {
        Ok(self.view(name)?.data().as_chunks().0.iter().map(|x| i32::from_le_bytes(*x)).collect())
    }

    /// Text of the file's header.
    pub(crate) fn metadata(&self, name: &str) -> Result<Option<String>, Failure> {
        let (_, header) = SafeTensors::read_metadata(&self.bytes)?;
        Ok(header.metadata().as_ref().and_then(|metadata| metadata.get(name).cloned()))
    }

    pub(crate) fn shape(&self, name: &str) -> Result<Vec<usize>, Failure> {
        Ok(self.view(name)?.shape().to_vec())
    }
}

fn halves(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|x| f16::from_le_bytes(*x).to_f32()).collect()
}

/// Blocks of 32 elements with a scale each.
fn expand(blocks: &[u8], scales: &[f32], bits: usize) -> Vec<f32> {
    let per_block = 4 * bits;
    let mut out = Vec::with_capacity(32 * scales.len());
    for (block, scale) in blocks.chunks_exact(per_block).zip(scales) {
        for &byte in block {
            if bits == 4 {
                out.push(scale * (f32::from(byte & 15) - 8.0));
                out.push(scale * (f32::from(byte >> 4) - 8.0));
            } else {
                out.push(scale * f32::from(byte.cast_signed()));
            }
        }
    }
    out
}
