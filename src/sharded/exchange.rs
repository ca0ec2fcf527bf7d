//! What ranks send one another: what they agree on, and states of rows to be merged.

use std::sync::atomic::{AtomicU64, Ordering};

use mpi::collective::{CommunicatorCollectives, Root};
use mpi::datatype::{Equivalence, PartitionMut};
use mpi::point_to_point::{self, Destination, Source};
use mpi::topology::{Communicator, Rank, SimpleCommunicator};

use super::state::{self, HEAD};
use super::{ShardedError, Way, operator};

/// What this process gave to MPI in calls of this module since it began: how often, and bytes. Of a collective operation it is
/// what the process put in, once; how MPI passes it on, and in how many messages, is MPI's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Messages, and calls of collective operations.
    pub calls: u64,
    /// Bytes of the buffers that were given.
    pub bytes: u64,
}

static CALLS: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicU64 = AtomicU64::new(0);

/// What this process has given to MPI so far.
#[must_use]
pub fn traffic() -> Traffic {
    Traffic { calls: CALLS.load(Ordering::Relaxed), bytes: BYTES.load(Ordering::Relaxed) }
}

/// Counts what is given to a call.
fn given<T>(data: &[T]) -> &[T] {
    CALLS.fetch_add(1, Ordering::Relaxed);
    BYTES.fetch_add(size_of_val(data) as u64, Ordering::Relaxed);
    data
}

/// Numbers in one message at most: 64 MiB.
const MESSAGE: usize = 1 << 24;

/// What every rank has, by rank.
fn of_all(comm: &SimpleCommunicator, own: &[u8]) -> Vec<Vec<u8>> {
    let ranks = usize::try_from(comm.size()).unwrap_or(1);
    let len = i32::try_from(own.len()).unwrap_or(i32::MAX);
    let own = &own[..usize::try_from(len).unwrap_or(0)];
    let mut lens = vec![0i32; ranks];
    comm.all_gather_into(given(&[len]), &mut lens[..]);
    let starts: Vec<i32> = lens
        .iter()
        .scan(0i32, |at, len| {
            let start = *at;
            *at = at.saturating_add(*len);
            Some(start)
        })
        .collect();
    let total: usize = lens.iter().map(|&len| usize::try_from(len).unwrap_or(0)).sum();
    let mut all = vec![0u8; total];
    comm.all_gather_varcount_into(given(own), &mut PartitionMut::new(&mut all[..], &lens[..], &starts[..]));
    let mut rest = &all[..];
    lens.iter()
        .map(|&len| {
            let (one, behind) = rest.split_at(usize::try_from(len).unwrap_or(0).min(rest.len()));
            rest = behind;
            one.to_vec()
        })
        .collect()
}

/// Goes on only where every rank can: with what each has, as lines `name: value`, or the error of the first that refuses. Lines
/// whose name begins with a dot may differ.
pub(super) fn agree(
    comm: &SimpleCommunicator,
    own: Result<&[(String, String)], String>,
) -> Result<Vec<Vec<(String, String)>>, ShardedError> {
    // marks between fields that no value has; the first one also so that a text is never empty: an empty vector of bytes begins at
    // address 1, which to some MPIs is `MPI_IN_PLACE`
    let text = match &own {
        Ok(lines) => {
            let lines = lines.iter().map(|(name, value)| format!("{name}\u{1f}{value}\u{1e}"));
            format!("\u{6}{}", lines.collect::<String>())
        }
        Err(message) => format!("\u{15}{}", shortened(message, comm)),
    };
    let all: Vec<String> =
        of_all(comm, text.as_bytes()).iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect();
    let refused = all.iter().zip(0..).find_map(|(text, rank)| Some((text.strip_prefix('\u{15}')?, rank)));
    if let Some((message, rank)) = refused {
        return Err(ShardedError::Rank { rank, message: message.to_owned() });
    }
    let lines = |text: &String| -> Vec<(String, String)> {
        let line = |line: &str| line.split_once('\u{1f}').map(|(name, value)| (name.to_owned(), value.to_owned()));
        text.trim_start_matches('\u{6}').split('\u{1e}').filter_map(line).collect()
    };
    let all: Vec<_> = all.iter().map(lines).collect();
    compared(&all)?;
    Ok(all)
}

