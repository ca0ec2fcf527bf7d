//! `merge`: partial results over shards of the keys as the result over all of them.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use cross_attention::cpu::{MergeError, PartialState, StatePart, merge as merge_lse, merge_states};
use cross_attention::{Element, Layout, ProblemError, RowState, TensorData, TensorRef};
use safetensors::Dtype;

use crate::error::Error;
use crate::file::{FileFlags, Form, floats, one_of};
use crate::input::{Bytes, Contents, Format, Source, is_dash};
use crate::options::AxisOrder;
use crate::output::{Place, Stored, save};
use crate::results::RESULT;
use crate::terminal::Terminal;
use crate::text::shown;

const EXAMPLE: &str = "\
Examples:
  cross-attention run keys-0.safetensors -o part-0.safetensors --row-state
  cross-attention run keys-1.safetensors -o part-1.safetensors --row-state
  cross-attention merge part-0.safetensors part-1.safetensors -o whole.safetensors";

/// Merge results over parts of the keys into the result over all of them
///
/// Each file is a result of `run`: output, and lse (F32) [batch, q_heads, q_len], of the same queries over some of the keys.
/// Every key counts in one part only, and so does a sink: give sinks to one part, not to all. Where all files hold row_max and
/// row_sum too (`run --row-state`), they are merged by these: nothing is lost to the size of scores, while the weight of a
/// part is off by up to 2^-23 |lse| where there is an lse alone. An lse that says something else than they is refused.
///
/// A row without keys in a part leaves the others as they are. Files are merged in the order that they are given in, on the
/// CPU. The result holds output, in the form of the first file's, lse, and row_max and row_sum where all files do, so that
/// it can be merged again. Formats are those of `run`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// Files with output and lse, safetensors or NumPy (.npz); - for standard input
    #[arg(required = true, value_name = "FILE")]
    inputs: Vec<PathBuf>,
    /// Where to write; - for standard output
    #[arg(short, long = "output", value_name = "OUT")]
    output: PathBuf,
    /// Element type of the output, f32, f16 or bf16
    #[arg(long, value_name = "TYPE", default_value_t = Element::F32)]
    output_type: Element,
    /// Order of the axes of outputs of 4 axes, bhld or blhd; without it, what the metadata says
    #[arg(long, value_enum, ignore_case = true)]
    layout: Option<AxisOrder>,
    /// Say nothing but errors
    #[arg(short, long)]
    quiet: bool,
}

