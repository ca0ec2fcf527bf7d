//! The kernels: what the host must know of each shader, and which shaders make up a kernel.

pub(crate) mod combine;
pub(crate) mod cooperative;
pub(crate) mod fused;
pub(crate) mod linear;
pub(crate) mod merge;
pub(crate) mod params;
pub(crate) mod plain;
pub(crate) mod rows;
mod shader;
pub(crate) mod small;
pub(crate) mod split;
pub(crate) mod tiled;
pub(crate) mod weights;

pub use params::Params;
pub use shader::Shader;

use crate::caps::{DeviceCaps, DeviceClass};
use crate::plan::split::Part;
use crate::plan::{PlanChoice, Step, TileShape, Unmet};
use crate::problem::AttentionProblem;
use crate::tensor::Element;

/// A way to compute an attention on a GPU. A plan chooses one; [`Kernel::ALL`] lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "tune", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
pub enum Kernel {
    /// Whole rows in the registers of each lane, keys and values handed round in a subgroup, for software drivers.
    Rows,
    /// The keys split over workgroups and merged, the query heads of a group taken together, for few queries.
    Split,
    /// One pass with register tiles, for many queries; scores are never stored.
    Tiled,
    /// One pass on matrix units, for many f16 queries and keys; scores are never stored. Needs the feature
    /// `cooperative-matrix` and a device that has them.
    Cooperative,
    /// One pass with an online softmax over blocks of keys; scores are never stored.
    Fused,
    /// Three passes: scores, softmax, weighted sum. Stores `q_len * kv_len` scores for every head.
    Plain,
}

impl Kernel {
    /// Every kernel, in the order in which they are preferred where several would do.
    pub const ALL: [Self; 6] = [Self::Rows, Self::Split, Self::Cooperative, Self::Tiled, Self::Fused, Self::Plain];

    /// `rows`, `split`, `cooperative`, `tiled`, `fused`, `plain`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rows => "rows",
            Self::Split => "split",
            Self::Tiled => "tiled",
            Self::Cooperative => "cooperative",
            Self::Fused => "fused",
            Self::Plain => "plain",
        }
    }

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

    /// Workgroups along each dimension for every dispatch of a part.
    pub(crate) fn grids(&self, problem: &AttentionProblem, caps: &DeviceCaps, part: &Part) -> Vec<[u64; 3]> {
        match self {
            Self::Rows(tiles) => rows::grids(problem, part, tiles),
            Self::Split(tiling) => split::grids(problem, caps, part, tiling),
            Self::Tiled(tiles) => vec![tiled::grid(part, tiles)],
            Self::Cooperative(tiles) => vec![cooperative::grid(part, tiles)],
            Self::Fused(tiles) => vec![fused::grid(part, tiles)],
            Self::Plain => plain::grids(problem, part),
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

impl std::fmt::Display for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

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

fn subgroups(found: Option<(u32, u32)>) -> String {
    found.map_or_else(|| "none".to_owned(), |(min, max)| format!("{min} to {max}"))
}

fn subgroup_sizes(found: Option<(u32, u32)>) -> String {
    match found {
        None => "the device has none".to_owned(),
        Some((smallest, largest)) => format!("the device has them from {smallest} to {largest}"),
    }
}

/// A buffer that a kernel binds: the name it has in WGSL and the place it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Slot {
    /// The caller's query.
    Query,
    /// The caller's key.
    Key,
    /// The caller's value.
    Value,
    /// The caller's bias.
    Bias,
    /// The caller's boolean mask, one byte an element.
    Mask,
    /// Key lengths, row ranges, slopes and sinks, side by side.
    RowData,
    /// The caller's output.
    Output,
    /// The caller's log-sum-exp.
    Lse,
    /// The caller's score matrix.
    Scores,
    /// Scores between passes, in the plan's workspace.
    Workspace,
    /// Outputs and log-sum-exps over parts of the keys, in the plan's workspace.
    States,
    /// The outputs of one of those parts.
    PartOutput,
    /// The log-sum-exps of one of those parts.
    PartRowState,
    /// Which heads, rows and keys weights are wanted of.
    Selection,
    /// The caller's selected weights.
    Weights,
}

impl Slot {
    /// `query`, `key`, …
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Query => "query",
            Self::Key => "key",
            Self::Value => "value",
            Self::Bias => "bias",
            Self::Mask => "mask",
            Self::RowData => "row_data",
            Self::Output => "output",
            Self::Lse => "lse",
            Self::Scores => "scores",
            Self::Workspace => "workspace",
            Self::States => "states",
            Self::PartOutput => "part_output",
            Self::PartRowState => "part_row_state",
            Self::Selection => "selection",
            Self::Weights => "weights",
        }
    }

    /// Whether the buffer is made for the plan, and is none of the caller's.
    pub(crate) const fn is_of_the_plan(self) -> bool {
        match self {
            Self::RowData
            | Self::Workspace
            | Self::States
            | Self::PartOutput
            | Self::PartRowState
            | Self::Selection => true,
            Self::Query
            | Self::Key
            | Self::Value
            | Self::Bias
            | Self::Mask
            | Self::Output
            | Self::Lse
            | Self::Scores
            | Self::Weights => false,
        }
    }

    /// The binding number in every attention shader. To a shader, scores are the same in the workspace and returned, output and
    /// log-sum-exp the same of all keys and of a part of them.
    pub(crate) const fn binding(self) -> u32 {
        match self {
            Self::Query => 1,
            Self::Key => 2,
            Self::Value => 3,
            Self::Bias => 4,
            Self::Mask => 5,
            Self::RowData => 6,
            Self::Output | Self::PartOutput => 7,
            Self::Lse | Self::PartRowState => 8,
            Self::Scores | Self::Workspace | Self::States => 9,
            Self::Selection => 10,
            Self::Weights => 11,
        }
    }
}

/// Buffers that a kernel binds which does everything in one pass: 8 at most.
fn storage_buffers(problem: &AttentionProblem) -> u32 {
    let spec = problem.spec();
    let row_data = spec.kv_lens || spec.row_ranges || spec.alibi_slopes || spec.sinks;
    4 + [spec.bias.is_some(), spec.mask.is_some(), row_data, spec.returns_rows()].map(u32::from).iter().sum::<u32>()
}

pub(crate) fn check_invocations(needed: u32, caps: &DeviceCaps) -> Result<(), Unsupported> {
    let found = caps.max_compute_invocations_per_workgroup;
    if found < needed { Err(Unsupported::Invocations { needed, found }) } else { Ok(()) }
}

pub(crate) fn check_storage_buffers(needed: u32, caps: &DeviceCaps) -> Result<(), Unsupported> {
    let found = caps.max_storage_buffers_per_shader_stage;
    if found < needed { Err(Unsupported::StorageBuffers { needed, found }) } else { Ok(()) }
}

/// Iterations of an invocation, all its loops together, after which llvmpipe leaves every loop it is in
/// (`LP_MAX_TGSI_LOOP_ITERATIONS`); results are then wrong, and nothing says so.
pub(crate) const MAX_ITERATIONS: u64 = 65_535;

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
