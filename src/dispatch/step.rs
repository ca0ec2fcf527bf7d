//! One dispatch as data, and whether a device can run it.

use super::{Binding, Bindings, Needs, Params, Unmet, Variant};
use crate::caps::DeviceCaps;

/// One dispatch: what it is built from, its parameters, its buffers and its grid.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// What the pipeline is built from.
    pub variant: Variant,
    /// The uniform at binding 0.
    #[doc(hidden)]
    pub params: Params,
    /// The storage buffers.
    pub bindings: Vec<Binding>,
    /// Workgroups along x, y and z.
    pub grid: [u64; 3],
    /// Workgroup memory of one workgroup, in bytes, each variable rounded up to 16.
    pub workgroup_bytes: u64,
    /// What else the shader needs of a device.
    pub needs: Needs,
}

impl Step {
    pub(crate) fn new(
        variant: Variant,
        bindings: Bindings<'_>,
        params: Params,
        grid: [u64; 3],
        workgroup_bytes: u64,
        needs: Needs,
    ) -> Self {
        Self { variant, params, bindings: bindings.into_list(), grid, workgroup_bytes, needs }
    }

    /// The grid as a device takes it. A plan is cut until all its grids fit.
    #[must_use]
    pub fn workgroups(&self) -> [u32; 3] {
        self.grid.map(|n| u32::try_from(n).unwrap_or(u32::MAX))
    }

    /// Whether a device with `caps` can run it.
    pub(crate) fn check(&self, caps: &DeviceCaps) -> Result<(), Unmet> {
        self.needs.check(self.workgroup_bytes, self.bindings.len(), caps)?;
        let alignment = caps.min_storage_buffer_offset_alignment;
        for &Binding { slot, start_bytes, size_bytes, .. } in &self.bindings {
            let found = caps.max_storage_buffer_binding_size;
            if size_bytes > found {
                return Err(Unmet::Binding { slot, needed: size_bytes, found });
            }
            if !start_bytes.is_multiple_of(u64::from(alignment.max(1))) {
                return Err(Unmet::Alignment { slot, start: start_bytes, alignment });
            }
            // buffers of the caller's are there already, the plan's own are to be made
            let (needed, found) = (start_bytes + size_bytes, caps.max_buffer_size);
            if slot.is_of_the_plan() && needed > found {
                return Err(Unmet::Buffer { slot, needed, found });
            }
        }
        let found = caps.max_compute_workgroups_per_dimension;
        match self.grid.into_iter().max() {
            Some(most) if most > u64::from(found) => {
                Err(Unmet::Grid { needed: u32::try_from(most).unwrap_or(u32::MAX), found })
            }
            _ => Ok(()),
        }
    }
}

/// Whether a device with `caps` can run steps that may have been planned for another.
pub(crate) fn check_steps(steps: &[Step], caps: &DeviceCaps) -> Result<(), Unmet> {
    steps.iter().try_for_each(|step| step.check(caps))
}

pub(crate) const fn ceil_div(n: usize, by: usize) -> u64 {
    n.div_ceil(by) as u64
}
