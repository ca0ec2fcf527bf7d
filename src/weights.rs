//! Which attention weights are wanted: some heads, rows and keys of `exp(score - lse)`, without the whole matrix.
//!
//! A fused attention never holds its weights. Where some of them are wanted afterwards, a second pass computes those and
//! no others from query, key, and maximum and sum of the rows (or their log-sum-exp); its cost is in proportion to what is
//! asked for.
//!
//! Uses: maps of the words of a prompt over an image (DAAM, arXiv:2210.04885), times of words from the alignment heads of
//! Whisper, the mass that each passage gets in a fusion-in-decoder reader (arXiv:2007.01282).

use std::ops::Range;

use crate::inputs::{AttentionInputs, AttentionOutput, InputError, RowState};
use crate::problem::AttentionProblem;
use crate::terms::Terms;

/// Some positions along one axis. A list may be in any order and may repeat.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Select {
    /// Every one.
    #[default]
    All,
    /// From the start up to, not including, the end.
    Range(Range<usize>),
    /// These.
    List(Vec<usize>),
}

/// What becomes of the heads that are asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum HeadReduce {
    /// Each stays by itself.
    #[default]
    Each,
    /// Their mean; a head that is listed twice counts twice.
    Mean,
    /// Their sum; a head that is listed twice counts twice.
    Sum,
}

/// What becomes of the keys.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Keys {
    /// The weight of each of these.
    Each(Select),
    /// The sum of the weights over each of these ranges of keys. They may overlap, and may be empty: then the sum is 0.
    Segments(Vec<Range<usize>>),
}

impl Default for Keys {
    fn default() -> Self {
        Self::Each(Select::All)
    }
}

/// Which weights are wanted. Plain data; the default is all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct WeightsSpec {
    /// Query heads.
    pub heads: Select,
    /// What becomes of them.
    pub reduce: HeadReduce,
    /// Query rows.
    pub rows: Select,
    /// Keys, or ranges of them.
    pub keys: Keys,
}

/// What the weights of each row are divided by: its maximum and sum, or its log-sum-exp where nothing else is known.
///
/// Functions that take it take any of `&RowState`, `&[f32]`, `&Vec<f32>` and `&[f32; N]`.
#[derive(Clone, Copy, Debug)]
pub enum RowNorm<'a> {
    /// A weight is `exp(score - lse)`, with one `lse` a row, `[batch, q_heads, q_len]`. An lse is rounded to f32, so all
    /// weights of a row are off by one factor, up to `exp(2^-24 |lse|)`: a relative 6e-6 of scores around 100, 6e-4 around
    /// 10^4, and anything around 10^9, which some use for padding.
    Lse(&'a [f32]),
    /// A weight is `exp(score - row_max) / row_sum`, which loses nothing to the size of the scores.
    State(&'a RowState),
}

impl RowNorm<'_> {
    /// `[rows, 2]`, maximum and sum, as a device takes them.
    pub(crate) fn pairs(self) -> Vec<f32> {
        match self {
            Self::Lse(lse) => {
                lse.iter().flat_map(|&lse| [lse, if lse == f32::NEG_INFINITY { 0.0 } else { 1.0 }]).collect()
            }
            Self::State(RowState { row_max, row_sum }) => {
                row_max.iter().zip(row_sum).flat_map(|(&max, &sum)| [max, sum]).collect()
            }
        }
    }

    /// Compares the lengths with the number of rows.
    pub(crate) fn check(self, wanted: usize) -> Result<(), InputError> {
        let exactly = |name, found| if found == wanted { Ok(()) } else { Err(InputError::Len { name, wanted, found }) };
        match self {
            Self::Lse(lse) => exactly("lse", lse.len()),
            Self::State(RowState { row_max, row_sum }) => {
                exactly("row_max", row_max.len())?;
                exactly("row_sum", row_sum.len())
            }
        }
    }
}

impl<'a> From<&'a [f32]> for RowNorm<'a> {
    fn from(lse: &'a [f32]) -> Self {
        Self::Lse(lse)
    }
}

impl<'a> From<&'a Vec<f32>> for RowNorm<'a> {
    fn from(lse: &'a Vec<f32>) -> Self {
        Self::Lse(lse)
    }
}

impl<'a, const N: usize> From<&'a [f32; N]> for RowNorm<'a> {
    fn from(lse: &'a [f32; N]) -> Self {
        Self::Lse(lse)
    }
}

impl<'a> From<&'a RowState> for RowNorm<'a> {
    fn from(state: &'a RowState) -> Self {
        Self::State(state)
    }
}

