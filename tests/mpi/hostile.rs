//! What a user may do that others do not: parts of a communicator, several attentions in turns, nothing anywhere, other storage on
//! each rank, other threads, ranks that leave.

use std::process::ExitCode;

use cross_attention::cpu::{self, StatePart};
use cross_attention::sharded::{
    EndTogether, Queries, Results, ShardInputs, ShardedAttention, ShardedError, ShardedSpec, Way, merge_over,
    run_together,
};
use cross_attention::{AttentionInputs, AttentionSpec, Device, Element, Error, Layout, RowState, TensorSpec, f16};
use mpi::environment::{Threading, threading_support};
use mpi::topology::{Color, Communicator, SimpleCommunicator};

use super::common::case::Case;
use super::common::check;
use super::scenarios::{WAYS, number, one};
use super::shards::{Shard, cuts, drawn};

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Every second rank by itself, the others by themselves; then all again.
pub(crate) fn parts(comm: &SimpleCommunicator) -> Result<(), String> {
    let color = Color::with_value(comm.rank() % 2);
    let part = comm.split_by_color(color).ok_or("no part")?;
    let case = |name| Case::new(name, "ranks of a part", 2, [4, 2], [3, 41], [8, 5]).sinks(1.0);
    for way in WAYS {
        one(&part, &Device::Cpu, &case(["even", "odd"][number(comm)[0] % 2]), way, &mut drawn(way.name()))?;
        one(comm, &Device::Cpu, &case("all"), way, &mut drawn(way.name()))?;
    }
    Ok(())
}

/// Two attentions of one communicator in turns give what each gives alone.
pub(crate) fn turns(comm: &SimpleCommunicator) -> Result<(), String> {
    let [rank, ranks] = number(comm);
    let cases = [
        Case::new("first", "one in turns", 1, [2, 2], [5, 30], [8, 8]),
        Case::new("second", "the other in turns", 2, [4, 1], [2, 17], [16, 3]).sinks(0.0),
    ];
    let data = cases.clone().map(|case| case.data());
    let shards: Vec<Shard> = cases
        .iter()
        .zip(&data)
        .map(|(case, data)| {
            let cuts = cuts(case, ranks, &mut drawn(&case.name));
            Shard::new(case, data, [cuts[rank], cuts[rank + 1]])
        })
        .collect();
    let new = |n: usize| {
        let spec = ShardedSpec { way: WAYS[2 * n], ..ShardedSpec::new(shards[n].spec.clone()) };
        ShardedAttention::new(comm, &Device::Cpu, spec).map_err(text)
    };
    let attentions = [new(0)?, new(1)?];
    let attend = |n: usize| {
        let output = attentions[n].attend_blocking(&shards[n].inputs(Some(&data[n].query))).map_err(text)?;
        output.ok_or_else(|| "no result".to_owned())
    };
    let alone = [attend(0)?, attend(1)?];
    for n in [0, 1, 1, 0, 0, 1] {
        check::same_bits(&attend(n)?, &alone[n])?;
    }
    check::within_tolerance(&cases[0].problem(), &data[0], &alone[0])?;
    check::within_tolerance(&cases[1].problem(), &data[1], &alone[1])
}

/// No batch, no row, no key on any rank; sinks where there is no key; lengths of 0.
pub(crate) fn nothing(comm: &SimpleCommunicator) -> Result<(), String> {
    for queries in [Queries::OnAll, Queries::OnRoot(0), Queries::Own] {
        for (way, shape) in [Way::Gather, Way::Tree, Way::Ring]
            .into_iter()
            .flat_map(|way| [[0, 3, 4], [2, 0, 4], [2, 3, 0]].map(move |shape| (way, shape)))
        {
            let [batch, q_len, kv_len] = shape;
            let mut of = AttentionSpec::new([batch, 2, q_len, 4], [batch, 1, kv_len, 4]);
            (of.sinks, of.lse, of.kv_lens) = (true, true, true);
            let way = if queries == Queries::Own { Way::Ring } else { way };
            let attention = ShardedSpec { queries, way, ..ShardedSpec::new(of) };
            let attention = ShardedAttention::new(comm, &Device::Cpu, attention).map_err(text)?;
            let (query, key) = (vec![1.0f32; batch * 2 * q_len * 4], vec![1.0f32; batch * kv_len * 4]);
            let (sinks, kv_lens) = ([0.5f32, -2.0], vec![0u32; batch]);
            let mut inputs = ShardInputs::new(&query, &key, &key);
            if matches!(queries, Queries::OnRoot(root) if root != comm.rank()) {
                inputs.query = None;
            }
            (inputs.terms.sinks, inputs.terms.kv_lens) = (Some((&sinks).into()), Some((&kv_lens).into()));
            let output = attention.attend_blocking(&inputs).map_err(text)?.ok_or("no result")?;
            let lse: Vec<f32> = (0..batch * 2 * q_len).map(|row| sinks[row / q_len.max(1) % 2]).collect();
            let zeros = vec![0.0f32; batch * 2 * q_len * 4];
            if output.output.to_f32() != zeros || output.lse.as_ref() != Some(&lse) {
                return Err(format!("{queries:?}, {}, {shape:?}: {output:?}", way.name()));
            }
        }
    }
    Ok(())
}

