//! The host side of one call: borrowed inputs, compared with the problem they are for, and owned outputs.

use std::ops::Range;

use crate::problem::{AlibiSlopes, AttentionProblem, ScoreStage};
use crate::slice::Kind;
use crate::stored::{Pages, StoredRows};
use crate::tensor::{TensorData, TensorRef, TensorSpec};
use crate::terms::{HostTerms, OwnedTerms, TermSpec, Terms};

/// Data of one attention in host memory. What is given must be what the spec says is given.
///
/// Tensors are read through the layouts of the [`AttentionSpec`](crate::AttentionSpec).
///
/// ```
/// use cross_attention::{AttentionInputs, AttentionProblem, AttentionSpec, Terms, cpu};
/// let mut spec = AttentionSpec::new([2, 1, 1, 2], [2, 1, 3, 2]);
/// spec.kv_lens = true;
/// let problem = AttentionProblem::new(spec)?;
/// let (query, key, value) = ([1.0f32; 4], [0.0f32; 12], [1.0f32, 1.0, 2.0, 2.0, 9.0, 9.0, 3.0, 3.0, 6.0, 6.0, 9.0, 9.0]);
/// // the first entry of the batch has two keys, the second all three
/// let terms = Terms { kv_lens: Some(&[2u32, 3][..]), ..Terms::default() };
/// let inputs = AttentionInputs { terms, ..AttentionInputs::new(&query, &key, &value) };
/// assert_eq!(cpu::attention(&problem, &inputs)?.output.to_f32(), [1.5, 1.5, 6.0, 6.0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct AttentionInputs<'a> {
    /// `[batch, q_heads, q_len, head_dim]`.
    pub query: TensorRef<'a>,
    /// `[batch, kv_heads, kv_len, head_dim]`, or pages.
    pub key: TensorRef<'a>,
    /// `[batch, kv_heads, kv_len, v_head_dim]`, or pages.
    pub value: TensorRef<'a>,
    /// The rest, as the spec asks for it.
    pub terms: HostTerms<'a>,
}

impl<'a> AttentionInputs<'a> {
    /// Query, key and value, and nothing else.
    pub fn new(
        query: impl Into<TensorRef<'a>>,
        key: impl Into<TensorRef<'a>>,
        value: impl Into<TensorRef<'a>>,
    ) -> Self {
        Self { query: query.into(), key: key.into(), value: value.into(), terms: Terms::default() }
    }

    /// Compares the data with the problem: what is there, of which type, how long, and that key lengths fit.
    ///
    /// # Errors
    /// An [`InputError`] that names the tensor, what was found and what would do.
    pub fn check(&self, problem: &AttentionProblem) -> Result<(), InputError> {
        self.checked(problem).map(drop)
    }

    /// The same, and the proof of it.
    pub(crate) fn checked(&self, problem: &AttentionProblem) -> Result<CheckedInputs<'_, 'a>, InputError> {
        let spec = problem.spec();
        let tensors =
            [("query", self.query, &spec.query), ("key", self.key, &spec.key), ("value", self.value, &spec.value)];
        for (name, data, of) in tensors {
            check_tensor(name, (data.element().into(), data.len()), of)?;
        }
        check_terms(&self.terms.slices(), problem, |slice| (slice.kind(), slice.len()))?;
        check_lens("q_lens", self.terms.q_lens, problem.q_len())?;
        check_lens("kv_lens", self.terms.kv_lens, problem.kv_len())?;
        check_table(problem, self.terms.block_table, self.terms.kv_lens)?;
        Ok(CheckedInputs(self))
    }

