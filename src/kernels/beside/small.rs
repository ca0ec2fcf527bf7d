//! Small shaders beside the attention (`shaders/combine_sources.wgsl`): shape, limits, dispatch.

use crate::caps::DeviceCaps;
use crate::dispatch::{Needs, Shader, Unsupported, Variant, flat_grid_within};

/// Invocations of a workgroup.
const WIDTH: usize = 64;
/// Storage buffers of `combine_sources.wgsl`, which has the most of them.
const MOST_BUFFERS: usize = Shader::CombineSources.ports().len();

impl Variant {
    /// The shader that adds attentions over several sources; there is one for all.
    pub(crate) fn combine_sources() -> Self {
        let mut variant = Self::new(Shader::CombineSources);
        variant.snippets(&["numerics"]);
        variant
    }
}

/// The grid for so many invocations, and how many blocks stand in a row of it. `elements` is the largest position that
/// the shader counts to.
pub(crate) fn grid(
    name: &'static str,
    invocations: usize,
    elements: usize,
    caps: &DeviceCaps,
) -> Result<(u32, [u32; 3]), Unsupported> {
    let too_many = || Unsupported::positions(name, elements, u32::MAX.into());
    u32::try_from(elements).map_err(|_| too_many())?;
    // each invocation goes over the elements that lie behind one another
    let iterations = elements.div_ceil(invocations.max(1)).max(4);
    Needs::new(64, iterations).check(0, MOST_BUFFERS, caps)?;
    let grid = flat_grid_within(invocations.div_ceil(WIDTH), caps).ok_or_else(too_many)?;
    Ok((grid[0], grid))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::Unmet;
    use crate::kernels::beside::linear::{LinearPlan, LinearShape};
    use crate::kernels::beside::merge::MergePlan;

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
                let shape = LinearShape {
                    rows: n,
                    in_features: 40,
                    out_features: 24,
                    output_stride: 24,
                    output_offset: 0,
                    turned: [false; 2],
                };
                if let Ok(Some(plan)) = LinearPlan::new(shape, true, &caps) {
                    assert!(plan.grid.iter().all(|n| (1..=limit).contains(n)), "{caps:?}");
                }
                #[cfg(feature = "layer")]
                if let Ok(Some(plan)) = crate::kernels::beside::linear::NormPlan::new(n, 40, [true, true], 1e-5, &caps)
                {
                    assert!(plan.grid.iter().all(|n| (1..=limit).contains(n)), "{caps:?}");
                }
            }
        }
    }

    /// A device that lacks one thing, and what that is.
    #[test]
    fn small_shaders_compare_what_they_need() {
        let usual = DeviceCaps::webgpu_defaults;
        let shape = |rows, in_features| LinearShape {
            rows,
            in_features,
            out_features: 8,
            output_stride: 8,
            output_offset: 0,
            turned: [false; 2],
        };
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
                let norm = crate::kernels::beside::linear::NormPlan::new(2, 1 << 21, [true, true], 1e-5, &caps);
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
            let shape =
                LinearShape { rows, in_features, out_features: 8, output_stride, output_offset, turned: [false; 2] };
            LinearPlan::new(shape, false, &caps)
        };
        let plan = linear(3, 40, 10, 5).unwrap().unwrap();
        assert_eq!((plan.extent, plan.shader), (2 * 10 + 5 + 8, Shader::LinearFew));
        assert_eq!(linear(4, 40, 8, 0).unwrap().unwrap().shader, Shader::LinearFew);
        assert_eq!(linear(5, 40, 8, 0).unwrap().unwrap().shader, Shader::Linear);
        // 100 rows are 128 for the tiles
        assert!(positions(linear(100, 1 << 25, 8, 0).err()));
        assert!(positions(linear(2, 8, 8, u32::MAX as usize - 256 - 15).err()));
        assert!(linear(2, 8, 8, u32::MAX as usize - 256 - 16).is_ok());
    }
}
