//! Shape and weights of a layer, compared with one another.

use super::LayerError;
use super::names::Role;
use crate::tensor::TensorData;

/// Shape of a cross-attention layer. Sizes in elements.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerConfig {
    /// Width of the states that ask, and of the output.
    pub width: usize,
    /// Width of the context that is asked.
    pub context_width: usize,
    /// Heads of the query.
    pub heads: usize,
    /// Heads of key and value; divides `heads`.
    pub kv_heads: usize,
    /// Width of a row of query and key.
    pub head_dim: usize,
    /// Width of a row of value.
    pub v_head_dim: usize,
    /// Factor on the dot products; `None`: `1 / sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// Which projections have a bias.
    pub biases: Biases,
    /// Normalises each row of each head of the query.
    pub query_norm: Option<Norm>,
    /// Normalises each row of each head of the key.
    pub key_norm: Option<Norm>,
}

/// Which projections have a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are the projections")]
#[expect(clippy::struct_excessive_bools, reason = "each projection has one or not")]
pub struct Biases {
    pub query: bool,
    pub key: bool,
    pub value: bool,
    pub output: bool,
}

impl Biases {
    /// Every projection has one.
    pub const ALL: Self = Self { query: true, key: true, value: true, output: true };
    /// None has one.
    pub const NONE: Self = Self { query: false, key: false, value: false, output: false };

    pub(super) const fn of(self, role: Role) -> bool {
        match role {
            Role::Query => self.query,
            Role::Key => self.key,
            Role::Value => self.value,
            Role::Output => self.output,
        }
    }
}

/// What a norm divides by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// The root of the mean square.
    Rms,
    /// The standard deviation, the mean taken off first.
    Layer,
}

/// A norm over `head_dim`, the same for every head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// What is divided by.
    pub kind: NormKind,
    /// Added to the mean square under the root.
    pub epsilon: f32,
    /// Whether there is a bias.
    pub bias: bool,
}

impl LayerConfig {
    /// `heads` heads of `width / heads`, as many of key and value, a bias on every projection, no norms.
    #[must_use]
    pub const fn new(width: usize, context_width: usize, heads: usize) -> Self {
        let head_dim = match width.checked_div(heads) {
            Some(head_dim) => head_dim,
            None => 0,
        };
        Self {
            width,
            context_width,
            heads,
            kv_heads: heads,
            head_dim,
            v_head_dim: head_dim,
            scale: None,
            biases: Biases::ALL,
            query_norm: None,
            key_norm: None,
        }
    }

    /// `[out, in]` of a projection.
    pub(super) const fn shape(&self, role: Role) -> [usize; 2] {
        match role {
            Role::Query => [self.heads.saturating_mul(self.head_dim), self.width],
            Role::Key => [self.kv_heads.saturating_mul(self.head_dim), self.context_width],
            Role::Value => [self.kv_heads.saturating_mul(self.v_head_dim), self.context_width],
            Role::Output => [self.width, self.heads.saturating_mul(self.v_head_dim)],
        }
    }

    pub(super) fn check(&self) -> Result<(), LayerError> {
        let sizes = [
            ("width", self.width),
            ("context_width", self.context_width),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("v_head_dim", self.v_head_dim),
        ];
        if let Some((name, _)) = sizes.into_iter().find(|(_, n)| *n == 0) {
            return Err(LayerError::Zero { name });
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(LayerError::Heads { heads: self.heads, kv_heads: self.kv_heads });
        }
        let epsilons = [self.query_norm, self.key_norm].into_iter().flatten().map(|norm| norm.epsilon);
        match epsilons.into_iter().find(|epsilon| !(epsilon.is_finite() && *epsilon >= 0.0)) {
            Some(epsilon) => Err(LayerError::Epsilon { epsilon }),
            None => Ok(()),
        }
    }
}

/// A linear projection: `weight` is `[out, in]`, row after row.
#[derive(Clone, Debug, PartialEq)]
pub struct Projection {
    /// `[out, in]`.
    pub weight: TensorData,
    /// `[out]`.
    pub bias: Option<Vec<f32>>,
}

/// Weights of a norm over `head_dim`.
#[derive(Clone, Debug, PartialEq)]
pub struct NormWeights {
    /// `[head_dim]`.
    pub weight: Vec<f32>,
    /// `[head_dim]`.
    pub bias: Option<Vec<f32>>,
}

/// Weights of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerWeights {
    /// `[heads * head_dim, width]`.
    pub query: Projection,
    /// `[kv_heads * head_dim, context_width]`.
    pub key: Projection,
    /// `[kv_heads * v_head_dim, context_width]`.
    pub value: Projection,
    /// `[width, heads * v_head_dim]`.
    pub output: Projection,
    /// `[head_dim]`.
    pub query_norm: Option<NormWeights>,
    /// `[head_dim]`.
    pub key_norm: Option<NormWeights>,
}

impl LayerWeights {
    pub(super) const fn projection(&self, role: Role) -> &Projection {
        match role {
            Role::Query => &self.query,
            Role::Key => &self.key,
            Role::Value => &self.value,
            Role::Output => &self.output,
        }
    }

    pub(super) fn check(&self, config: &LayerConfig) -> Result<(), LayerError> {
        let part = |name, found: Option<usize>, wanted: Option<usize>| match (found, wanted) {
            (Some(found), Some(wanted)) if found != wanted => Err(LayerError::Weight { name, wanted, found }),
            (None, Some(_)) => Err(LayerError::Missing { name }),
            (Some(_), None) => Err(LayerError::Unexpected { name }),
            _ => Ok(()),
        };
        for role in Role::ALL {
            let [out, inner] = config.shape(role);
            let projection = self.projection(role);
            let [weight, bias] = role.parts();
            part(weight, Some(projection.weight.as_ref().len()), Some(out.saturating_mul(inner)))?;
            part(bias, projection.bias.as_ref().map(Vec::len), config.biases.of(role).then_some(out))?;
        }
        let norms = [
            ("query_norm.weight", "query_norm.bias", &self.query_norm, config.query_norm),
            ("key_norm.weight", "key_norm.bias", &self.key_norm, config.key_norm),
        ];
        for (weight, bias, found, wanted) in norms {
            let width = config.head_dim;
            part(weight, found.as_ref().map(|norm| norm.weight.len()), wanted.map(|_| width))?;
            let found = found.as_ref().and_then(|norm| norm.bias.as_ref()).map(Vec::len);
            part(bias, found, wanted.filter(|norm| norm.bias).map(|_| width))?;
        }
        Ok(())
    }
}
