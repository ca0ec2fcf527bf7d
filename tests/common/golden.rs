//! Reads the files of `tests/golden`.

use std::path::{Path, PathBuf};

use cross_attention::{TensorData, f16};
use safetensors::{Dtype, SafeTensors};

/// One tensor of a file, as it is stored; bfloat16 is widened to f32 (exact).
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stored {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) numbers: Numbers,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Numbers {
    Real(TensorData),
    Bool(Vec<bool>),
    Int(Vec<i64>),
}

pub(crate) struct File {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl File {
    /// Opens a file named from the root of the repository.
    pub(crate) fn open(path: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
        let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self { path, bytes }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What stands beside the tensors.
    pub(crate) fn metadata(&self) -> std::collections::HashMap<String, String> {
        let (_, header) =
            SafeTensors::read_metadata(&self.bytes).unwrap_or_else(|e| panic!("{}: {e}", self.path.display()));
        header.metadata().clone().unwrap_or_default()
    }

    pub(crate) fn tensor(&self, name: &str) -> Stored {
        self.find(name).unwrap_or_else(|| panic!("{} has no {name}", self.path.display()))
    }

    pub(crate) fn find(&self, name: &str) -> Option<Stored> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap_or_else(|e| panic!("{}: {e}", self.path.display()));
        let view = file.tensor(name).ok()?;
        let data = view.data();
        let halves = || data.chunks_exact(2).map(|two| u16::from_le_bytes([two[0], two[1]]));
        let numbers = match view.dtype() {
            Dtype::F32 => {
                let numbers = data.chunks_exact(4).map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]));
                Numbers::Real(TensorData::F32(numbers.collect()))
            }
            Dtype::F16 => Numbers::Real(TensorData::F16(halves().map(f16::from_bits).collect())),
            Dtype::BF16 => {
                Numbers::Real(TensorData::F32(halves().map(|bits| f32::from_bits(u32::from(bits) << 16)).collect()))
            }
            Dtype::BOOL => Numbers::Bool(data.iter().map(|&byte| byte != 0).collect()),
            Dtype::I32 => {
                let four = |four: &[u8]| i64::from(i32::from_le_bytes(four.try_into().expect("chunks of four")));
                Numbers::Int(data.chunks_exact(4).map(four).collect())
            }
            Dtype::I64 => {
                let eight = |eight: &[u8]| i64::from_le_bytes(eight.try_into().expect("chunks of eight"));
                Numbers::Int(data.chunks_exact(8).map(eight).collect())
            }
            other => panic!("{}: {name} is {other:?}, which no test reads", self.path.display()),
        };
        Some(Stored { dtype: view.dtype(), shape: view.shape().to_vec(), numbers })
    }

    /// A tensor of f32 or f16.
    pub(crate) fn real(&self, name: &str) -> TensorData {
        self.tensor(name).real()
    }
}

impl Stored {
    pub(crate) fn real(self) -> TensorData {
        match self.numbers {
            Numbers::Real(numbers) => numbers,
            other => panic!("not a tensor of real numbers: {other:?}"),
        }
    }
}
