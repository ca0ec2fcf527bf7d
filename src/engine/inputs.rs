//! The tensors of one attention, wherever they are, compared with the problem.

use super::PlaceError;
use super::tensor::{HostRead, Tensor};
use crate::error::Error;
use crate::inputs::{self, AttentionInputs, InputError};
use crate::problem::AttentionProblem;
use crate::slice::Kind;
use crate::tensor::{Element, TensorSpec};
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
    inputs::check_terms(terms, problem, |tensor| (tensor.kind(), tensor.len()))?;
    for (name, lens, most) in
        [("q_lens", &terms.q_lens, problem.q_len()), ("kv_lens", &terms.kv_lens, problem.kv_len())]
    {
        let lens = lens.as_ref().and_then(Tensor::host);
        inputs::check_lens(name, lens.as_ref().map(HostRead::u32), most)?;
    }
    let table = terms.block_table.as_ref().and_then(Tensor::host);
    let lens = terms.kv_lens.as_ref().and_then(Tensor::host);
    if terms.kv_lens.is_some() && lens.is_none() {
        // how much of the table is looked at is known on the device only
        return Ok(());
    }
    inputs::check_table(problem, table.as_ref().map(HostRead::i32), lens.as_ref().map(HostRead::u32))?;
    Ok(())
}

/// Whether the elements are of the type and reach as far as a spec says.
pub(crate) fn reaches(name: &'static str, tensor: &Tensor<'_>, of: &TensorSpec) -> Result<(), InputError> {
    inputs::check_tensor(name, (tensor.kind(), tensor.len()), of)
}

pub(crate) fn is_a(name: &'static str, tensor: &Tensor<'_>, wanted: Kind) -> Result<(), InputError> {
    let found = tensor.kind();
    if found == wanted { Ok(()) } else { Err(InputError::Element { name, wanted, found }) }
}

/// The type of elements that an attention can read.
pub(crate) fn element_of(name: &'static str, tensor: &Tensor<'_>) -> Result<Element, InputError> {
    let found = tensor.kind();
    found.element().ok_or(InputError::Element { name, wanted: Kind::F32, found })
}

impl<'a> AttentionInputs<'a> {
    /// What is given beside query, key and value, as tensors.
    #[must_use]
    pub fn terms(&self) -> Terms<Tensor<'a>> {
        self.terms.slices().map(|&slice| slice.into())
    }
}

/// All tensors of an attention for as long as they are read on the host.
#[derive(Debug)]
pub(crate) struct HostInputs<'r> {
    query: HostRead<'r>,
    key: HostRead<'r>,
    value: HostRead<'r>,
    terms: Terms<HostRead<'r>>,
}

impl<'r> HostInputs<'r> {
    /// Where all are on the host.
    pub(crate) fn new(inputs: &'r Inputs<'_>, device: &str) -> Result<Self, PlaceError> {
        let read = |name, tensor: &'r Tensor<'_>| on_host(name, tensor, device);
        Ok(Self {
            query: read("query", &inputs.query)?,
            key: read("key", &inputs.key)?,
            value: read("value", &inputs.value)?,
            terms: inputs.terms.try_map(read)?,
        })
    }

    pub(crate) fn get(&self) -> AttentionInputs<'_> {
        AttentionInputs {
            query: self.query.tensor(),
            key: self.key.tensor(),
            value: self.value.tensor(),
            terms: self.terms.by_kind(HostRead::tensor, HostRead::bools, HostRead::u32, HostRead::i32, HostRead::f32),
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
