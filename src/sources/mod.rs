//! Attention to several sources of keys and values that stay in buffers of their own.
//!
//! - [`Combine::Softmax`]: one softmax over the keys of all sources: each is attended to with its log-sum-exp, and the
//!   states are merged exactly. The same as attention over the concatenation, without making it.
//! - [`Combine::Sum`]: a weighted sum of attentions that are each normalised by themselves, as IP-Adapter adds its image
//!   prompt (Ye et al. 2023, arXiv:2308.06721, equation 5): `sum over s of scale_s * row_weight_s[b,i] * attention_s`.
//!
//! Keys may be weighted before the softmax ([`Source::key_weights`]) or after it ([`Source::after_weights`]); the output
//! may be gated by `tanh(gate)` (Alayrac et al. 2022, arXiv:2204.14198, section 2.2). A row that sees no key in any source
//! stays exactly zero.

mod error;
mod run;

pub use error::SourcesError;
pub use run::PreparedSources;

use crate::engine::Tensor;
use crate::problem::{AttentionProblem, AttentionSpec};
use crate::tensor::{Layout, TensorSpec};
use crate::terms::Terms;

/// How the attentions to the sources become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Combine {
    /// One softmax over the keys of all sources. A sink of a source takes part once for each source that has one.
    #[default]
    Softmax,
    /// The weighted sum of separately normalised attentions.
    Sum,
}

/// What the output is multiplied with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Gate {
    /// Nothing.
    #[default]
    None,
    /// `tanh` of one number, for all heads.
    Scalar,
    /// `tanh` of one number for each query head.
    Heads,
}

/// One source of keys and values.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    /// What errors call it.
    pub name: String,
    /// Query, key, value and all terms; the query is the same for every source. `output` and `lse` are not looked at,
    /// `scores` must be `None`.
    pub spec: AttentionSpec,
    /// Whether weights `[batch, kv_len]` are given that multiply `exp(score)` before the softmax: a bias of `ln(weight)`.
    /// A weight of 0 forbids the key.
    pub key_weights: bool,
    /// Whether weights `[batch, kv_len]` are given that multiply the weight of a key after the softmax, without
    /// normalising again: the same as multiplying its value row. The lse stays as it is. A weight of 0 takes the value
    /// row for zeros, whatever it holds.
    pub after_weights: bool,
    /// Factor on this attention in a [`Combine::Sum`]; any finite number. 0 leaves the source out.
    pub scale: f32,
    /// Whether factors `[batch, q_len]` are given as well, in a [`Combine::Sum`]: a spatial mask of the source.
    pub row_weights: bool,
}

impl Source {
    /// A source with a scale of 1 and no weights.
    pub fn new(name: impl Into<String>, query: TensorSpec, key: TensorSpec, value: TensorSpec) -> Self {
        Self {
            name: name.into(),
            spec: AttentionSpec::from_tensors(query, key, value),
            key_weights: false,
            after_weights: false,
            scale: 1.0,
            row_weights: false,
        }
    }
}

/// Data of one source, on the host or on the device. What is given must be what the [`Source`] says is given.
#[derive(Clone, Debug)]
pub struct SourceInputs<'a> {
    /// `[batch, kv_heads, kv_len, head_dim]`.
    pub key: Tensor<'a>,
    /// `[batch, kv_heads, kv_len, v_head_dim]`; in host memory where there are `after_weights`.
    pub value: Tensor<'a>,
    /// The rest.
    pub terms: Terms<Tensor<'a>>,
    /// `[batch, kv_len]`, at least 0.
    pub key_weights: Option<&'a [f32]>,
    /// `[batch, kv_len]`.
    pub after_weights: Option<&'a [f32]>,
    /// f32 `[batch, q_len]`.
    pub row_weights: Option<Tensor<'a>>,
}

impl<'a> SourceInputs<'a> {
    /// Key and value, and nothing else.
    pub fn new(key: impl Into<Tensor<'a>>, value: impl Into<Tensor<'a>>) -> Self {
        Self {
            key: key.into(),
            value: value.into(),
            terms: Terms::default(),
            key_weights: None,
            after_weights: None,
            row_weights: None,
        }
    }
}

/// What comes back from sources, where it was recorded; f32 without gaps.
#[derive(Clone, Debug)]
pub struct SourcesTensors {
    /// `[batch, q_heads, q_len, v_head_dim]`.
    pub output: Tensor<'static>,
    /// `[batch, q_heads, q_len, 2]`, maximum and sum of each row over all sources; `None` for a sum.
    pub row_state: Option<Tensor<'static>>,
    /// `[sources, batch, q_heads, q_len, 2]`, maximum and sum of each row over each source alone.
    pub source_row_state: Tensor<'static>,
}

/// What comes back from sources, in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct SourcesOutput {
    /// `[batch, q_heads, q_len, v_head_dim]`, without gaps.
    pub output: Vec<f32>,
    /// `[batch, q_heads, q_len]` over all sources; `None` for a sum, which has no softmax in common.
    pub lse: Option<Vec<f32>>,
    /// `[sources, batch, q_heads, q_len]`: the log-sum-exp of each source alone.
    pub source_lse: Vec<f32>,
}

