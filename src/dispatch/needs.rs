//! What a dispatch needs of a device, as data, and the comparison of that with what a device has.

use super::Slot;
use crate::caps::{CooperativeMatrix, DeviceCaps, DeviceClass};

/// Iterations of an invocation, all its loops together, after which llvmpipe leaves every loop it is in
/// (`LP_MAX_TGSI_LOOP_ITERATIONS`); results are then wrong, and nothing says so.
pub(crate) const MAX_ITERATIONS: u64 = 65_535;

/// What a shader needs of a device beside its buffers, its grid and its workgroup memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Invocations of a workgroup.
    pub invocations: u32,
    /// Iterations of all loops of an invocation together, at most: software drivers leave them after some number.
    pub iterations: u64,
    /// The smallest and the largest subgroup that will do, where it uses subgroups.
    pub subgroups: Option<(u32, u32)>,
    /// Whether it computes in f16.
    pub shader_f16: bool,
    /// The matrices that subgroups multiply as one, where it uses any.
    pub cooperative_matrix: Option<CooperativeMatrix>,
}

impl Needs {
    pub(crate) const fn new(invocations: u32, iterations: usize) -> Self {
        Self {
            invocations,
            iterations: iterations as u64,
            subgroups: None,
            shader_f16: false,
            cooperative_matrix: None,
        }
    }

    /// Of this size or another between.
    pub(crate) const fn with_subgroups(self, smallest: u32, largest: u32) -> Self {
        Self { subgroups: Some((smallest, largest)), ..self }
    }

    /// Compares with a device, buffers and workgroup memory too.
    pub(crate) fn check(&self, workgroup_bytes: u64, storage_buffers: usize, caps: &DeviceCaps) -> Result<(), Unmet> {
        let found = u64::from(caps.max_compute_workgroup_storage_size);
        if workgroup_bytes > found {
            return Err(Unmet::WorkgroupMemory { needed: workgroup_bytes, found });
        }
        let (needed, found) = (self.invocations, caps.max_compute_invocations_per_workgroup);
        if needed > found {
            return Err(Unmet::Invocations { needed, found });
        }
        let needed = u32::try_from(storage_buffers).unwrap_or(u32::MAX);
        let found = caps.max_storage_buffers_per_shader_stage;
        if needed > found {
            return Err(Unmet::StorageBuffers { needed, found });
        }
        if let Some((smallest, largest)) = self.subgroups {
            let fits = |(min, max): (u32, u32)| {
                // sizes of subgroups are powers of two, those between the smallest and the largest too
                smallest <= min && max <= largest && min.is_power_of_two() && max.is_power_of_two()
            };
            if !caps.subgroups.is_some_and(fits) {
                return Err(Unmet::Subgroups { smallest, largest, found: caps.subgroups });
            }
        }
        if self.shader_f16 && !caps.shader_f16 {
            return Err(Unmet::ShaderF16);
        }
        match self.cooperative_matrix {
            Some(needed) if caps.cooperative_matrix != Some(needed) => {
                return Err(Unmet::CooperativeMatrix { needed, found: caps.cooperative_matrix });
            }
            _ => {}
        }
        let (needed, found) = (self.iterations, MAX_ITERATIONS);
        if caps.class == DeviceClass::Software && needed > found {
            return Err(Unmet::Iterations { needed, found });
        }
        Ok(())
    }
}

/// What a plan needs and a device does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unmet {
    /// Workgroup memory.
    #[error("needs {needed} bytes of workgroup memory, the device has {found}")]
    WorkgroupMemory {
        /// Bytes needed.
        needed: u64,
        /// Bytes there are.
        found: u64,
    },
    /// Invocations of a workgroup.
    #[error("needs {needed} invocations in a workgroup, the device allows {found}")]
    Invocations {
        /// Invocations needed.
        needed: u32,
        /// Invocations allowed.
        found: u32,
    },
    /// Storage buffers of one shader.
    #[error("needs {needed} storage buffers, the device allows {found} in a shader")]
    StorageBuffers {
        /// Buffers needed.
        needed: u32,
        /// Buffers allowed.
        found: u32,
    },
    /// The range that one binding shows.
    #[error("binds {needed} bytes of {}, the device allows {found} in a binding", .slot.name())]
    Binding {
        /// Which buffer.
        slot: Slot,
        /// Bytes needed.
        needed: u64,
        /// Bytes allowed.
        found: u64,
    },
    /// Where a binding may start.
    #[error("binds {} from byte {start} on, on the device a binding starts at a multiple of {alignment}", .slot.name())]
    Alignment {
        /// Which buffer.
        slot: Slot,
        /// Where its range starts, in bytes.
        start: u64,
        /// The device's alignment, in bytes.
        alignment: u32,
    },
    /// A buffer between passes.
    #[error("needs a buffer of {needed} bytes for {}, the device allows {found}", .slot.name())]
    Buffer {
        /// Which buffer.
        slot: Slot,
        /// Bytes needed.
        needed: u64,
        /// Bytes allowed.
        found: u64,
    },
    /// Workgroups along one dimension.
    #[error("needs {needed} workgroups along one dimension, the device allows {found}")]
    Grid {
        /// Workgroups needed.
        needed: u32,
        /// Workgroups allowed.
        found: u32,
    },
    /// The size of subgroups.
    #[error("{}", subgroups_text(*.smallest, *.largest, *.found))]
    Subgroups {
        /// The smallest that will do.
        smallest: u32,
        /// The largest that will do.
        largest: u32,
        /// The smallest and the largest that the device has, where kernels may use subgroups.
        found: Option<(u32, u32)>,
    },
    /// Arithmetic in f16.
    #[error("needs arithmetic in f16, which the device does not have")]
    ShaderF16,
    /// Matrices that subgroups multiply as one.
    #[error("needs cooperative matrices of {0} by {0}, the device has {1}", .needed.size(), matrices_text(*.found))]
    CooperativeMatrix {
        /// The matrices that the shader is made of.
        needed: CooperativeMatrix,
        /// The largest that the device has.
        found: Option<CooperativeMatrix>,
    },
    /// Iterations of loops on a software driver.
    #[error("takes {needed} loop iterations in an invocation, software drivers may leave all loops after {found}")]
    Iterations {
        /// Iterations of all loops together, at most.
        needed: u64,
        /// Iterations that are safe.
        found: u64,
    },
}

fn subgroups_text(smallest: u32, largest: u32, found: Option<(u32, u32)>) -> String {
    let wanted = match (smallest, largest) {
        (smallest, largest) if smallest == largest => format!("of {smallest}"),
        (smallest, u32::MAX) => format!("of at least {smallest}"),
        (smallest, largest) => format!("of {smallest} to {largest}"),
    };
    let found = match found {
        None => "has none that kernels may use".to_owned(),
        Some((smallest, largest)) if smallest == largest => format!("has them of {smallest}"),
        Some((smallest, largest)) => format!("has them of {smallest} to {largest}"),
    };
    format!("needs subgroups {wanted}, the device {found}")
}

fn matrices_text(found: Option<CooperativeMatrix>) -> String {
    found.map_or_else(|| "none".to_owned(), |found| format!("{0} by {0}", found.size()))
}
