//! What a plan chooses where several ways would do, as data: kernel, tile, parts of the keys.

use super::Kernel;

/// A way to compute a problem: a kernel, and what its speed depends on. It never changes what the result means.
///
/// [`Plan::choice`](crate::Plan::choice) tells a plan's, [`Plan::candidates`](crate::Plan::candidates) lists those worth a
/// try, [`Plan::with_choice`](crate::Plan::with_choice) forces one. What is `None` is left to the kernel's rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "tune", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub struct PlanChoice {
    /// The kernel.
    pub kernel: Kernel,
    /// Its tile; [`Kernel::Plain`] has none to choose.
    pub tile: Option<TileShape>,
    /// Parts that the keys are split into (where they had to be cut, the keys of a range), each computed by workgroups of
    /// its own; only [`Kernel::Split`] and [`Kernel::Rows`] have them.
    pub num_splits: Option<u32>,
}

/// The block of queries and keys that a workgroup computes at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "tune", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub struct TileShape {
    /// Query rows of a workgroup; for [`Kernel::Split`] and [`Kernel::Rows`] those of all query heads of a group
    /// together.
    pub block_q: u32,
    /// Keys of a block.
    pub block_kv: u32,
    /// Whether the query rows stay in workgroup memory.
    pub query_resident: bool,
    /// Whether the values of two keys are weighted in turn, which takes more registers; a choice of [`Kernel::Tiled`] alone.
    pub paired_keys: bool,
}

impl PlanChoice {
    /// A kernel with all else left to its rules.
    #[must_use]
    pub const fn of(kernel: Kernel) -> Self {
        Self { kernel, tile: None, num_splits: None }
    }
}

impl TileShape {
    pub(crate) fn new(block_q: usize, block_kv: usize, query_resident: bool) -> Self {
        let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Self { block_q: narrow(block_q), block_kv: narrow(block_kv), query_resident, paired_keys: false }
    }
}

impl std::fmt::Display for PlanChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.kernel)?;
        if let Some(tile) = self.tile {
            write!(f, " {tile}")?;
        }
        if let Some(num_splits) = self.num_splits {
            write!(f, " num_splits={num_splits}")?;
        }
        Ok(())
    }
}

impl std::fmt::Display for TileShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { block_q, block_kv, query_resident, paired_keys } = self;
        write!(f, "block_q={block_q} block_kv={block_kv} query_resident={query_resident}")?;
        if *paired_keys { write!(f, " paired_keys=true") } else { Ok(()) }
    }
}
