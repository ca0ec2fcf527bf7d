//! `bench --plot`: the rates of all rows under the measured roofs of the device.

mod chart;
mod labels;
mod write;

use std::path::Path;

use cross_attention::files::{Ours, OutputFile};
use serde_json::Value;

use super::error::BenchError;
use crate::draw::scene::Format;
use crate::error::Error;

use chart::{Chart, Point};

/// A picture that will be drawn.
#[derive(Debug)]
pub(super) struct Plot<'a> {
    path: &'a Path,
    format: Format,
}

/// What a file must be that is replaced.
const fn ours(format: Format) -> Ours {
    match format {
        Format::Svg => Ours { what: "a picture (SVG)", is: |head| Format::Svg.starts(head) },
        Format::Png => Ours { what: "a picture (PNG)", is: |head| Format::Png.starts(head) },
    }
}

impl<'a> Plot<'a> {
    /// Sees to it that the picture can be written, before anything is timed.
    ///
    /// # Errors
    /// [`BenchError::PlotFormat`], [`Error::Output`].
    pub(super) fn open(path: &'a Path) -> Result<Self, Error> {
        let format = Format::of(path).ok_or_else(|| BenchError::PlotFormat { path: path.to_owned() })?;
        OutputFile::check(path, ours(format))?;
        Ok(Self { path, format })
    }

    /// Draws rows of one run.
    ///
    /// # Errors
    /// [`BenchError::NothingToPlot`], [`Error::Output`], [`Error::Picture`].
    pub(super) fn draw<'r>(self, rows: impl Iterator<Item = &'r Value>) -> Result<(), Error> {
        let rows: Vec<_> = rows.collect();
        let nothing = || BenchError::NothingToPlot { path: self.path.to_owned() };
        let chart = chart_of(&rows).ok_or_else(nothing)?;
        let bytes = write::scene(&chart.drawing())
            .encode(self.format)
            .map_err(|source| Error::Picture { path: self.path.to_owned(), source })?;
        Ok(OutputFile::write(self.path, ours(self.format), &bytes)?)
    }
}

/// What the rows say; `None` if none of them was timed.
fn chart_of(rows: &[&Value]) -> Option<Chart> {
    let above_0 = |value: &Value| value.as_f64().filter(|number| number.is_finite() && *number > 0.0);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let point = |row: &&Value| {
        let (intensity, rate) = (above_0(&row["flops_per_byte"])?, above_0(&row["gflops"])?);
        Some(Point { name: text(&row["workload"]), kind: text(&row["kernel"]), intensity, rate })
    };
    let points: Vec<_> = rows.iter().filter_map(point).collect();
    let first = rows.first().filter(|_| !points.is_empty())?;
    let backward = if first["backward"] == Value::Bool(true) { ", backward" } else { "" };
    let left_out = match rows.len() - points.len() {
        0 => vec![],
        count => vec![format!("{count} not drawn: failed, or no work")],
    };
    let mut notes = match first["device"].as_str() {
        Some("cpu") => vec![text(&first["cpu"])],
        _ => vec![text(&first["driver"])],
    };
    let mut elements: Vec<_> = rows.iter().map(|row| text(&row["element"])).collect();
    elements.dedup();
    if first["software"] == Value::Bool(true) {
        notes.push("software: says nothing about GPUs".to_owned());
    }
    notes.push(format!("element type {}", elements.join(", ")));
    notes.extend(left_out);
    Some(Chart {
        title: format!("Roofline of {}{backward}", text(&first["adapter"])),
        roofs: above_0(&first["peak_gflops"]).zip(above_0(&first["peak_gbps"])),
        points,
        notes,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row(name: &str, intensity: f64, rate: f64) -> Value {
        json!({
            "workload": name, "kernel": "fused", "adapter": "a <device>", "flops_per_byte": intensity, "gflops": rate,
            "peak_gflops": 100.0, "peak_gbps": 10.0, "cpu": "a cpu", "threads": 2, "device": "cpu",
        })
    }

    fn text(drawing: &[chart::Mark]) -> String {
        String::from_utf8(write::scene(drawing).encode(Format::Svg).unwrap()).unwrap()
    }

    #[test]
    fn all_that_was_timed_is_drawn() {
        let rows = [row("one", 0.5, 3.0), row("two & three", 40.0, 80.0), json!({"workload": "x", "error": "no"})];
        let drawing = chart_of(&rows.iter().collect::<Vec<_>>()).unwrap().drawing();
        let svg = text(&drawing);
        for text in [
            "a &lt;device&gt;",
            ">one<",
            ">two &amp; three<",
            "100.0 GFLOP/s",
            "10.0 GB/s",
            "FLOP a byte",
            "1 not drawn",
        ] {
            assert!(svg.contains(text), "{text}: {svg}");
        }
        assert_eq!(svg.matches("<circle").count(), 6, "two points and one of the legend, each with its rim");
        assert!(write::scene(&drawing).encode(Format::Png).unwrap().starts_with(b"\x89PNG"));
        assert!(chart_of(&[&rows[2]]).is_none() && chart_of(&[]).is_none());
    }

    #[test]
    fn any_rows_can_be_drawn() {
        let extremes = [row("a", 1e-300, 1e300), row("b", 1e300, 1e-300), row(&"long ".repeat(99), 1.0, 1.0)];
        let same: Vec<_> = (0..200).map(|n| row(&format!("workload {n}"), 8.0, 50.0)).collect();
        let mut without_roofs = row("a", 1.0, 1.0);
        without_roofs["peak_gflops"] = Value::Null;
        for rows in [&extremes[..], &same, &[without_roofs]] {
            let drawing = chart_of(&rows.iter().collect::<Vec<_>>()).unwrap().drawing();
            assert!(!text(&drawing).contains("NaN"));
            assert!(write::scene(&drawing).encode(Format::Png).is_ok());
        }
    }
}
