//! Merge of partial attentions (shaders/merge.wgsl): shape, limits, dispatch.

use super::small::rows_of_blocks;
use crate::caps::DeviceCaps;
use crate::dispatch::uniforms::MergeParams;
use crate::dispatch::{Needs, Shader, Unsupported, Variant};

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
        let too_many = |found: usize| Unsupported::Positions {
            name: "parts * rows * v_head_dim",
            found: i64::try_from(found).unwrap_or(i64::MAX),
            max: i64::from(u32::MAX),
        };
        if u32::try_from(elements).is_err() {
            return Err(too_many(elements));
        }
        // three passes over the parts at most; part outputs and states, output and lse
        Needs::new(64, parts.saturating_mul(3)).check(0, 4, caps)?;
        let narrow = |n: usize| u32::try_from(n).map_err(|_| too_many(elements));
        let blocks = narrow((rows * v_head_dim).div_ceil(WIDTH))?;
        let [blocks_per_row, rows_of_blocks] = rows_of_blocks(blocks, caps).ok_or_else(|| too_many(elements))?;
        Ok(Some(Self {
            params: MergeParams {
                parts: narrow(parts)?,
                rows: narrow(rows)?,
                v_head_dim: narrow(v_head_dim)?,
                blocks_per_row,
                negative_infinity: f32::NEG_INFINITY,
                padding: [0; 3],
            },
            grid: [blocks_per_row, rows_of_blocks, 1],
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
