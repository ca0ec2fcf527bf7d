//! Very many calls of everything that is prepared: memory stays as it is, and so does every bit.
//!
//! `SOAK_CALLS` says how many calls of a prepared attention there are, a few hundred otherwise; the others make a twentieth
//! of that, and a hundredth as often all is made anew and let go. `SOAK_DEVICES=cpu` leaves the GPUs out, `SOAK_ONLY=pool,layer`
//! all but these. Run it with `--nocapture` to see the figures.

#![cfg(feature = "native")]
#![expect(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a test that cannot go on stops; figures go to the terminal"
)]

#[path = "common/mod.rs"]
#[allow(dead_code, unused_imports, reason = "this one needs the least of what tests share")]
mod common;

use std::time::Instant;

use common::joined::{self, Prepared};
use cross_attention::gpu::{self, AdapterRequest};
use cross_attention::{Device, wgpu};

/// Calls where nobody asks for more.
const FEW: usize = 200;
/// What an allocator and a driver may keep beyond what they held before, in bytes: an eighth of a kilobyte lost by each of
/// 1e5 calls is more.
const SLACK: u64 = 12 << 20;

fn calls() -> usize {
    std::env::var("SOAK_CALLS").ok().and_then(|n| n.parse().ok()).unwrap_or(FEW)
}

/// Resident memory of the process, where the system tells.
fn resident() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = text.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * 4096)
}

fn devices() -> Vec<Device> {
    let mut devices = vec![Device::Cpu];
    if std::env::var("SOAK_DEVICES").is_ok_and(|only| only == "cpu") {
        return devices;
    }
    for summary in gpu::adapters_blocking().into_iter().filter(|summary| summary.info.backend != wgpu::Backend::Gl) {
        let request = AdapterRequest::Named(summary.info.name.clone());
        let opened = pollster::block_on(async { gpu::choose(&request).await?.open().await });
        devices.push(Device::Gpu(opened.expect("an adapter gives a device")));
    }
    devices
}

/// Resident memory after a tenth of the rounds, and the most in the last tenth. A round says whether all was as ever.
fn rounds(what: &str, device: &Device, count: usize, mut round: impl FnMut(usize)) {
    let start = Instant::now();
    let warm = count.div_ceil(10).max(20.min(count));
    let (mut before, mut most) = (None, None);
    for n in 0..count {
        round(n);
        if n + 1 == warm {
            before = resident();
        }
        if n >= count - count.div_ceil(10) && (n % 16 == 0 || n + 1 == count) {
            most = most.max(resident());
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let mib = |bytes: Option<u64>| bytes.map_or(0.0, |bytes| bytes as f64 / f64::from(1 << 20));
    println!(
        "{}: {what}: {count} rounds in {seconds:.1} s, {:.1} MiB after {warm}, {:.1} MiB at the end",
        device.name(),
        mib(before),
        mib(most)
    );
    if let (Some(before), Some(most)) = (before, most) {
        assert!(most <= before + SLACK, "{what} on {}: {before} bytes became {most}", device.name());
    }
}

fn wanted_by_name(only: &str, name: &str) -> bool {
    only.is_empty() || only.split(',').any(|one| one == name)
}

fn same(device: &Device, prepared: &dyn Prepared, n: usize, wanted: &[joined::Bits]) {
    let input = n % joined::INPUTS;
    let found = joined::drive(device, vec![prepared.call(input)]).remove(0).expect("it did before");
    assert!(found == wanted[input], "call {n} gives other bits");
}

#[test]
fn memory_and_bits_stay_as_they_are() {
    let calls = calls();
    let only = std::env::var("SOAK_ONLY").unwrap_or_default();
    for device in devices() {
        for (name, make) in joined::all().into_iter().filter(|(name, _)| wanted_by_name(&only, name)) {
            let prepared = make(&device).expect("a device that has it");
            let wanted = joined::alone(&device, &*prepared).expect("a device that has it");
            let count = if name == "attention" { calls } else { calls.div_ceil(20).max(20) };
            rounds(name, &device, count, |n| same(&device, &*prepared, n, &wanted));
            drop(prepared);
            // prepared, called and let go, again and again
            rounds(&format!("{name}, made anew"), &device, calls.div_ceil(100).max(20), |n| {
                same(&device, &*make(&device).expect("it was made before"), n, &wanted);
            });
        }
    }
}
