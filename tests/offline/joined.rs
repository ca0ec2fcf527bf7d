//! Calls at the same time on the CPU: what is prepared once gives each the bits that it gives alone.

use cross_attention::Device;

use crate::common::joined;

#[test]
fn calls_at_the_same_time() {
    for device in [Device::Cpu, Device::Oracle] {
        for (name, make) in joined::all() {
            // a layer has no oracle
            if matches!(device, Device::Oracle) && name.starts_with("layer") {
                continue;
            }
            joined::check(&device, make)
                .map_err(|error| format!("{name} on {}: {error}", device.name()))
                .expect("the same bits");
        }
    }
}
