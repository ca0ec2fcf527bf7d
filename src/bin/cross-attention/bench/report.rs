//! What one row says: an object for programs, and the lines about it for people.

use cross_attention::{Device, KernelChoice, Timing};
use serde_json::{Value, json};

use super::cases::Case;
use super::format::Output;
use super::measure::Row;
use super::{Common, software};
use crate::about;
use crate::error::Error;
use crate::terminal::Terminal;
use crate::text::{listed, shown};

/// What holds for all rows, and how the first result came about.
pub(super) fn opening(
    case: &Case,
    common: &Common<'_>,
    first: &Result<Row, Error>,
    output: &mut Output,
    terminal: &mut Terminal,
) -> Result<(), Error> {
    if let Some(roofline) = &common.roofline {
        output.detail(
            format_args!(
                "peak: {:.1} GFLOP/s, {:.1} GB/s, measured ({}); memory limits below {:.1} FLOP a byte",
                roofline.gflops,
                roofline.gbps,
                roofline.timing,
                roofline.ridge(),
            ),
            terminal,
        )?;
    }
    if let Ok(row) = first {
        output.detail(
            format_args!(
                "cold start: {:.1} ms from the start of the program to the device, {:.1} to plan and make {} pipelines, \
                 {:.1} for the first run of {}",
                common.device_ms, row.prepare_ms, row.pipelines, row.first_run_ms, shown(&case.name),
            ),
            terminal,
        )?;
    }
    Ok(())
}

/// Says which rows something came between: other work on the machine, a clock that still rose.
pub(super) fn warn(rows: &[(Value, Result<Row, Error>)], terminal: &Terminal) {
    let measured = || rows.iter().filter_map(|(row, result)| Some((row["workload"].as_str()?, result.as_ref().ok()?)));
    let names = |is: fn(&Row) -> bool| measured().filter(|(_, row)| is(row)).map(|(name, _)| name).collect::<Vec<_>>();
    let disturbed = names(|row| row.spread.is_disturbed(row.timing.millis.len()));
    if !disturbed.is_empty() {
        terminal.note(format_args!(
            "warning: more than 1 % of the rounds are outliers: {}; does other work run on this machine?",
            listed(disturbed.into_iter())
        ));
    }
    let unsteady = names(|row| row.warm_up.steady == Some(false));
    if !unsteady.is_empty() {
        terminal.note(format_args!(
            "warning: times still changed when the warm-up was over: {}; --seconds gives it more",
            listed(unsteady.into_iter())
        ));
    }
}

/// GFLOP/s and GB/s at the median.
pub(super) fn rates(row: &Row) -> (f64, f64) {
    let median_ms = row.timing.quantile(0.5);
    (row.flops / (median_ms * 1e6), row.bytes / (median_ms * 1e6))
}

/// One case as an object. `cold`: nothing ran on the device before.
pub(super) fn as_json(case: &Case, common: &Common<'_>, result: &Result<Row, Error>, run: u32, cold: bool) -> Value {
    let Common { args, device, cpu, .. } = common;
    let shape = &case.shape;
    let mut object = json!({
        "workload": case.name,
        "version": env!("CARGO_PKG_VERSION"),
        "commit": about::COMMIT,
        "rustc": about::RUSTC,
        "cpu": cpu.model,
        "cores": cpu.cores,
        "threads": cpu.threads,
        "device": kind(device),
        "adapter": device.name(),
        "driver": device.driver(),
        "backend": device.backend(),
        "software": software(device),
        "kernel_choice": asked_kernel(common),
        "backward": args.backward,
        "element": shape.element,
        "kv": shape.kv,
        "page_len": shape.page_len,
        "output": shape.output,
        "layout": shape.layout,
        "batch": shape.batch,
        "q_heads": shape.q_heads,
        "kv_heads": shape.kv_heads,
        "q_len": shape.q_len,
        "kv_len": shape.kv_len,
        "head_dim": shape.head_dim,
        "v_head_dim": shape.v_head_dim,
        "scale": shape.scale,
        "terms": shape.terms,
        "peak_gflops": common.roofline.map(|roofline| roofline.gflops),
        "peak_gbps": common.roofline.map(|roofline| roofline.gbps),
        "peak_timing": common.roofline.map(|roofline| roofline.timing.to_string()),
        "device_ms": common.device_ms,
        "run": run,
        "cold": cold,
    });
    let measured = match result {
        Ok(row) => measured(row, common),
        Err(error) => json!({ "error": error.chain() }),
    };
    if let (Value::Object(object), Value::Object(measured)) = (&mut object, measured) {
        object.extend(measured);
    }
    object
}

