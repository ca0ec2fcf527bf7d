//! What may be asked: [`AttentionSpec`], plain fields, becomes a checked [`AttentionProblem`] or a [`ProblemError`].

mod check;
mod derived;
mod error;
mod terms;
#[cfg(test)]
mod tests;

use std::ops::Range;

pub use error::ProblemError;
pub use terms::{AlibiSlopes, Diagonal, Paged, ScoreStage};

use crate::tensor::{Layout, TensorSpec};

/// The longest query or key sequence, in tokens: 2^30, so that positions and their differences fit an `i32`.
pub const MAX_LEN: usize = 1 << 30;

/// The longest page of keys and values, in tokens, where a batch entry may have several. Their lengths are powers of two.
pub const MAX_PAGE_LEN: usize = 256;

/// What is asked of one attention. Plain data: fill it in, then make an [`AttentionProblem`] of it.
///
/// For batch entry `b`, query head `h`, row `i`, key `j`, with key/value head `h / (q_heads / kv_heads)`:
///
/// ```text
/// s  = scale * dot(query[b,h,i,:], key[b,h/group,j,:])
/// s  = softcap * tanh(s / softcap)                     if a softcap is given
/// s += bias[b,h,i,j]                                   if a bias is given
/// s -= alibi_slopes[h] * |i + offset - j|              if ALiBi slopes are given ([b,h] if there are so many)
/// j is allowed iff  i < q_lens[b]  and  j < kv_lens[b]  and  mask[b,h,i,j]  and  row_start[b,i] <= j < row_end[b,i]
///              and  j <= i + offset                    if causal
///              and  i + offset - window_left <= j <= i + offset + window_right
///              and  bias[b,h,i,j] is not -inf
/// lse    = ln(sum over allowed j of exp(s)  [+ exp(sinks[h])])
/// output = sum over allowed j of exp(s - lse) * value[b,h/group,j,:]
/// ```
///
/// Keys and values that are stored as signed bytes count as `byte * scale` of the block that they stand in, and those that lie
/// in pages as if each batch entry had its pages side by side: `key[b,h,j,:]` is row `j % page_len` of page
/// `block_table[b, j / page_len]`.
///
/// A row with no allowed key gives zeros, and an `lse` of negative infinity (of `sinks[h]` with a sink). A row behind its
/// entry's query length gives zeros and negative infinity, sink or not.
///
/// ```
/// use cross_attention::{AttentionProblem, AttentionSpec};
/// // 4096 latent positions attend to 77 tokens of a prompt, 8 heads of 40
/// let spec = AttentionSpec::new([2, 8, 4096, 40], [2, 8, 77, 40]);
/// let problem = AttentionProblem::new(spec)?;
/// assert_eq!(problem.scale(), 1.0 / 40f32.sqrt());
/// # Ok::<(), cross_attention::ProblemError>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct AttentionSpec {
    /// `[batch, q_heads, q_len, head_dim]`.
    pub query: TensorSpec,
    /// `[batch, kv_heads, kv_len, head_dim]`; a batch of 1 is shared by the whole batch. Where they are
    /// [`paged`](Self::paged), `[pages, kv_heads, page_len, head_dim]`.
    pub key: TensorSpec,
    /// `[batch, kv_heads, kv_len, v_head_dim]`; a batch of 1 is shared by the whole batch. Where they are
    /// [`paged`](Self::paged), `[pages, kv_heads, page_len, v_head_dim]`.
    pub value: TensorSpec,
    /// Scales of keys that are [`Element::I8`](crate::Element::I8), which need them: `[batch, kv_heads, kv_len, blocks]` (of
    /// pages as the key), f32 or f16. Each holds for `head_dim / blocks` neighbouring columns of its row; `blocks` divides `head_dim`.
    pub key_scale: Option<TensorSpec>,
    /// The same of values, by `v_head_dim`.
    pub value_scale: Option<TensorSpec>,
    /// Keys and values lie in pages, and a table `[batch, table_len]` says which page holds which tokens; `None`: side by side.
    pub paged: Option<Paged>,
    /// `[batch, q_heads, q_len, v_head_dim]`; no two elements may share a place.
    pub output: TensorSpec,
    /// Factor on the dot products; any finite number (on a GPU none that is subnormal). `None`: `1 / sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// Cap on the scaled scores, `softcap * tanh(s / softcap)`; finite and above 0. A subnormal cap is as the smallest
    /// normal number: either way all scores add nothing to 1.
    pub softcap: Option<f32>,
    /// Added to the scores; `[batch, q_heads, q_len, kv_len]`, each axis may also be 1. -inf forbids the key.
    pub bias: Option<TensorSpec>,
    /// Boolean mask, true = attend; `[batch, q_heads, q_len, kv_len]`, each axis may also be 1.
    /// On a device one byte an element, 0 = false.
    pub mask: Option<Layout>,
    /// Whether query lengths `[batch]` are given, in tokens: sequences of different lengths, padded to `q_len` rows. What
    /// stands in the rows behind a length is not looked at.
    pub q_lens: bool,
    /// Whether key lengths `[batch]` are given, in tokens.
    pub kv_lens: bool,
    /// Whether a range of keys `row_start <= j < row_end` is given for each row, two tensors `[batch, q_len]`.
    pub row_ranges: bool,
    /// Whether ALiBi slopes are given, and how many; `None`: none.
    pub alibi_slopes: Option<AlibiSlopes>,
    /// Whether attention sinks `[q_heads]` are given: a logit that takes part in the softmax and has no value.
    pub sinks: bool,
    /// Causal mask along this diagonal; `None`: not causal.
    pub causal: Option<Diagonal>,
    /// Keys a row sees before the diagonal, in tokens; `None`: all.
    pub window_left: Option<u32>,
    /// Keys a row sees behind the diagonal, in tokens; `None`: all.
    pub window_right: Option<u32>,
    /// The diagonal of windows and ALiBi where `causal` is `None` (default: [`Diagonal::TopLeft`]); with
    /// `causal` it must be `None` or the same.
    pub offset: Option<Diagonal>,
    /// Whether to return the log-sum-exp of each row, `[batch, q_heads, q_len]` in f32, natural logarithm.
    pub lse: bool,
    /// Whether to return the maximum and the sum of each row's softmax ([`RowState`](crate::RowState)): what weights and
    /// merges need where scores are large, for an `lse` of 10^9 is rounded to 64. On a device the pairs take the place of
    /// the log-sum-exp in its buffer.
    pub row_state: bool,
    /// A score matrix to return as well. It is as large as it is: `q_len * kv_len` for every head.
    pub scores: Option<ScoreStage>,
}

