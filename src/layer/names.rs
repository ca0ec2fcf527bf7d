//! Weights of a layer by their names in a safetensors file.

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use super::config::{LayerConfig, LayerWeights, Norm, NormWeights, Projection};
use crate::tensor::TensorData;

/// Which projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// States to queries.
    Query,
    /// Context to keys.
    Key,
    /// Context to values.
    Value,
    /// Attention to output.
    Output,
}

impl Role {
    pub(super) const ALL: [Self; 4] = [Self::Query, Self::Key, Self::Value, Self::Output];

    /// Names of its weight and bias among a layer's weights.
    pub(super) const fn parts(self) -> [&'static str; 2] {
        match self {
            Self::Query => ["query.weight", "query.bias"],
            Self::Key => ["key.weight", "key.bias"],
            Self::Value => ["value.weight", "value.bias"],
            Self::Output => ["output.weight", "output.bias"],
        }
    }
}

/// A tensor that holds the rows of one projection, or of several, one below the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// Its name in the file.
    pub name: String,
    /// The projections it holds, in order.
    pub holds: Vec<Role>,
}

/// Weight and bias of a projection in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProjectionNames {
    /// `[out, in]`.
    pub weight: StoredTensor,
    /// `[out]`; looked for where the config says that there is a bias.
    pub bias: StoredTensor,
}

/// Where a file keeps each part of a layer. Plain data: change what a model names otherwise.
///
/// A prefix goes in front of every name as it is, with its dot or slash: `"decoder.layers.0.encoder_attn."`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    /// States to queries.
    pub query: ProjectionNames,
    /// Context to keys.
    pub key: ProjectionNames,
    /// Context to values.
    pub value: ProjectionNames,
    /// Attention to output.
    pub output: ProjectionNames,
    /// Weight and bias of the query's norm.
    pub query_norm: [String; 2],
    /// Weight and bias of the key's norm.
    pub key_norm: [String; 2],
}

const QKV: [Role; 3] = [Role::Query, Role::Key, Role::Value];

impl Names {
    /// One tensor for each projection, `<name>.weight` and `<name>.bias`.
    #[must_use]
    pub fn separate(prefix: &str, [query, key, value, output]: [&str; 4], [query_norm, key_norm]: [&str; 2]) -> Self {
        let of = |role, name: &str| {
            let source = |part| StoredTensor { name: format!("{prefix}{name}.{part}"), holds: vec![role] };
            ProjectionNames { weight: source("weight"), bias: source("bias") }
        };
        let norm = |name: &str| ["weight", "bias"].map(|part| format!("{prefix}{name}.{part}"));
        Self {
            query: of(Role::Query, query),
            key: of(Role::Key, key),
            value: of(Role::Value, value),
            output: of(Role::Output, output),
            query_norm: norm(query_norm),
            key_norm: norm(key_norm),
        }
    }

    /// `q_proj`, `k_proj`, `v_proj`, `out_proj`, norms `q_norm` and `k_norm`: many models of transformers.
    #[must_use]
    pub fn hugging_face(prefix: &str) -> Self {
        Self::separate(prefix, ["q_proj", "k_proj", "v_proj", "out_proj"], ["q_norm", "k_norm"])
    }

    /// `to_q`, `to_k`, `to_v`, `to_out.0`, norms `norm_q` and `norm_k`: diffusers.
    #[must_use]
    pub fn diffusers(prefix: &str) -> Self {
        Self::separate(prefix, ["to_q", "to_k", "to_v", "to_out.0"], ["norm_q", "norm_k"])
    }

    /// `in_proj_weight` and `in_proj_bias` with query, key and value, and `out_proj`: torch's `nn.MultiheadAttention`
    /// where states and context have one width.
    #[must_use]
    pub fn torch_packed(prefix: &str) -> Self {
        let mut names = Self::hugging_face(prefix);
        for projection in [&mut names.query, &mut names.key, &mut names.value] {
            projection.weight = StoredTensor { name: format!("{prefix}in_proj_weight"), holds: QKV.to_vec() };
            projection.bias = StoredTensor { name: format!("{prefix}in_proj_bias"), holds: QKV.to_vec() };
        }
        names
    }

