//! Small shaders beside the attention (`shaders/combine_sources.wgsl`, `shaders/expand_q8.wgsl`): shape, limits, dispatch.

use std::mem::offset_of;

use crate::caps::DeviceCaps;
use crate::kernels::Unsupported;
use crate::plan::Needs;

/// Invocations of a workgroup.
const WIDTH: usize = 64;
/// Storage buffers of `combine_sources.wgsl`, which has the most of them.
const MOST_BUFFERS: usize = 5;

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
    // each invocation goes over the elements that lie behind one another, or over the bytes of a word
    let iterations = elements.div_ceil(invocations.max(1)).max(4);
    Needs::new(64, iterations).check(0, MOST_BUFFERS, caps)?;
    let blocks = narrow(invocations.div_ceil(WIDTH))?;
    let [blocks_per_row, rows] = rows_of_blocks(blocks, caps).ok_or_else(too_many)?;
    Ok((blocks_per_row, [blocks_per_row, rows, 1]))
}

/// So many workgroups in rows that the device allows: how many in a row, and rows, of which the last may be longer than
/// what is left. `None` where they are too many.
pub(crate) fn rows_of_blocks(blocks: u32, caps: &DeviceCaps) -> Option<[u32; 2]> {
    let limit = caps.max_compute_workgroups_per_dimension;
    let blocks_per_row = blocks.min(limit).max(1);
    let rows = blocks.div_ceil(blocks_per_row);
    (blocks_per_row <= limit && rows <= limit).then_some([blocks_per_row, rows])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::linear::{LinearPlan, LinearShape};
    use crate::kernels::merge::MergePlan;
    use crate::plan::Unmet;

    const EDGES: [u32; 6] = [0, 1, 2, 100, 65535, u32::MAX];

    /// Each limit in turn at an edge.
    fn devices() -> Vec<DeviceCaps> {
        let mut all = vec![];
        for edge in EDGES {
            let usual = DeviceCaps::webgpu_defaults();
            all.push(DeviceCaps { max_compute_workgroups_per_dimension: edge, ..usual.clone() });
            all.push(DeviceCaps { max_compute_invocations_per_workgroup: edge, ..usual.clone() });
            all.push(DeviceCaps { max_storage_buffers_per_shader_stage: edge, ..usual.clone() });
            all.push(DeviceCaps { max_compute_workgroup_storage_size: edge, ..usual });
        }
        all
    }

    #[test]
    fn no_limit_makes_small_shaders_panic() {
        for caps in devices() {
            for n in [1, 63, 64, 65, 70_000, 1 << 20] {
                let limit = caps.max_compute_workgroups_per_dimension;
                if let Ok((per_row, [x, y, z])) = grid("elements", n, n, &caps) {
                    assert!(x <= limit && y <= limit && z == 1 && per_row == x, "{caps:?}");
                    assert!(u64::from(x) * u64::from(y) * 64 >= n as u64);
                }
                if let Ok(Some(plan)) = MergePlan::new(3, n, 8, &caps) {
                    assert!(plan.grid.iter().all(|n| (1..=limit).contains(n)), "{caps:?}");
                }
                let shape =
                    LinearShape { rows: n, in_features: 40, out_features: 24, output_stride: 24, output_offset: 0 };
                if let Ok(Some(plan)) = LinearPlan::new(shape, true, &caps) {
                    assert!(plan.grid.iter().all(|n| (1..=limit).contains(n)), "{caps:?}");
                }
                #[cfg(feature = "layer")]
                if let Ok(Some(plan)) = crate::kernels::linear::NormPlan::new(n, 40, [true, true], 1e-5, &caps) {
                    assert!(plan.grid.iter().all(|n| (1..=limit).contains(n)), "{caps:?}");
                }
            }
        }
    }

    /// A device that lacks one thing, and what that is.
    #[test]
    fn small_shaders_compare_what_they_need() {
        let usual = DeviceCaps::webgpu_defaults;
        let shape =
            |rows, in_features| LinearShape { rows, in_features, out_features: 8, output_stride: 8, output_offset: 0 };
        let linear =
            |rows, in_features, caps: &DeviceCaps| LinearPlan::new(shape(rows, in_features), false, caps).err();
        let merge = |parts, caps: &DeviceCaps| MergePlan::new(parts, 2, 8, caps).err();
        let few_invocations = DeviceCaps { max_compute_invocations_per_workgroup: 60, ..usual() };
        let invocations = |needed| Some(Unsupported::Device(Unmet::Invocations { needed, found: 60 }));
        assert_eq!(linear(1, 8, &few_invocations), invocations(256));
        assert_eq!(linear(9, 8, &few_invocations), invocations(256));
        assert_eq!(merge(2, &few_invocations), invocations(64));
        assert_eq!(grid("elements", 9, 9, &few_invocations).err(), invocations(64));
        let few_buffers = DeviceCaps { max_storage_buffers_per_shader_stage: 3, ..usual() };
        let buffers = |needed| Some(Unsupported::Device(Unmet::StorageBuffers { needed, found: 3 }));
        assert_eq!(linear(1, 8, &few_buffers), buffers(4));
        assert_eq!(merge(2, &few_buffers), buffers(4));
        assert_eq!(grid("elements", 9, 9, &few_buffers).err(), buffers(5));
        let little_memory = DeviceCaps { max_compute_workgroup_storage_size: 4000, ..usual() };
        let memory = |needed| Some(Unsupported::Device(Unmet::WorkgroupMemory { needed, found: 4000 }));
        assert_eq!(linear(1, 8, &little_memory), memory(4096));
        assert_eq!(linear(9, 8, &little_memory), memory(8192));
        // software drivers leave loops early, others do not
        for class in crate::caps::DeviceClass::ALL {
            let caps = DeviceCaps { class, ..usual() };
            let software = class == crate::caps::DeviceClass::Software;
            let early = |error: Option<Unsupported>| {
                matches!(error, Some(Unsupported::Device(Unmet::Iterations { .. }))) == software
            };
            assert!(early(merge(40_000, &caps)), "{class}");
            assert!(early(linear(9, 1 << 19, &caps)), "{class}");
            assert!(early(linear(1, 1 << 23, &caps)), "{class}");
            assert!(early(grid("elements", 2, 200_000, &caps).err()), "{class}");
            #[cfg(feature = "layer")]
            {
                let norm = crate::kernels::linear::NormPlan::new(2, 1 << 21, [true, true], 1e-5, &caps);
                assert!(early(norm.err()), "{class}");
            }
        }
    }

    /// Positions in these shaders are `u32`, in all parts together, and with what a loop steps past its end.
    #[test]
    fn small_shaders_count_to_the_end_of_u32() {
        let caps = DeviceCaps::webgpu_defaults();
        let positions = |error: Option<Unsupported>| matches!(error, Some(Unsupported::Positions { .. }));
        assert!(positions(MergePlan::new(4, 1 << 27, 8, &caps).err()));
        let linear = |rows, in_features, output_stride, output_offset| {
            let shape = LinearShape { rows, in_features, out_features: 8, output_stride, output_offset };
            LinearPlan::new(shape, false, &caps)
        };
        let plan = linear(3, 40, 10, 5).unwrap().unwrap();
        assert_eq!((plan.extent, plan.shader), (2 * 10 + 5 + 8, crate::kernels::Shader::LinearFew));
        assert_eq!(linear(4, 40, 8, 0).unwrap().unwrap().shader, crate::kernels::Shader::LinearFew);
        assert_eq!(linear(5, 40, 8, 0).unwrap().unwrap().shader, crate::kernels::Shader::Linear);
        // 100 rows are 128 for the tiles
        assert!(positions(linear(100, 1 << 25, 8, 0).err()));
        assert!(positions(linear(2, 8, 8, u32::MAX as usize - 256 - 15).err()));
        assert!(linear(2, 8, 8, u32::MAX as usize - 256 - 16).is_ok());
    }
}