impl AttentionSpec {
    /// Attention over f32 tensors without gaps, in memory order `[batch, heads, len, dim]`.
    ///
    /// `query` is `[batch, q_heads, q_len, head_dim]`; `key` is `[batch, kv_heads, kv_len, head_dim]`, and value
    /// has the shape of key.
    #[must_use]
    pub fn new(query: [usize; 4], key: [usize; 4]) -> Self {
        let key = TensorSpec::f32(Layout::bhld(key));
        Self::from_tensors(TensorSpec::f32(Layout::bhld(query)), key, key)
    }

    /// Attention over the given tensors; the output is of the query's element type, without gaps, in memory
    /// order `[batch, heads, len, dim]`.
    #[must_use]
    pub fn from_tensors(query: TensorSpec, key: TensorSpec, value: TensorSpec) -> Self {
        let [batch, heads, len, _] = query.layout.shape;
        let output = Layout::bhld([batch, heads, len, value.layout.shape[3]]);
        Self {
            query,
            key,
            value,
            output: TensorSpec { element: query.element, layout: output },
            key_scale: None,
            value_scale: None,
            paged: None,
            scale: None,
            softcap: None,
            bias: None,
            mask: None,
            q_lens: false,
            kv_lens: false,
            row_ranges: false,
            alibi_slopes: None,
            sinks: false,
            causal: None,
            window_left: None,
            window_right: None,
            offset: None,
            lse: false,
            row_state: false,
            scores: None,
        }
    }

    /// Attention to keys and values in pages `[pages, kv_heads, page_len, width]`, in any memory order. Each entry of the batch
    /// has `table_len` of them, and as many keys as these hold.
    #[must_use]
    pub fn from_pages(query: TensorSpec, key: TensorSpec, value: TensorSpec, table_len: usize) -> Self {
        let kv_len = table_len.saturating_mul(key.layout.shape[2]);
        Self { paged: Some(Paged { table_len, kv_len }), ..Self::from_tensors(query, key, value) }
    }

    /// Length of the key/value sequence, in tokens.
    pub(crate) fn kv_len(&self) -> usize {
        self.paged.map_or(self.key.layout.shape[2], |paged| paged.kv_len)
    }

    /// Whether all entries of the batch read the same keys and values.
    pub(crate) fn shares_keys(&self) -> bool {
        let shared = |tensor: &TensorSpec| tensor.layout.strides[0] == 0;
        let scales = [&self.key_scale, &self.value_scale].into_iter().flatten();
        self.paged.is_none() && [&self.key, &self.value].into_iter().chain(scales).all(shared)
    }

    /// Whether anything of a row's softmax is returned beside the output.
    pub(crate) const fn returns_rows(&self) -> bool {
        self.lse || self.row_state
    }

    /// Numbers of a row in the buffer of log-sum-exps: it, or maximum and sum in its place.
    pub(crate) const fn lse_width(&self) -> usize {
        if self.row_state { 2 } else { 1 }
    }
}

/// An [`AttentionSpec`] that was found sound. Later stages do not check it again.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionProblem {
    spec: AttentionSpec,
    scale: f32,
    diagonal: Diagonal,
}

