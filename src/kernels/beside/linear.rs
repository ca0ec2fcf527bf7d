//! Linear maps and norms of heads (`linear.wgsl`, `linear_few.wgsl`, `head_norm.wgsl`): shape, limits, dispatch.

use crate::caps::DeviceCaps;
use crate::dispatch::uniforms::LinearParams;
#[cfg(feature = "layer")]
use crate::dispatch::uniforms::NormParams;
use crate::dispatch::{KEY, Needs, QUERY, Shader, Unsupported, Variant, flat_grid_within};
use crate::tensor::Element;

/// Rows and columns of a block of the tiled kernel.
const BLOCK: usize = 64;
/// The most rows that the kernel for few rows takes.
const FEW_ROWS: usize = 4;
/// Columns of a workgroup of the kernel for few rows.
const FEW_COLUMNS: usize = 4;

/// Sizes of one linear map, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LinearShape {
    pub(crate) rows: usize,
    pub(crate) in_features: usize,
    pub(crate) out_features: usize,
    pub(crate) output_stride: usize,
    pub(crate) output_offset: usize,
    /// Whether the input lies as `[in_features, rows]`, and the weight as `[in_features, out_features]`.
    pub(crate) turned: [bool; 2],
}

/// What a linear map runs.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LinearPlan {
    pub(crate) shader: Shader,
    pub(crate) params: LinearParams,
    pub(crate) grid: [u32; 3],
    /// Elements that the output reaches over.
    pub(crate) extent: usize,
}

impl LinearPlan {
    /// `None` where there are no rows.
    pub(crate) fn new(shape: LinearShape, bias: bool, caps: &DeviceCaps) -> Result<Option<Self>, Unsupported> {
        let LinearShape { rows, in_features, out_features, output_stride, output_offset, turned } = shape;
        if rows == 0 {
            return Ok(None);
        }
        let product = |name, a: usize, b: usize| position(name, a.saturating_mul(b));
        product("rows * in_features", rows.next_multiple_of(BLOCK), in_features)?;
        product("out_features * in_features", out_features.next_multiple_of(BLOCK), in_features)?;
        let extent = (rows - 1)
            .checked_mul(output_stride)
            .and_then(|start| start.checked_add(output_offset)?.checked_add(out_features))
            .unwrap_or(usize::MAX);
        position("output_offset + rows * output_stride", extent)?;
        let (shader, row_blocks, column_blocks) = if rows <= FEW_ROWS {
            (Shader::LinearFew, 1, out_features.div_ceil(FEW_COLUMNS))
        } else {
            (Shader::Linear, rows.div_ceil(BLOCK), out_features.div_ceil(BLOCK))
        };
        needs(shader, in_features).check(workgroup_bytes(shader), shader.ports().len(), caps)?;
        let strides = |turned, rows| if turned { [1, rows] } else { [in_features, 1] };
        let ([input_row_stride, input_stride], [weight_row_stride, weight_stride]) =
            (strides(turned[0], rows), strides(turned[1], out_features));
        let grid = flat_grid("rows * out_features", row_blocks.saturating_mul(column_blocks), caps)?;
        Ok(Some(Self {
            shader,
            params: LinearParams {
                rows: position("rows", rows)?,
                in_features: position("in_features", in_features)?,
                out_features: position("out_features", out_features)?,
                output_stride: position("output_stride", output_stride)?,
                output_offset: position("output_offset", output_offset)?,
                blocks_per_row: grid[0],
                column_blocks: position("out_features", column_blocks)?,
                has_bias: u32::from(bias),
                input_row_stride: position("in_features", input_row_stride)?,
                input_stride: position("rows", input_stride)?,
                weight_row_stride: position("in_features", weight_row_stride)?,
                weight_stride: position("out_features", weight_stride)?,
            },
            grid,
            extent,
        }))
    }
}

/// What a norm of rows of heads runs.
#[cfg(feature = "layer")]
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct NormPlan {
    pub(crate) params: NormParams,
    pub(crate) grid: [u32; 3],
}

#[cfg(feature = "layer")]
impl NormPlan {
    /// `None` where there are no rows.
    pub(crate) fn new(
        rows: usize,
        width: usize,
        [centred, bias]: [bool; 2],
        epsilon: f32,
        caps: &DeviceCaps,
    ) -> Result<Option<Self>, Unsupported> {
        if rows == 0 {
            return Ok(None);
        }
        position("rows * width", rows.saturating_mul(width))?;
        needs(Shader::HeadNorm, width).check(
            workgroup_bytes(Shader::HeadNorm),
            Shader::HeadNorm.ports().len(),
            caps,
        )?;
        let grid = flat_grid("rows", rows, caps)?;
        let params = NormParams {
            rows: position("rows", rows)?,
            width: position("width", width)?,
            blocks_per_row: grid[0],
            centred: u32::from(centred),
            has_bias: u32::from(bias),
            epsilon,
            padding: [0; 2],
        };
        Ok(Some(Self { params, grid }))
    }
}

impl Variant {
    /// A linear map of many rows ([`Shader::Linear`]) or few ([`Shader::LinearFew`]), or the norm of heads
    /// ([`Shader::HeadNorm`]), over these element types.
    pub(crate) fn linear(shader: Shader, input: Element, weight: Element, output: Element) -> Self {
        let mut variant = Self::new(shader);
        variant.element(input, &QUERY.single).element(weight, &KEY.single);
        variant.element(output, &["output_f32", "output_f16", "output_bf16", ""]);
        variant
    }

    /// Every variant of linear maps and norms.
    #[doc(hidden)]
    #[must_use]
    pub fn all_linear() -> Vec<Self> {
        let elements = Element::FLOATS;
        let mut variants = vec![];
        for output in elements {
            for weight in elements {
                for input in elements {
                    variants.push(Self::linear(Shader::Linear, input, weight, output));
                    variants.push(Self::linear(Shader::LinearFew, input, weight, output));
                }
            }
            variants.push(Self::linear(Shader::HeadNorm, Element::F32, Element::F32, output));
        }
        variants
    }
}

fn position(name: &'static str, found: usize) -> Result<u32, Unsupported> {
    // one short of the end, so that a loop may step past its end
    let max = u32::MAX - 256;
    let narrow = u32::try_from(found).ok().filter(|narrow| *narrow <= max);
    narrow.ok_or_else(|| Unsupported::positions(name, found, max.into()))
}

/// What a shader of this file needs for rows of so many elements.
fn needs(shader: Shader, elements: usize) -> Needs {
    match shader {
        // a block of 16 elements after the other, and in each the elements
        Shader::Linear => Needs::new(256, elements.div_ceil(16).saturating_mul(17)),
        Shader::LinearFew => Needs::new(256, elements.div_ceil(64) + 6),
        // at most twice the mean, then the output, and two sums over the lanes
        _ => Needs::new(64, 3 * elements.div_ceil(64) + 12),
    }
}

/// Workgroup memory of a shader of this file.
const fn workgroup_bytes(shader: Shader) -> u64 {
    match shader {
        Shader::Linear => 2 * 256 * 16,
        Shader::LinearFew => 256 * 16,
        _ => 64 * 4,
    }
}

/// A grid of `blocks` workgroups in rows that the device allows; the last row may be longer than what is left.
fn flat_grid(name: &'static str, blocks: usize, caps: &DeviceCaps) -> Result<[u32; 3], Unsupported> {
    flat_grid_within(blocks, caps).ok_or_else(|| {
        let limit = u64::from(caps.max_compute_workgroups_per_dimension);
        Unsupported::positions(name, blocks, limit.saturating_mul(limit).min(u32::MAX.into()))
    })
}
