//! The weights of one batch entry, with names: as a table and as a picture.

use std::fmt::Write;
use std::ops::Range;
use std::path::Path;

use cross_attention::AttentionProblem;
use cross_attention::weights::{AttentionWithWeights, HeadReduce, Keys, WeightsSpec};

use super::{positions, room};
use crate::draw::heat::{Figure, HeatMap};
use crate::draw::scale::{Spacing, round_step};
use crate::draw::scene::{MAX_PIXELS, Scene};
use crate::error::Error;
use crate::options::Metadata;
use crate::show::{self, ranges};

/// What every table starts with.
pub(super) const CSV_START: &str = "heads,row,label";

/// Bytes that a pixel takes at most while a picture is written: as an image, drawn, encoded, and as the text of an SVG.
const PIXEL_BYTES: usize = 28;

/// The weights of one batch entry, with names.
pub(super) struct Table<'a> {
    /// `[heads, rows, columns]`
    weights: &'a [f32],
    heads: Vec<String>,
    rows: Vec<usize>,
    labels: Vec<String>,
    keys: Columns,
    seconds: Option<f64>,
    /// `[heads, rows]`: rows that see no key.
    keyless: Vec<bool>,
    /// What a picture says of the file, of each panel, and of what is left out.
    about: String,
    titles: Vec<String>,
    notes: Vec<String>,
}

/// Text that grows as far as there is memory.
#[derive(Default)]
struct Text {
    bytes: Vec<u8>,
    /// What there was no memory for.
    refused: usize,
}

impl Write for Text {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        if self.bytes.try_reserve(text.len()).is_err() {
            self.refused = self.bytes.len() + text.len();
            return Err(std::fmt::Error);
        }
        self.bytes.extend_from_slice(text.as_bytes());
        Ok(())
    }
}

/// What the columns are.
enum Columns {
    Keys(Vec<usize>),
    Segments(Vec<Range<usize>>),
}

impl Columns {
    const fn len(&self) -> usize {
        match self {
            Self::Keys(keys) => keys.len(),
            Self::Segments(segments) => segments.len(),
        }
    }
}

impl<'a> Table<'a> {
    pub(super) fn new(
        (path, spec): (&Path, &WeightsSpec),
        problem: &AttentionProblem,
        metadata: &Metadata,
        batch: usize,
        result: &'a AttentionWithWeights,
    ) -> Self {
        let [_, heads, rows, columns] = result.shape;
        let entry = heads * rows * columns;
        let chosen = positions(&spec.heads, problem.q_heads());
        let all = || chosen.iter().map(usize::to_string).collect::<Vec<_>>().join(" ");
        let heads = match spec.reduce {
            HeadReduce::Each => chosen.iter().map(|head| format!("head {head}")).collect(),
            HeadReduce::Mean => vec![format!("mean of heads {}", all())],
            HeadReduce::Sum => vec![format!("sum of heads {}", all())],
        };
        let rows = positions(&spec.rows, problem.q_len());
        let named = show::labels(metadata);
        let labels = rows.iter().map(|&row| named.get(row).cloned().unwrap_or_else(|| row.to_string())).collect();
        let keys = match &spec.keys {
            Keys::Each(keys) => Columns::Keys(positions(keys, problem.kv_len())),
            Keys::Segments(segments) => Columns::Segments(segments.clone()),
        };
        let seconds = show::seconds(metadata);
        let name = path.file_name().unwrap_or_default().display();
        let reduced = |how: &str| match &chosen[..] {
            [head] => vec![format!("head {head}")],
            heads => vec![format!("{how} of heads {}", ranges(heads))],
        };
        let titles = match spec.reduce {
            HeadReduce::Each => heads.clone(),
            HeadReduce::Mean => reduced("mean"),
            HeadReduce::Sum => reduced("sum"),
        };
        let notes = [
            (problem.batch() > 1).then(|| format!("batch entry {batch} of {}", problem.batch())),
            part("heads", &chosen, problem.q_heads()),
            part("queries", &rows, problem.q_len()),
            if let Columns::Keys(keys) = &keys { part("keys", keys, problem.kv_len()) } else { None },
        ];
        let notes: Vec<_> = notes.into_iter().flatten().collect();
        // the sum over no key has no logarithm; a sink would be one
        let blind = |head: usize, row: usize| {
            let lse = result
                .attention
                .lse
                .as_ref()
                .and_then(|lse| lse.get((batch * problem.q_heads() + head) * problem.q_len() + row));
            lse.is_some_and(|lse| *lse == f32::NEG_INFINITY)
        };
        let panels: Vec<&[usize]> = match spec.reduce {
            HeadReduce::Each => chosen.chunks(1).collect(),
            HeadReduce::Mean | HeadReduce::Sum => vec![&chosen],
        };
        let of_panel = |heads: &&[usize]| -> Vec<bool> {
            rows.iter().map(|&row| heads.iter().all(|&head| blind(head, row))).collect()
        };
        let keyless = panels.iter().flat_map(of_panel).collect();
        Self {
            weights: &result.weights[batch * entry..][..entry],
            heads,
            rows,
            labels,
            keys,
            seconds,
            keyless,
            about: format!("Attention weights of {name}"),
            titles,
            notes: if notes.is_empty() { vec![] } else { vec![notes.join("; ")] },
        }
    }