/// Merges the files.
///
/// # Errors
/// A file that is refused or does not fit the first, what keeps the result from being written.
pub(crate) fn merge(args: &Args, terminal: &mut Terminal) -> Result<(), Error> {
    if args.output_type == Element::I8 {
        let wanted = "f32, f16 or bf16";
        return Err(
            cross_attention::Error::from(ProblemError::Element { name: "output", found: Element::I8, wanted }).into()
        );
    }
    let sources: Vec<Source> = args.inputs.iter().map(|path| Source::of(path)).collect();
    // a key counts once
    let mut seen = HashSet::new();
    let twice = args.inputs.iter().find(|input| input.canonicalize().is_ok_and(|input| !seen.insert(input)));
    if let Some(input) = twice {
        return Err(Error::PartTwice { input: input.clone() });
    }
    if sources.iter().filter(|source| **source == Source::Stdin).count() > 1 {
        return Err(Error::StdinTwice);
    }
    let is_input = |output: &PathBuf| {
        args.inputs.iter().filter_map(|input| input.canonicalize().ok()).any(|input| input == *output)
    };
    if !is_dash(&args.output) && args.output.canonicalize().as_ref().is_ok_and(is_input) {
        return Err(Error::OutputIsInput { output: args.output.clone() });
    }
    // tried before anything is read
    Place::new(&args.output, Format::Safetensors).check(RESULT)?;
    if is_dash(&args.output) {
        terminal.leave_stdout();
    }
    let mut parts: Vec<Part> = vec![];
    for source in &sources {
        let named = |error| Error::Input { path: source.label(), source: Box::new(error) };
        let bar = terminal.start_bytes("reading", source.len());
        let opened = Bytes::open(source, &bar);
        bar.finish_and_clear();
        let (contents, bytes) = opened.map_err(named)?;
        let part = Part::new(&contents, &bytes, args.layout).map_err(named)?;
        if let Some(first) = parts.first() {
            part.fits(first, &sources[0].label()).map_err(named)?;
        }
        parts.push(part);
    }
    let Some(first) = parts.first() else { return Err(MergeError::NoParts.into()) };
    let place = Place::new(&args.output, first.format);
    if place.format() != Format::Safetensors && args.output_type == Element::Bf16 {
        return Err(Error::NoNumpyType { name: "output".to_owned(), dtype: Dtype::BF16 });
    }
    let work = terminal.start_work("merging");
    let merged = merged(&parts, first.rows[3]);
    work.finish_and_clear();
    let (output, lse, state) = merged?;

    let rows = vec![first.rows[0], first.rows[1], first.rows[2]];
    let stored = first.form.shape(first.rows);
    let output = reordered(&output, Layout::bhld(first.rows), first.form.layout(first.rows))?;
    let output = TensorData::from_f32(args.output_type, output);
    let mut tensors =
        vec![Stored::of("output", output.as_ref(), stored), Stored::of("lse", TensorRef::F32(&lse), rows.clone())];
    if let Some(state) = &state {
        tensors.push(Stored::of("row_max", TensorRef::F32(&state.row_max), rows.clone()));
        tensors.push(Stored::of("row_sum", TensorRef::F32(&state.row_sum), rows));
    }
    if place.format() == Format::Npy {
        tensors.truncate(1);
    }
    let count = parts.len().to_string();
    let mut about = vec![("merged", &count[..]), ("version", env!("CARGO_PKG_VERSION"))];
    if first.form == Form::Four(AxisOrder::Blhd) {
        about.push(("layout", "blhd"));
    }
    let bar = terminal.start_bytes("writing", tensors.iter().map(|tensor| tensor.bytes.len() as u64).sum());
    let written = save(place, RESULT, &about, tensors, &bar);
    bar.finish_and_clear();
    written?;
    if !args.quiet {
        let [batch, heads, len, dim] = first.rows;
        let by = match state {
            Some(_) => "maximum and sum of rows",
            None if parts.iter().any(|part| part.state.is_some()) => {
                "log-sum-exp, for not all have row_max and row_sum"
            }
            None => "log-sum-exp",
        };
        terminal.line(format_args!(
            "{} of batch {batch}, q_heads {heads}, q_len {len}, v_head_dim {dim} merged by {by}",
            crate::text::counted(parts.len(), "part")
        ))?;
    }
    Ok(())
}

/// Output, log-sum-exp, and the state of rows where all parts have it.
type Merged = (Vec<f32>, Vec<f32>, Option<RowState>);

fn merged(parts: &[Part], width: usize) -> Result<Merged, Error> {
    let states: Option<Vec<_>> =
        parts.iter().map(|part| part.state.as_ref().map(|state| StatePart::new(&part.output, state))).collect();
    match states {
        Some(states) => {
            let merged = merge_states(&states, width)?;
            Ok((merged.output, merged.state.lse(), Some(merged.state)))
        }
        None => {
            let parts: Vec<_> =
                parts.iter().map(|part| PartialState { output: &part.output, lse: &part.lse }).collect();
            let merged = merge_lse(&parts, width)?;
            Ok((merged.output, merged.lse, None))
        }
    }
}

/// A result over some of the keys.
struct Part {
    /// `[batch, q_heads, q_len, v_head_dim]`.
    rows: [usize; 4],
    form: Form,
    format: Format,
    /// In the order of `rows`.
    output: Vec<f32>,
    lse: Vec<f32>,
    state: Option<RowState>,
}

