//! `map`: chosen attention weights of a file as a picture or a table.

use std::fmt::Write;
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use cross_attention::files::{Ours, OutputFile};
use cross_attention::weights::{AttentionWithWeights, HeadReduce, Keys, Select, WeightsProblem, WeightsSpec};
use cross_attention::{AttentionProblem, Device, DeviceRequest, Element};

use crate::draw::{self, HeatMap};
use crate::error::Error;
use crate::file::{Opened, Wish};
use crate::options::{Metadata, OptionFlags};
use crate::show;
use crate::terminal::Terminal;

const EXAMPLE: &str = "\
Examples:
  cross-attention map capture.safetensors --heads 0-4 --reduce mean --out map.png
  cross-attention map capture.safetensors --heads 2 --rows 3,7-9 --segments 0-99,100-199 --out mass.csv";

/// Draw or list attention weights of a file
///
/// The file is one that `run` takes. Positions count from 0; a list is numbers and ranges, 0-4,7, both ends included. Only
/// what is asked for is computed: first the attention, then these weights from its log-sum-exp.
///
/// The metadata may hold row_labels (labels, a JSON list of strings), seconds_per_key (the time a key stands for), and what
/// to show where no flag says it: show_heads (0,2,5) and show_keys (how many).
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// A safetensors file
    #[arg(value_name = "INPUT")]
    input: PathBuf,
    /// Where to write: a picture (.png) or a table (.csv)
    #[arg(short, long = "out", value_name = "FILE")]
    output: PathBuf,
    /// Query heads
    #[arg(long, value_name = "LIST", value_parser = list)]
    heads: Option<List>,
    /// What becomes of the heads: their mean, their sum, or a panel for each
    #[arg(long, value_enum, value_name = "HOW", default_value_t)]
    reduce: ReduceName,
    /// Query rows
    #[arg(long, value_name = "LIST", value_parser = list)]
    rows: Option<List>,
    /// Keys
    #[arg(long, value_name = "LIST", value_parser = list, conflicts_with = "segments")]
    keys: Option<List>,
    /// Ranges of keys, each to be summed up
    #[arg(long, value_name = "LIST", value_parser = list)]
    segments: Option<List>,
    /// Entry of the batch
    #[arg(long, value_name = "N", default_value_t = 0)]
    batch: usize,
    /// Where to compute: auto (a hardware GPU, else the CPU), cpu, oracle (f64, slow), gpu, the number of an adapter as
    /// `devices` lists it, a backend (vulkan, metal, dx12, gl), or part of an adapter's name
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceRequest,
    /// Say nothing but errors
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    options: OptionFlags,
}

/// What becomes of heads, by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum ReduceName {
    #[default]
    Mean,
    Sum,
    None,
}

/// What can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Png,
    Csv,
}

impl Format {
    /// What a file must be that is replaced.
    const fn ours(self) -> Ours {
        match self {
            Self::Png => Ours { what: "a picture (PNG)", is: |head| head.starts_with(b"\x89PNG\r\n\x1a\n") },
            Self::Csv => Ours { what: "a table of this program", is: |head| head.starts_with(CSV_START.as_bytes()) },
        }
    }
}

/// What every table starts with.
const CSV_START: &str = "heads,row,label";

/// Positions as they were asked for, each a range.
#[derive(Clone, Debug, PartialEq, Eq)]
struct List(Vec<RangeInclusive<u64>>);

/// What would have been right.
#[derive(Debug, thiserror::Error)]
#[error("needs numbers and ranges such as 0-4,7")]
struct WantedList;

fn list(text: &str) -> Result<List, WantedList> {
    let range = |part: &str| {
        let part = part.trim();
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(number(first.trim())?..=number(last.trim())?)
    };
    text.split(',').map(range).collect::<Option<Vec<_>>>().map(List).ok_or(WantedList)
}

/// A whole number; one that cannot be counted is further than any file reaches.
fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().unwrap_or(u64::MAX))
}

impl List {
    /// The ranges of positions below `len`; none of them is empty.
    fn ranges(&self, axis: &'static str, len: usize) -> Result<Vec<Range<usize>>, Error> {
        let range = |range: &RangeInclusive<u64>| {
            let (start, last) = (*range.start(), *range.end());
            let asked = if start == last { start.to_string() } else { format!("{start}-{last}") };
            let refused = |wrong| Err(Error::Positions { axis, asked: asked.clone(), wrong, len });
            match (usize::try_from(start), usize::try_from(last)) {
                _ if start > last => refused("it ends before it starts"),
                (Ok(start), Ok(last)) if last < len => Ok(start..last + 1),
                _ if start == last => refused("there is no such position"),
                _ => refused("it reaches past the end"),
            }
        };
        self.0.iter().map(range).collect()
    }

    fn select(&self, axis: &'static str, len: usize) -> Result<Select, Error> {
        Ok(Select::List(self.ranges(axis, len)?.into_iter().flatten().collect()))
    }
}

