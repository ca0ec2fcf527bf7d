//! From gradients that are asked for and a device's capabilities to a plan: passes, parts, dispatches.

use std::fmt;
use std::ops::Range;

use super::PlanError;
use super::select::summary;
use crate::backward::BackwardProblem;
use crate::caps::DeviceCaps;
use crate::dispatch::{Part, Rejection, Slot, Step, Unsupported, check_steps};
use crate::kernels::backward::{self, Made, Pass};
use crate::problem::AttentionProblem;

/// Parts that a pass may be cut into.
const MAX_PARTS: u64 = 1 << 14;

/// What a device runs for gradients: plain data. Print it to see.
///
/// One dispatch finds what the pairs of a row have in common. Then a pass for each gradient goes over tiles of pairs, adds up in
/// f32 in the workspace, and is stored before the next pass begins. Where not all fits into a binding, a pass goes over
/// parts of the problem, one after another.
///
/// ```
/// use cross_attention::backward::{BackwardProblem, BackwardSpec};
/// use cross_attention::plan::BackwardPlan;
/// use cross_attention::{AttentionSpec, DeviceCaps};
/// let problem = BackwardProblem::new(BackwardSpec::new(AttentionSpec::new([1, 8, 4096, 64], [1, 8, 77, 64])))?;
/// println!("{}", BackwardPlan::new(&problem, &DeviceCaps::webgpu_defaults())?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct BackwardPlan {
    problem: BackwardProblem,
    passes: Vec<Pass>,
    steps: Vec<Step>,
    sums_bytes: u64,
    row_words: u64,
    summary: String,
}

impl BackwardPlan {
    /// Plans gradients for a device.
    ///
    /// # Errors
    /// A [`Rejection`] names the limit that even the smallest part does not fit, or what the kernels do not take.
    pub fn new(problem: &BackwardProblem, caps: &DeviceCaps) -> Result<Self, Rejection> {
        backward::supports(problem, caps)?;
        let (spec, forward) = (problem.spec(), problem.forward());
        let passes = Pass::all(problem, caps)?;
        let cutter = Cutter { forward, caps };
        let rows_alone = [true, true, true, false];
        let mut steps = vec![];
        if forward.rows() > 0 && !passes.is_empty() || spec.d_sinks {
            steps.extend(cutter.cut(rows_alone, |part| vec![backward::delta(problem, caps, part)])?);
        }
        for pass in &passes {
            steps.extend(cutter.cut(pass.may_be_cut(), |part| vec![pass.step(problem, caps, part)])?);
            steps.extend(cutter.cut(rows_alone, |part| pass.chosen(problem, caps, part))?);
            for stored in pass.stored(problem) {
                steps.extend(cutter.cut_slice(pass.shape(), |slice| pass.store(problem, caps, stored, slice))?);
            }
            steps.extend(cutter.cut(rows_alone, |part| pass.row_sums(problem, caps, part))?);
        }
        if spec.d_sinks {
            steps.extend(cutter.cut(rows_alone, |part| backward::sinks(problem, caps, part))?);
        }
        let sums_bytes = passes.iter().map(Pass::workspace_bytes).max().unwrap_or(0).max(backward::sink_bytes(problem));
        let found = caps.max_buffer_size;
        if sums_bytes > found {
            return Err(Rejection::Binding { slot: Slot::Gradients, needed: sums_bytes, found });
        }
        let row_words = backward::row_stats(problem).words as u64;
        let summary = summary(forward, caps);
        Ok(Self { problem: problem.clone(), passes, steps, sums_bytes, row_words, summary })
    }

    /// What was planned.
    #[must_use]
    pub const fn problem(&self) -> &BackwardProblem {
        &self.problem
    }

    /// The dispatches, in order. None where no gradient has elements.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Device memory needed besides inputs and gradients, in bytes: sums before they are stored, row data, and four numbers of
    /// each row; where a gradient of chosen weights is given, a copy of it, and where each head, row and key stands in it. Linear in `q_len` and in `kv_len`; passes use the same sums one after another.
    #[must_use]
    pub const fn workspace_bytes(&self) -> u64 {
        self.sums_bytes + self.row_words * 4
    }

