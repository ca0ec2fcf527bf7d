//! The host side of one call: borrowed inputs, compared with the problem they are for, and owned outputs.

use crate::problem::AttentionProblem;
use crate::tensor::{Element, Layout, TensorData, TensorRef};

/// Data of one attention in host memory. What is given must be what the spec says is given.
///
/// Tensors are read through the layouts of the [`AttentionSpec`](crate::AttentionSpec).
#[derive(Clone, Copy, Debug)]
pub struct AttentionInputs<'a> {
    /// `[batch, q_heads, q_len, head_dim]`.
    pub query: TensorRef<'a>,
    /// `[batch, kv_heads, kv_len, head_dim]`.
    pub key: TensorRef<'a>,
    /// `[batch, kv_heads, kv_len, v_head_dim]`.
    pub value: TensorRef<'a>,
    /// `[batch, q_heads, q_len, kv_len]`, broadcast as the spec's layout says.
    pub bias: Option<TensorRef<'a>>,
    /// `[batch, q_heads, q_len, kv_len]`, broadcast as the spec's layout says; true = attend.
    pub mask: Option<&'a [bool]>,
    /// `[batch]`, in tokens, each at most `kv_len`.
    pub kv_lens: Option<&'a [u32]>,
    /// `[batch, q_len]`: the first key each row may see. May be any number, also negative.
    pub row_start: Option<&'a [i32]>,
    /// `[batch, q_len]`: one past the last key each row may see. May be any number.
    pub row_end: Option<&'a [i32]>,
    /// `[q_heads]`.
    pub alibi_slopes: Option<&'a [f32]>,
    /// `[q_heads]`.
    pub sinks: Option<&'a [f32]>,
}

impl<'a> AttentionInputs<'a> {
    /// Query, key and value, and nothing else.
    pub fn new(
        query: impl Into<TensorRef<'a>>,
        key: impl Into<TensorRef<'a>>,
        value: impl Into<TensorRef<'a>>,
    ) -> Self {
        Self {
            query: query.into(),
            key: key.into(),
            value: value.into(),
            bias: None,
            mask: None,
            kv_lens: None,
            row_start: None,
            row_end: None,
            alibi_slopes: None,
            sinks: None,
        }
    }

    /// Compares the data with the problem: what is there, of which type, how long, and that key lengths fit.
    ///
    /// # Errors
    /// An [`InputError`] that names the tensor, what was found and what would do.
    pub fn check(&self, problem: &AttentionProblem) -> Result<(), InputError> {
        let spec = problem.spec();
        tensor("query", self.query, spec.query.element, &spec.query.layout)?;
        tensor("key", self.key, spec.key.element, &spec.key.layout)?;
        tensor("value", self.value, spec.value.element, &spec.value.layout)?;
        self.check_terms(problem)
    }

    /// The same where keys and values are held elsewhere.
    pub(crate) fn check_beside_keys(&self, problem: &AttentionProblem) -> Result<(), InputError> {
        let query = &problem.spec().query;
        tensor("query", self.query, query.element, &query.layout)?;
        self.check_terms(problem)
    }

    /// The same for what is beside query, key and value.
    pub(crate) fn check_terms(&self, problem: &AttentionProblem) -> Result<(), InputError> {
        let spec = problem.spec();
        if let Some((bias, of)) = both("bias", self.bias, spec.bias.as_ref())? {
            tensor("bias", bias, of.element, &of.layout)?;
        }
        if let Some((mask, layout)) = both("mask", self.mask, spec.mask.as_ref())? {
            at_least("mask", layout.extent().unwrap_or(usize::MAX), mask.len())?;
        }
        let rows = problem.batch() * problem.q_len();
        exactly("kv_lens", self.kv_lens.map(<[u32]>::len), spec.kv_lens, problem.batch())?;
        exactly("row_start", self.row_start.map(<[i32]>::len), spec.row_ranges, rows)?;
        exactly("row_end", self.row_end.map(<[i32]>::len), spec.row_ranges, rows)?;
        exactly("alibi_slopes", self.alibi_slopes.map(<[f32]>::len), spec.alibi_slopes, problem.q_heads())?;
        exactly("sinks", self.sinks.map(<[f32]>::len), spec.sinks, problem.q_heads())?;
        for (batch, &found) in self.kv_lens.unwrap_or_default().iter().enumerate() {
            if found as usize > problem.kv_len() {
                return Err(InputError::KvLen { batch, found, kv_len: problem.kv_len() });
            }
        }
        Ok(())
    }

