//! The merge of states as an operation of MPI: on one contiguous datatype a row, so that MPI never splits a state.
//!
//! The unsafe code of the module is here, but for a question in `together`. Its conditions: MPI calls the operation with as many rows in both buffers as it says, and
//! of the datatype that the call was given, whose size is a whole number of f32 with at least maximum and sum; a view covers
//! whole rows of the slice that it is made of.

#![expect(unsafe_code, reason = "MPI takes a function by pointer, and buffers with a datatype by their address")]

use std::ffi::{c_int, c_void};

use mpi::collective::{CommunicatorCollectives, Root, UnsafeUserOperation};
use mpi::datatype::{Equivalence, MutView, UserDatatype, View};
use mpi::ffi;
use mpi::topology::{Communicator, Rank, SimpleCommunicator};

use super::state::{HEAD, merge_into};

/// Merges the rows of `earlier` into those of `later`. It does not panic: that would unwind into MPI.
unsafe extern "C" fn merge_rows(
    earlier: *mut c_void,
    later: *mut c_void,
    rows: *mut c_int,
    datatype: *mut ffi::MPI_Datatype,
) {
    let mut bytes: c_int = 0;
    // SAFETY: MPI gives pointers to a count and to a datatype that it knows
    let rows = unsafe {
        ffi::MPI_Type_size(*datatype, &raw mut bytes);
        usize::try_from(*rows).unwrap_or(0)
    };
    let row = usize::try_from(bytes).unwrap_or(0) / size_of::<f32>();
    let Some(width) = row.checked_sub(HEAD) else { return };
    // SAFETY: both buffers hold so many rows of this datatype, which has no gaps, and do not overlap
    let (earlier, later) = unsafe {
        (
            std::slice::from_raw_parts(earlier.cast::<f32>().cast_const(), rows * row),
            std::slice::from_raw_parts_mut(later.cast::<f32>(), rows * row),
        )
    };
    merge_into(earlier, later, width);
}

/// Reduces the packed rows of all ranks in rank order, to one or to all; by whatever tree MPI takes. `None` where no result is.
pub(super) fn reduce(comm: &SimpleCommunicator, packed: &[f32], row: usize, root: Option<Rank>) -> Option<Vec<f32>> {
    // chunks are small enough for both counts
    let count = c_int::try_from(packed.len() / row).unwrap_or(0);
    let datatype = UserDatatype::contiguous(c_int::try_from(row).unwrap_or(0), &f32::equivalent_datatype());
    // SAFETY: merge_rows keeps to what its head says
    let operation = unsafe { UnsafeUserOperation::associative(merge_rows) };
    // SAFETY: so many rows of f32 without gaps are all of the slice
    let send = unsafe { View::with_count_and_datatype(packed, count, &datatype) };
    let mut merged = vec![0.0f32; packed.len()];
    match root {
        Some(root) if comm.rank() != root => {
            comm.process_at_rank(root).reduce_into(&send, &operation);
            return None;
        }
        root => {
            // SAFETY: as above
            let mut receive = unsafe { MutView::with_count_and_datatype(&mut merged[..], count, &datatype) };
            match root {
                Some(root) => comm.process_at_rank(root).reduce_into_root(&send, &mut receive, &operation),
                None => comm.all_reduce_into(&send, &mut receive, &operation),
            }
        }
    }
    Some(merged)
}
