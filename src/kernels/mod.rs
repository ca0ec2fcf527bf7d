//! The kernels: what the host must know of each shader, and which shaders make up a kernel.

pub(crate) mod backward;
pub(crate) mod beside;
pub(crate) mod combine;
pub(crate) mod cooperative;
pub(crate) mod fused;
pub(crate) mod plain;
pub(crate) mod rows;
pub(crate) mod split;
pub(crate) mod tiled;
pub(crate) mod weights;

use crate::caps::{DeviceCaps, DeviceClass};
use crate::dispatch::{Kernel, MAX_ITERATIONS, Part, PlanChoice, Step, Unsupported, params};
use crate::problem::AttentionProblem;

impl Kernel {
    /// Whether the kernel can compute this problem on such a device, and if not, why.
    ///
    /// # Errors
    /// The reason.
    pub fn supports(self, problem: &AttentionProblem, caps: &DeviceCaps) -> Result<(), Unsupported> {
        self.tiling(problem, caps, &PlanChoice::of(self)).map(drop)
    }

    /// A choice of this kernel in the kernel's own terms.
    pub(crate) fn tiling(
        self,
        problem: &AttentionProblem,
        caps: &DeviceCaps,
        choice: &PlanChoice,
    ) -> Result<Tiling, Unsupported> {
        params::supports(problem)?;
        if let (Some(found), true) = (choice.num_splits, !matches!(self, Self::Rows | Self::Split)) {
            return Err(Unsupported::NotSplit { found });
        }
        match self {
            Self::Rows => rows::tiling(problem, caps, choice).map(Tiling::Rows),
            Self::Split => split::tiling(problem, caps, choice).map(Tiling::Split),
            Self::Tiled => tiled::tiling(problem, caps, choice.tile).map(Tiling::Tiled),
            Self::Cooperative => cooperative::tiling(problem, caps, choice.tile).map(Tiling::Cooperative),
            Self::Fused => fused::tiling(problem, caps, choice.tile).map(Tiling::Fused),
            Self::Plain => plain::tiling(problem, caps, choice.tile).map(|()| Tiling::Plain),
        }
    }

    /// The choices of this kernel that are worth a try, its rule's own not always among them.
    pub(crate) fn candidates(self, problem: &AttentionProblem, caps: &DeviceCaps) -> Vec<PlanChoice> {
        match self {
            Self::Rows => rows::candidates(problem, caps),
            Self::Split => split::candidates(problem, caps),
            Self::Tiled => tiled::candidates(problem, caps),
            Self::Cooperative => cooperative::candidates(problem, caps),
            Self::Fused => fused::candidates(problem, caps),
            Self::Plain => vec![PlanChoice::of(self)],
        }
    }
}

/// How a kernel lays a problem over workgroups: a choice that was found to fit problem and device.
#[derive(Clone, Debug)]
pub(crate) enum Tiling {
    Rows(rows::Tiles),
    Split(split::Tiling),
    Tiled(tiled::Tiles),
    Cooperative(cooperative::Tiles),
    Fused(fused::Tiles),
    Plain,
}

impl Tiling {
    /// The choice with nothing left open, as it is for a part.
    pub(crate) fn choice(&self, problem: &AttentionProblem, caps: &DeviceCaps, part: &Part) -> PlanChoice {
        match self {
            Self::Rows(tiles) => tiles.choice(),
            Self::Split(tiling) => tiling.choice(problem, caps, part),
            Self::Tiled(tiles) => PlanChoice { tile: Some(tiles.shape()), ..PlanChoice::of(Kernel::Tiled) },
            Self::Cooperative(tiles) => PlanChoice { tile: Some(tiles.shape()), ..PlanChoice::of(Kernel::Cooperative) },
            Self::Fused(tiles) => PlanChoice { tile: Some(tiles.shape()), ..PlanChoice::of(Kernel::Fused) },
            Self::Plain => PlanChoice::of(Kernel::Plain),
        }
    }

    /// Query rows of the smallest part that the problem can be cut into.
    pub(crate) const fn block_rows(&self) -> usize {
        match self {
            Self::Rows(_) | Self::Split(_) => 1,
            Self::Tiled(tiles) => tiles.block_q(),
            Self::Cooperative(tiles) => tiles.block_q,
            Self::Fused(tiles) => tiles.rows,
            // its softmax takes a workgroup a row
            Self::Plain => 1,
        }
    }

    /// Partial states that the kernel makes of a part of the keys.
    pub(crate) fn states(&self, problem: &AttentionProblem, caps: &DeviceCaps, part: &Part) -> usize {
        match self {
            Self::Rows(tiles) => tiles.splits,
            Self::Split(tiling) => split::tiles(problem, caps, part, tiling).splits,
            Self::Tiled(_) | Self::Cooperative(_) | Self::Fused(_) | Self::Plain => 1,
        }
    }

    /// The dispatches that compute a part.
    pub(crate) fn steps(&self, problem: &AttentionProblem, caps: &DeviceCaps, part: &Part) -> Vec<Step> {
        match self {
            Self::Rows(tiles) => rows::steps(problem, caps, part, tiles),
            Self::Split(tiling) => split::steps(problem, caps, part, tiling),
            Self::Tiled(tiles) => tiled::steps(problem, caps, part, tiles),
            Self::Cooperative(tiles) => cooperative::steps(problem, caps, part, tiles),
            Self::Fused(tiles) => fused::steps(problem, caps, part, tiles),
            Self::Plain => plain::steps(problem, caps, part),
        }
    }
}

/// Buffers that a kernel binds which does everything in one pass: 8 at most, and the scales of keys and values.
fn storage_buffers(problem: &AttentionProblem) -> u32 {
    let spec = problem.spec();
    let scales = [spec.key_scale.is_some(), spec.value_scale.is_some()];
    let terms = [spec.bias.is_some(), spec.mask.is_some(), spec.has_row_data(), spec.returns_rows()];
    4 + [terms.as_slice(), &scales].concat().into_iter().map(u32::from).sum::<u32>()
}

pub(crate) fn check_invocations(needed: u32, caps: &DeviceCaps) -> Result<(), Unsupported> {
    let found = caps.max_compute_invocations_per_workgroup;
    if found < needed { Err(Unsupported::Invocations { needed, found }) } else { Ok(()) }
}

pub(crate) fn check_storage_buffers(needed: u32, caps: &DeviceCaps) -> Result<(), Unsupported> {
    let found = caps.max_storage_buffers_per_shader_stage;
    if found < needed { Err(Unsupported::StorageBuffers { needed, found }) } else { Ok(()) }
}

/// Refuses what a software driver would cut short; `needed` may be too many, for drivers write short loops out.
pub(crate) fn check_iterations(needed: usize, caps: &DeviceCaps) -> Result<(), Unsupported> {
    let (needed, found) = (needed as u64, MAX_ITERATIONS);
    if caps.class == DeviceClass::Software && needed > found {
        return Err(Unsupported::Iterations { needed, found });
    }
    Ok(())
}

pub(crate) fn check_workgroup_memory(
    needed: u64,
    problem: &AttentionProblem,
    caps: &DeviceCaps,
) -> Result<(), Unsupported> {
    let found = u64::from(caps.max_compute_workgroup_storage_size);
    let head_dim = problem.head_dim();
    if found < needed { Err(Unsupported::WorkgroupMemory { needed, found, head_dim }) } else { Ok(()) }
}