/// Attention weights of a problem that were found to be there. Later stages do not check it again.
///
/// For batch entry `b`, head `h`, row `i` and key `j`, `exp(score - row_max[b, h, i]) / row_sum[b, h, i]` with the score
/// that [`AttentionSpec`](crate::AttentionSpec) defines ([`RowNorm`] also takes an `lse`); zero where the row may not see
/// the key, and in a row that sees none. A sink has its share in the sum, so that the weights of a row then add up to less
/// than 1.
///
/// ```
/// use cross_attention::weights::{HeadReduce, Keys, Select, WeightsProblem, WeightsSpec};
/// use cross_attention::{AttentionProblem, AttentionSpec};
/// // the mean over 8 heads of what each of 4096 positions of an image gives to two words of a prompt
/// let attention = AttentionProblem::new(AttentionSpec::new([1, 8, 4096, 40], [1, 8, 77, 40]))?;
/// let spec = WeightsSpec {
///     reduce: HeadReduce::Mean,
///     keys: Keys::Each(Select::List(vec![2, 5])),
///     ..WeightsSpec::default()
/// };
/// assert_eq!(WeightsProblem::new(&attention, &spec)?.shape(), [1, 1, 4096, 2]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct WeightsProblem {
    /// Without value and sinks, which have no part in a weight.
    scores: AttentionProblem,
    heads: Vec<u32>,
    reduce: HeadReduce,
    rows: Vec<u32>,
    keys: KeyList,
}

/// The keys that are wanted, written out.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum KeyList {
    Each(Vec<u32>),
    /// First key and one past the last.
    Segments(Vec<[u32; 2]>),
}

impl KeyList {
    pub(crate) const fn len(&self) -> usize {
        match self {
            Self::Each(keys) => keys.len(),
            Self::Segments(segments) => segments.len(),
        }
    }
}

impl WeightsProblem {
    /// Checks which weights are wanted of an attention.
    ///
    /// # Errors
    /// [`WeightsError::OutOfRange`], [`WeightsError::Backwards`], [`WeightsError::Empty`], [`WeightsError::Overflow`].
    pub fn new(attention: &AttentionProblem, spec: &WeightsSpec) -> Result<Self, WeightsError> {
        let (q_heads, q_len, kv_len) = (attention.q_heads(), attention.q_len(), attention.kv_len());
        // counted before any list is written out
        let heads = counted("heads", &spec.heads, q_heads)?;
        let rows = counted("rows", &spec.rows, q_len)?;
        let keys = match &spec.keys {
            Keys::Each(keys) => counted("keys", keys, kv_len)?,
            Keys::Segments(segments) => {
                for segment in segments {
                    range("segments", segment, kv_len)?;
                }
                some("segments", segments.len())?
            }
        };
        let shown = if spec.reduce == HeadReduce::Each { heads } else { 1 };
        let shape = [attention.batch(), shown, rows, keys];
        let bytes = shape.iter().try_fold(4usize, |bytes, &n| bytes.checked_mul(n));
        if bytes.is_none() {
            return Err(WeightsError::Overflow { shape });
        }
        let keys = match &spec.keys {
            Keys::Each(keys) => KeyList::Each(written_out(keys, kv_len)),
            Keys::Segments(segments) => {
                KeyList::Segments(segments.iter().map(|keys| [keys.start, keys.end].map(narrow)).collect())
            }
        };
        Ok(Self {
            scores: attention.scores_alone(),
            heads: written_out(&spec.heads, q_heads),
            reduce: spec.reduce,
            rows: written_out(&spec.rows, q_len),
            keys,
        })
    }

    /// `[batch, heads or 1, rows, keys or segments]`.
    #[must_use]
    pub const fn shape(&self) -> [usize; 4] {
        let heads = match self.reduce {
            HeadReduce::Each => self.heads.len(),
            HeadReduce::Mean | HeadReduce::Sum => 1,
        };
        [self.scores.batch(), heads, self.rows.len(), self.keys.len()]
    }