    /// Number of keys of batch entry `b`: its key length where given, else `kv_len`.
    ///
    /// # Panics
    /// If key lengths are given and `b` is not one of the batch.
    #[must_use]
    pub fn kv_len(&self, problem: &AttentionProblem, b: usize) -> usize {
        self.kv_lens.map_or(problem.kv_len(), |lens| lens[b] as usize)
    }
}

/// Data of one attention in host memory, owned: what [`AttentionInputs`] borrows.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionData {
    /// `[batch, q_heads, q_len, head_dim]`.
    pub query: TensorData,
    /// `[batch, kv_heads, kv_len, head_dim]`.
    pub key: TensorData,
    /// `[batch, kv_heads, kv_len, v_head_dim]`.
    pub value: TensorData,
    /// `[batch, q_heads, q_len, kv_len]`, broadcast as the spec's layout says.
    pub bias: Option<TensorData>,
    /// `[batch, q_heads, q_len, kv_len]`, broadcast as the spec's layout says; true = attend.
    pub mask: Option<Vec<bool>>,
    /// `[batch]`, in tokens.
    pub kv_lens: Option<Vec<u32>>,
    /// `[batch, q_len]`.
    pub row_start: Option<Vec<i32>>,
    /// `[batch, q_len]`.
    pub row_end: Option<Vec<i32>>,
    /// `[q_heads]`.
    pub alibi_slopes: Option<Vec<f32>>,
    /// `[q_heads]`.
    pub sinks: Option<Vec<f32>>,
}

impl AttentionData {
    /// Borrows everything.
    #[must_use]
    pub fn as_inputs(&self) -> AttentionInputs<'_> {
        AttentionInputs {
            query: self.query.as_ref(),
            key: self.key.as_ref(),
            value: self.value.as_ref(),
            bias: self.bias.as_ref().map(TensorData::as_ref),
            mask: self.mask.as_deref(),
            kv_lens: self.kv_lens.as_deref(),
            row_start: self.row_start.as_deref(),
            row_end: self.row_end.as_deref(),
            alibi_slopes: self.alibi_slopes.as_deref(),
            sinks: self.sinks.as_deref(),
        }
    }
}

fn both<D, S>(name: &'static str, data: Option<D>, spec: Option<S>) -> Result<Option<(D, S)>, InputError> {
    match (data, spec) {
        (Some(data), Some(spec)) => Ok(Some((data, spec))),
        (None, None) => Ok(None),
        (None, Some(_)) => Err(InputError::Missing { name }),
        (Some(_), None) => Err(InputError::Unexpected { name }),
    }
}

fn tensor(name: &'static str, data: TensorRef<'_>, element: Element, layout: &Layout) -> Result<(), InputError> {
    if data.element() != element {
        return Err(InputError::Element { name, wanted: element, found: data.element() });
    }
    at_least(name, layout.extent().unwrap_or(usize::MAX), data.len())
}

fn at_least(name: &'static str, needed: usize, found: usize) -> Result<(), InputError> {
    if found < needed { Err(InputError::TooShort { name, needed, found }) } else { Ok(()) }
}

fn exactly(name: &'static str, found: Option<usize>, wanted: bool, len: usize) -> Result<(), InputError> {
    match both(name, found, wanted.then_some(len))? {
        Some((found, wanted)) if found != wanted => Err(InputError::Len { name, wanted, found }),
        _ => Ok(()),
    }
}