/// Sources that were found to fit together.
///
/// ```
/// use cross_attention::sources::{Combine, Gate, Source, SourceInputs, Sources};
/// use cross_attention::{Device, Layout, TensorSpec};
/// # pollster::block_on(async {
/// let of = |shape| TensorSpec::f32(Layout::bhld(shape));
/// // one query row, a text of two tokens and an image of one, width 2
/// let text = Source::new("text", of([1, 1, 1, 2]), of([1, 1, 2, 2]), of([1, 1, 2, 2]));
/// let image = Source::new("image", of([1, 1, 1, 2]), of([1, 1, 1, 2]), of([1, 1, 1, 2]));
/// let sources = Sources::new(vec![text, image], Combine::Softmax, Gate::None)?;
/// let (query, keys) = (vec![0.5f32, 0.5], vec![0.0f32; 4]);
/// let (of_text, of_image) = (vec![1.0f32, 2.0, 3.0, 4.0], vec![8.0f32, 9.0]);
/// let inputs = [SourceInputs::new(&keys, &of_text), SourceInputs::new(&keys[..2], &of_image)];
/// let result = sources.prepare(&Device::Cpu).await?.run(&query, &inputs, None).await?;
/// // equal scores: the mean over all three keys
/// assert!((result.output[0] - 4.0).abs() < 1e-6 && (result.output[1] - 5.0).abs() < 1e-6);
/// # Ok::<(), cross_attention::Error>(())
/// # }).unwrap();
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Sources {
    sources: Vec<Source>,
    /// One for each source, f32 outputs side by side, with maximum and sum; weights before the softmax are a bias.
    problems: Vec<AttentionProblem>,
    combine: Combine,
    gate: Gate,
}

impl Sources {
    /// Checks a description.
    ///
    /// # Errors
    /// A [`SourcesError`] that names the source, what was found and what would do.
    pub fn new(sources: Vec<Source>, combine: Combine, gate: Gate) -> Result<Self, SourcesError> {
        let first = sources.first().ok_or(SourcesError::NoSources)?;
        let mut problems = Vec::with_capacity(sources.len());
        for source in &sources {
            let source_name = source.name.clone();
            if source.spec.query != first.spec.query {
                return Err(SourcesError::Query {
                    source_name,
                    wanted: first.spec.query.layout.shape,
                    found: source.spec.query.layout.shape,
                });
            }
            let width = |source: &Source| source.spec.value.layout.shape[3];
            if width(source) != width(first) {
                let first_name = first.name.clone();
                let (wanted, found) = (width(first), width(source));
                return Err(SourcesError::ValueWidth { source_name, first: first_name, wanted, found });
            }
            if source.spec.scores.is_some() {
                return Err(SourcesError::Scores { source_name });
            }
            if source.spec.bias.is_some() && source.key_weights {
                return Err(SourcesError::BiasAndWeights { source_name });
            }
            if !source.scale.is_finite() {
                return Err(SourcesError::Scale { source_name, scale: source.scale });
            }
            if combine == Combine::Softmax {
                #[expect(clippy::float_cmp, reason = "exactly what `new` sets")]
                let scaled = source.scale != 1.0;
                for (name, found) in [("scale", scaled), ("row_weights", source.row_weights)] {
                    if found {
                        return Err(SourcesError::SumOnly { source_name, name });
                    }
                }
            }
            let problem =
                problem(source).map_err(|error| SourcesError::Problem { source_name, error: error.into() })?;
            problems.push(problem);
        }
        Ok(Self { sources, problems, combine, gate })
    }

    /// The sources, in order.
    #[must_use]
    pub fn sources(&self) -> &[Source] {
        &self.sources
    }

    /// How they become one.
    #[must_use]
    pub const fn combine(&self) -> Combine {
        self.combine
    }

    /// What the output is multiplied with.
    #[must_use]
    pub const fn gate(&self) -> Gate {
        self.gate
    }

    fn any_row_weights(&self) -> bool {
        self.sources.iter().any(|source| source.row_weights)
    }

    /// Number of gates that are given.
    fn gates(&self) -> usize {
        match self.gate {
            Gate::None => 0,
            Gate::Scalar => 1,
            Gate::Heads => self.problems[0].q_heads(),
        }
    }
}

/// What is run for a source.
fn problem(source: &Source) -> Result<AttentionProblem, crate::problem::ProblemError> {
    let mut spec = source.spec.clone();
    let [batch, heads, len, _] = spec.query.layout.shape;
    let width = spec.value.layout.shape[3];
    spec.output = TensorSpec::f32(Layout::bhld([batch, heads, len, width]));
    spec.row_state = true;
    if source.key_weights {
        spec.bias = Some(TensorSpec::f32(Layout::bhld([batch, 1, 1, spec.key.layout.shape[2]])));
    }
    if source.after_weights {
        // the scaled copy has a row for each key of each batch entry
        AttentionProblem::new(spec.clone())?;
        let [_, kv_heads, kv_len, _] = spec.key.layout.shape;
        spec.value = TensorSpec::f32(Layout::bhld([batch, kv_heads, kv_len, width]));
    }
    AttentionProblem::new(spec)
}