    /// Number of weights that are returned.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.shape().iter().product()
    }

    /// The attention's scores: its problem without value and sinks.
    pub(crate) const fn scores(&self) -> &AttentionProblem {
        &self.scores
    }

    /// The heads that go into one of the result's, and what their sum is divided by.
    pub(crate) fn heads_of(&self, shown: usize) -> (&[u32], usize) {
        match self.reduce {
            HeadReduce::Each => (&self.heads[shown..=shown], 1),
            HeadReduce::Sum => (&self.heads, 1),
            HeadReduce::Mean => (&self.heads, self.heads.len()),
        }
    }

    pub(crate) fn heads(&self) -> &[u32] {
        &self.heads
    }

    pub(crate) const fn reduce(&self) -> HeadReduce {
        self.reduce
    }

    pub(crate) fn rows(&self) -> &[u32] {
        &self.rows
    }

    pub(crate) const fn keys(&self) -> &KeyList {
        &self.keys
    }

    /// Inputs as the scores alone need them: whatever value and sinks are, nobody looks at them.
    ///
    /// # Errors
    /// An [`InputError`] if the rest is not what the problem asks for, or there is not one `lse`, or maximum and sum, a row.
    pub(crate) fn inputs<'a>(
        &self,
        inputs: &AttentionInputs<'a>,
        norm: RowNorm<'_>,
    ) -> Result<AttentionInputs<'a>, InputError> {
        let terms = Terms { sinks: None, value_scale: inputs.terms.key_scale, ..inputs.terms };
        let inputs = AttentionInputs { value: inputs.key, terms, ..*inputs };
        inputs.check(&self.scores)?;
        norm.check(self.scores.rows())?;
        Ok(inputs)
    }
}

/// Checks a selection and counts it.
fn counted(axis: &'static str, select: &Select, len: usize) -> Result<usize, WeightsError> {
    match select {
        // an axis without positions has nothing to select, and that is no error
        Select::All => Ok(len),
        Select::Range(positions) => {
            range(axis, positions, len)?;
            some(axis, positions.len())
        }
        Select::List(positions) => {
            if let Some((n, &found)) = positions.iter().enumerate().find(|(_, position)| **position >= len) {
                return Err(WeightsError::OutOfRange { axis, n, found, len });
            }
            some(axis, positions.len())
        }
    }
}

fn range(axis: &'static str, &Range { start, end }: &Range<usize>, len: usize) -> Result<(), WeightsError> {
    if start > end {
        return Err(WeightsError::Backwards { axis, start, end });
    }
    if end > len {
        return Err(WeightsError::PastTheEnd { axis, start, end, len });
    }
    Ok(())
}

const fn some(axis: &'static str, count: usize) -> Result<usize, WeightsError> {
    if count == 0 { Err(WeightsError::Empty { axis }) } else { Ok(count) }
}

fn written_out(select: &Select, len: usize) -> Vec<u32> {
    match select {
        Select::All => (0..narrow(len)).collect(),
        Select::Range(positions) => (narrow(positions.start)..narrow(positions.end)).collect(),
        Select::List(positions) => positions.iter().map(|&position| narrow(position)).collect(),
    }
}

/// Rows and keys are at most [`MAX_LEN`](crate::MAX_LEN); more heads than a `u32` counts have no memory.
fn narrow(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// An attention, and some of its weights.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionWithWeights {
    /// The attention's output, with the log-sum-exp of its rows, and their maxima and sums if the spec asks for them.
    pub attention: AttentionOutput,
    /// The weights, of [`shape`](Self::shape).
    pub weights: Vec<f32>,
    /// `[batch, heads or 1, rows, keys or segments]`.
    pub shape: [usize; 4],
}

/// Why weights could not be asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// A position is not there.
    #[error("{axis}[{n}] is {found}, there are {len}, counted from 0")]
    OutOfRange {
        /// `heads`, `rows` or `keys`.
        axis: &'static str,
        /// Where in the list.
        n: usize,
        /// The position that was asked for.
        found: usize,
        /// The positions that there are.
        len: usize,
    },
    /// A range reaches past the end.
    #[error("{axis} holds the range {start}..{end}, there are {len}")]
    PastTheEnd {
        /// `heads`, `rows`, `keys` or `segments`.
        axis: &'static str,
        /// Start of the range.
        start: usize,
        /// End of the range.
        end: usize,
        /// The positions that there are.
        len: usize,
    },
    /// A range ends before it starts.
    #[error("{axis} holds the range {start}..{end}, which ends before it starts")]
    Backwards {
        /// `heads`, `rows`, `keys` or `segments`.
        axis: &'static str,
        /// Start of the range.
        start: usize,
        /// End of the range.
        end: usize,
    },
    /// A list or range is empty.
    #[error("{axis} is empty, needs at least one; leave the weights out instead")]
    Empty {
        /// `heads`, `rows`, `keys` or `segments`.
        axis: &'static str,
    },
    /// The result is larger than memory can be addressed.
    #[error("weights of shape {shape:?} are larger than memory can be addressed; ask for fewer heads, rows or keys")]
    Overflow {
        /// `[batch, heads or 1, rows, keys or segments]`.
        shape: [usize; 4],
    },
}
