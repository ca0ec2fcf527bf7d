//! Merge of partial attentions (shaders/merge.wgsl): shape, limits, dispatch.

use crate::caps::DeviceCaps;
use crate::dispatch::uniforms::MergeParams;
use crate::dispatch::{Needs, Shader, Unsupported, Variant, flat_grid_within};

/// Invocations of a workgroup.
const WIDTH: usize = 64;

/// What the merge of `parts` states of `rows` rows of `v_head_dim` elements runs.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct MergePlan {
    pub(crate) params: MergeParams,
    pub(crate) grid: [u32; 3],
}

impl MergePlan {
    /// Sizes in elements; `None` where nothing is to be merged.
    pub(crate) fn new(
        parts: usize,
        rows: usize,
        v_head_dim: usize,
        caps: &DeviceCaps,
    ) -> Result<Option<Self>, Unsupported> {
        let elements = rows.checked_mul(v_head_dim).and_then(|n| n.checked_mul(parts)).unwrap_or(usize::MAX);
        if elements == 0 {
            return Ok(None);
        }
        let too_many = || Unsupported::positions("parts * rows * v_head_dim", elements, u32::MAX.into());
        let narrow = |n: usize| u32::try_from(n).map_err(|_| too_many());
        narrow(elements)?;
        // three passes over the parts at most
        Needs::new(64, parts.saturating_mul(3)).check(0, Shader::Merge.ports().len(), caps)?;
        let grid = flat_grid_within((rows * v_head_dim).div_ceil(WIDTH), caps).ok_or_else(too_many)?;
        Ok(Some(Self {
            params: MergeParams {
                parts: narrow(parts)?,
                rows: narrow(rows)?,
                v_head_dim: narrow(v_head_dim)?,
                blocks_per_row: grid[0],
                negative_infinity: f32::NEG_INFINITY,
                padding: [0; 3],
            },
            grid,
        }))
    }
}

impl Variant {
    /// The shader that merges partial attentions by their log-sum-exp, or by maximum and sum of each row.
    pub(crate) fn merge(row_states: bool) -> Self {
        let mut variant = Self::new(Shader::Merge);
        variant.snippets(&["numerics"]).switch("ROW_STATES", row_states);
        variant
    }
}
