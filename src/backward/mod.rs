//! Gradients of an attention: what its inputs must change by, given what its outputs should.
//!
//! For a loss `L`, `d_output` is the gradient of `L` by the output, and `d_lse` that by the log-sum-exp. With `s` the scores with
//! all their terms, `p = exp(s - lse)` the weights of allowed pairs (0 for others), and `w` chosen weights that a gradient
//! `d_weights` is given for:
//!
//! ```text
//! delta_i   = sum_d d_output_id * output_id - d_lse_i  [+ sum_j w_ij * d_weights_ij]
//! ds_ij     = p_ij * (dot(d_output_i, value_j) - delta_i  [+ d_weights_ij])
//! d_value_j = sum_i p_ij * d_output_i
//! d_bias    = ds, summed over the axes along which the bias has length 1; 0 where it is -inf
//! d_alibi_slopes_h = -sum_ij ds_ij * |i + offset - j|
//! d_sinks_h = -sum_i exp(sinks_h - lse_i) * delta_i
//! dt_ij     = ds_ij * (1 - tanh(t_ij / softcap)^2)        with the scaled score t; ds_ij without a softcap
//! d_query_i = scale * sum_j dt_ij * key_j
//! d_key_j   = scale * sum_i dt_ij * query_i
//! d_scale   = sum_ij dt_ij * dot(query_i, key_j)
//! ```
//!
//! summed over the query heads of a group, and over the batch where keys or values are shared. Rows that see no key, and keys that
//! no row sees, get zeros, and what is hidden never enters arithmetic. Nothing is held that grows with `q_len * kv_len`,
//! but a gradient of a bias that is itself so large. The algorithm is that of FlashAttention-2 (Dao 2023, arXiv:2307.08691),
//! without its atomic additions: the same inputs give the same bits, whatever the number of threads.
//!
//! The weights are made anew from the maximum and the sum of each row ([`RowState`](crate::RowState)), which the forward call
//! returns ([`BackwardProblem::forward`]): an `lse` in their place would be rounded, and of scores around 10^4 spoil each
//! weight by 5e-4. The CPU sums the dot products of scores in the order in which its forward does, so that the weights of a row sum to 1
//! however large the scores are (but for keys in signed bytes, which few rows read as they are stored). A GPU's kernels have orders of their own: there a score of `s` leaves a relative error of up to
//! about `head_dim^(1/2) * 2^-24 * |s|` in a weight, as it does in the weight itself.
//!
//! ```
//! use cross_attention::backward::{BackwardInputs, BackwardProblem, BackwardSpec};
//! use cross_attention::{AttentionInputs, AttentionSpec, cpu};
//!
//! // one row, two keys of the same score: each has half of the weight
//! let problem = BackwardProblem::new(BackwardSpec::new(AttentionSpec::new([1, 1, 1, 1], [1, 1, 2, 1])))?;
//! let (query, key, value) = ([1.0f32], [0.0f32, 0.0], [2.0f32, 4.0]);
//! let inputs = AttentionInputs::new(&query, &key, &value);
//! let forward = cpu::attention(problem.forward(), &inputs)?;
//! let d_output = [1.0f32];
//! let gradients = cpu::backward(&problem, &BackwardInputs::new(inputs, &forward, &d_output)?)?;
//! assert_eq!(gradients.d_value.map(|d| d.to_f32()), Some(vec![0.5, 0.5]));
//! // more weight on the second key would raise the output
//! assert_eq!(gradients.d_key.map(|d| d.to_f32()), Some(vec![-0.5, 0.5]));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod inputs;
#[cfg(test)]
mod tests;

pub use inputs::{BackwardInputs, Gradients};

use crate::problem::{AttentionProblem, AttentionSpec, ProblemError};
use crate::tensor::{Element, Layout, TensorSpec};
use crate::weights::{WeightsError, WeightsProblem, WeightsSpec};

