//! Why a kernel will not do: what it cannot compute, and what a device's limits forbid.

use super::{Slot, TileShape, Unmet};
use crate::caps::DeviceClass;
use crate::tensor::Element;

/// Why a kernel cannot compute a problem on a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unsupported {
    /// The device has fewer invocations in a workgroup.
    #[error("needs {needed} invocations in a workgroup, the device allows {found}")]
    Invocations {
        /// What the kernel needs.
        needed: u32,
        /// What the device has.
        found: u32,
    },
    /// The kernel is written for subgroups of one known size.
    #[error("needs subgroups of one size, a power of two from 4 to 128, the device has {}", subgroups(*.found))]
    Subgroups {
        /// Smallest and largest subgroup of the device, where kernels may use subgroups.
        found: Option<(u32, u32)>,
    },
    /// The tiles do not fit workgroup memory.
    #[error("needs {needed} bytes of workgroup memory for head_dim {head_dim}, the device has {found}")]
    WorkgroupMemory {
        /// Bytes that the kernel needs.
        needed: u64,
        /// Bytes that the device has.
        found: u64,
        /// Width of a query row.
        head_dim: usize,
    },
    /// The kernel binds more buffers than the device allows.
    #[error("needs {needed} storage buffers, the device allows {found} in a kernel")]
    StorageBuffers {
        /// What the kernel needs.
        needed: u32,
        /// What the device has.
        found: u32,
    },
    /// A row of the output is too wide for the registers that a kernel may ask for.
    #[error("{name} is {found}, the kernel takes at most {max}")]
    Dim {
        /// `head_dim` or `v_head_dim`.
        name: &'static str,
        /// What was asked.
        found: usize,
        /// The widest that would do.
        max: usize,
    },
    /// Positions do not fit the kernel's integers.
    #[error("{name} is {found}, positions in a kernel go up to {max}")]
    Positions {
        /// Which number.
        name: &'static str,
        /// What was asked.
        found: i64,
        /// The largest that would do.
        max: i64,
    },
    /// The scale is subnormal: some devices take such numbers for 0.
    #[error("scale is {found}, which devices may take for 0; needs 0, or at least {:e} in size", f32::MIN_POSITIVE)]
    SmallScale {
        /// What was asked, as text.
        found: String,
    },
    /// The kernel multiplies matrices of f16 on units that the device, or this build, does not offer.
    #[error(
        "needs cooperative matrices of f16 summed in f32, 8x8x8 or 16x16x16: a Vulkan device that has them, opened with the \
         feature `cooperative-matrix`"
    )]
    CooperativeMatrix,
    /// A tensor is stored in a type that the kernel does not take.
    #[error("{name} is stored as {found}, the kernel takes {needed}")]
    Element {
        /// Which tensor.
        name: &'static str,
        /// What was asked.
        found: Element,
        /// What would do.
        needed: Element,
    },
    /// The kernel computes in f16, and the device does not.
    #[error("needs arithmetic in f16, which the device does not have")]
    ShaderF16,
    /// Subgroups must fill a workgroup.
    #[error("needs subgroups whose size divides {workgroup}, {}", subgroup_sizes(*.found))]
    SubgroupsOfWorkgroup {
        /// Invocations of a workgroup.
        workgroup: u32,
        /// The smallest and largest that the device has, if it has any.
        found: Option<(u32, u32)>,
    },
    /// A tile was asked for that the kernel does not have for this problem.
    #[error("has no tile {found}; possible: {possible}")]
    Tile {
        /// What was asked.
        found: TileShape,
        /// What would do.
        possible: String,
    },
    /// A software driver would leave the kernel's loops before their end, without a word.
    #[error("takes {needed} loop iterations in an invocation, software drivers may leave all loops after {found}")]
    Iterations {
        /// Iterations of all loops together, at most.
        needed: u64,
        /// Iterations that are safe.
        found: u64,
    },
    /// A dispatch needs something else that the device does not have.
    #[error(transparent)]
    Device(#[from] Unmet),
    /// Parts of the keys were asked for that are too many, or too few.
    #[error("num_splits is {found}, possible: {min} to {max}")]
    NumSplits {
        /// What was asked.
        found: u32,
        /// The fewest that would do.
        min: u32,
        /// The most that would do.
        max: u32,
    },
    /// Parts of the keys were asked for, and the kernel does not split them.
    #[error("does not split the keys; num_splits {found} was asked for")]
    NotSplit {
        /// What was asked.
        found: u32,
    },
}

impl Unsupported {
    /// Sizes beyond what would do; they saturate.
    pub(crate) fn positions(name: &'static str, found: usize, max: u64) -> Self {
        let wide = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        Self::Positions { name, found: wide(found as u64), max: wide(max) }
    }
}

fn subgroups(found: Option<(u32, u32)>) -> String {
    found.map_or_else(|| "none".to_owned(), |(min, max)| format!("{min} to {max}"))
}

fn subgroup_sizes(found: Option<(u32, u32)>) -> String {
    match found {
        None => "the device has none".to_owned(),
        Some((smallest, largest)) => format!("the device has them from {smallest} to {largest}"),
    }
}

/// Why a kernel will not do for a problem on a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Rejection {
    /// The kernel cannot.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The kernel is made for software drivers, and runs on others only where it is asked for by name.
    #[error("made for software drivers, on a {class} it runs where it is asked for by name")]
    ByNameOnly {
        /// What the device is.
        class: DeviceClass,
    },
    /// A binding is too large, and the problem cannot be cut so that it fits.
    #[error("{} needs a binding of {needed} bytes for the smallest part, the device allows {found}", .slot.name())]
    Binding {
        /// Which buffer.
        slot: Slot,
        /// Bytes needed.
        needed: u64,
        /// Bytes allowed.
        found: u64,
    },
    /// A grid is too large, and the problem cannot be cut so that it fits.
    #[error("needs {needed} workgroups along one dimension for the smallest part, the device allows {found}")]
    Grid {
        /// Workgroups needed.
        needed: u64,
        /// Workgroups allowed.
        found: u64,
    },
    /// Cutting the problem to the limits leaves more parts than are sensible.
    #[error("would have to be cut into {needed} parts to fit the device's limits, at most {found} are made")]
    Parts {
        /// Parts needed.
        needed: u64,
        /// Parts allowed.
        found: u64,
    },
}