impl AttentionProblem {
    /// Checks a spec. Axes of length 1 that broadcast get a stride of 0.
    ///
    /// # Errors
    /// A [`ProblemError`] that names the tensor or option, what was found and what would do.
    pub fn new(spec: AttentionSpec) -> Result<Self, ProblemError> {
        check::check(spec)
    }

    /// The spec, with every layout stretched to its full shape.
    #[must_use]
    pub const fn spec(&self) -> &AttentionSpec {
        &self.spec
    }

    /// Entries of the batch.
    #[must_use]
    pub const fn batch(&self) -> usize {
        self.spec.query.layout.shape[0]
    }

    /// Heads of the query.
    #[must_use]
    pub const fn q_heads(&self) -> usize {
        self.spec.query.layout.shape[1]
    }

    /// Heads of key and value.
    #[must_use]
    pub const fn kv_heads(&self) -> usize {
        self.spec.key.layout.shape[1]
    }

    /// Query heads that share one key/value head: `q_heads / kv_heads`.
    #[must_use]
    pub const fn group_size(&self) -> usize {
        self.q_heads() / self.kv_heads()
    }

    /// Length of the query sequence, in tokens.
    #[must_use]
    pub const fn q_len(&self) -> usize {
        self.spec.query.layout.shape[2]
    }

    /// Length of the key/value sequence, in tokens.
    #[must_use]
    pub const fn kv_len(&self) -> usize {
        match &self.spec.paged {
            Some(paged) => paged.kv_len,
            None => self.spec.key.layout.shape[2],
        }
    }

    /// Width of a query or key row.
    #[must_use]
    pub const fn head_dim(&self) -> usize {
        self.spec.query.layout.shape[3]
    }

    /// Width of a value or output row.
    #[must_use]
    pub const fn v_head_dim(&self) -> usize {
        self.spec.value.layout.shape[3]
    }

    /// The factor on the dot products, default filled in.
    #[must_use]
    pub const fn scale(&self) -> f32 {
        self.scale
    }

    /// The factor that makes a dot product the exponent of 2 that its score stands for, where nothing but the scale goes
    /// into a score: then maxima and powers can be taken of dot products as they are. The factor keeps their order, and is
    /// at most 1, so that nothing overflows that a score would not.
    #[expect(clippy::cast_possible_truncation, reason = "rounded to f32, as kernels compute")]
    pub(crate) fn exponent_scale(&self) -> Option<f32> {
        let factor = (f64::from(self.scale) * std::f64::consts::LOG2_E) as f32;
        let bare = self.spec.softcap.is_none() && self.spec.bias.is_none() && self.spec.alibi_slopes.is_none();
        // subnormal factors may be flushed to 0
        (bare && (f32::MIN_POSITIVE..=1.0).contains(&factor)).then_some(factor)
    }

    /// The diagonal of causal mask, windows and ALiBi, default filled in.
    #[must_use]
    pub const fn diagonal(&self) -> Diagonal {
        self.diagonal
    }

    /// Number of query rows: `batch * q_heads * q_len`.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.batch() * self.q_heads() * self.q_len()
    }

    /// Whether there is nothing to compute: the output has no elements.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.rows() == 0
    }

    /// Shape of a returned score matrix: `[batch, q_heads, q_len, kv_len]`.
    #[must_use]
    pub const fn score_shape(&self) -> [usize; 4] {
        [self.batch(), self.q_heads(), self.q_len(), self.kv_len()]
    }

    /// The offset of the diagonal for a batch entry with `q_len` rows and `kv_len` keys (its lengths, where given).
    #[must_use]
    pub fn offset(&self, q_len: usize, kv_len: usize) -> i64 {
        match self.diagonal {
            Diagonal::TopLeft => 0,
            Diagonal::BottomRight => self.kv_len() as i64 - self.q_len() as i64,
            Diagonal::EndOfKeys => kv_len as i64 - q_len as i64,
            Diagonal::Fixed(offset) => i64::from(offset),
        }
    }

    /// The keys that row `i` may see by causal mask and window, for a batch entry with `q_len` rows and `kv_len` keys; none
    /// for a row behind the last.
    ///
    /// Boolean mask, row ranges and bias come on top of it.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "0 <= from <= to <= kv_len, which was a usize")]
    pub fn row_keys(&self, i: usize, q_len: usize, kv_len: usize) -> Range<usize> {
        if i >= q_len {
            return 0..0;
        }
        let diagonal = i as i64 + self.offset(q_len, kv_len);
        let from = self.spec.window_left.map_or(0, |left| diagonal - i64::from(left)).max(0);
        let mut to = self.spec.window_right.map_or(i64::MAX, |right| diagonal + i64::from(right) + 1);
        if self.spec.causal.is_some() {
            to = to.min(diagonal + 1);
        }
        let to = to.clamp(0, kv_len as i64);
        let from = from.min(to);
        from.unsigned_abs() as usize..to.unsigned_abs() as usize
    }
}