/// Computes and writes the weights.
///
/// # Errors
/// A file that is refused, positions that are not there, a file that can't be written.
pub(crate) fn map(args: &Args, terminal: &mut Terminal) -> Result<(), Error> {
    let format = format(&args.output)?;
    if args.output.canonicalize().is_ok_and(|output| args.input.canonicalize().is_ok_and(|input| input == output)) {
        return Err(Error::OutputIsInput { output: args.output.clone() });
    }
    // tried before anything is computed
    OutputFile::check(&args.output, format.ours())?;
    let named = |source| Error::Input { path: args.input.clone(), source: Box::new(source) };
    let wish = Wish { output: Element::F32, probs: false, backward: false };
    let opened = Opened::open(&args.input, &args.options, wish, terminal).map_err(named)?;
    let request = &opened.request;
    let problem = &request.problem;
    if !args.quiet {
        request.warn(&args.input, terminal);
        show::warn(problem, &request.metadata, &args.input, terminal);
    }
    if args.batch >= problem.batch() {
        return Err(Error::Batch { found: args.batch, batch: problem.batch() });
    }
    let spec = spec(args, problem, &request.metadata)?;
    let wanted = WeightsProblem::new(problem, &spec).map_err(cross_attention::Error::from)?;
    if wanted.elements() == 0 {
        return Err(Error::NoWeights { shape: wanted.shape() });
    }
    if Vec::<f32>::new().try_reserve_exact(wanted.elements()).is_err() {
        return Err(Error::Memory { bytes: 4 * wanted.elements() as u128 });
    }
    let choice = Device::choose_blocking(&args.device)?;
    if !args.quiet {
        terminal.line(format_args!("device: {choice}"))?;
    }
    let operands = opened.operands().map_err(named)?;
    let work = terminal.start_work(&format!("computing on {}", choice.device.name()));
    let result = choice.device.attention_with_weights_blocking(problem, &operands.as_inputs(), &spec);
    work.finish_and_clear();
    let result = result?;
    let table = Table::new(&spec, problem, &request.metadata, args.batch, &result);
    let bytes = match format {
        Format::Csv => table.csv().into_bytes(),
        Format::Png => table.png(&args.output)?,
    };
    OutputFile::write(&args.output, format.ours(), &bytes)?;
    if !args.quiet {
        let [_, heads, rows, columns] = result.shape;
        let output = args.output.display();
        let count = |n: usize, one: &str| if n == 1 { format!("1 {one}") } else { format!("{n} {one}s") };
        let columns = count(columns, if args.segments.is_some() { "segment" } else { "key" });
        let heads = match (args.reduce, positions(&spec.heads, problem.q_heads()).len()) {
            (ReduceName::None, _) => count(heads, "head"),
            (ReduceName::Mean, of) => format!("the mean of {}", count(of, "head")),
            (ReduceName::Sum, of) => format!("the sum of {}", count(of, "head")),
        };
        terminal.line(format_args!("{output}: {heads}, {} by {columns}", count(rows, "row")))?;
    }
    Ok(())
}

fn format(path: &Path) -> Result<Format, Error> {
    let is = |wanted: &str| path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(wanted));
    match (is("png"), is("csv")) {
        (true, _) => Ok(Format::Png),
        (_, true) => Ok(Format::Csv),
        (false, false) => Err(Error::MapFormat { path: path.to_owned() }),
    }
}

/// What the flags ask for; where they do not, what the metadata says is worth showing.
fn spec(args: &Args, problem: &AttentionProblem, metadata: &Metadata) -> Result<WeightsSpec, Error> {
    let heads = match &args.heads {
        Some(heads) => heads.select("heads", problem.q_heads())?,
        None => Select::List(show::heads(problem, metadata)),
    };
    let rows = match &args.rows {
        Some(rows) => rows.select("rows", problem.q_len())?,
        None => Select::All,
    };
    let shown = show::number(metadata, "show_keys").filter(|&keys| keys > 0 && keys <= problem.kv_len());
    let keys = match (&args.keys, &args.segments) {
        (_, Some(segments)) => Keys::Segments(segments.ranges("segments", problem.kv_len())?),
        (Some(keys), None) => Keys::Each(keys.select("keys", problem.kv_len())?),
        (None, None) => Keys::Each(shown.map_or(Select::All, |keys| Select::Range(0..keys))),
    };
    let reduce = match args.reduce {
        ReduceName::Mean => HeadReduce::Mean,
        ReduceName::Sum => HeadReduce::Sum,
        ReduceName::None => HeadReduce::Each,
    };
    Ok(WeightsSpec { heads, reduce, rows, keys })
}

fn positions(select: &Select, len: usize) -> Vec<usize> {
    match select {
        Select::All => (0..len).collect(),
        Select::Range(range) => range.clone().collect(),
        Select::List(list) => list.clone(),
    }
}

