//! Grids of workgroups that are told apart by one number.

use crate::caps::DeviceCaps;

/// So many workgroups in rows that the device allows: how many in a row, how many rows, and 1. The last row may be longer
/// than what is left, and rows may be more than the device allows.
pub(crate) fn flat_grid(workgroups: u64, caps: &DeviceCaps) -> [u64; 3] {
    let per_row = workgroups.min(u64::from(caps.max_compute_workgroups_per_dimension)).max(1);
    [per_row, workgroups.div_ceil(per_row), 1]
}

/// The same; `None` where the device does not allow so many, or a shader cannot count them.
pub(crate) fn flat_grid_within(workgroups: usize, caps: &DeviceCaps) -> Option<[u32; 3]> {
    let [per_row, rows, _] = flat_grid(u32::try_from(workgroups).ok()?.into(), caps);
    let allowed = |n: u64| u32::try_from(n).ok().filter(|n| *n <= caps.max_compute_workgroups_per_dimension);
    Some([allowed(per_row)?, allowed(rows)?, 1])
}