    /// Whether a device with `caps` can run the plan, which may have been made for another.
    ///
    /// # Errors
    /// [`PlanError::OtherDevice`] with the first thing that the device does not have.
    pub fn check(&self, caps: &DeviceCaps) -> Result<(), PlanError> {
        check_steps(&self.steps, caps).map_err(|unmet| PlanError::OtherDevice { unmet })
    }

    /// What stands before the gradient of chosen weights, and at which word.
    pub(crate) fn chosen(&self) -> (Vec<u32>, u64) {
        let at = backward::row_stats(&self.problem).chosen_at;
        (backward::chosen_words(&self.problem, at), at as u64)
    }

    /// The word at which that gradient stands.
    pub(crate) fn d_weights_at(&self) -> u64 {
        backward::d_weights_at(&self.problem) as u64
    }

    pub(crate) const fn sums_bytes(&self) -> u64 {
        self.sums_bytes
    }

    pub(crate) const fn row_bytes(&self) -> u64 {
        self.row_words * 4
    }
}

impl fmt::Display for BackwardPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.summary)?;
        for pass in &self.passes {
            let (of, why) = match pass.made {
                Made::Chosen => ("d_weights".to_owned(), "what chosen weights add to delta of each row"),
                Made::Rows { query, alibi, scale } => {
                    let parts = [(query, "d_query"), (alibi, "d_alibi_slopes"), (scale, "d_scale")];
                    let asked: Vec<_> = parts.into_iter().filter(|(asked, _)| *asked).map(|(_, name)| name).collect();
                    (asked.join(", "), "a workgroup for each tile of rows goes over the keys")
                }
                Made::Keys { key: true, value: true } => {
                    ("d_key, d_value".to_owned(), "a workgroup for each tile of keys goes over the rows of its heads")
                }
                Made::Keys { key: true, value: false } => (
                    "d_key".to_owned(),
                    "too wide for one pass with d_value, or another batch; over the rows of its heads",
                ),
                Made::Keys { .. } => {
                    ("d_value".to_owned(), "too wide for one pass with d_key, or alone; over the rows of its heads")
                }
                Made::Bias if pass.direct => ("d_bias".to_owned(), "stored pair by pair"),
                Made::Bias => ("d_bias".to_owned(), "summed over what the bias has one of"),
            };
            let tiles = pass.tiles;
            write!(f, "pass       {of}: tiles of {} rows x {} keys", tiles.rows(), tiles.keys())?;
            write!(f, " on {0} x {0} invocations, {why}", tiles.lanes)?;
            if tiles.column_blocks > 1 {
                write!(f, "; {} blocks of columns, each of which computes the scores anew", tiles.column_blocks)?;
            }
            if pass.splits > 1 {
                write!(f, "; {} splits for the device's workgroups, added in order", pass.splits)?;
            }
            writeln!(f)?;
        }
        writeln!(f, "workspace  {} bytes", self.workspace_bytes())?;
        super::write_steps(f, &self.steps, "no gradient has elements")
    }
}

/// A pass cut into parts of the problem until every binding and grid fits.
struct Cutter<'a> {
    forward: &'a AttentionProblem,
    caps: &'a DeviceCaps,
}

