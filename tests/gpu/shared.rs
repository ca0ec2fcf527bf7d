//! What is prepared once and shared: calls at the same time, and a device that is lost or too small in the middle of one.

use cross_attention::gpu::{AdapterRequest, Gpu, GpuError, choose};
use cross_attention::{Device, Error, wgpu};
use libtest_mimic::Trial;

use super::adapters::Adapter;
use super::trials::trial;
use crate::common::joined::{self, Make};

type Check = fn(&Gpu, Make) -> Result<(), String>;

pub(crate) fn trials(adapter: &Adapter) -> Vec<Trial> {
    let mut trials = vec![];
    for (name, make) in joined::all().into_iter().chain(joined::ON_GPU) {
        // the rows kernel needs what not every device has
        if name == "rows" && adapter.context.caps().subgroups.is_none_or(|(smallest, largest)| smallest != largest) {
            continue;
        }
        let checks: [(&str, Check); 3] =
            [("joined", at_once), ("lost", lost_in_the_middle), ("small", on_a_small_device)];
        // each device makes its shaders anew, which the spared driver takes long for
        let slow = ["tiled", "split", "rows", "layer_with_kept_context"].contains(&name);
        for (group, check) in checks {
            if adapter.sparing && slow && group != "joined" {
                continue;
            }
            let context = adapter.context.clone();
            trials.push(trial(adapter, group, name, move || check(&context, make)));
        }
    }
    let context = adapter.context.clone();
    trials.push(trial(adapter, "host", "lanes_are_neighbours", move || lanes_are_neighbours(&context)));
    trials
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn at_once(context: &Gpu, make: Make) -> Result<(), String> {
    joined::check(&Device::Gpu(context.clone()), make)
}

/// What the device says of its subgroups, it does; so kernels may use them.
fn lanes_are_neighbours(context: &Gpu) -> Result<(), String> {
    let (caps, has) = (context.caps(), context.device().features().contains(wgpu::Features::SUBGROUP));
    match (&caps.subgroup_fault, caps.subgroups) {
        (None, Some(_)) if has => Ok(()),
        (None, None) if !has => Ok(()),
        (Some(fault), None) => Err(format!("the software drivers that this is made for have none: {fault}")),
        found => Err(format!("{found:?}")),
    }
}

/// The device goes after each of the first few steps of a call: the call tells so, or had come to its end, and a device that
/// is still there gives what it gave before.
fn lost_in_the_middle(context: &Gpu, make: Make) -> Result<(), String> {
    let here = Device::Gpu(context.clone());
    let prepared = make(&here).map_err(text)?;
    let wanted = joined::alone(&here, &*prepared)?;
    for steps in 0..4 {
        let request = AdapterRequest::Named(context.info().name.clone());
        let other = pollster::block_on(async { choose(&request).await?.open().await }).map_err(text)?;
        let there = Device::Gpu(other.clone());
        let lost = make(&there).map_err(text)?;
        let mut call = lost.call(1);
        let mut found = None;
        for _ in 0..steps {
            found = found.or_else(|| joined::step(&mut call));
            other.device().poll(wgpu::PollType::wait_indefinitely()).map_err(text)?;
        }
        other.device().destroy();
        let found = found.map_or_else(|| joined::drive(&there, vec![call]), |found| vec![found]);
        for result in found {
            match result {
                Err(Error::Gpu(GpuError::DeviceLost { .. })) => {}
                Ok(found) if steps > 0 && found == wanted[1] => {}
                other => return Err(format!("after {steps} steps: {other:?}")),
            }
        }
        for result in joined::drive(&there, vec![lost.call(0)]) {
            if !matches!(result, Err(Error::Gpu(GpuError::DeviceLost { .. }))) {
                return Err(format!("after the loss: {result:?}"));
            }
        }
        if joined::alone(&here, &*prepared)? != wanted {
            return Err("another device gives other bits than before".to_owned());
        }
    }
    Ok(())
}

/// On devices with ever smaller buffers and bindings a call is right or refused, and says what there is too little of.
fn on_a_small_device(context: &Gpu, make: Make) -> Result<(), String> {
    let here = Device::Gpu(context.clone());
    let wanted = joined::alone(&here, &*make(&here).map_err(text)?)?;
    let adapter = super::interop::same_adapter(&context.info().name)?;
    let (mut right, mut refused) = (0, 0);
    for bytes in [1u64 << 28, 1 << 18, 1 << 16, 1 << 14, 1 << 12, 1 << 10, 64] {
        let has = adapter.limits();
        let limits = wgpu::Limits {
            max_buffer_size: bytes.min(has.max_buffer_size),
            max_storage_buffer_binding_size: bytes.min(has.max_storage_buffer_binding_size),
            ..has
        };
        let wanted_device = wgpu::DeviceDescriptor {
            required_features: adapter.features() & Gpu::FEATURES,
            required_limits: limits,
            ..Default::default()
        };
        let (device, queue) = pollster::block_on(adapter.request_device(&wanted_device)).map_err(text)?;
        let small = match Gpu::from_device_blocking(device, queue) {
            Ok(small) => Device::Gpu(small),
            // not even the probe of its subgroups fits
            Err(GpuError::BufferTooLarge { .. } | GpuError::Validation { .. }) if bytes < 1 << 12 => continue,
            Err(error) => return Err(format!("{bytes} bytes: {error}")),
        };
        let found = match make(&small) {
            Ok(prepared) => joined::drive(&small, vec![prepared.call(0)]).remove(0),
            Err(error) => Err(error),
        };
        match found {
            // parts of keys are summed in another order, so that not all bits are the same
            Ok(found) if close(&found, &wanted[0]) => right += 1,
            Ok(_) => return Err(format!("{bytes} bytes: another result")),
            Err(error) if names_a_limit(&error) => refused += 1,
            Err(error) => return Err(format!("{bytes} bytes: {error:?}")),
        }
    }
    if right > 0 && refused > 0 { Ok(()) } else { Err(format!("{right} right, {refused} refused")) }
}

fn close(found: &[u32], wanted: &[u32]) -> bool {
    let near = |(a, b): (&u32, &u32)| {
        let (a, b) = (f32::from_bits(*a), f32::from_bits(*b));
        a.to_bits() == b.to_bits() || (a - b).abs() <= 1e-4 * (1.0 + b.abs())
    };
    found.len() == wanted.len() && found.iter().zip(wanted).all(near)
}

fn names_a_limit(error: &Error) -> bool {
    match error {
        Error::Plan(_)
        | Error::WeightsPlan { .. }
        | Error::BackwardPlan { .. }
        | Error::MergePlan { .. }
        | Error::LinearPlan { .. } => true,
        Error::Gpu(error) => matches!(error, GpuError::BufferTooLarge { .. } | GpuError::OutOfMemory { .. }),
        // a page of a pool
        Error::Pool(_) => true,
        _ => false,
    }
}