/// Which gradients are asked for, and where they go. Plain data; then make a [`BackwardProblem`] of it.
#[derive(Clone, Debug, PartialEq)]
pub struct BackwardSpec {
    /// The attention that is differentiated. It may ask for no scores.
    pub attention: AttentionSpec,
    /// The gradient of the output that is given, `[batch, q_heads, q_len, v_head_dim]`.
    pub d_output: TensorSpec,
    /// Whether a gradient of the log-sum-exp is given, `[batch, q_heads, q_len]`.
    pub d_lse: bool,
    /// Weights of which a gradient is given, in the shape of [`WeightsProblem::shape`]; `None`: of none.
    pub d_weights: Option<WeightsSpec>,
    /// `[batch, q_heads, q_len, head_dim]`, if asked for.
    pub d_query: Option<TensorSpec>,
    /// `[batch, kv_heads, kv_len, head_dim]`, if asked for. Where the batch shares its keys, a batch of 1 asks for the sum
    /// over the batch.
    pub d_key: Option<TensorSpec>,
    /// `[batch, kv_heads, kv_len, v_head_dim]`, as `d_key`.
    pub d_value: Option<TensorSpec>,
    /// `[batch, q_heads, q_len, kv_len]`, if asked for; an axis along which the bias has length 1 may have it too, and asks
    /// for the sum over that axis.
    pub d_bias: Option<TensorSpec>,
    /// Whether the gradient of the ALiBi slopes is asked for, as many as there are slopes.
    pub d_alibi_slopes: bool,
    /// Whether the gradient of the sinks is asked for, `[q_heads]`.
    pub d_sinks: bool,
    /// Whether the gradient of the scale is asked for, one number.
    pub d_scale: bool,
}

impl BackwardSpec {
    /// The gradients of query, key and value in f32, in the shapes of these, without gaps, given that of the output in
    /// f32 without gaps.
    #[must_use]
    pub fn new(attention: AttentionSpec) -> Self {
        let like = |of: &TensorSpec| TensorSpec::f32(Layout::bhld(of.layout.shape));
        Self {
            d_output: like(&attention.output),
            d_lse: false,
            d_weights: None,
            d_query: Some(like(&attention.query)),
            d_key: Some(like(&attention.key)),
            d_value: Some(like(&attention.value)),
            d_bias: None,
            d_alibi_slopes: false,
            d_sinks: false,
            d_scale: false,
            attention,
        }
    }

    /// The gradients of every input that has one, in f32 without gaps: as [`new`](Self::new), and of bias, slopes and sinks where
    /// these are given. Keys and values in signed bytes or in pages have none.
    #[must_use]
    pub fn all(attention: AttentionSpec) -> Self {
        let stored = attention.paged.is_some();
        let [key, value] = [&attention.key, &attention.value].map(|of| !stored && of.element != Element::I8);
        let d_bias = attention.bias.as_ref().map(|bias| TensorSpec::f32(Layout::bhld(bias.layout.shape)));
        let (d_alibi_slopes, d_sinks) = (attention.alibi_slopes.is_some(), attention.sinks);
        let new = Self::new(attention);
        let (d_key, d_value) = (new.d_key.filter(|_| key), new.d_value.filter(|_| value));
        Self { d_key, d_value, d_bias, d_alibi_slopes, d_sinks, ..new }
    }
}

/// A [`BackwardSpec`] that was found sound. Later stages do not check it again.
#[derive(Clone, Debug, PartialEq)]
pub struct BackwardProblem {
    spec: BackwardSpec,
    forward: AttentionProblem,
    weights: Option<WeightsProblem>,
}