    /// `q_proj_weight`, `k_proj_weight`, `v_proj_weight`, `in_proj_bias`, `out_proj`: torch's `nn.MultiheadAttention`
    /// where states and context differ in width.
    #[must_use]
    pub fn torch_separate(prefix: &str) -> Self {
        let mut names = Self::torch_packed(prefix);
        let projections = [
            (&mut names.query, Role::Query, "q_proj_weight"),
            (&mut names.key, Role::Key, "k_proj_weight"),
            (&mut names.value, Role::Value, "v_proj_weight"),
        ];
        for (projection, role, name) in projections {
            projection.weight = StoredTensor { name: format!("{prefix}{name}"), holds: vec![role] };
        }
        names
    }

    /// `linear_0` the query, `linear_1` key and value, `linear_2` the output, each with `/weight` and `/bias`:
    /// cross-attention of `CTranslate2`.
    #[must_use]
    pub fn ctranslate2(prefix: &str) -> Self {
        let mut names =
            Self::separate(prefix, ["linear_0", "linear_1", "linear_1", "linear_2"], ["query_norm", "key_norm"]);
        for projection in [&mut names.query, &mut names.key, &mut names.value, &mut names.output] {
            for source in [&mut projection.weight, &mut projection.bias] {
                if let Some((name, part)) = source.name.rsplit_once('.') {
                    source.name = format!("{name}/{part}");
                }
            }
        }
        for projection in [&mut names.key, &mut names.value] {
            projection.weight.holds = vec![Role::Key, Role::Value];
            projection.bias.holds = vec![Role::Key, Role::Value];
        }
        names
    }

    const fn of(&self, role: Role) -> &ProjectionNames {
        match role {
            Role::Query => &self.query,
            Role::Key => &self.key,
            Role::Value => &self.value,
            Role::Output => &self.output,
        }
    }
}

impl LayerWeights {
    /// Reads the weights of a layer: F32 and F16 as they are, BF16 as f32, which holds all its values.
    ///
    /// # Errors
    /// A [`LoadError`] names the tensor that is missing, of another shape or type, or there against the config.
    pub fn load(file: &SafeTensors<'_>, names: &Names, config: &LayerConfig) -> Result<Self, LoadError> {
        let projection = |role: Role| {
            let ProjectionNames { weight, bias } = names.of(role);
            let [_, inner] = config.shape(role);
            Ok(Projection {
                weight: rows(file, weight, role, config, Some(inner))?,
                bias: if config.biases.of(role) {
                    Some(rows(file, bias, role, config, None)?.to_f32())
                } else {
                    // a part of a packed bias may be left out
                    absent(file, &bias.name, bias.holds.iter().any(|&other| config.biases.of(other)))?;
                    None
                },
            })
        };
        let norm = |names: &[String; 2], norm: Option<Norm>| {
            let [weight, bias] = names;
            let vector = |name: &String| Ok(read(file, name, &[config.head_dim], 0..config.head_dim)?.to_f32());
            let Some(norm) = norm else {
                absent(file, weight, false)?;
                return Ok(None);
            };
            if !norm.bias {
                absent(file, bias, false)?;
            }
            let bias = if norm.bias { Some(vector(bias)?) } else { None };
            Ok(Some(NormWeights { weight: vector(weight)?, bias }))
        };
        Ok(Self {
            query: projection(Role::Query)?,
            key: projection(Role::Key)?,
            value: projection(Role::Value)?,
            output: projection(Role::Output)?,
            query_norm: norm(&names.query_norm, config.query_norm)?,
            key_norm: norm(&names.key_norm, config.key_norm)?,
        })
    }
}

fn absent(file: &SafeTensors<'_>, name: &str, allowed: bool) -> Result<(), LoadError> {
    if !allowed && file.tensor(name).is_ok() {
        return Err(LoadError::Unexpected { tensor: name.to_owned() });
    }
    Ok(())
}