fn measured(row: &Row, common: &Common<'_>) -> Value {
    let median_ms = row.timing.quantile(0.5);
    let (gflops, gbps) = rates(row);
    let us = |timing: &Timing| timing.quantile(0.5) * 1e3;
    let host = row.gpu.as_ref().map(|gpu| &gpu.host);
    let kernels = row.gpu.as_ref().and_then(|gpu| gpu.kernels.as_ref()).map(|kernels| {
        let each = kernels.iter().map(|kernel| {
            json!({
                "shader": kernel.shader.name(),
                "dispatches": kernel.dispatches,
                "median_ms": kernel.timing.quantile(0.5),
                "p10_ms": kernel.timing.quantile(0.1),
                "p90_ms": kernel.timing.quantile(0.9),
            })
        });
        each.collect::<Vec<_>>()
    });
    json!({
        "kernel": row.kernel,
        "gradients": row.gradients,
        "median_ms": median_ms,
        "min_ms": row.spread.min,
        "p10_ms": row.timing.quantile(0.1),
        "p25_ms": row.timing.quantile(0.25),
        "p75_ms": row.timing.quantile(0.75),
        "p90_ms": row.timing.quantile(0.9),
        "p99_ms": row.timing.quantile(0.99),
        "max_ms": row.spread.max,
        "mean_ms": row.spread.mean,
        "stddev_ms": row.spread.stddev,
        "blocks_ms": row.spread.blocks,
        "outliers": row.spread.outliers,
        "warmup_rounds": row.warm_up.rounds,
        "warmup_steady": row.warm_up.steady,
        "rounds": row.timing.millis.len(),
        "timing": row.timing.source.to_string(),
        "gflops": gflops,
        "gbps": gbps,
        "flops_per_byte": row.flops / row.bytes,
        "roof": common.roofline.map(|roofline| roofline.roof(row.flops, row.bytes).to_string()),
        "roof_share": common.roofline.map(|roofline| roofline.share(row.flops, row.bytes, median_ms)),
        "max_abs_error": row.max_abs_error,
        "first_ms": row.prepare_ms + row.first_run_ms,
        "prepare_ms": row.prepare_ms,
        "pipelines": row.pipelines,
        "first_run_ms": row.first_run_ms,
        "plan_us": row.plan_us,
        "bind_us": host.map(|host| us(&host.bind)),
        "bind_wgpu_us": host.map(|host| us(&host.bind_wgpu)),
        "encode_us": host.map(|host| us(&host.encode)),
        "encode_wgpu_us": host.map(|host| us(&host.encode_wgpu)),
        "kernels": kernels,
    })
}

/// Who chose the kernel: the plan, a tuned choice, or the flag that names it.
fn asked_kernel(common: &Common<'_>) -> String {
    match common.args.device.kernel {
        KernelChoice::Auto if common.args.tuned.is_given() => "tuned".to_owned(),
        KernelChoice::Auto => "auto".to_owned(),
        KernelChoice::Gpu(kernel) => kernel.to_string(),
        KernelChoice::Cpu(kernel) => kernel.name().to_owned(),
    }
}

const fn kind(device: &Device) -> &'static str {
    match device {
        Device::Cpu => "cpu",
        Device::Oracle => "oracle",
        Device::Gpu(_) => "gpu",
    }
}