impl BackwardProblem {
    /// Checks a spec.
    ///
    /// # Errors
    /// A [`BackwardError`] that names the tensor, what was found and what would do.
    pub fn new(mut spec: BackwardSpec) -> Result<Self, BackwardError> {
        if spec.attention.scores.is_some() {
            return Err(BackwardError::Scores);
        }
        let mut attention = spec.attention.clone();
        attention.row_state = true;
        let forward = AttentionProblem::new(attention)?;
        let of = forward.spec();
        let [batch, q_heads, q_len, kv_len] = forward.score_shape();
        let output = [batch, q_heads, q_len, forward.v_head_dim()];
        if spec.d_output.layout.shape != output {
            return Err(BackwardError::Shape { name: "d_output", wanted: output, found: spec.d_output.layout.shape });
        }
        let kv_heads = forward.kv_heads();
        let free_batch = |of: &TensorSpec| [of.layout.strides[0] == 0, false, false, false];
        let (key, value) = (free_batch(&of.key), free_batch(&of.value));
        let bias = of.bias.as_ref().map(|bias| bias.layout.strides.map(|stride| stride == 0));
        for (name, input, stored) in [("d_key", &of.key, &spec.d_key), ("d_value", &of.value, &spec.d_value)] {
            if stored.is_some() && (input.element == Element::I8 || of.paged.is_some()) {
                let found = if of.paged.is_some() { "in pages" } else { "in signed bytes" };
                return Err(BackwardError::Stored { name, found });
            }
        }
        if spec.d_bias.is_some() && bias.is_none() {
            return Err(BackwardError::NoInput { name: "d_bias", input: "bias" });
        }
        for (name, asked, input, given) in [
            ("d_alibi_slopes", spec.d_alibi_slopes, "alibi_slopes", of.alibi_slopes.is_some()),
            ("d_sinks", spec.d_sinks, "sinks", of.sinks),
        ] {
            if asked && !given {
                return Err(BackwardError::NoInput { name, input });
            }
        }
        check_elements(&spec.d_output, "d_output")?;
        for (name, gradient, wanted, free) in [
            ("d_query", &spec.d_query, [batch, q_heads, q_len, forward.head_dim()], [false; 4]),
            ("d_key", &spec.d_key, [batch, kv_heads, kv_len, forward.head_dim()], key),
            ("d_value", &spec.d_value, [batch, kv_heads, kv_len, forward.v_head_dim()], value),
            ("d_bias", &spec.d_bias, [batch, q_heads, q_len, kv_len], bias.unwrap_or_default()),
        ] {
            let Some(gradient) = gradient else { continue };
            let found = gradient.layout.shape;
            if (0..4).any(|axis| found[axis] != wanted[axis] && !(free[axis] && found[axis] == 1)) {
                return Err(BackwardError::Shape { name, wanted, found });
            }
            check_elements(gradient, name)?;
            if !gradient.layout.is_injective() {
                return Err(BackwardError::Overlaps { name, shape: found, strides: gradient.layout.strides });
            }
        }
        let weights = spec.d_weights.as_ref().map(|weights| WeightsProblem::new(&forward, weights)).transpose()?;
        spec.attention = of.clone();
        let gradients = [&mut spec.d_query, &mut spec.d_key, &mut spec.d_value, &mut spec.d_bias];
        for tensor in gradients.into_iter().flatten().chain([&mut spec.d_output]) {
            // nothing of it is ever touched, so where it would lie must not matter either
            if tensor.layout.is_empty() {
                tensor.layout = Layout { shape: tensor.layout.shape, strides: [0; 4], offset: 0 };
            }
        }
        Ok(Self { spec, forward, weights })
    }

    /// The spec; that of the attention with every layout stretched to its full shape, and with maximum and sum of the rows asked
    /// for.
    #[must_use]
    pub const fn spec(&self) -> &BackwardSpec {
        &self.spec
    }

    /// The attention whose results [`BackwardInputs`] takes: the one that was asked for, which also returns maximum and sum of each
    /// row.
    #[must_use]
    pub const fn forward(&self) -> &AttentionProblem {
        &self.forward
    }

    /// The weights of which a gradient is given.
    #[must_use]
    pub const fn weights(&self) -> Option<&WeightsProblem> {
        self.weights.as_ref()
    }

