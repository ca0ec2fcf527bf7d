//! How rows are printed: a table for people, comma-separated values, Markdown, or JSON.

use std::fmt::Arguments;

use clap::ValueEnum;
use cross_attention::workload::Workload;
use cross_attention::{AttentionProblem, Timing};
use serde_json::Value;

use super::cases::Case;
use super::measure::Row;
use super::{Common, report, software};
use crate::error::Error;
use crate::record;
use crate::run::shape;
use crate::table::Table;
use crate::terminal::Terminal;
use crate::text::{shown, wrap};

/// What is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    #[default]
    Table,
    Csv,
    Markdown,
    Json,
}

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

/// Names of the values of a row, in the order of their columns; lists that have no cell of their own are left to JSON.
#[rustfmt::skip]
pub(super) const FIELDS: [&str; 69] = [
    "workload", "batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim", "v_head_dim", "element", "kv", "page_len",
    "output", "layout", "scale", "terms", "backward", "gradients", "kernel", "kernel_choice", "run",
    "median_ms", "mean_ms", "stddev_ms", "min_ms", "p10_ms", "p25_ms", "p75_ms", "p90_ms", "p99_ms", "max_ms", "rounds",
    "outliers", "warmup_rounds", "warmup_steady", "timing",
    "gflops", "gbps", "flops_per_byte", "roof", "roof_share", "peak_gflops", "peak_gbps", "peak_timing", "max_abs_error",
    "cold", "device_ms", "first_ms", "prepare_ms", "pipelines", "first_run_ms", "plan_us", "bind_us", "bind_wgpu_us",
    "encode_us", "encode_wgpu_us",
    "device", "adapter", "driver", "backend", "software", "cpu", "cores", "threads", "version", "commit", "rustc",
    "error", "blocks_ms", "kernels",
];

/// Of these, how many have a column.
const FLAT: usize = FIELDS.len() - 2;

/// Names of the values that have a column.
#[cfg(feature = "mpi")]
pub(super) fn flat_fields() -> &'static [&'static str] {
    &FIELDS[..FLAT]
}

/// Rows on their way to standard output.
#[derive(Debug)]
pub(super) struct Output {
    format: Format,
    table: Table,
    begun: bool,
}

impl Output {
    pub(super) fn new(format: Format) -> Self {
        Self { format, table: Table::new(&COLUMNS, 4..15), begun: false }
    }

    /// A line about all rows, which is none of them.
    pub(super) fn about(&self, line: Arguments<'_>, terminal: &mut Terminal) -> Result<(), Error> {
        if self.format == Format::Table {
            return terminal.line(line);
        }
        terminal.note(line);
        Ok(())
    }

    /// A line that the rows say too, for those who don't see them as programs do.
    pub(super) fn detail(&self, line: Arguments<'_>, terminal: &mut Terminal) -> Result<(), Error> {
        match self.format {
            Format::Table | Format::Markdown => self.about(line, terminal),
            Format::Csv | Format::Json => Ok(()),
        }
    }

    /// A row of its own.
    pub(super) fn row(
        &mut self,
        case: &Case,
        common: &Common<'_>,
        result: &Result<Row, Error>,
        row: &Value,
        terminal: &mut Terminal,
    ) -> Result<(), Error> {
        match self.format {
            Format::Table | Format::Markdown => {
                let mut cells = cells(case, common, result);
                if common.args.runs > 1 {
                    cells[0] += &format!(" #{}", row["run"]);
                }
                self.table.push(cells);
                Ok(())
            }
            Format::Csv => {
                if !std::mem::replace(&mut self.begun, true) {
                    terminal.line(format_args!("{}", FIELDS[..FLAT].join(",")))?;
                }
                terminal.line(format_args!("{}", csv(FIELDS[..FLAT].iter().map(|name| &row[*name]))))
            }
            Format::Json => terminal.line(format_args!("{row}")),
        }
    }

    /// What could not be printed before all rows were there.
    pub(super) fn finish(self, terminal: &mut Terminal) -> Result<(), Error> {
        print(&self.table, self.format, terminal)
    }
}

/// A table for people or for Markdown.
pub(super) fn print(table: &Table, format: Format, terminal: &mut Terminal) -> Result<(), Error> {
    match format {
        Format::Table => terminal.line(format_args!("{}", table.text(terminal.width()))),
        Format::Markdown => terminal.line(format_args!("{}", table.markdown())),
        Format::Csv | Format::Json => Ok(()),
    }
}