/// The weights of one batch entry, with names.
struct Table<'a> {
    /// `[heads, rows, columns]`
    weights: &'a [f32],
    heads: Vec<String>,
    rows: Vec<usize>,
    labels: Vec<String>,
    keys: Columns,
    seconds: Option<f64>,
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
    fn new(
        spec: &WeightsSpec,
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
        Self { weights: &result.weights[batch * entry..][..entry], heads, rows, labels, keys, seconds }
    }

    /// A line of names, then a line a head and row: its numbers, its label, its weights.
    fn csv(&self) -> String {
        let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
        let mut text = CSV_START.to_owned();
        // writing to a String cannot fail
        let mut name = |name: std::fmt::Arguments<'_>| {
            let _ = write!(text, ",{name}");
        };
        match (&self.keys, self.seconds) {
            (Columns::Keys(keys), Some(seconds)) => {
                keys.iter().for_each(|&key| name(format_args!("{:.3} s", key as f64 * seconds)));
            }
            (Columns::Keys(keys), None) => keys.iter().for_each(|key| name(format_args!("key {key}"))),
            (Columns::Segments(segments), _) => {
                segments.iter().for_each(|keys| name(format_args!("keys {} to {}", keys.start, keys.end - 1)));
            }
        }
        text.push('\n');
        let mut lines = self.weights.chunks(self.keys.len());
        for head in &self.heads {
            for (row, label) in self.rows.iter().zip(&self.labels) {
                let _ = write!(text, "{},{row},{}", quoted(head), quoted(label.trim()));
                for weight in lines.next().unwrap_or_default() {
                    let _ = write!(text, ",{weight}");
                }
                text.push('\n');
            }
        }
        text
    }

    /// A panel a head.
    fn png(&self, path: &Path) -> Result<Vec<u8>, Error> {
        let (ticks, axis) = self.ticks();
        let panels: Vec<_> = self
            .weights
            .chunks(self.rows.len() * self.keys.len())
            .zip(&self.heads)
            .map(|(values, title)| HeatMap {
                title: title.clone(),
                values,
                columns: self.keys.len(),
                row_labels: &self.labels,
                ticks: &ticks,
                axis,
            })
            .collect();
        let [width, height] = draw::size(&panels);
        if width.saturating_mul(height) > MAX_PIXELS {
            return Err(Error::LargePicture { width, height, max: MAX_PIXELS });
        }
        let failed = |error: png::EncodingError| Error::Picture { path: path.to_owned(), source: error.into() };
        draw::draw(&panels).png().map_err(failed)
    }

    /// Ticks under the columns, and what they count.
    fn ticks(&self) -> (Vec<(f64, String)>, &'static str) {
        let keys = match &self.keys {
            Columns::Segments(segments) => {
                let label =
                    |(n, keys): (usize, &Range<usize>)| (n as f64 + 0.5, format!("{}-{}", keys.start, keys.end - 1));
                return (segments.iter().enumerate().map(label).collect(), "keys");
            }
            Columns::Keys(keys) => keys,
        };
        let first = keys.first().copied().unwrap_or(0);
        let side_by_side = keys.iter().enumerate().all(|(n, &key)| key == first + n);
        let unit = self.seconds.unwrap_or(1.0);
        let axis = if self.seconds.is_some() { "seconds" } else { "key" };
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

/// Pixels that a picture may have.
const MAX_PIXELS: usize = 1 << 26;

/// 1, 2 or 5 times a power of ten, so that about ten of them make up `span`.
fn tick_step(span: f64, whole: bool) -> f64 {
    let wanted = span / 10.0;
    let power = 10f64.powf(wanted.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|n| n * power).find(|step| *step >= wanted).unwrap_or(wanted);
    if whole { step.max(1.0) } else { step }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read() {
        assert_eq!(list("0-4, 7").unwrap(), List(vec![0..=4, 7..=7]));
        for wrong in ["", "x", "1-", "1,,2", "-1", "1-2-3", "+1", "1e3"] {
            assert!(list(wrong).is_err(), "{wrong}");
        }
        assert_eq!(list("3,1-2").unwrap().select("keys", 4).unwrap(), Select::List(vec![3, 1, 2]));
        let error = list("2-9").unwrap().select("keys", 4).unwrap_err();
        assert_eq!(error.to_string(), "--keys 2-9: it reaches past the end; the file has 4 keys, 0 to 3");
        for (text, message) in [
            ("3-1", "--rows 3-1: it ends before it starts; the file has 4 rows, 0 to 3"),
            ("1,4", "--rows 4: there is no such position; the file has 4 rows, 0 to 3"),
            ("0-999999999999", "--rows 0-999999999999: it reaches past the end; the file has 4 rows, 0 to 3"),
        ] {
            assert_eq!(list(text).unwrap().select("rows", 4).unwrap_err().to_string(), message);
        }
        assert!(list("99999999999999999999999").unwrap().select("keys", 4).is_err());
        assert!(list("0-4294967295").unwrap().select("keys", 4).is_err());
    }

    #[test]
    fn steps_are_round() {
        let steps = [10.7, 77.0, 4.0, 1500.0, 0.3].map(|span| tick_step(span, false));
        for (step, wanted) in steps.into_iter().zip([2.0, 10.0, 0.5, 200.0, 0.05]) {
            assert!((step - wanted).abs() < 1e-9, "{step}, not {wanted}");
        }
        assert!((tick_step(4.0, true) - 1.0).abs() < 1e-9);
    }
}