    /// Multiplications and additions that the backward of FlashAttention counts: five products of `q_len * kv_len` for each head
    /// where the forward has two. A kernel in two passes takes seven, and what is masked is counted in.
    #[must_use]
    pub fn flops(&self) -> f64 {
        let [batch, q_heads, q_len, kv_len] = self.forward.score_shape().map(|n| n as f64);
        let width = (self.forward.head_dim() + self.forward.v_head_dim()) as f64;
        2.5 * 2.0 * batch * q_heads * q_len * kv_len * width
    }

    /// Whether the product of queries and keys has to be differentiated.
    pub(crate) const fn has_dots(&self) -> bool {
        self.spec.d_query.is_some() || self.spec.d_key.is_some() || self.spec.d_scale
    }
}

fn check_elements(tensor: &TensorSpec, name: &'static str) -> Result<(), BackwardError> {
    if !Element::FLOATS.contains(&tensor.element) {
        return Err(BackwardError::Element { name, found: tensor.element });
    }
    let bytes = |layout: &Layout| layout.extent()?.checked_mul(4);
    // counts of rows must fit where another axis is 0
    let count = tensor.layout.shape.iter().try_fold(4usize, |product, &n| product.checked_mul(n.max(1)));
    if count.is_none() || bytes(&tensor.layout).is_none() {
        let Layout { shape, strides, .. } = tensor.layout;
        return Err(BackwardError::Overflow { name, shape, strides });
    }
    Ok(())
}

/// Why gradients were refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum BackwardError {
    /// The attention itself is not sound.
    #[error(transparent)]
    Attention(#[from] ProblemError),
    /// The chosen weights are not there.
    #[error("d_weights: {0}")]
    Weights(#[from] WeightsError),
    /// A score matrix is asked for, of which there is no gradient.
    #[error("the attention returns scores, whose gradient cannot be given; ask for chosen weights (d_weights) instead")]
    Scores,
    /// A tensor's shape does not fit the attention.
    #[error(
        "{name} has shape {found:?}, needs {wanted:?}{}",
        match *name {
            "d_key" | "d_value" => " (batch may be 1 where the batch shares them)",
            "d_bias" => " (1 along axes where the bias has 1)",
            _ => "",
        }
    )]
    Shape {
        /// Which tensor.
        name: &'static str,
        /// The shape that would do.
        wanted: [usize; 4],
        /// The shape that was given.
        found: [usize; 4],
    },
    /// A tensor cannot hold elements of this type.
    #[error("{name} holds {found}, needs f32, f16 or bf16")]
    Element {
        /// Which tensor.
        name: &'static str,
        /// The type that was given.
        found: Element,
    },
    /// Two elements of a gradient would be written to one place.
    #[error(
        "{name} with shape {shape:?} and strides {strides:?} has elements that share a place; \
         each axis must step over what the smaller strides span"
    )]
    Overlaps {
        /// Which tensor.
        name: &'static str,
        /// Its shape.
        shape: [usize; 4],
        /// Its strides, in elements.
        strides: [usize; 4],
    },
    /// Positions in a tensor, or its bytes, do not fit a `usize`.
    #[error("{name} with shape {shape:?} and strides {strides:?} is larger than memory can be addressed")]
    Overflow {
        /// Which tensor.
        name: &'static str,
        /// Its shape.
        shape: [usize; 4],
        /// Its strides, in elements.
        strides: [usize; 4],
    },
    /// Keys or values that are not stored as numbers of their own.
    #[error(
        "{name} is asked for, but keys and values are stored {found}; the gradients of the query and of all terms can be had"
    )]
    Stored {
        /// `d_key` or `d_value`.
        name: &'static str,
        /// How they are stored.
        found: &'static str,
    },
    /// The gradient of something that is not an input.
    #[error("{name} is asked for, but the attention has no {input}")]
    NoInput {
        /// The gradient.
        name: &'static str,
        /// What it would be the gradient of.
        input: &'static str,
    },
}