    /// The keys, however they are stored.
    pub(crate) fn keys<'p>(&self, problem: &'p AttentionProblem) -> StoredRows<'a, 'p> {
        let spec = problem.spec();
        StoredRows::new(self.key, &spec.key, self.terms.key_scale.zip(spec.key_scale.as_ref()), self.pages(problem))
    }

    /// The values, however they are stored.
    pub(crate) fn values<'p>(&self, problem: &'p AttentionProblem) -> StoredRows<'a, 'p> {
        let spec = problem.spec();
        StoredRows::new(
            self.value,
            &spec.value,
            self.terms.value_scale.zip(spec.value_scale.as_ref()),
            self.pages(problem),
        )
    }

    fn pages(&self, problem: &AttentionProblem) -> Option<Pages<'a>> {
        let (table, paged) = self.terms.block_table.zip(problem.spec().paged)?;
        let [pages, _, page_len, _] = problem.spec().key.layout.shape;
        // pages of no token hold no key that anybody asks for
        Some(Pages { table, table_len: paged.table_len, page_len: page_len.max(1), pages })
    }

    /// Number of rows of batch entry `b`: its query length where given, else `q_len`.
    ///
    /// # Panics
    /// If query lengths are given and `b` is not one of the batch.
    #[must_use]
    pub fn q_len(&self, problem: &AttentionProblem, b: usize) -> usize {
        self.terms.q_lens.map_or(problem.q_len(), |lens| lens[b] as usize)
    }

    /// Number of keys of batch entry `b`: its key length where given, else `kv_len`.
    ///
    /// # Panics
    /// If key lengths are given and `b` is not one of the batch.
    #[must_use]
    pub fn kv_len(&self, problem: &AttentionProblem, b: usize) -> usize {
        self.terms.kv_lens.map_or(problem.kv_len(), |lens| lens[b] as usize)
    }

    /// The key that row `i` of batch entry `b` stands on: its position plus the offset of the diagonal.
    ///
    /// # Panics
    /// As [`kv_len`](Self::kv_len).
    #[must_use]
    pub fn diagonal(&self, problem: &AttentionProblem, b: usize, i: usize) -> i64 {
        i as i64 + problem.offset(self.q_len(problem, b), self.kv_len(problem, b))
    }

    /// The keys that row `i` of batch entry `b` may see by its position: what lengths, causal mask, window and row range
    /// leave. Boolean mask and bias come on top of it.
    ///
    /// # Panics
    /// If `b` is not one of the batch, or `i` is not one of its rows.
    #[must_use]
    pub fn row_keys(&self, problem: &AttentionProblem, b: usize, i: usize) -> Range<usize> {
        let Range { mut start, mut end } = problem.row_keys(i, self.q_len(problem, b), self.kv_len(problem, b));
        let row = b * problem.q_len() + i;
        // a position may lie before the first key
        let index = |position: i32| usize::try_from(position).unwrap_or(0);
        if let Some(starts) = self.terms.row_start {
            start = start.max(index(starts[row]));
        }
        if let Some(ends) = self.terms.row_end {
            end = end.min(index(ends[row]));
        }
        start.min(end)..end
    }

    /// Whether as many values as there are keys may add up to more than f32 holds.
    pub(crate) fn may_overflow(&self, problem: &AttentionProblem) -> bool {
        let most = f32::MAX / problem.kv_len().max(1) as f32;
        let beyond = |of: TensorRef<'_>, most: f32| {
            (0..of.len()).any(|n| {
                let value = of.get(n);
                value.is_finite() && value.abs() > most
            })
        };
        match self.value {
            TensorRef::F32(_) | TensorRef::Bf16(_) => beyond(self.value, most),
            // no byte is more than 128
            TensorRef::I8(_) => self.terms.value_scale.is_some_and(|scale| beyond(scale, most / 128.0)),
            TensorRef::F16(_) => false,
        }
    }

    /// The slope of a head, where there are slopes.
    pub(crate) fn slope(&self, problem: &AttentionProblem, b: usize, h: usize) -> Option<f32> {
        let slopes = self.terms.alibi_slopes?;
        Some(match problem.spec().alibi_slopes {
            Some(AlibiSlopes::PerBatchAndHead) => slopes[b * problem.q_heads() + h],
            Some(AlibiSlopes::PerHead) | None => slopes[h],
        })
    }

    /// The sink of a row, negative infinity where it has none: without sinks, and behind the query length.
    pub(crate) fn sink(&self, problem: &AttentionProblem, [b, h, i]: [usize; 3]) -> f32 {
        match self.terms.sinks {
            Some(sinks) if i < self.q_len(problem, b) => sinks[h],
            _ => f32::NEG_INFINITY,
        }
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
    /// The rest, as the spec asks for it.
    pub terms: OwnedTerms,
}

impl AttentionData {
    /// Borrows everything.
    #[must_use]
    pub fn as_inputs(&self) -> AttentionInputs<'_> {
        AttentionInputs {
            query: self.query.as_ref(),
            key: self.key.as_ref(),
            value: self.value.as_ref(),
            terms: self.terms.as_host(),
        }
    }
}