/// As much of a message as all ranks can send at once, for the bytes of all are one count of MPI's.
fn shortened<'m>(message: &'m str, comm: &SimpleCommunicator) -> &'m str {
    let most = usize::try_from(i32::MAX / comm.size().max(1)).unwrap_or(0).clamp(1, 1 << 14) - 1;
    let ends = message.char_indices().map(|(at, c)| at + c.len_utf8());
    &message[..ends.take_while(|end| *end <= most).last().unwrap_or(0)]
}

/// Whether all ranks have the same lines. An empty value is unknown, and goes with every other.
fn compared(all: &[Vec<(String, String)>]) -> Result<(), ShardedError> {
    let value = |lines: &[(String, String)], name: &str| {
        lines.iter().find(|(of, _)| of == name).map_or("not there".to_owned(), |(_, value)| value.clone())
    };
    for (lines, rank) in all.iter().zip(0..).skip(1) {
        let names = all[0].iter().chain(lines).map(|(name, _)| name);
        for name in names.filter(|name| !name.starts_with('.')) {
            let found = value(lines, name);
            // the first that is known
            let wanted =
                all.iter().map(|lines| value(lines, name)).find(|wanted| !wanted.is_empty()).unwrap_or_default();
            if wanted != found && !found.is_empty() {
                return Err(ShardedError::Disagree { what: name.clone(), rank, found, wanted });
            }
        }
    }
    Ok(())
}

/// Sends numbers of one rank to all, where the others have as many.
pub(super) fn broadcast(comm: &SimpleCommunicator, root: Rank, numbers: &mut [f32]) {
    for chunk in numbers.chunks_mut(MESSAGE) {
        if comm.rank() == root {
            given(chunk);
        }
        comm.process_at_rank(root).broadcast_into(chunk);
    }
}

/// The sum over ranks, in rank order, to one or to all; `None` where no result is.
pub(super) fn sum(comm: &SimpleCommunicator, own: &[f32], root: Option<Rank>) -> Option<Vec<f32>> {
    let ranks = usize::try_from(comm.size()).unwrap_or(1);
    let mut total = Vec::with_capacity(own.len());
    for chunk in own.chunks((MESSAGE / ranks).max(1)) {
        let Some(all) = gathered(comm, chunk, root) else { continue };
        let mut sums = all[..chunk.len()].to_vec();
        for part in all.chunks_exact(chunk.len()).skip(1) {
            sums.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
        }
        total.extend(sums);
    }
    has_result(comm, root).then_some(total)
}

fn has_result(comm: &SimpleCommunicator, root: Option<Rank>) -> bool {
    root.is_none_or(|root| root == comm.rank())
}

/// Equally many numbers of each rank, behind one another.
fn gathered(comm: &SimpleCommunicator, own: &[f32], root: Option<Rank>) -> Option<Vec<f32>> {
    let ranks = usize::try_from(comm.size()).unwrap_or(1);
    let mut all = vec![];
    if has_result(comm, root) {
        all = vec![0.0f32; own.len() * ranks];
    }
    match root {
        None => comm.all_gather_into(given(own), &mut all[..]),
        Some(root) if root == comm.rank() => comm.process_at_rank(root).gather_into_root(given(own), &mut all[..]),
        Some(root) => comm.process_at_rank(root).gather_into(given(own)),
    }
    has_result(comm, root).then_some(all)
}

/// Merges packed rows of all ranks, to one or to all; `None` where no result is. Every rank has as many rows.
pub(super) fn merge(
    comm: &SimpleCommunicator,
    packed: &[f32],
    width: usize,
    way: Way,
    root: Option<Rank>,
) -> Result<Option<Vec<f32>>, ShardedError> {
    let row = HEAD + width;
    let ranks = usize::try_from(comm.size()).unwrap_or(1);
    if row > MESSAGE {
        return Err(ShardedError::Width { width: row, max: MESSAGE });
    }
    // what a rank holds at a time is bounded: the states of all ranks where they are gathered, of one elsewhere
    let held = if way == Way::Gather { ranks } else { 1 };
    let rows = (MESSAGE / (row * held)).max(1);
    let mut merged = vec![];
    for chunk in packed.chunks(rows * row) {
        let of_chunk = match way {
            _ if ranks == 1 => Some(chunk.to_vec()),
            Way::Gather => gathered(comm, chunk, root).map(|all| {
                let mut parts = all.chunks_exact(chunk.len());
                let mut before = parts.next().map(<[f32]>::to_vec).unwrap_or_default();
                for part in parts {
                    let mut later = part.to_vec();
                    state::merge_into(&before, &mut later, width);
                    before = later;
                }
                before
            }),
            Way::Tree => operator::reduce(comm, given(chunk), row, root),
            Way::Ring | Way::Auto => ring(comm, chunk, width, root),
        };
        merged.extend(of_chunk.into_iter().flatten());
    }
    Ok(has_result(comm, root).then_some(merged))
}

