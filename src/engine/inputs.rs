//! The tensors of one attention, wherever they are, compared with the problem.

use super::PlaceError;
use super::tensor::{HostRead, Kind, Tensor};
use crate::error::Error;
use crate::inputs::{AttentionInputs, InputError};
use crate::problem::AttentionProblem;
use crate::tensor::{Layout, TensorSpec};
use crate::terms::Terms;

/// Query, key, value and terms of an attention, on the host or on a device.
#[derive(Clone, Debug)]
pub struct Inputs<'a> {
    /// `[batch, q_heads, q_len, head_dim]`.
    pub query: Tensor<'a>,
    /// `[batch, kv_heads, kv_len, head_dim]`.
    pub key: Tensor<'a>,
    /// `[batch, kv_heads, kv_len, v_head_dim]`.
    pub value: Tensor<'a>,
    /// The rest, as the spec asks for it.
    pub terms: Terms<Tensor<'a>>,
}

impl<'a> Inputs<'a> {
    /// Query, key and value, and nothing else.
    pub fn new(query: impl Into<Tensor<'a>>, key: impl Into<Tensor<'a>>, value: impl Into<Tensor<'a>>) -> Self {
        Self { query: query.into(), key: key.into(), value: value.into(), terms: Terms::default() }
    }

    /// Compares what there is with the problem: types, sizes, and of what is on the host key lengths.
    ///
    /// # Errors
    /// [`Error::Input`] or [`Error::Place`] names the tensor, what was found and what would do.
    pub fn check(&self, problem: &AttentionProblem) -> Result<(), Error> {
        let spec = problem.spec();
        for (name, tensor, of) in
            [("query", &self.query, &spec.query), ("key", &self.key, &spec.key), ("value", &self.value, &spec.value)]
        {
            reaches(name, tensor, of)?;
        }
        check_terms(&self.terms, problem)
    }
}

/// The same for what is beside query, key and value.
pub(crate) fn check_terms(terms: &Terms<Tensor<'_>>, problem: &AttentionProblem) -> Result<(), Error> {
    let spec = problem.spec();
    if let Some((bias, of)) = both("bias", terms.bias.as_ref(), spec.bias.as_ref())? {
        reaches("bias", bias, of)?;
    }
    if let Some((mask, layout)) = both("mask", terms.mask.as_ref(), spec.mask.as_ref())? {
        is_a("mask", mask, Kind::Bool)?;
        at_least("mask", layout, mask.len())?;
    }
    let rows = problem.batch() * problem.q_len();
    let vectors = [
        ("kv_lens", &terms.kv_lens, spec.kv_lens, problem.batch(), Kind::U32),
        ("row_start", &terms.row_start, spec.row_ranges, rows, Kind::I32),
        ("row_end", &terms.row_end, spec.row_ranges, rows, Kind::I32),
        ("alibi_slopes", &terms.alibi_slopes, spec.alibi_slopes, problem.q_heads(), Kind::F32),
        ("sinks", &terms.sinks, spec.sinks, problem.q_heads(), Kind::F32),
    ];
    for (name, tensor, asked, wanted, kind) in vectors {
        let Some((tensor, ())) = both(name, tensor.as_ref(), asked.then_some(()))? else { continue };
        is_a(name, tensor, kind)?;
        if tensor.len() != wanted {
            return Err(InputError::Len { name, wanted, found: tensor.len() }.into());
        }
    }
    if let Some(lens) = terms.kv_lens.as_ref().and_then(Tensor::host) {
        let kv_len = problem.kv_len();
        if let Some((batch, &found)) = lens.u32().iter().enumerate().find(|(_, len)| **len as usize > kv_len) {
            return Err(InputError::KvLen { batch, found, kv_len }.into());
        }
    }
    Ok(())
}

/// Whether the elements are of the type and reach as far as a spec says.
pub(crate) fn reaches(name: &'static str, tensor: &Tensor<'_>, of: &TensorSpec) -> Result<(), Error> {
    is_a(name, tensor, of.element.into())?;
    Ok(at_least(name, &of.layout, tensor.len())?)
}

pub(crate) fn is_a(name: &'static str, tensor: &Tensor<'_>, wanted: Kind) -> Result<(), PlaceError> {
    let found = tensor.kind();
    if found == wanted { Ok(()) } else { Err(PlaceError::Kind { name, wanted, found }) }
}

fn at_least(name: &'static str, layout: &Layout, found: usize) -> Result<(), InputError> {
    let needed = layout.extent().unwrap_or(usize::MAX);
    if found < needed { Err(InputError::TooShort { name, needed, found }) } else { Ok(()) }
}

fn both<D, S>(name: &'static str, data: Option<D>, spec: Option<S>) -> Result<Option<(D, S)>, InputError> {
    match (data, spec) {
        (Some(data), Some(spec)) => Ok(Some((data, spec))),
        (None, None) => Ok(None),
        (None, Some(_)) => Err(InputError::Missing { name }),
        (Some(_), None) => Err(InputError::Unexpected { name }),
    }
}

impl<'a> AttentionInputs<'a> {
    /// What is given beside query, key and value, as tensors.
    #[must_use]
    pub fn terms(&self) -> Terms<Tensor<'a>> {
        Terms {
            bias: self.bias.map(Tensor::from),
            mask: self.mask.map(Tensor::from),
            kv_lens: self.kv_lens.map(Tensor::from),
            row_start: self.row_start.map(Tensor::from),
            row_end: self.row_end.map(Tensor::from),
            alibi_slopes: self.alibi_slopes.map(Tensor::from),
            sinks: self.sinks.map(Tensor::from),
        }
    }
}

/// All tensors of an attention for as long as they are read on the host.
#[derive(Debug)]
pub(super) struct HostInputs<'r> {
    query: HostRead<'r>,
    key: HostRead<'r>,
    value: HostRead<'r>,
    terms: Terms<HostRead<'r>>,
}

impl<'r> HostInputs<'r> {
    /// Where all are on the host.
    pub(super) fn new(inputs: &'r Inputs<'_>, device: &str) -> Result<Self, PlaceError> {
        let read = |name, tensor: &'r Tensor<'_>| on_host(name, tensor, device);
        Ok(Self {
            query: read("query", &inputs.query)?,
            key: read("key", &inputs.key)?,
            value: read("value", &inputs.value)?,
            terms: inputs.terms.try_map(read)?,
        })
    }

    pub(super) fn get(&self) -> AttentionInputs<'_> {
        let Terms { bias, mask, kv_lens, row_start, row_end, alibi_slopes, sinks } = &self.terms;
        AttentionInputs {
            query: self.query.tensor(),
            key: self.key.tensor(),
            value: self.value.tensor(),
            bias: bias.as_ref().map(HostRead::tensor),
            mask: mask.as_ref().map(HostRead::bools),
            kv_lens: kv_lens.as_ref().map(HostRead::u32),
            row_start: row_start.as_ref().map(HostRead::i32),
            row_end: row_end.as_ref().map(HostRead::i32),
            alibi_slopes: alibi_slopes.as_ref().map(HostRead::f32),
            sinks: sinks.as_ref().map(HostRead::f32),
        }
    }
}

pub(super) fn on_host<'r>(
    name: &'static str,
    tensor: &'r Tensor<'_>,
    device: &str,
) -> Result<HostRead<'r>, PlaceError> {
    tensor.host().ok_or_else(|| PlaceError::OnDevice { name, device: device.to_owned() })
}