impl Cutter<'_> {
    /// The dispatches of all parts, cut along these of batch, heads, rows and keys. Heads of a group stay together.
    fn cut(&self, along: [bool; 4], steps: impl Fn(&Part) -> Vec<Step>) -> Result<Vec<Step>, Rejection> {
        let [batch, heads, rows, keys] = self.forward.score_shape();
        let group = self.forward.group_size();
        let part = |[batch, heads, rows, keys]: [Range<usize>; 4]| Part { batch, heads, rows, keys, states: None };
        self.cut_ranges([batch, heads, rows, keys], [1, group, 1, 1], along, |ranges| steps(&part(ranges)))
    }

    /// The same of a tensor's first three axes.
    fn cut_slice(
        &self,
        [b, h, l]: [usize; 3],
        step: impl Fn([Range<usize>; 3]) -> Step,
    ) -> Result<Vec<Step>, Rejection> {
        let along = [true, true, true, false];
        self.cut_ranges([b, h, l, 1], [1; 4], along, |[b, h, l, _]| vec![step([b, h, l])])
    }

    fn cut_ranges(
        &self,
        extents: [usize; 4],
        least: [usize; 4],
        along: [bool; 4],
        steps: impl Fn([Range<usize>; 4]) -> Vec<Step>,
    ) -> Result<Vec<Step>, Rejection> {
        let mut size = extents;
        loop {
            let counts = [0, 1, 2, 3].map(|axis| extents[axis].div_ceil(size[axis].max(1)).max(1) as u64);
            let needed = counts.into_iter().fold(1u64, u64::saturating_mul);
            if needed > MAX_PARTS {
                return Err(Rejection::Parts { needed, found: MAX_PARTS });
            }
            let mut all: Vec<_> = parts(extents, size).into_iter().flat_map(&steps).collect();
            // a dispatch over nothing is left out
            all.retain(|step| !step.grid.contains(&0));
            let Some(reason) = all.iter().find_map(|step| self.reason_against(step)) else { return Ok(all) };
            // row data is bound whole, whatever the part
            if matches!(reason, Rejection::Binding { slot: Slot::RowData, .. }) {
                return Err(reason);
            }
            let needs = |size: [usize; 4]| match &reason {
                Rejection::Binding { slot, .. } => largest(&first(extents, size, &steps), *slot),
                Rejection::Grid { .. } => {
                    first(extents, size, &steps).iter().flat_map(|step| step.grid).max().unwrap_or(0)
                }
                _ => 0,
            };
            let now = needs(size);
            let smaller = (0..4).filter(|axis| along[*axis] && size[*axis] > least[*axis]).map(|axis| {
                let mut smaller = size;
                smaller[axis] = size[axis].div_ceil(2).next_multiple_of(least[axis]);
                smaller
            });
            let smaller = smaller.filter(|smaller| *smaller != size).map(|size| (needs(size), size));
            match smaller.filter(|(needs, _)| *needs < now).min_by_key(|(needs, _)| *needs) {
                Some((_, smaller)) => size = smaller,
                None => return Err(reason),
            }
        }
    }

    /// The limit of the device that a dispatch does not fit.
    fn reason_against(&self, step: &Step) -> Option<Rejection> {
        let caps = self.caps;
        // indices in a kernel are u32
        let found = caps.max_storage_buffer_binding_size.min(caps.max_buffer_size).min(u64::from(u32::MAX));
        if let Some(binding) = step.bindings.iter().find(|binding| binding.size_bytes > found) {
            return Some(Rejection::Binding { slot: binding.slot, needed: binding.size_bytes, found });
        }
        let found = u64::from(caps.max_compute_workgroups_per_dimension);
        if let Some(needed) = step.grid.into_iter().find(|n| *n > found) {
            return Some(Rejection::Grid { needed, found });
        }
        step.check(caps).err().map(|unmet| Unsupported::from(unmet).into())
    }
}

/// The ranges of parts of this size, at least one along each axis.
fn parts(extents: [usize; 4], size: [usize; 4]) -> Vec<[Range<usize>; 4]> {
    let along = |axis: usize| {
        let (extent, size) = (extents[axis], size[axis].max(1));
        (0..extent.div_ceil(size).max(1)).map(move |n| n * size..((n + 1) * size).min(extent))
    };
    let mut parts = vec![];
    for b in along(0) {
        for h in along(1) {
            for l in along(2) {
                parts.extend(along(3).map(|last| [b.clone(), h.clone(), l.clone(), last]));
            }
        }
    }
    parts
}

fn first(extents: [usize; 4], size: [usize; 4], steps: impl Fn([Range<usize>; 4]) -> Vec<Step>) -> Vec<Step> {
    steps([0, 1, 2, 3].map(|axis| 0..size[axis].min(extents[axis])))
}

/// The largest binding of a slot.
fn largest(steps: &[Step], slot: Slot) -> u64 {
    let bindings = steps.iter().flat_map(|step| &step.bindings);
    bindings.filter(|binding| binding.slot == slot).map(|binding| binding.size_bytes).max().unwrap_or(0)
}
