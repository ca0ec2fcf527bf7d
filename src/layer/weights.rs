//! Weights of a layer, and where they are found in a file.

use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use super::{LayerConfig, LayerError};
use crate::tensor::{TensorData, TensorRef};

/// One of a layer's four projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Projection {
    /// States to queries.
    Query,
    /// Context to keys.
    Key,
    /// Context to values.
    Value,
    /// Heads to states.
    Out,
}

impl Projection {
    const fn part(self) -> [&'static str; 2] {
        match self {
            Self::Query => ["query", "query bias"],
            Self::Key => ["key", "key bias"],
            Self::Value => ["value", "value bias"],
            Self::Out => ["out", "out bias"],
        }
    }
}

/// Where a projection's weights are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// Name of the matrix, `[out, in]`.
    pub weight: String,
    /// Name of the bias, `[out]`; `None` if the layer has none there.
    pub bias: Option<String>,
    /// Whose rows the tensors hold, one after another; the projection alone, or several packed.
    pub rows: Vec<Projection>,
}

/// Where all weights of a layer are. Fields may be changed for files with names of their own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Names {
    /// States to queries.
    pub query: Source,
    /// Context to keys.
    pub key: Source,
    /// Context to values.
    pub value: Source,
    /// Heads to states.
    pub out: Source,
    /// Gain of the norm of queries, and its shift; looked for where the configuration has a norm.
    pub query_norm: [Option<String>; 2],
    /// Gain of the norm of keys, and its shift.
    pub key_norm: [Option<String>; 2],
}

impl Names {
    /// `torch.nn.MultiheadAttention` with one width: `in_proj_weight` and `in_proj_bias` packed, `out_proj`. The prefix ends
    /// with its dot, or is empty.
    #[must_use]
    pub fn torch_packed(prefix: &str) -> Self {
        let packed = || Source {
            weight: format!("{prefix}in_proj_weight"),
            bias: Some(format!("{prefix}in_proj_bias")),
            rows: vec![Projection::Query, Projection::Key, Projection::Value],
        };
        Self::of([packed(), packed(), packed(), alone(prefix, "out_proj", Projection::Out, true)])
    }

    /// `torch.nn.MultiheadAttention` with widths of its own for keys and values: `q_proj_weight`, `k_proj_weight`,
    /// `v_proj_weight`, biases packed.
    #[must_use]
    pub fn torch_separate(prefix: &str) -> Self {
        // the bias is packed where the matrices are not, so it is found by its rows
        let of = |name: &str, own| Source {
            weight: format!("{prefix}{name}_proj_weight"),
            bias: Some(format!("{prefix}in_proj_bias")),
            rows: vec![own],
        };
        let [q, k, v] = [("q", Projection::Query), ("k", Projection::Key), ("v", Projection::Value)];
        let out = alone(prefix, "out_proj", Projection::Out, true);
        Self::of([of(q.0, q.1), of(k.0, k.1), of(v.0, v.1), out])
    }

    /// Hugging Face: `q_proj`, `k_proj`, `v_proj`, `out_proj`, each `.weight` and `.bias`. Some models leave out a bias
    /// (Whisper that of the keys): set its name to `None`.
    #[must_use]
    pub fn hugging_face(prefix: &str) -> Self {
        let of = |name, own| alone(prefix, name, own, true);
        let [q, k] = [of("q_proj", Projection::Query), of("k_proj", Projection::Key)];
        Self::of([q, k, of("v_proj", Projection::Value), of("out_proj", Projection::Out)])
    }

    /// Diffusers: `to_q`, `to_k`, `to_v` without biases, `to_out.0` with one; norms `norm_q`, `norm_k`.
    #[must_use]
    pub fn diffusers(prefix: &str) -> Self {
        let of = |name, own, bias| alone(prefix, name, own, bias);
        let mut names = Self::of([
            of("to_q", Projection::Query, false),
            of("to_k", Projection::Key, false),
            of("to_v", Projection::Value, false),
            of("to_out.0", Projection::Out, true),
        ]);
        names.query_norm[0] = Some(format!("{prefix}norm_q.weight"));
        names.key_norm[0] = Some(format!("{prefix}norm_k.weight"));
        names
    }