/// Keys, values and the output are stored otherwise on every second rank.
pub(crate) fn storage(comm: &SimpleCommunicator) -> Result<(), String> {
    let [rank, ranks] = number(comm);
    let total = 5 * ranks;
    // numbers that f16 has
    let numbers =
        |seed: usize, len: usize| (0..len).map(|n| ((n * 7 + seed) % 13) as f32 / 4.0 - 1.5).collect::<Vec<f32>>();
    let (query, key, value) = (numbers(1, 2 * 3 * 4), numbers(2, total * 4), numbers(3, total * 4));
    let own = |of: &[f32]| of[rank * 20..][..20].to_vec();
    let halves = |of: &[f32]| own(of).into_iter().map(f16::from_f32).collect::<Vec<_>>();
    let (keys, values, half_keys, half_values) = (own(&key), own(&value), halves(&key), halves(&value));
    let is_half = rank % 2 == 1;
    let mut of = AttentionSpec::new([1, 2, 3, 4], [1, 1, 5, 4]);
    if is_half {
        let half = TensorSpec { element: Element::F16, layout: of.key.layout };
        (of.key, of.value) = (half, half);
        // and the output, heads last
        of.output = TensorSpec { element: Element::F16, layout: Layout::blhd([1, 2, 3, 4]) };
    }
    let problem = cross_attention::AttentionProblem::new(AttentionSpec::new([1, 2, 3, 4], [1, 1, total, 4]));
    let problem = problem.map_err(text)?;
    let want = cpu::attention(&problem, &AttentionInputs::new(&query, &key, &value)).map_err(text)?.output.to_f32();
    for way in WAYS {
        let spec = ShardedSpec { way, ..ShardedSpec::new(of.clone()) };
        let attention = ShardedAttention::new(comm, &Device::Cpu, spec).map_err(text)?;
        let inputs = match is_half {
            true => ShardInputs::new(&query, &half_keys, &half_values),
            false => ShardInputs::new(&query, &keys, &values),
        };
        let output = attention.attend_blocking(&inputs).map_err(text)?.ok_or("no result")?.output;
        let got = output.to_f32();
        // outputs are below 2 in size: half a last place of f16, or some roundings of f32
        let slack = if is_half { 2f32.powi(-10) } else { 1e-6 };
        for head in 0..2 {
            for at in 0..12 {
                let place = if is_half { at / 4 * 8 + head * 4 + at % 4 } else { head * 12 + at };
                let (got, want) = (got[place], want[head * 12 + at]);
                if (got - want).abs() > slack {
                    return Err(format!("{}: head {head}, {at}: {got}, should be {want}", way.name()));
                }
            }
        }
        if (output.as_ref().element() == Element::F16) != is_half {
            return Err("an output is of another rank's element".to_owned());
        }
    }
    Ok(())
}

/// Calls, each with a communicator, messages and operations of its own, take no more memory the more there are.
pub(crate) fn memory(comm: &SimpleCommunicator) -> Result<(), String> {
    const MOST: usize = 2 << 20;
    let spec = AttentionSpec::new([1, 4, 64, 32], [1, 4, 8, 32]);
    let (query, keys) = (vec![0.5f32; 4 * 64 * 32], vec![0.5f32; 4 * 8 * 32]);
    let calls = |count: usize| {
        for n in 0..count {
            let spec = ShardedSpec { way: WAYS[n % 3], ..ShardedSpec::new(spec.clone()) };
            let attention = ShardedAttention::new(comm, &Device::Cpu, spec).map_err(text)?;
            attention.attend_blocking(&ShardInputs::new(&query, &keys, &keys)).map_err(text)?;
        }
        Ok::<_, String>(())
    };
    calls(100)?;
    let Some(before) = resident() else { return Ok(()) };
    calls(200)?;
    let grown = resident().unwrap_or(before).saturating_sub(before);
    if grown > MOST {
        return Err(format!("grown by {grown} bytes in 200 calls, from {before}"));
    }
    no_memory(comm)
}