/// The rows of one projection out of a tensor.
fn rows(
    file: &SafeTensors<'_>,
    source: &StoredTensor,
    role: Role,
    config: &LayerConfig,
    inner: Option<usize>,
) -> Result<TensorData, LoadError> {
    let Some(at) = source.holds.iter().position(|&held| held == role) else {
        return Err(LoadError::NotHeld { tensor: source.name.clone(), role });
    };
    let of = |roles: &[Role]| roles.iter().fold(0usize, |sum, &role| sum.saturating_add(config.shape(role)[0]));
    let (start, end, total) = (of(&source.holds[..at]), of(&source.holds[..=at]), of(&source.holds));
    match inner {
        Some(inner) => {
            read(file, &source.name, &[total, inner], start.saturating_mul(inner)..end.saturating_mul(inner))
        }
        None => read(file, &source.name, &[total], start..end),
    }
}

/// Elements of a tensor that must have this shape.
fn read(
    file: &SafeTensors<'_>,
    name: &str,
    expected: &[usize],
    range: std::ops::Range<usize>,
) -> Result<TensorData, LoadError> {
    let Ok(tensor) = file.tensor(name) else {
        return Err(LoadError::Missing { tensor: name.to_owned(), expected: expected.to_vec() });
    };
    if tensor.shape() != expected {
        let transposed = tensor.shape().iter().rev().eq(expected);
        let (tensor, found) = (name.to_owned(), tensor.shape().to_vec());
        return Err(LoadError::Shape { tensor, expected: expected.to_vec(), found, transposed });
    }
    elements(&tensor, range).ok_or_else(|| LoadError::Element { tensor: name.to_owned(), found: tensor.dtype() })
}

fn elements(tensor: &TensorView<'_>, range: std::ops::Range<usize>) -> Option<TensorData> {
    fn each<T, const N: usize>(bytes: &[u8], range: std::ops::Range<usize>, read: fn([u8; N]) -> T) -> Option<Vec<T>> {
        let (elements, _) = bytes.as_chunks::<N>();
        Some(elements.get(range)?.iter().map(|&bytes| read(bytes)).collect())
    }
    let bytes = tensor.data();
    match tensor.dtype() {
        Dtype::F32 => each(bytes, range, f32::from_le_bytes).map(TensorData::F32),
        Dtype::F16 => each(bytes, range, f16::from_le_bytes).map(TensorData::F16),
        Dtype::BF16 => each(bytes, range, |bytes| bf16::from_le_bytes(bytes).to_f32()).map(TensorData::F32),
        _ => None,
    }
}

/// Why weights could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The file has no such tensor.
    #[error("the file has no tensor {tensor}, needs one of shape {expected:?}")]
    Missing {
        /// Its name.
        tensor: String,
        /// The shape that would do.
        expected: Vec<usize>,
    },
    /// A tensor has another shape.
    #[error("{tensor} has shape {found:?}, needs {expected:?}{}", if *.transposed { "; transposed it would fit: weights are [out, in]" } else { "" })]
    Shape {
        /// Its name.
        tensor: String,
        /// The shape that would do.
        expected: Vec<usize>,
        /// The shape that it has.
        found: Vec<usize>,
        /// Whether it would fit with its axes swapped.
        transposed: bool,
    },
    /// A tensor has elements that cannot be read.
    #[error("{tensor} holds {found:?}, needs F32, F16 or BF16")]
    Element {
        /// Its name.
        tensor: String,
        /// What it holds.
        found: Dtype,
    },
    /// A tensor is there that the config says is not.
    #[error("the file has a tensor {tensor}, the config says there is none; leaving it out would change the result")]
    Unexpected {
        /// Its name.
        tensor: String,
    },
    /// The names say that a tensor holds a projection, and its list of what it holds leaves that out.
    #[error("the names take {role:?} from {tensor}, which is not said to hold it")]
    NotHeld {
        /// The tensor's name.
        tensor: String,
        /// The projection.
        role: Role,
    },
}
