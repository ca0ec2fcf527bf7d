//! From chosen attention weights and a device's capabilities to a plan: parts, dispatches.

use super::PlanError;
use crate::caps::DeviceCaps;
use crate::dispatch::{Rejection, RowDataMap, Step, check_steps};
use crate::kernels::weights;
use crate::weights::WeightsProblem;

/// What a device runs for selected weights: plain data.
///
/// Where not all fits into one binding, batch entries go one after another.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightsPlan {
    problem: WeightsProblem,
    steps: Vec<Step>,
    selection: Vec<u32>,
    row_data_words: u32,
}

impl WeightsPlan {
    /// Plans selected weights for a device.
    ///
    /// # Errors
    /// A [`Rejection`] names the limit that one batch entry does not fit.
    pub fn new(problem: &WeightsProblem, caps: &DeviceCaps) -> Result<Self, Rejection> {
        let scores = problem.scores();
        let row_data_words = RowDataMap::new(scores).words;
        if problem.elements() == 0 {
            return Ok(Self { problem: problem.clone(), steps: vec![], selection: vec![], row_data_words });
        }
        weights::supports(problem, caps)?;
        let mut per_part = scores.batch();
        loop {
            let limit = caps.max_compute_workgroups_per_dimension;
            let selection = weights::selection(problem, limit);
            let parts = (0..scores.batch()).step_by(per_part);
            let ranges = parts.map(|start| start..(start + per_part).min(scores.batch()));
            let steps: Vec<_> = ranges.map(|batch| weights::step(problem, caps, batch, selection.len())).collect();
            match steps.iter().find_map(|step| reason_against(step, caps)) {
                None => return Ok(Self { problem: problem.clone(), steps, selection, row_data_words }),
                Some(reason) if per_part == 1 => return Err(reason),
                Some(_) => per_part = per_part.div_ceil(2),
            }
        }
    }

    /// What was planned.
    #[must_use]
    pub const fn problem(&self) -> &WeightsProblem {
        &self.problem
    }

    /// The dispatches, in order. None where nothing is returned.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Whether a device with `caps` can run the plan, which may have been made for another.
    ///
    /// # Errors
    /// [`PlanError::OtherDevice`] with the first thing that the device does not have.
    pub fn check(&self, caps: &DeviceCaps) -> Result<(), PlanError> {
        check_steps(&self.steps, caps).map_err(|unmet| PlanError::OtherDevice { unmet })
    }

    /// The words at binding 10.
    pub(crate) fn selection(&self) -> &[u32] {
        &self.selection
    }

    pub(crate) const fn row_data_words(&self) -> u32 {
        self.row_data_words
    }
}

/// The limit of the device that a dispatch does not fit.
fn reason_against(step: &Step, caps: &DeviceCaps) -> Option<Rejection> {
    let found = caps.max_storage_buffer_binding_size.min(caps.max_buffer_size);
    let large = step.bindings.iter().find(|binding| binding.size_bytes > found);
    if let Some(binding) = large {
        return Some(Rejection::Binding { slot: binding.slot, needed: binding.size_bytes, found });
    }
    let needed = step.grid[1];
    let found = u64::from(caps.max_compute_workgroups_per_dimension);
    if needed > found {
        return Some(Rejection::Grid { needed, found });
    }
    step.check(caps).err().map(|unmet| Rejection::Unsupported(unmet.into()))
}