/// Memory that is not there on one rank is the same error on all, and the next call works.
fn no_memory(comm: &SimpleCommunicator) -> Result<(), String> {
    let [rank, ranks] = number(comm);
    let (query, keys) = (vec![0.5f32; 2 * 3 * 4], vec![0.5f32; 2 * 5 * 4]);
    let inputs = ShardInputs::new(&query, &keys, &keys);
    let mut of = AttentionSpec::new([2, 1, 3, 4], [2, 1, 5, 4]);
    let alike = ShardedAttention::new(comm, &Device::Cpu, ShardedSpec::new(of.clone())).map_err(text)?;
    if rank + 1 == ranks {
        of.output.layout.strides[0] = 1 << 50;
    }
    let attention = ShardedAttention::new(comm, &Device::Cpu, ShardedSpec::new(of)).map_err(text)?;
    match attention.attend_blocking(&inputs) {
        Err(Error::Sharded(ShardedError::Rank { rank, message }))
            if rank + 1 == comm.size() && message.contains("more memory than the host has") => {}
        other => return Err(format!("{other:?}")),
    }
    alike.attend_blocking(&inputs).map(drop).map_err(text)
}

/// Bytes of memory that this process holds, where the system tells.
fn resident() -> Option<usize> {
    let pages: usize = std::fs::read_to_string("/proc/self/statm").ok()?.split(' ').nth(1)?.parse().ok()?;
    Some(pages * 4096)
}

/// More rows than one message holds.
pub(crate) fn messages(comm: &SimpleCommunicator) -> Result<(), String> {
    const WIDTH: usize = 254;
    let [rank, ranks] = number(comm);
    // of all ranks together
    let rows = (1 << 24) / ranks / (WIDTH + 2) + 3;
    let output: Vec<f32> = (0..rows * WIDTH).map(|at| ((at / WIDTH + rank) % 64) as f32).collect();
    let state = RowState { row_max: vec![0.0; rows], row_sum: vec![1.0; rows] };
    let merged = merge_over(comm, StatePart::new(&output, &state), WIDTH, Way::Gather, Results::OnAll);
    let merged = merged.map_err(text)?.ok_or("no result")?;
    let mean = |row: usize| (0..ranks).map(|rank| ((row + rank) % 64) as f32).sum::<f32>() / ranks as f32;
    for (row, got) in merged.output.chunks_exact(WIDTH).enumerate() {
        // some roundings of numbers below 64
        if got.iter().any(|x| (x - mean(row)).abs() > 1e-4) {
            return Err(format!("row {row}: {}, should be {}", got[0], mean(row)));
        }
    }
    if merged.output.len() == output.len() { Ok(()) } else { Err(format!("{} numbers", merged.output.len())) }
}

/// A thread that MPI was not begun on is told so before anything is sent; the others go on.
pub(crate) fn threads(comm: &SimpleCommunicator) -> Result<(), String> {
    if matches!(threading_support(), Threading::Serialized | Threading::Multiple) {
        eprintln!("this MPI lets every thread call it, whatever it was begun for");
        return turns(comm);
    }
    let refused = std::thread::spawn(|| {
        let world = SimpleCommunicator::world();
        let spec = ShardedSpec::new(AttentionSpec::new([1, 1, 1, 1], [1, 1, 1, 1]));
        ShardedAttention::new(&world, &Device::Cpu, spec).err()
    });
    match refused.join().map_err(|_| "the thread panicked")? {
        Some(Error::Sharded(ShardedError::Thread { .. })) => turns(comm),
        other => Err(format!("{other:?}")),
    }
}

/// What [`threads`] refuses, where MPI was begun for it.
pub(crate) fn in_a_thread() -> Result<(), String> {
    let played = std::thread::spawn(|| turns(&SimpleCommunicator::world()));
    played.join().map_err(|_| "the thread panicked")?
}

/// The third rank leaves between two calls: it panics, returns by an error, or comes to an early end.
pub(crate) fn leaves(comm: &SimpleCommunicator, how: &str) -> ExitCode {
    let calls = || {
        let together = EndTogether::new(comm);
        let spec = ShardedSpec::new(AttentionSpec::new([1, 1, 4, 8], [1, 1, 16, 8]));
        let attention = ShardedAttention::new(comm, &Device::Cpu, spec).map_err(text)?;
        let (query, keys) = (vec![0.5f32; 32], vec![0.5f32; 128]);
        for call in 0..1_000_000 {
            if call == 20 && comm.rank() == 2 {
                match how {
                    "panics" => panic!("on purpose"),
                    "fails" => {
                        together.done();
                        return Err("something of its own".to_owned());
                    }
                    _ => return Ok(()),
                }
            }
            attention.attend_blocking(&ShardInputs::new(&query, &keys, &keys)).map_err(text)?;
        }
        Ok::<_, String>(())
    };
    run_together(comm, calls);
    eprintln!("went on");
    ExitCode::SUCCESS
}
