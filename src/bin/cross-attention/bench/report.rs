//! What `bench` says: a table for people, a line of JSON for programs.

use cross_attention::workload::Workload;
use cross_attention::{Device, Timing};
use serde_json::{Value, json};

use super::{Common, Row, software};
use crate::error::Error;
use crate::table::Table;
use crate::terminal::Terminal;

const COLUMNS: [&str; 16] = [
    "workload",
    "batch x heads x q_len x kv_len x dim",
    "kernel",
    "element",
    "median ms",
    "p10",
    "p90",
    "GFLOP/s",
    "GB/s",
    "of roof",
    "plan us",
    "encode us",
    "prepare ms",
    "first run",
    "max error",
    "timing",
];

/// What holds for all rows, and how the first result came about.
pub(super) fn opening(
    common: &Common<'_>,
    workload: &Workload,
    first: &Result<Row, Error>,
    terminal: &mut Terminal,
) -> Result<(), Error> {
    if let Some(roofline) = &common.roofline {
        terminal.line(format_args!(
            "peak: {:.1} GFLOP/s, {:.1} GB/s, measured ({}); memory limits below {:.1} FLOP a byte",
            roofline.gflops,
            roofline.gbps,
            roofline.timing,
            roofline.ridge(),
        ))?;
    }
    if let Ok(row) = first {
        terminal.line(format_args!(
            "cold start: {:.1} ms from the start of the program to the device, {:.1} to plan and make {} pipelines, \
             {:.1} for the first run of {}",
            common.device_ms, row.prepare_ms, row.pipelines, row.first_run_ms, workload.name,
        ))?;
    }
    Ok(())
}

pub(super) fn headed_table() -> Table {
    Table::new(&COLUMNS, 4..15)
}

/// The row of a workload.
pub(super) fn add_row(table: &mut Table, workload: &Workload, common: &Common<'_>, result: &Result<Row, Error>) {
    let mut cells = vec![workload.name.to_owned(), short_shape(workload)];
    let Ok(row) = result else {
        cells.push("failed".to_owned());
        table.push(cells);
        return;
    };
    let median_ms = row.timing.quantile(0.5);
    let (gflops, gbps) = rates(row);
    let of_roof = common.roofline.map_or_else(String::new, |roofline| {
        let share = roofline.share(row.flops, row.bytes, median_ms);
        format!("{:.0} % {}", share * 100.0, roofline.roof(row.flops, row.bytes))
    });
    let encode = row.gpu.as_ref().map_or_else(String::new, |gpu| {
        let us = |timing: &Timing| timing.quantile(0.5) * 1e3;
        format!("{:.1}, wgpu's {:.1}", us(&gpu.host.encode), us(&gpu.host.encode_wgpu))
    });
    // a line for each shader under that of the whole, where there are several
    let shaders = row.gpu.as_ref().and_then(|gpu| gpu.kernels.as_deref()).filter(|shaders| shaders.len() > 1);
    let mut kernel = row.kernel.to_owned();
    let mut times = [0.5, 0.1, 0.9].map(|share| format!("{:.3}", row.timing.quantile(share)));
    for shader in shaders.unwrap_or_default() {
        kernel += &format!("\n  {}", shader.shader.name());
        if shader.dispatches > 1 {
            kernel += &format!(" x {}", shader.dispatches);
        }
        for (text, share) in times.iter_mut().zip([0.5, 0.1, 0.9]) {
            *text += &format!("\n{:.3}", shader.timing.quantile(share));
        }
    }
    let element = common.args.element;
    cells.extend([kernel, common.args.kv.words().map_or_else(|| element.to_string(), |kv| format!("{element}, {kv}"))]);
    cells.extend(times);
    cells.extend([
        format!("{gflops:.1}"),
        format!("{gbps:.1}"),
        of_roof,
        format!("{:.1}", row.plan_us),
        encode,
        format!("{:.1}", row.prepare_ms),
        format!("{:.1}", row.first_run_ms),
        format!("{:.1e}", row.max_abs_error),
        format!("{}{}", row.timing.source, if software(common.device) { ", software" } else { "" }),
    ]);
    table.push(cells);
}

/// `batch x q_heads/kv_heads x q_len x kv_len x head_dim/v_head_dim`, where equal ones are named once.
fn short_shape(workload: &Workload) -> String {
    let [batch, q_heads, q_len, head_dim] = workload.spec.query.layout.shape;
    let [_, kv_heads, kv_len, _] = workload.spec.key.layout.shape;
    let pair = |first, second| if first == second { format!("{first}") } else { format!("{first}/{second}") };
    let (heads, dim) = (pair(q_heads, kv_heads), pair(head_dim, workload.spec.value.layout.shape[3]));
    format!("{batch} x {heads} x {q_len} x {kv_len} x {dim}")
}

/// GFLOP/s and GB/s at the median.
fn rates(row: &Row) -> (f64, f64) {
    let median_ms = row.timing.quantile(0.5);
    (row.flops / (median_ms * 1e6), row.bytes / (median_ms * 1e6))
}

/// One workload as an object. `cold`: nothing ran on the device before.
pub(super) fn as_json(workload: &Workload, common: &Common<'_>, result: &Result<Row, Error>, cold: bool) -> Value {
    let device = common.device;
    let [batch, q_heads, q_len, head_dim] = workload.spec.query.layout.shape;
    let [_, kv_heads, kv_len, _] = workload.spec.key.layout.shape;
    let mut object = json!({
        "workload": workload.name,
        "device": kind(device),
        "adapter": device.name(),
        "driver": device.driver(),
        "backend": device.backend(),
        "software": software(device),
        "element": common.args.element.name(),
        "kv": common.args.kv.format().unwrap_or(common.args.element.name()),
        "page_len": common.args.kv.page_len(),
        "batch": batch,
        "q_heads": q_heads,
        "kv_heads": kv_heads,
        "q_len": q_len,
        "kv_len": kv_len,
        "head_dim": head_dim,
        "v_head_dim": workload.spec.value.layout.shape[3],
        "peak_gflops": common.roofline.map(|roofline| roofline.gflops),
        "peak_gbps": common.roofline.map(|roofline| roofline.gbps),
        "peak_timing": common.roofline.map(|roofline| roofline.timing.to_string()),
        "device_ms": common.device_ms,
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
        "median_ms": median_ms,
        "p10_ms": row.timing.quantile(0.1),
        "p90_ms": row.timing.quantile(0.9),
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

const fn kind(device: &Device) -> &'static str {
    match device {
        Device::Cpu => "cpu",
        Device::Oracle => "oracle",
        Device::Gpu(_) => "gpu",
    }
}