impl Part {
    fn new(contents: &Contents, bytes: &Bytes, layout: Option<AxisOrder>) -> Result<Self, Error> {
        let needed = |name: &'static str| {
            let held = || contents.names().iter().map(|name| shown(name)).collect();
            floats(contents, bytes, name)?.ok_or_else(|| Error::NotPartial { name, found: held() })
        };
        let (output, output_shape) = needed("output")?;
        let (lse, lse_shape) = needed("lse")?;
        // 16 bits of a logarithm would leave 3 digits of a weight
        for name in ["lse", "row_max", "row_sum"] {
            contents.info(name).map_or(Ok(()), |info| one_of(name, info, &[Dtype::F32], "F32"))?;
        }
        let [batch, heads, len] = <[usize; 3]>::try_from(&lse_shape[..]).map_err(|_| Error::Rank {
            name: "lse",
            found: lse_shape.clone(),
            wanted: "[batch, q_heads, q_len]".to_owned(),
        })?;
        let order = match layout {
            Some(order) => order,
            None => FileFlags::default().options.over(&contents.metadata)?.layout,
        };
        let form = if output_shape.len() == 3 { Form::Joined } else { Form::Four(order) };
        let rows = form.axes(&output_shape, heads).filter(|rows| rows[..3] == [batch, heads, len]);
        let rows = rows.ok_or_else(|| Error::Rank {
            name: "output",
            found: output_shape.clone(),
            wanted: format!(
                "{} of the rows of lse, batch {batch}, q_heads {heads}, q_len {len}; --layout says another order of axes",
                form.words()
            ),
        })?;
        let state = match [floats(contents, bytes, "row_max")?, floats(contents, bytes, "row_sum")?] {
            [Some((row_max, max_shape)), Some((row_sum, sum_shape))] => {
                for (name, found) in [("row_max", max_shape), ("row_sum", sum_shape)] {
                    if found != lse_shape {
                        return Err(Error::Rank { name, found, wanted: format!("that of lse, {lse_shape:?}") });
                    }
                }
                Some(RowState { row_max: row_max.into_f32(), row_sum: row_sum.into_f32() })
            }
            [None, None] => None,
            [Some(_), None] => return Err(Error::HalfState { given: "row_max", missing: "row_sum" }),
            [None, Some(_)] => return Err(Error::HalfState { given: "row_sum", missing: "row_max" }),
        };
        let lse = lse.into_f32();
        if let Some(state) = &state {
            agree(&lse, state, [heads, len])?;
        }
        let output = reordered(&output.into_f32(), form.layout(rows), Layout::bhld(rows))?;
        Ok(Self { rows, form, format: contents.format, output, lse, state })
    }

    /// Whether it is of the same rows as the first.
    fn fits(&self, first: &Self, path: &Path) -> Result<(), Error> {
        if self.rows == first.rows {
            return Ok(());
        }
        Err(Error::PartShape { found: self.rows, wanted: first.rows, first: path.to_owned() })
    }
}

/// Whether maxima and sums say the same as the log-sum-exp of their rows.
fn agree(lse: &[f32], state: &RowState, [heads, len]: [usize; 2]) -> Result<(), Error> {
    // a logarithm on a GPU may be off by 2^-21, and each of the roundings that follow by 2^-24 of the numbers they round
    const ULPS: f64 = 8.0 * f32::EPSILON as f64;
    for (n, (lse, (max, sum))) in lse.iter().zip(state.row_max.iter().zip(&state.row_sum)).enumerate() {
        let (found, max, log) = (f64::from(*lse), f64::from(*max), f64::from(*sum).ln());
        let wanted = max + log;
        let near = (found - wanted).abs() <= ULPS * (1.0 + max.abs() + log.abs());
        // what is no number, or no sum, is told by who merges
        if !near && !wanted.is_nan() && found.total_cmp(&wanted).is_ne() {
            let row = [n / len / heads, n / len % heads, n % len];
            return Err(Error::PartState { row, lse: *lse, max: state.row_max[n], sum: *sum });
        }
    }
    Ok(())
}

/// The rows of a tensor in another order.
fn reordered(rows: &[f32], from: Layout, to: Layout) -> Result<Vec<f32>, Error> {
    let mut reordered = vec![];
    reordered.try_reserve_exact(rows.len()).map_err(|_| Error::Memory { bytes: 4 * rows.len() as u128 })?;
    if from == to {
        reordered.extend_from_slice(rows);
        return Ok(reordered);
    }
    reordered.resize(rows.len(), 0.0);
    let [batch, heads, len, dim] = from.shape;
    for b in 0..batch {
        for h in 0..heads {
            for i in 0..len {
                let (start, end) = (from.index([b, h, i, 0]), to.index([b, h, i, 0]));
                reordered[end..end + dim].copy_from_slice(&rows[start..start + dim]);
            }
        }
    }
    Ok(reordered)
}