/// Each rank merges one block of rows, which comes round by the ranks before it; then the blocks are brought together.
fn ring(comm: &SimpleCommunicator, packed: &[f32], width: usize, root: Option<Rank>) -> Option<Vec<f32>> {
    let row = HEAD + width;
    let ranks = usize::try_from(comm.size()).unwrap_or(1);
    let rank = usize::try_from(comm.rank()).unwrap_or(0);
    let rows = packed.len() / row;
    let block = |n: usize| {
        let n = n % ranks;
        n * rows / ranks * row..(n + 1) * rows / ranks * row
    };
    let mut state = packed.to_vec();
    for step in 0..ranks - 1 {
        // block n begins with rank n and goes through all
        let (sent, received) = (block(rank + ranks - step), block(rank + 2 * ranks - step - 1));
        let mut earlier = vec![0.0f32; received.len()];
        pass_on(comm, &state[sent], &mut earlier);
        state::merge_into(&earlier, &mut state[received], width);
    }
    let whole = rank + 1;
    match root {
        None => {
            for step in 0..ranks - 1 {
                let (sent, received) = (block(whole + ranks - step), block(whole + 2 * ranks - step - 1));
                let mut merged = vec![0.0f32; received.len()];
                pass_on(comm, &state[sent], &mut merged);
                state[received].copy_from_slice(&merged);
            }
            Some(state)
        }
        Some(root) if root == comm.rank() => {
            for other in (0..ranks).filter(|other| *other != rank) {
                let from = comm.process_at_rank(Rank::try_from(other).unwrap_or(0));
                from.receive_into(&mut state[block(other + 1)]);
            }
            Some(state)
        }
        Some(root) => {
            comm.process_at_rank(root).send(given(&state[block(whole)]));
            None
        }
    }
}

/// Sends to the next rank what the one before sends here: as much.
pub(super) fn pass_round<T: Equivalence + Clone + Default>(comm: &SimpleCommunicator, sent: &[T]) -> Vec<T> {
    let mut received = vec![T::default(); sent.len()];
    for (sent, received) in sent.chunks(MESSAGE).zip(received.chunks_mut(MESSAGE)) {
        pass_on(comm, sent, received);
    }
    received
}

/// The same of one message, which may be shorter or longer than what comes.
fn pass_on<T: Equivalence>(comm: &SimpleCommunicator, sent: &[T], received: &mut [T]) {
    let (rank, ranks) = (comm.rank(), comm.size());
    let next = comm.process_at_rank((rank + 1) % ranks);
    let before = comm.process_at_rank((rank + ranks - 1) % ranks);
    point_to_point::send_receive_into(given(sent), &next, received, &before);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_unknown_on_one_rank_is_compared_among_the_others() {
        let all = |values: [&str; 3]| values.map(|value| vec![("data of query".to_owned(), value.to_owned())]);
        compared(&all(["a", "", "a"])).unwrap();
        compared(&all(["", "a", "a"])).unwrap();
        let refused = compared(&all(["", "a", "b"])).unwrap_err();
        assert!(matches!(&refused, ShardedError::Disagree { rank: 2, wanted, .. } if wanted == "a"), "{refused}");
        let named = |name: &str, value: &str| vec![(name.to_owned(), value.to_owned())];
        compared(&[named(".len", "3"), named(".len", "4")]).unwrap();
        compared(&[named("bias", "3"), named("mask", "3")]).unwrap_err();
    }
}
