//! Merge of partial attentions (shaders/merge.wgsl): shape, limits, dispatch.

use std::mem::offset_of;

use crate::caps::DeviceCaps;
use crate::kernels::Unsupported;
use crate::kernels::small::rows_of_blocks;
use crate::plan::Needs;

/// Invocations of a workgroup.
const WIDTH: usize = 64;

/// The uniform at binding 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    pub(crate) parts: u32,
    pub(crate) rows: u32,
    pub(crate) v_head_dim: u32,
    pub(crate) blocks_per_row: u32,
    pub(crate) negative_infinity: f32,
    // a uniform's size is a multiple of 16; WGSL pads by itself
    padding: [u32; 3],
}

impl Params {
    /// Name and byte offset of each field, to compare with the shader's struct.
    pub(crate) const FIELDS: &'static [(&'static str, usize)] = &[
        ("parts", offset_of!(Self, parts)),
        ("rows", offset_of!(Self, rows)),
        ("v_head_dim", offset_of!(Self, v_head_dim)),
        ("blocks_per_row", offset_of!(Self, blocks_per_row)),
        ("negative_infinity", offset_of!(Self, negative_infinity)),
    ];
}

/// What the merge of `parts` states of `rows` rows of `v_head_dim` elements runs.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct MergePlan {
    pub(crate) params: Params,
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
            params: Params {
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
