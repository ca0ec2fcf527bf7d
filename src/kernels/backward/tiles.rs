//! How a pass lays its pairs over workgroups: tiles of rows and keys, and the workgroup memory that they take.

use super::{CHUNK, Made};
use crate::caps::{DeviceCaps, DeviceClass};
use crate::dispatch::Unsupported;
use crate::problem::AttentionProblem;

/// The variables of a tile's workgroup that are no tiles.
const FLAGS_BYTES: u64 = 6 * 16;

/// How a pass lays its pairs over workgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiles {
    /// Invocations along each side.
    pub(crate) lanes: usize,
    /// Rows and keys of an invocation.
    pub(super) row_reg: usize,
    pub(super) key_reg: usize,
    /// vec4 columns of an invocation, and blocks of columns, each in workgroups of its own.
    pub(super) columns: usize,
    /// Slices of the others that are staged at a time.
    pub(super) step: usize,
    pub(crate) column_blocks: usize,
}

impl Tiles {
    pub(crate) const fn rows(&self) -> usize {
        self.row_reg * self.lanes
    }

    pub(crate) const fn keys(&self) -> usize {
        self.key_reg * self.lanes
    }

    /// vec4s of a lane in workgroup memory: the chunks of its rows and keys, slices of the others, or numbers of all other lanes.
    pub(super) fn stage(&self, products: bool) -> usize {
        let chunks = (self.row_reg + self.key_reg) * CHUNK;
        let slice = if products { self.step * self.lanes * (1 + self.columns) } else { 0 };
        // an odd number: lanes start in different banks
        chunks.max(slice).max(2 * self.lanes) | 1
    }

    /// vec4s of a chunk that an invocation stages, of so many rows or keys a lane.
    pub(super) const fn staged(&self, reg: usize) -> usize {
        (reg * CHUNK).div_ceil(self.lanes)
    }

    /// With slices of the others, where there are products, or without.
    pub(super) fn workgroup_bytes(&self, products: bool) -> u64 {
        let seen = if products { 4 * self.lanes * self.lanes } else { 0 };
        (16 * self.lanes * self.stage(products) + seen) as u64 + FLAGS_BYTES
    }
}

/// The widest tiles that a device has room for.
pub(super) fn tiles(
    forward: &AttentionProblem,
    caps: &DeviceCaps,
    made: Made,
    rows: usize,
) -> Result<Tiles, Unsupported> {
    let fits = |tiles: &Tiles| {
        tiles.lanes * tiles.lanes <= caps.max_compute_invocations_per_workgroup as usize
            && tiles.workgroup_bytes(true) <= u64::from(caps.max_compute_workgroup_storage_size)
    };
    let of_width = |lanes: usize| {
        let width = match made {
            Made::Rows { query: true, .. } | Made::Keys { key: true, value: false } => forward.head_dim(),
            Made::Keys { key: true, value: true } => forward.head_dim().max(forward.v_head_dim()),
            Made::Keys { .. } => forward.v_head_dim(),
            Made::Rows { .. } | Made::Bias | Made::Chosen => 1,
        };
        let vecs = width.div_ceil(4);
        // 128 columns at a time
        let columns = vecs.div_ceil(lanes).clamp(1, 32 / lanes);
        // rows, keys
        let [row_most, key_most] = match caps.class {
            // what is written out takes software drivers long to compile
            DeviceClass::Software => [2, 2],
            // 128 registers do not hold four by four beside the sums of what is owned, and less beside elements that are asked for
            DeviceClass::Integrated => {
                let both = matches!(made, Made::Keys { key: true, value: true });
                [if both && !width.is_multiple_of(4 * CHUNK) { 3 } else { 4 }, 3]
            }
            _ => [4, 4],
        };
        let reg = |n: usize, most: usize| n.div_ceil(lanes).clamp(1, most);
        let column_blocks = vecs.div_ceil(lanes * columns).max(1);
        let (row_reg, key_reg) = (reg(rows, row_most), reg(forward.kv_len(), key_most));
        let other_reg = if matches!(made, Made::Keys { .. }) { row_reg } else { key_reg };
        let tiles = Tiles { lanes, row_reg, key_reg, columns, step: 1, column_blocks };
        // slices that are staged together need fewer barriers; what is written out takes software drivers long to compile
        let several = Tiles { step: if other_reg == 4 { 2 } else { other_reg }, ..tiles };
        if caps.class != DeviceClass::Software && fits(&several) { several } else { tiles }
    };
    // small tiles compile sooner, and software drivers have no lanes to fill
    let wide = Some(of_width(16)).filter(|tiles| caps.class != DeviceClass::Software && fits(tiles));
    let tiles = wide.unwrap_or_else(|| of_width(8));
    let (needed, found) = (tiles.workgroup_bytes(true), u64::from(caps.max_compute_workgroup_storage_size));
    if needed > found {
        return Err(Unsupported::WorkgroupMemory { needed, found, head_dim: forward.head_dim() });
    }
    Ok(tiles)
}
