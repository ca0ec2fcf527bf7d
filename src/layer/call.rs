//! One call of a layer: what is said of it, and the attention that it makes.

use super::{LayerConfig, LayerError};
use crate::engine::{self, Kind, Tensor};
use crate::error::Error;
use crate::problem::{AttentionProblem, AttentionSpec, Diagonal};
use crate::tensor::{Element, Layout, TensorSpec};
use crate::terms::Terms;

/// What else is said of one call; the default is no mask at all.
#[derive(Clone, Debug, Default)]
pub struct LayerOptions<'a> {
    /// Causal mask along this diagonal.
    pub causal: Option<Diagonal>,
    /// Tokens of the context that a row sees before the diagonal.
    pub window_left: Option<u32>,
    /// Tokens of the context that a row sees behind the diagonal.
    pub window_right: Option<u32>,
    /// `[batch]`, u32, in tokens: rows of each entry that are there; what stands behind gives the output's bias. A host or a
    /// device tensor.
    pub q_lens: Option<Tensor<'a>>,
    /// `[batch]`: tokens of each context that count.
    pub kv_lens: Option<Tensor<'a>>,
    /// Which token sees which.
    pub mask: Option<LayerMask<'a>>,
}

/// A boolean mask without gaps, true = attend.
#[derive(Clone, Debug)]
pub struct LayerMask<'a> {
    /// Row after row.
    pub data: Tensor<'a>,
    /// `[batch, heads, q_len, kv_len]`, each axis may also be 1: `[batch, 1, 1, kv_len]` for padding.
    pub shape: [usize; 4],
}

/// One call's attention: heads side by side in memory, as projections write and read them.
#[derive(Debug)]
pub(super) struct Call<'a> {
    pub(super) problem: AttentionProblem,
    pub(super) terms: Terms<Tensor<'a>>,
}

impl<'a> Call<'a> {
    pub(super) fn new(
        config: &LayerConfig,
        batch: usize,
        states: &Tensor<'_>,
        [kv_batch, kv_len]: [usize; 2],
        element: Element,
        options: &LayerOptions<'a>,
    ) -> Result<Self, Error> {
        let q_len = tokens("states", batch, config.width, states)?;
        let &LayerConfig { heads, kv_heads, head_dim, v_head_dim, .. } = config;
        let tensor = |element, shape| TensorSpec { element, layout: Layout::blhd(shape) };
        let mut spec = AttentionSpec::from_tensors(
            tensor(Element::F32, [batch, heads, q_len, head_dim]),
            tensor(element, [kv_batch, kv_heads, kv_len, head_dim]),
            tensor(element, [kv_batch, kv_heads, kv_len, v_head_dim]),
        );
        spec.output = tensor(Element::F32, [batch, heads, q_len, v_head_dim]);
        spec.scale = config.scale;
        spec.causal = options.causal;
        spec.window_left = options.window_left;
        spec.window_right = options.window_right;
        (spec.q_lens, spec.kv_lens) = (options.q_lens.is_some(), options.kv_lens.is_some());
        spec.mask = options.mask.as_ref().map(|mask| Layout::bhld(mask.shape));
        let problem = AttentionProblem::new(spec)?;
        if let Some(mask) = &options.mask {
            let wanted = mask.shape.iter().try_fold(1usize, |n, &m| n.checked_mul(m)).unwrap_or(usize::MAX);
            if mask.data.len() != wanted {
                return Err(LayerError::Mask { shape: mask.shape, wanted, found: mask.data.len() }.into());
            }
        }
        let mask = options.mask.as_ref().map(|mask| mask.data.clone());
        let (q_lens, kv_lens) = (options.q_lens.clone(), options.kv_lens.clone());
        let terms = Terms { mask, q_lens, kv_lens, ..Terms::default() };
        engine::check_terms(&terms, &problem)?;
        Ok(Self { problem, terms })
    }
}

/// Tokens of each entry of the batch.
pub(super) fn tokens(name: &'static str, batch: usize, width: usize, of: &Tensor<'_>) -> Result<usize, Error> {
    engine::is_a(name, of, Kind::F32)?;
    let found = of.len();
    let token = batch.saturating_mul(width);
    if token == 0 && found == 0 {
        return Ok(0);
    }
    if token == 0 || !found.is_multiple_of(token) {
        return Err(LayerError::Tokens { name, batch, width, found }.into());
    }
    Ok(found / token)
}