    /// `CTranslate2`, cross-attention: `linear_0` the query, `linear_1` key and value packed, `linear_2` out. The prefix ends
    /// with its slash.
    #[must_use]
    pub fn ctranslate2(prefix: &str) -> Self {
        let of = |n: usize, rows: &[Projection]| Source {
            weight: format!("{prefix}linear_{n}/weight"),
            bias: Some(format!("{prefix}linear_{n}/bias")),
            rows: rows.to_vec(),
        };
        let packed = [Projection::Key, Projection::Value];
        Self::of([of(0, &[Projection::Query]), of(1, &packed), of(1, &packed), of(2, &[Projection::Out])])
    }

    fn of([query, key, value, out]: [Source; 4]) -> Self {
        Self { query, key, value, out, query_norm: [None, None], key_norm: [None, None] }
    }
}

fn alone(prefix: &str, name: &str, own: Projection, bias: bool) -> Source {
    Source {
        weight: format!("{prefix}{name}.weight"),
        bias: bias.then(|| format!("{prefix}{name}.bias")),
        rows: vec![own],
    }
}

/// A matrix `[outputs, inputs]`, and a bias.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearWeights {
    /// `[outputs, inputs]`, rows without gaps.
    pub weight: TensorData,
    /// `[outputs]`.
    pub bias: Option<Vec<f32>>,
}

/// What a norm multiplies by and adds.
#[derive(Clone, Debug, PartialEq)]
pub struct NormWeights {
    /// `[head_dim]`.
    pub gain: Vec<f32>,
    /// `[head_dim]`.
    pub shift: Option<Vec<f32>>,
}

/// All weights of a layer. F16 stays F16 in memory, BF16 becomes f32.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerWeights {
    /// `[heads * head_dim, width]`.
    pub query: LinearWeights,
    /// `[kv_heads * head_dim, context_width]`.
    pub key: LinearWeights,
    /// `[kv_heads * v_head_dim, context_width]`.
    pub value: LinearWeights,
    /// `[width, heads * v_head_dim]`.
    pub out: LinearWeights,
    /// Of every query head, if the configuration has a norm.
    pub query_norm: Option<NormWeights>,
    /// Of every key head, if the configuration has a norm.
    pub key_norm: Option<NormWeights>,
}

impl LayerWeights {
    /// Finds the weights of a layer in a file.
    ///
    /// # Errors
    /// [`LayerError::Missing`], [`LayerError::Shape`] (which says so where a matrix is transposed; a square one cannot be
    /// told), [`LayerError::Element`]; what the configuration itself refuses.
    pub fn load(config: &LayerConfig, file: &SafeTensors<'_>, names: &Names) -> Result<Self, LayerError> {
        config.check()?;
        let linear = |own, source| load_linear(config, file, own, source);
        let norm = |names: &[Option<String>; 2], part| match (&config.norm, &names[0]) {
            (Some(_), Some(gain)) => {
                let of = |name: &str| vector(file, name, part, config.head_dim);
                let shift = names[1].as_deref().map(of).transpose()?;
                Ok(Some(NormWeights { gain: of(gain)?, shift }))
            }
            (Some(_), None) => Err(LayerError::Missing { name: String::new(), part }),
            (None, _) => Ok(None),
        };
        Ok(Self {
            query: linear(Projection::Query, &names.query)?,
            key: linear(Projection::Key, &names.key)?,
            value: linear(Projection::Value, &names.value)?,
            out: linear(Projection::Out, &names.out)?,
            query_norm: norm(&names.query_norm, "query norm")?,
            key_norm: norm(&names.key_norm, "key norm")?,
        })
    }