/// A line of comma-separated values: numbers as they are, texts in quotes where they need it, nothing for null.
pub(super) fn csv<'a>(values: impl Iterator<Item = &'a Value>) -> String {
    let cell = |value: &Value| match value {
        Value::Null => String::new(),
        Value::String(text) => quoted(text),
        Value::Array(list) => quoted(&list.iter().filter_map(Value::as_str).collect::<Vec<_>>().join("; ")),
        other => other.to_string(),
    };
    values.map(cell).collect::<Vec<_>>().join(",")
}

fn quoted(text: &str) -> String {
    if text.contains(['"', ',', '\n', '\r']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.to_owned() }
}

/// The workloads and their shapes.
///
/// # Errors
/// Standard output that can't be written.
pub(super) fn list(workloads: &[Workload], format: Format, terminal: &mut Terminal) -> Result<(), Error> {
    const NAMES: [&str; 9] =
        ["workload", "batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim", "v_head_dim", "about"];
    let header = if format == Format::Markdown { ["workload", "shape", "about"] } else { [""; 3] };
    let mut table = Table::new(&header, 0..0);
    if format == Format::Csv {
        terminal.line(format_args!("{}", NAMES.join(",")))?;
    }
    for workload in workloads {
        let problem = AttentionProblem::new(workload.spec.clone())?;
        let row = record::with_shape(&problem, [("workload", workload.name.into()), ("about", workload.about.into())]);
        match format {
            Format::Json => terminal.line(format_args!("{row}"))?,
            Format::Csv => terminal.line(format_args!("{}", csv(NAMES.iter().map(|name| &row[*name]))))?,
            Format::Table | Format::Markdown => {
                // on a terminal, lines break at words
                let width = terminal.width().filter(|_| format == Format::Table);
                let cell = |text: String| width.map_or(text.clone(), |width| wrap(&text, width.saturating_sub(20)));
                table.push(vec![workload.name.to_owned(), cell(shape(&problem)), cell(workload.about.to_owned())]);
            }
        }
    }
    print(&table, format, terminal)
}

/// The row of a case.
fn cells(case: &Case, common: &Common<'_>, result: &Result<Row, Error>) -> Vec<String> {
    let mut cells = vec![shown(&case.name), case.shape.short()];
    let Ok(row) = result else {
        cells.push("failed".to_owned());
        return cells;
    };
    let median_ms = row.timing.quantile(0.5);
    let (gflops, gbps) = report::rates(row);
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
    let mut times = [0.5, 0.1, 0.9].map(|share| ms(row.timing.quantile(share)));
    for shader in shaders.unwrap_or_default() {
        kernel += &format!("\n  {}", shader.shader.name());
        if shader.dispatches > 1 {
            kernel += &format!(" x {}", shader.dispatches);
        }
        for (text, share) in times.iter_mut().zip([0.5, 0.1, 0.9]) {
            *text += &format!("\n{}", ms(shader.timing.quantile(share)));
        }
    }
    cells.extend([kernel, case.shape.elements()]);
    cells.extend(times);
    cells.extend([
        format!("{gflops:.1}"),
        format!("{gbps:.1}"),
        of_roof,
        if row.plan_us.is_nan() { String::new() } else { format!("{:.1}", row.plan_us) },
        encode,
        format!("{:.1}", row.prepare_ms),
        format!("{:.1}", row.first_run_ms),
        format!("{:.1e}", row.max_abs_error),
        format!("{}{}", row.timing.source, if software(common.device) { ", software" } else { "" }),
    ]);
    cells
}

/// Milliseconds, with digits that still tell something of short ones.
pub(super) fn ms(millis: f64) -> String {
    let digits = if millis < 0.1 { 5 } else { 3 };
    format!("{millis:.digits$}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_keep_their_cells() {
        let row = json!({ "a": "x, \"y\"", "b": null, "c": 1.5, "d": ["mask", "bias f32"], "e": true });
        assert_eq!(
            csv(["a", "b", "c", "d", "e"].iter().map(|name| &row[*name])),
            "\"x, \"\"y\"\"\",,1.5,mask; bias f32,true"
        );
    }
}