/// Inputs that were found to be what a problem asks for. Made where they come in; later stages do not look again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CheckedInputs<'i, 'a>(&'i AttentionInputs<'a>);

impl<'a> std::ops::Deref for CheckedInputs<'_, 'a> {
    type Target = AttentionInputs<'a>;

    fn deref(&self) -> &AttentionInputs<'a> {
        self.0
    }
}

/// Whether elements of a type, so many of them, are what a spec says.
pub(crate) fn check_tensor(name: &'static str, found: (Kind, usize), of: &TensorSpec) -> Result<(), InputError> {
    let elements = of.layout.extent().unwrap_or(usize::MAX);
    check_one(name, found, TermSpec { kind: of.element.into(), elements, exact: false, by_batch: false })
}

/// Whether the terms that a problem asks for are given and no others, of the type and number that it says.
pub(crate) fn check_terms<T>(
    given: &Terms<T>,
    problem: &AttentionProblem,
    describe: impl Fn(&T) -> (Kind, usize),
) -> Result<(), InputError> {
    for ((name, given), (_, wanted)) in given.list().into_iter().zip(problem.terms().list()) {
        match (given, wanted) {
            (Some(given), Some(wanted)) => check_one(name, describe(given), *wanted)?,
            (None, None) => {}
            (None, Some(_)) => return Err(InputError::Missing { name }),
            (Some(_), None) => return Err(InputError::Unexpected { name }),
        }
    }
    Ok(())
}

fn check_one(name: &'static str, (kind, found): (Kind, usize), wanted: TermSpec) -> Result<(), InputError> {
    if kind != wanted.kind {
        return Err(InputError::Element { name, wanted: wanted.kind, found: kind });
    }
    match wanted.elements {
        needed if found < needed && !wanted.exact => Err(InputError::TooShort { name, needed, found }),
        wanted_len if found != wanted_len && wanted.exact => Err(InputError::Len { name, wanted: wanted_len, found }),
        _ => Ok(()),
    }
}

/// Whether lengths, one for each entry of the batch, are within what there is.
pub(crate) fn check_lens(name: &'static str, lens: Option<&[u32]>, most: usize) -> Result<(), InputError> {
    match lens.unwrap_or_default().iter().enumerate().find(|(_, len)| **len as usize > most) {
        Some((batch, &found)) => Err(InputError::Length { name, batch, found, most }),
        None => Ok(()),
    }
}

/// Whether a table names pages that there are, as far as it is looked at.
pub(crate) fn check_table(
    problem: &AttentionProblem,
    table: Option<&[i32]>,
    kv_lens: Option<&[u32]>,
) -> Result<(), InputError> {
    let Some((table, paged)) = table.zip(problem.spec().paged) else { return Ok(()) };
    let [pages, _, page_len, _] = problem.spec().key.layout.shape;
    for (batch, of_entry) in table.chunks_exact(paged.table_len.max(1)).enumerate() {
        // scores before the masks are those of all keys
        let lens = kv_lens.filter(|_| !matches!(problem.spec().scores, Some(ScoreStage::Scaled | ScoreStage::Capped)));
        let keys = lens.map_or(paged.kv_len, |lens| lens[batch] as usize);
        let used = &of_entry[..keys.div_ceil(page_len.max(1))];
        let is_none = |page: &i32| usize::try_from(*page).map_or(true, |page| page >= pages);
        if let Some(place) = used.iter().position(is_none) {
            return Err(InputError::Page { batch, place, found: used[place], pages });
        }
    }
    Ok(())
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
        wanted: Kind,
        /// The type that was given.
        found: Kind,
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
    /// A table names a page that there is not.
    #[error("block_table[{batch}][{place}] is {found}, there are {pages} pages, counted from 0")]
    Page {
        /// Entry of the batch.
        batch: usize,
        /// Which of its pages.
        place: usize,
        /// The number that was given.
        found: i32,
        /// The pages there are.
        pages: usize,
    },
    /// A length is beyond the end of its sequence.
    #[error("{name}[{batch}] is {found}, the sequence has {most} tokens")]
    Length {
        /// `q_lens` or `kv_lens`.
        name: &'static str,
        /// Entry of the batch.
        batch: usize,
        /// The length that was given, in tokens.
        found: u32,
        /// The tokens there are.
        most: usize,
    },
}
