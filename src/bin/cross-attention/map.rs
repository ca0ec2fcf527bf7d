//! `map`: chosen attention weights of a file as a picture or a table.

mod list;
mod table;

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use cross_attention::files::{Ours, OutputFile};
use cross_attention::weights::{HeadReduce, Keys, Select, WeightsProblem, WeightsSpec};
use cross_attention::{AttentionProblem, Device, DeviceRequest};

use crate::draw::scale::Spacing;
use crate::draw::scene;
use crate::error::Error;
use crate::file::{FileFlags, Opened, Wish, reserved};
use crate::input::{Source, is_dash};
use crate::options::Metadata;
use crate::output;
use crate::show;
use crate::terminal::Terminal;
use crate::text::ShownPath as _;
use list::{List, list};
use table::{CSV_START, Table};

const EXAMPLE: &str = "\
Examples:
  cross-attention map capture.safetensors --heads 0-4 --reduce mean --out map.png
  cross-attention map capture.safetensors --reduce none --color-scale sqrt --scale-each --out heads.svg
  cross-attention map capture.safetensors --heads 2 --rows 3,7-9 --segments 0-99,100-199 --out mass.csv";

/// Draw or list attention weights of a file
///
/// The file is one that `run` takes. Positions count from 0; a list is numbers and ranges, 0-4,7, both ends included. Only
/// what is asked for is computed: first the attention, then these weights from its log-sum-exp.
///
/// A picture has a legend, which names the scale of its colors, both ends of it, and the colors of what has no weight: a
/// row that sees no key, and what is no number (NaN). A map of more than 1600 rows or columns is scaled down, each cell of
/// the picture the largest of those it stands for, and says so. In a PNG letters are bitmaps, which reach as far as
/// Unicode's first plane: of another letter (an emoji) the number is written, and a warning says so. In an SVG the viewer's
/// fonts draw all letters.
///
/// The metadata may hold row_labels (labels, a JSON list of strings), seconds_per_key (the time a key stands for), and what
/// to show where no flag says it: show_heads (0,2,5) and show_keys (how many).
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// A file of safetensors or NumPy (.npz); - for standard input
    #[arg(value_name = "INPUT")]
    input: PathBuf,
    /// Where to write: a picture (.png, .svg) or a table (.csv); - for standard output
    #[arg(short, long = "out", visible_alias = "output", value_name = "FILE")]
    output: PathBuf,
    /// What to write, whatever the name of the file says; standard output has none
    #[arg(long, value_enum, value_name = "FORMAT")]
    format: Option<FormatName>,
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
    /// How the weights are spread over the colors of a picture [default: linear]
    #[arg(long, value_enum, value_name = "SCALE")]
    color_scale: Option<Spacing>,
    /// Give each panel of --reduce none colors of its own, up to its own largest weight; else all panels share one scale
    #[arg(long)]
    scale_each: bool,
    /// Where to compute: auto (a hardware GPU, else the CPU), cpu, oracle (f64, slow), gpu, the number of an adapter as
    /// `devices` lists it, a backend (vulkan, metal, dx12, gl), or part of an adapter's name
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceRequest,
    /// Say nothing but errors
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    file: FileFlags,
}

/// What becomes of heads, by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum ReduceName {
    #[default]
    Mean,
    Sum,
    None,
}

/// What can be written, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FormatName {
    Png,
    Svg,
    Csv,
}

impl FormatName {
    const fn format(self) -> Format {
        match self {
            Self::Png => Format::Picture(scene::Format::Png),
            Self::Svg => Format::Picture(scene::Format::Svg),
            Self::Csv => Format::Csv,
        }
    }
}

/// What can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Picture(scene::Format),
    Csv,
}

impl Format {
    /// By the extension of a file's name.
    fn of(path: &Path) -> Option<Self> {
        let csv = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("csv"));
        if csv { Some(Self::Csv) } else { scene::Format::of(path).map(Self::Picture) }
    }

    /// What a file must be that is replaced.
    const fn ours(self) -> Ours {
        match self {
            Self::Picture(scene::Format::Png) => {
                Ours { what: "a picture (PNG)", is: |head| scene::Format::Png.starts(head) }
            }
            Self::Picture(scene::Format::Svg) => {
                Ours { what: "a picture (SVG) of this program", is: |head| scene::Format::Svg.starts(head) }
            }
            Self::Csv => Ours { what: "a table of this program", is: |head| head.starts_with(CSV_START.as_bytes()) },
        }
    }
}

