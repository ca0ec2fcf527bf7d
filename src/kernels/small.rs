//! Small shaders beside the attention (`shaders/combine_sources.wgsl`, `shaders/expand_q8.wgsl`): shape, limits, dispatch.

use std::mem::offset_of;

use crate::caps::DeviceCaps;
use crate::kernels::Unsupported;

/// Invocations of a workgroup.
const WIDTH: usize = 64;

/// The uniform of `combine_sources.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct CombineParams {
    pub(crate) parts: u32,
    pub(crate) rows: u32,
    pub(crate) v_head_dim: u32,
    pub(crate) blocks_per_row: u32,
    pub(crate) q_heads: u32,
    pub(crate) q_len: u32,
    pub(crate) weighted: u32,
    pub(crate) gating: u32,
}

impl CombineParams {
    /// Name and byte offset of each field, to compare with the shader's struct.
    pub(crate) const FIELDS: &'static [(&'static str, usize)] = &[
        ("parts", offset_of!(Self, parts)),
        ("rows", offset_of!(Self, rows)),
        ("v_head_dim", offset_of!(Self, v_head_dim)),
        ("blocks_per_row", offset_of!(Self, blocks_per_row)),
        ("q_heads", offset_of!(Self, q_heads)),
        ("q_len", offset_of!(Self, q_len)),
        ("weighted", offset_of!(Self, weighted)),
        ("gating", offset_of!(Self, gating)),
    ];
}

/// The uniform of `expand_q8.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct ExpandParams {
    pub(crate) words: u32,
    pub(crate) blocks_per_row: u32,
    // a uniform's size is a multiple of 16; WGSL pads by itself
    pub(crate) padding: [u32; 2],
}

impl ExpandParams {
    /// Name and byte offset of each field, to compare with the shader's struct.
    pub(crate) const FIELDS: &'static [(&'static str, usize)] =
        &[("words", offset_of!(Self, words)), ("blocks_per_row", offset_of!(Self, blocks_per_row))];
}

/// The grid for so many invocations, and how many blocks stand in a row of it. `elements` is the largest position that
/// the shader counts to.
pub(crate) fn grid(
    name: &'static str,
    invocations: usize,
    elements: usize,
    caps: &DeviceCaps,
) -> Result<(u32, [u32; 3]), Unsupported> {
    let too_many = || Unsupported::Positions {
        name,
        found: i64::try_from(elements).unwrap_or(i64::MAX),
        max: i64::from(u32::MAX),
    };
    let narrow = |n: usize| u32::try_from(n).map_err(|_| too_many());
    narrow(elements)?;
    let blocks = narrow(invocations.div_ceil(WIDTH))?;
    let limit = caps.max_compute_workgroups_per_dimension;
    let blocks_per_row = blocks.clamp(1, limit);
    let rows = blocks.div_ceil(blocks_per_row);
    if rows > limit { Err(too_many()) } else { Ok((blocks_per_row, [blocks_per_row, rows, 1])) }
}