    /// Compares every size with the configuration.
    pub(super) fn check(&self, config: &LayerConfig) -> Result<(), LayerError> {
        let of = [
            (Projection::Query, &self.query),
            (Projection::Key, &self.key),
            (Projection::Value, &self.value),
            (Projection::Out, &self.out),
        ];
        let wrong = |part, expected: Vec<usize>, found: usize| LayerError::Shape {
            name: String::new(),
            part,
            expected,
            found: vec![found],
            transposed: false,
        };
        for (own, linear) in of {
            let [inputs, outputs] = config.sizes(own);
            let [part, bias_part] = own.part();
            let found = linear.weight.as_ref().len();
            if found != inputs * outputs {
                return Err(wrong(part, vec![outputs, inputs], found));
            }
            if let Some(bias) = linear.bias.as_ref().filter(|bias| bias.len() != outputs) {
                return Err(wrong(bias_part, vec![outputs], bias.len()));
            }
        }
        for (part, norm) in [("query norm", &self.query_norm), ("key norm", &self.key_norm)] {
            match norm {
                None if config.norm.is_some() => return Err(LayerError::Missing { name: String::new(), part }),
                None => {}
                Some(norm) => {
                    for len in [Some(norm.gain.len()), norm.shift.as_ref().map(Vec::len)].into_iter().flatten() {
                        if len != config.head_dim {
                            return Err(wrong(part, vec![config.head_dim], len));
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// The rows of a projection in a tensor that may hold others too.
fn load_linear(
    config: &LayerConfig,
    file: &SafeTensors<'_>,
    own: Projection,
    source: &Source,
) -> Result<LinearWeights, LayerError> {
    let [part, bias_part] = own.part();
    let [inputs, outputs] = config.sizes(own);
    let rows_of = |list: &[Projection]| list.iter().map(|&one| config.sizes(one)[1]).sum::<usize>();
    let before = |list: &[Projection]| rows_of(&list[..list.iter().position(|&one| one == own).unwrap_or(0)]);
    let matrix = tensor(file, &source.weight, part)?;
    expect(&matrix, &source.weight, part, &[rows_of(&source.rows), inputs])?;
    let first = before(&source.rows) * inputs;
    let weight = elements(&matrix, &source.weight, first..first + outputs * inputs)?;
    let bias = match &source.bias {
        None => None,
        Some(name) => {
            let vector = tensor(file, name, bias_part)?;
            // torch packs the bias also where the matrices are apart
            let packed = [Projection::Query, Projection::Key, Projection::Value];
            let apart = source.rows.len() == 1 && vector.shape() != [outputs] && vector.shape() == [rows_of(&packed)];
            let list = if apart { &packed[..] } else { &source.rows };
            expect(&vector, name, bias_part, &[rows_of(list)])?;
            let first = before(list);
            Some(elements(&vector, name, first..first + outputs)?.to_f32())
        }
    };
    Ok(LinearWeights { weight, bias })
}

fn vector(file: &SafeTensors<'_>, name: &str, part: &'static str, len: usize) -> Result<Vec<f32>, LayerError> {
    let view = tensor(file, name, part)?;
    expect(&view, name, part, &[len])?;
    Ok(elements(&view, name, 0..len)?.to_f32())
}

fn tensor<'a>(file: &'a SafeTensors<'_>, name: &str, part: &'static str) -> Result<TensorView<'a>, LayerError> {
    file.tensor(name).map_err(|_| LayerError::Missing { name: name.to_owned(), part })
}

fn expect(view: &TensorView<'_>, name: &str, part: &'static str, expected: &[usize]) -> Result<(), LayerError> {
    let found = view.shape();
    if found == expected {
        return Ok(());
    }
    let transposed = found.iter().rev().eq(expected);
    Err(LayerError::Shape {
        name: name.to_owned(),
        part,
        expected: expected.to_vec(),
        found: found.to_vec(),
        transposed,
    })
}

/// Elements of a tensor; little-endian, as the format has them.
fn elements(view: &TensorView<'_>, name: &str, range: std::ops::Range<usize>) -> Result<TensorData, LayerError> {
    let bytes = |size: usize| &view.data()[range.start * size..range.end * size];
    Ok(match view.dtype() {
        Dtype::F32 => TensorData::F32(bytes(4).as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect()),
        Dtype::F16 => TensorData::F16(bytes(2).as_chunks().0.iter().map(|x| f16::from_le_bytes(*x)).collect()),
        Dtype::BF16 => {
            TensorData::F32(bytes(2).as_chunks().0.iter().map(|x| bf16::from_le_bytes(*x).to_f32()).collect())
        }
        other => return Err(LayerError::Element { name: name.to_owned(), found: format!("{other:?}") }),
    })
}

impl LinearWeights {
    pub(super) fn tensor(&self) -> TensorRef<'_> {
        self.weight.as_ref()
    }
}