/// Computes and writes the weights.
///
/// # Errors
/// A file that is refused, positions that are not there, a file that can't be written.
pub(crate) fn map(args: &Args, terminal: &mut Terminal) -> Result<(), Error> {
    let named = args.format.map(FormatName::format);
    let format = named.or_else(|| Format::of(&args.output));
    let format = format.ok_or_else(|| Error::MapFormat { path: args.output.clone() })?;
    let flags = [(args.color_scale.is_some(), "--color-scale"), (args.scale_each, "--scale-each")];
    if let (Format::Csv, Some((_, flag))) = (format, flags.into_iter().find(|(given, _)| *given)) {
        return Err(Error::ColorsOfTable { flag, path: args.output.clone() });
    }
    if args.scale_each && args.reduce != ReduceName::None {
        return Err(Error::OnePanel);
    }
    let source = Source::of(&args.input);
    if args.output.canonicalize().is_ok_and(|output| args.input.canonicalize().is_ok_and(|input| input == output)) {
        return Err(Error::OutputIsInput { output: args.output.clone() });
    }
    // tried before anything is computed
    if is_dash(&args.output) {
        output::check_stdout()?;
        terminal.leave_stdout();
    } else {
        OutputFile::check(&args.output, format.ours())?;
    }
    let named = |error| Error::Input { path: source.label(), source: Box::new(error) };
    let opened = Opened::open(&source, &args.file, Wish::PLAIN, terminal).map_err(named)?;
    let request = &opened.request;
    let problem = &request.problem;
    if !args.quiet {
        request.warn(&source.label(), terminal);
        show::warn(problem, &request.metadata, &source.label(), terminal);
    }
    if args.batch >= problem.batch() {
        return Err(Error::Batch { found: args.batch, batch: problem.batch() });
    }
    let spec = spec(args, problem, &request.metadata)?;
    let wanted = WeightsProblem::new(problem, &spec).map_err(cross_attention::Error::from)?;
    if wanted.elements() == 0 {
        return Err(Error::NoWeights { shape: wanted.shape() });
    }
    // before anything is computed: the weights, and the names of what they are of
    let [_, heads, rows, columns] = wanted.shape();
    let names = heads.saturating_mul(rows).saturating_add(columns).saturating_mul(NAME_BYTES);
    room(wanted.elements().saturating_mul(size_of::<f32>()).saturating_add(names))?;
    let choice = Device::choose_blocking(&args.device)?;
    if !args.quiet {
        terminal.line(format_args!("device: {choice}"))?;
    }
    let operands = opened.operands().map_err(named)?;
    let work = terminal.start_work(&format!("computing on {}", choice.device.name()));
    let result = choice.device.attention_with_weights_blocking(problem, &operands.as_inputs(), &spec);
    work.finish_and_clear();
    let result = result?;
    let table = Table::new((&args.input, &spec), problem, &request.metadata, args.batch, &result);
    let bytes = match format {
        Format::Csv => table.csv()?,
        Format::Picture(format) => picture(args, &table, format, terminal)?,
    };
    output::write(&args.output, format.ours(), &bytes)?;
    if !args.quiet {
        let [_, heads, rows, columns] = result.shape;
        let output = args.output.shown();
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

/// Bytes of the name of a row or a column, as a label, in a list and in a picture.
const NAME_BYTES: usize = 256;
/// Bytes of all that is small, and of no size that a file could tell.
const SMALL_BYTES: usize = 8 << 20;

/// Asks for memory that is about to be taken piece by piece, by what could not tell that there is none.
///
/// # Errors
/// [`Error::Memory`].
fn room(bytes: usize) -> Result<(), Error> {
    reserved::<u8>(bytes.saturating_add(SMALL_BYTES)).map(drop)
}

/// The bytes of a picture; what cannot be drawn as it is written is told.
fn picture(args: &Args, table: &Table<'_>, format: scene::Format, terminal: &Terminal) -> Result<Vec<u8>, Error> {
    let drawn = table.scene(args.color_scale.unwrap_or_default(), args.scale_each)?;
    if format == scene::Format::Png && !args.quiet {
        let output = args.output.shown();
        let numbers: Vec<_> = drawn.missing().into_iter().map(|char| format!("U+{:04X}", u32::from(char))).collect();
        if !numbers.is_empty() {
            terminal.note(format_args!(
                "warning: {output}: {} not in the font of a PNG and drawn as numbers; write an SVG, which leaves \
                 letters to its viewer",
                listed(&numbers)
            ));
        }
        if drawn.unjoined() {
            terminal.note(format_args!(
                "warning: {output}: letters that their script joins stand one by one in a PNG; write an SVG, which leaves \
                 letters to its viewer"
            ));
        }
    }
    drawn.encode(format).map_err(|source| Error::Picture { path: args.output.clone(), source })
}

/// The first few of some letters, as the subject of a sentence.
fn listed(numbers: &[String]) -> String {
    const MOST: usize = 8;
    let more = numbers.len().saturating_sub(MOST);
    let more = if more > 0 { format!(" and {more} letters more") } else { String::new() };
    let verb = if numbers.len() == 1 { "is" } else { "are" };
    format!("{}{more} {verb}", numbers[..numbers.len().min(MOST)].join(", "))
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