    /// A line of names, then a line a head and row: its numbers, its label, its weights.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub(super) fn csv(&self) -> Result<Vec<u8>, Error> {
        let mut text = Text::default();
        match self.write_csv(&mut text) {
            Ok(()) => Ok(text.bytes),
            Err(std::fmt::Error) => Err(Error::Memory { bytes: text.refused as u128 }),
        }
    }

    fn write_csv(&self, text: &mut Text) -> std::fmt::Result {
        let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
        text.write_str(CSV_START)?;
        match (&self.keys, self.seconds) {
            (Columns::Keys(keys), Some(seconds)) => {
                keys.iter().try_for_each(|&key| write!(text, ",{:.3} s", key as f64 * seconds))?;
            }
            (Columns::Keys(keys), None) => keys.iter().try_for_each(|key| write!(text, ",key {key}"))?,
            (Columns::Segments(segments), _) => {
                segments.iter().try_for_each(|keys| write!(text, ",keys {} to {}", keys.start, keys.end - 1))?;
            }
        }
        text.write_char('\n')?;
        let mut lines = self.weights.chunks(self.keys.len());
        for head in &self.heads {
            for (row, label) in self.rows.iter().zip(&self.labels) {
                write!(text, "{},{row},{}", quoted(head), quoted(label.trim()))?;
                lines.next().unwrap_or_default().iter().try_for_each(|weight| write!(text, ",{weight}"))?;
                text.write_char('\n')?;
            }
        }
        Ok(())
    }

    /// A panel a head.
    ///
    /// # Errors
    /// [`Error::LargePicture`], [`Error::Memory`].
    pub(super) fn scene(&self, spacing: Spacing, each: bool) -> Result<Scene, Error> {
        let (ticks, axis) = self.ticks();
        let single = self.heads.len() == 1;
        let of_panel = self.rows.len() * self.keys.len();
        let panels = self.weights.chunks(of_panel).zip(self.keyless.chunks(self.rows.len())).zip(&self.titles);
        let panels = panels.map(|((values, keyless), title)| HeatMap {
            title: if single { String::new() } else { title.clone() },
            values,
            columns: self.keys.len(),
            row_labels: &self.labels,
            ticks: &ticks,
            axes: ["query", &axis],
            keyless,
            marks: &[],
        });
        let title = if single { format!("{}, {}", self.about, self.titles[0]) } else { self.about.clone() };
        let unit = if matches!(self.keys, Columns::Keys(_)) { "weight" } else { "sum of the weights of a segment" };
        let figure =
            Figure { title, notes: self.notes.clone(), panels: panels.collect(), unit, spacing, each, marks: "" };
        let [width, height] = figure.size();
        if width.saturating_mul(height) > MAX_PIXELS {
            return Err(Error::LargePicture { width, height, max: MAX_PIXELS });
        }
        room(width * height * PIXEL_BYTES)?;
        Ok(figure.scene())
    }

    /// Ticks under the columns, and what they count.
    fn ticks(&self) -> (Vec<(f64, String)>, String) {
        let keys = match &self.keys {
            Columns::Segments(segments) => {
                let label =
                    |(n, keys): (usize, &Range<usize>)| (n as f64 + 0.5, format!("{}-{}", keys.start, keys.end - 1));
                return (segments.iter().enumerate().map(label).collect(), "segment of keys".to_owned());
            }
            Columns::Keys(keys) => keys,
        };
        let first = keys.first().copied().unwrap_or(0);
        let side_by_side = keys.iter().enumerate().all(|(n, &key)| key == first + n);
        let unit = self.seconds.unwrap_or(1.0);
        let axis = self.seconds.map_or("key".to_owned(), |seconds| format!("time in seconds ({seconds} s a key)"));
        let digits = usize::from(self.seconds.is_some());
        if !side_by_side {
            let label = |(n, &key): (usize, &usize)| (n as f64 + 0.5, format!("{:.*}", 2 * digits, key as f64 * unit));
            return (keys.iter().enumerate().map(label).collect(), axis);
        }
        // a key's number stands under its middle, a time at its start
        let shift = if self.seconds.is_some() { 0.0 } else { 0.5 };
        let step = tick_step(keys.len() as f64 * unit, self.seconds.is_none());
        let (from, to) = (first as f64 * unit, (first + keys.len()) as f64 * unit);
        let mut ticks = vec![];
        let mut n = (from / step).ceil();
        while n * step <= to {
            let place = n * step / unit - first as f64 + shift;
            if place <= keys.len() as f64 {
                let digits = if step < 1.0 { digits + 1 } else { digits };
                ticks.push((place, format!("{:.*}", digits, n * step)));
            }
            n += 1.0;
        }
        (ticks, axis)
    }
}

/// 1, 2 or 5 times a power of ten, so that about ten of them make up `span`.
fn tick_step(span: f64, whole: bool) -> f64 {
    let step = round_step(span / 10.0);
    if whole { step.max(1.0) } else { step }
}

/// Which of the positions of an axis these are; nothing where they are all.
fn part(what: &str, chosen: &[usize], all: usize) -> Option<String> {
    if chosen.iter().copied().eq(0..all) {
        return None;
    }
    let ranges = ranges(chosen);
    let which = if ranges.len() <= 60 { ranges } else { format!("{} chosen ones", chosen.len()) };
    Some(format!("{what} {which} of {all}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_round() {
        let steps = [10.7, 77.0, 4.0, 1500.0, 0.3].map(|span| tick_step(span, false));
        for (step, wanted) in steps.into_iter().zip([2.0, 10.0, 0.5, 200.0, 0.05]) {
            assert!((step - wanted).abs() < 1e-9, "{step}, not {wanted}");
        }
        assert!((tick_step(4.0, true) - 1.0).abs() < 1e-9);
    }
}