/// What an attention gives back, in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionOutput {
    /// `[batch, q_heads, q_len, v_head_dim]` in the layout of the spec's `output`; gaps are zero.
    pub output: TensorData,
    /// `[batch, q_heads, q_len]`, natural logarithm, if the spec asks for it.
    pub lse: Option<Vec<f32>>,
    /// Maximum and sum of each row's softmax, if the spec asks for it.
    pub row_state: Option<RowState>,
    /// `[batch, q_heads, q_len, kv_len]`, if the spec asks for it.
    pub scores: Option<Vec<f32>>,
}

/// Maximum and sum of the softmax of each row, both `[batch, q_heads, q_len]`: a key of score `s` has the weight
/// `exp(s - row_max) / row_sum`.
///
/// `lse = row_max + ln(row_sum)` says the same in one number, and rounds it: of scores around 10^4 a weight made from an
/// lse is off by 5e-4, of scores around 10^9 (padding) it is off by a factor of `exp(32)`. The pair is not. A sink is
/// counted in. A row without a key has a maximum of negative infinity and a sum of 0; with a sink, the sink's logit and 1.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowState {
    /// The largest score, or what a kernel subtracted in its place; natural units.
    pub row_max: Vec<f32>,
    /// The sum of `exp(score - row_max)` over the allowed keys, and of the sink.
    pub row_sum: Vec<f32>,
}

impl RowState {
    /// `[rows, 2]`, as a device has them.
    pub(crate) fn from_pairs(pairs: &[f32]) -> Self {
        let (row_max, row_sum) = pairs.chunks_exact(2).map(|pair| (pair[0], pair[1])).unzip();
        Self { row_max, row_sum }
    }

    /// The same as [`from_pairs`](Self::from_pairs) takes.
    pub(crate) fn to_pairs(&self) -> Vec<f32> {
        self.row_max.iter().zip(&self.row_sum).flat_map(|(&max, &sum)| [max, sum]).collect()
    }

    /// The log-sum-exp of each row, rounded once; negative infinity where a row saw no key.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
    pub fn lse(&self) -> Vec<f32> {
        let of = |(&max, &sum): (&f32, &f32)| (f64::from(max) + f64::from(sum).ln()) as f32;
        self.row_max.iter().zip(&self.row_sum).map(of).collect()
    }
}

/// Why the data of a call was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InputError {
    /// The spec says it is given, and it is not.
    #[error("{name} is missing; the spec says it is given")]
    Missing {
        /// Which tensor.
        name: &'static str,
    },
    /// It is given, and the spec does not say so.
    #[error("{name} is given but the spec does not ask for it")]
    Unexpected {
        /// Which tensor.
        name: &'static str,
    },
    /// The data is of another type.
    #[error("{name} holds {found}, the spec says {wanted}")]
    Element {
        /// Which tensor.
        name: &'static str,
        /// The type that would do.
        wanted: Element,
        /// The type that was given.
        found: Element,
    },
    /// The layout reaches past the data.
    #[error("{name} has {found} elements, its layout reaches over {needed}")]
    TooShort {
        /// Which tensor.
        name: &'static str,
        /// Elements that the layout reaches over.
        needed: usize,
        /// Elements that were given.
        found: usize,
    },
    /// A tensor without a layout has another length.
    #[error("{name} has {found} elements, needs {wanted}")]
    Len {
        /// Which tensor.
        name: &'static str,
        /// Elements that would do.
        wanted: usize,
        /// Elements that were given.
        found: usize,
    },
    /// The results are more than this machine has memory for.
    #[error(
        "output, lse and scores take {bytes} bytes, more than can be allocated; cut the problem over batch, heads or rows"
    )]
    Memory {
        /// What all of them take, workspace included; `u64::MAX` if it cannot be counted.
        bytes: u64,
    },
    /// A key length is beyond the keys.
    #[error("kv_lens[{batch}] is {found}, there are {kv_len} keys")]
    KvLen {
        /// Entry of the batch.
        batch: usize,
        /// The length that was given, in tokens.
        found: u32,
        /// The keys there are.
        kv_len: usize,
    },
}
