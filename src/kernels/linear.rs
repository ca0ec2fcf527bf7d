//! Projections and norms of a layer (shaders/linear.wgsl, linear_few.wgsl, head_norm.wgsl): shape, limits, dispatch.

use std::mem::offset_of;

use crate::caps::DeviceCaps;
use crate::kernels::{Shader, Unsupported};

/// Rows and outputs of a workgroup of `linear.wgsl`.
const SIDE: usize = 64;
/// Rows that `linear_few.wgsl` takes, and outputs of a workgroup of it.
const FEW: usize = 4;

/// The uniform of `linear.wgsl` and `linear_few.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct LinearParams {
    rows: u32,
    inputs: u32,
    outputs: u32,
    has_bias: u32,
    blocks_per_row: u32,
    // a uniform's size is a multiple of 16; WGSL pads by itself
    padding: [u32; 3],
}

impl LinearParams {
    /// Name and byte offset of each field, to compare with the shader's struct.
    pub(crate) const FIELDS: &'static [(&'static str, usize)] = &[
        ("rows", offset_of!(Self, rows)),
        ("inputs", offset_of!(Self, inputs)),
        ("outputs", offset_of!(Self, outputs)),
        ("has_bias", offset_of!(Self, has_bias)),
        ("blocks_per_row", offset_of!(Self, blocks_per_row)),
    ];
}

/// The uniform of `head_norm.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct HeadNormParams {
    vectors: u32,
    width: u32,
    blocks_per_row: u32,
    has_shift: u32,
    epsilon: f32,
    padding: [u32; 3],
}

impl HeadNormParams {
    /// Name and byte offset of each field, to compare with the shader's struct.
    pub(crate) const FIELDS: &'static [(&'static str, usize)] = &[
        ("vectors", offset_of!(Self, vectors)),
        ("width", offset_of!(Self, width)),
        ("blocks_per_row", offset_of!(Self, blocks_per_row)),
        ("has_shift", offset_of!(Self, has_shift)),
        ("epsilon", offset_of!(Self, epsilon)),
    ];
}

/// A product `[rows, inputs] x [outputs, inputs]^T` on a device.
#[cfg(feature = "layer")]
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct LinearPlan {
    pub(crate) shader: Shader,
    pub(crate) params: LinearParams,
    pub(crate) grid: [u32; 3],
}

#[cfg(feature = "layer")]
impl LinearPlan {
    /// What runs for a product; `None` where there is nothing to compute.
    pub(crate) fn new(
        [rows, inputs, outputs]: [usize; 3],
        has_bias: bool,
        caps: &DeviceCaps,
    ) -> Result<Option<Self>, Unsupported> {
        if rows == 0 || outputs == 0 {
            return Ok(None);
        }
        // what the shader counts to, a block past the end
        let reach = |rows: usize| rows.checked_add(SIDE).and_then(|n| n.checked_mul(inputs.max(outputs) + SIDE));
        let largest = reach(rows).zip(reach(outputs)).map_or(usize::MAX, |(a, b)| a.max(b));
        let limit = caps.max_compute_workgroups_per_dimension;
        narrow("rows * inputs, outputs * inputs or rows * outputs", largest)?;
        let (shader, blocks_per_row, grid) = if rows <= FEW {
            let (blocks_per_row, grid) = flat("outputs", outputs.div_ceil(FEW), limit)?;
            (Shader::LinearFew, blocks_per_row, grid)
        } else {
            let [x, y] = [outputs, rows].map(|n| n.div_ceil(SIDE));
            for (name, blocks) in [("outputs / 64", x), ("rows / 64", y)] {
                within(name, blocks, limit)?;
            }
            (Shader::Linear, 0, [narrow("outputs", x)?, narrow("rows", y)?, 1])
        };
        let params = LinearParams {
            rows: narrow("rows", rows)?,
            inputs: narrow("inputs", inputs)?,
            outputs: narrow("outputs", outputs)?,
            has_bias: has_bias.into(),
            blocks_per_row,
            padding: [0; 3],
        };
        Ok(Some(Self { shader, params, grid }))
    }
}

#[cfg(feature = "layer")]
impl HeadNormParams {
    /// Uniform and grid for so many vectors of `width` elements.
    pub(crate) fn new(
        vectors: usize,
        width: usize,
        epsilon: f32,
        has_shift: bool,
        caps: &DeviceCaps,
    ) -> Result<(Self, [u32; 3]), Unsupported> {
        narrow("rows * heads * head_dim", vectors.checked_mul(width).unwrap_or(usize::MAX))?;
        let (blocks_per_row, grid) = flat("rows * heads", vectors, caps.max_compute_workgroups_per_dimension)?;
        let params = Self {
            vectors: narrow("rows * heads", vectors)?,
            width: narrow("head_dim", width)?,
            blocks_per_row,
            has_shift: has_shift.into(),
            epsilon,
            padding: [0; 3],
        };
        Ok((params, grid))
    }
}

#[cfg(feature = "layer")]
fn narrow(name: &'static str, n: usize) -> Result<u32, Unsupported> {
    u32::try_from(n).map_err(|_| too_many(name, n, u32::MAX))
}

#[cfg(feature = "layer")]
fn within(name: &'static str, n: usize, limit: u32) -> Result<(), Unsupported> {
    if n > limit as usize { Err(too_many(name, n, limit)) } else { Ok(()) }
}

#[cfg(feature = "layer")]
fn too_many(name: &'static str, n: usize, max: u32) -> Unsupported {
    Unsupported::Positions { name, found: i64::try_from(n).unwrap_or(i64::MAX), max: i64::from(max) }
}

/// So many workgroups as rows of no more than the device allows.
#[cfg(feature = "layer")]
fn flat(name: &'static str, blocks: usize, limit: u32) -> Result<(u32, [u32; 3]), Unsupported> {
    let blocks = narrow(name, blocks)?;
    let per_row = blocks.clamp(1, limit);
    let rows = blocks.div_ceil(per_row);
    within(name, rows as usize, limit)?;
    Ok((per_row, [per_row, rows, 1]))
}
