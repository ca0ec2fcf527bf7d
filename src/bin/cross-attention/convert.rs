//! `convert`: a file's keys and values in another format, and what that costs.

mod apart;

use std::path::PathBuf;

use clap::ValueEnum as _;
use cross_attention::files::Ours;
use cross_attention::quantize::Quantized;
use cross_attention::{
    AttentionProblem, Diagonal, Element, Layout, MAX_PAGE_LEN, ProblemError, TensorData, TensorSpec, cpu,
};
use safetensors::Dtype;

use crate::error::Error;
use crate::file::{FileFlags, Opened, Operands, Placed, Wish};
use crate::input::{Bytes, Contents, Format, Source, is_dash};
use crate::options::{AxisOrder, OptionFlags};
use crate::output::{Place, Stored};
use crate::shape::{KvFlags, KvFormat};
use crate::terminal::Terminal;
use crate::text::ShownPath as _;

const EXAMPLE: &str = "\
Examples:
  cross-attention convert capture.safetensors -o small.safetensors --kv int8_32
  cross-attention convert capture.safetensors -o pages.safetensors --kv bf16 --pages 16";

/// Write a file's keys and values in another format, and say what that costs
///
/// Keys and values are those of `run`, of F32, F16 or BF16; with --pages they are cut into pages, and a block_table says which
/// holds what. Query, key and value that are packed (qkv, kv) or have 3 axes become tensors of 4 axes, and past_key and
/// past_value a part of key and value; with --pages a bias or mask that --pad-mask widens is written as wide as the keys.
/// Everything else is copied as it is, and so are keys and values of I8 or in pages, which --kv and --pages do not take.
///
/// An .npz has the metadata as texts without axes; what the flags say of the file stands there too. The cost is that of the
/// elements, and of the output that a CPU computes from them. Nothing is written where the new file cannot be read.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// A file as `run` takes it, safetensors or NumPy (.npz); - for standard input
    #[arg(value_name = "INPUT")]
    input: PathBuf,
    /// Where to write: a name that ends in .npz is NumPy's format, any other is safetensors; - for standard output
    #[arg(short, long = "output", value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    kv: KvFlags,
    /// Heads of the query, needed for tensors of 3 axes, [batch, len, heads * dim]
    #[arg(long, alias = "q_heads", value_name = "N")]
    q_heads: Option<usize>,
    /// Heads of key and value in tensors of 3 axes; those of the query where nothing says so
    #[arg(long, alias = "kv_heads", value_name = "N")]
    kv_heads: Option<usize>,
    /// Order of the axes of tensors of 4 axes, bhld or blhd; without it, what the metadata says
    #[arg(long, value_enum, ignore_case = true)]
    layout: Option<AxisOrder>,
    /// Let bias and mask be shorter than the keys: those behind their end are hidden, as in ONNX
    #[arg(long, alias = "pad_mask")]
    pad_mask: bool,
}

/// What a file must be that is replaced.
const CONVERTED: Ours = Ours { what: "a file that this program converted", is: is_converted };

/// The metadata that tells it.
const MARK: &str = "converted_by";

fn is_converted(head: &[u8]) -> bool {
    let text = format!("\"{MARK}\":\"cross-attention\"");
    head.windows(text.len()).any(|bytes| bytes == text.as_bytes())
}

impl Args {
    /// How the file is read.
    fn file_flags(&self) -> FileFlags {
        let Self { q_heads, kv_heads, pad_mask, .. } = *self;
        FileFlags { options: OptionFlags::laid(self.layout), q_heads, kv_heads, pad_mask }
    }

    /// What the flags say, so that the new file says it too.
    fn metadata(&self) -> Vec<(&'static str, String)> {
        let heads = |name, heads: Option<usize>| heads.map(|heads| (name, heads.to_string()));
        let layout = self.layout.and_then(|layout| layout.to_possible_value());
        let mut said = vec![(MARK, "cross-attention".to_owned())];
        said.extend(layout.map(|layout| ("layout", layout.get_name().to_owned())));
        said.extend(heads("q_heads", self.q_heads));
        said.extend(heads("kv_heads", self.kv_heads));
        said.extend(self.pad_mask.then(|| ("pad_mask", "true".to_owned())));
        said
    }
}

/// Converts a file.
///
/// # Errors
/// A file that is refused or holds what cannot be converted; what keeps the result from being written.
pub(crate) fn convert(args: &Args, terminal: &mut Terminal) -> Result<(), Error> {
    let source = Source::of(&args.input);
    let named = |error| Error::Input { path: source.label(), source: Box::new(error) };
    if Format::of_name(&args.output) == Format::Npy {
        return Err(Error::OneArray { names: ["query", "key", "value"].map(str::to_owned).into() });
    }
    // tried before anything is read
    Place::new(&args.output, Format::Safetensors).check(CONVERTED)?;
    if is_dash(&args.output) {
        terminal.leave_stdout();
    }
    // what the backward reads is copied too
    let opened = Opened::open(&source, &args.file_flags(), Wish::BACKWARD, terminal).map_err(named)?;
    opened.request.warn(&source.label(), terminal);
    let operands = opened.operands().map_err(named)?;
    let converted = Converted::new(&opened, &operands, args.kv).map_err(named)?;
    let (before, after) = (converted.before, converted.after);

    let contents = opened.contents();
    let place = Place::new(&args.output, contents.format);
    let mut tensors = converted.tensors;
    for name in contents.names().into_iter().filter(|name| !converted.instead.contains(&name.as_str())) {
        let Some(info) = contents.info(&name) else { continue };
        let bytes = opened.data(info).into();
        tensors.push(Stored { dtype: info.dtype, shape: info.shape.clone(), bytes, name });
    }
    let said = args.metadata();
    let mut metadata: Vec<(&str, &str)> =
        opened.request.metadata.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    metadata.retain(|(name, _)| said.iter().all(|(of_flag, _)| of_flag != name));
    metadata.extend(said.iter().map(|(name, text)| (*name, text.as_str())));
    // what is written is read as any file is, and is written where that went well
    let bar = terminal.start_bytes("converting", tensors.iter().map(|tensor| tensor.bytes.len() as u64).sum());
    let bytes = place.encode(&metadata, tensors, &bar);
    bar.finish_and_clear();
    let bytes = bytes?;
    let again = Bytes::copied(&bytes).and_then(|read| Opened::of(read, &FileFlags::default(), Wish::PLAIN));
    let again = again.map_err(named)?;

    let work = terminal.start_work("comparing with what was there");
    let outputs = [operands, again.operands().map_err(named)?];
    let outputs = [(&opened, &outputs[0]), (&again, &outputs[1])].map(|(opened, operands)| {
        cpu::attention(&opened.request.problem, &operands.as_inputs())
            .map_err(|error| Error::from(cross_attention::Error::from(error)))
    });
    work.finish_and_clear();
    let [there, now] = outputs;
    let (there, now) = (there.map_err(named)?, now.map_err(named)?);
    // rows of heads in one order, whatever that of the files is
    let rows = |opened: &Opened, output: &TensorData| {
        let layout = opened.request.problem.spec().output.layout;
        apart::numbers(output.as_ref(), &layout, &Layout::bhld(layout.shape))
    };
    let output = cost(&rows(&opened, &there.output)?, &rows(&again, &now.output)?);
    place.write(CONVERTED, &bytes)?;
    terminal.line(format_args!("{}: keys and values of {before} bytes take {after}", args.output.shown()))?;
    for (name, there, now) in converted.elements {
        terminal.line(format_args!("  {name}: {}", cost(&there, &now)))?;
    }
    terminal.line(format_args!("  output: {output}"))
}

/// What numbers are off by, in shares of their size.
fn cost(there: &[f32], now: &[f32]) -> String {
    let pairs = || there.iter().zip(now).map(|(a, b)| (f64::from(*a), f64::from(*b)));
    let finite = || pairs().filter(|(a, b)| a.is_finite() && b.is_finite());
    // NaN stays NaN, and an infinity itself
    let kept = |(a, b): &(f64, f64)| a.total_cmp(b).is_eq() || (a.is_nan() && b.is_nan());
    let (others, changed) = (
        there.len() - finite().count(),
        pairs().filter(|(a, b)| !(a.is_finite() && b.is_finite())).filter(|pair| !kept(pair)).count(),
    );
    let beside = match (others, changed) {
        (0, _) => String::new(),
        (_, 0) => format!("; {others} are infinite or NaN, as they were"),
        _ => format!("; {others} are infinite or NaN, {changed} of them were something else"),
    };
    if others == there.len() && others > 0 {
        return format!("none is finite{beside}");
    }
    let count = finite().count().max(1) as f64;
    let size = (finite().map(|(a, _)| a * a).sum::<f64>() / count).sqrt();
    let off = (finite().map(|(a, b)| (a - b) * (a - b)).sum::<f64>() / count).sqrt();
    let most = finite().map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    if size == 0.0 {
        return format!("all zeros, off by {most:.3e} at most{beside}");
    }
    format!("off by {:.3} % of its size (rms), {:.2} % at most{beside}", off / size * 100.0, most / size * 100.0)
}

/// Keys and values as they are written, and what else is not copied.
struct Converted {
    tensors: Vec<Stored<'static>>,
    /// Names of the tensors that these stand for.
    instead: Vec<&'static str>,
    /// Name, elements that were there, and what they are now.
    elements: Vec<(&'static str, Vec<f32>, Vec<f32>)>,
    /// Bytes of keys and values.
    before: usize,
    after: usize,
}

impl Converted {
    fn new(opened: &Opened, operands: &Operands<'_>, kv: KvFlags) -> Result<Self, Error> {
        let request = &opened.request;
        let problem = &request.problem;
        let spec = problem.spec();
        let [_, key, value] = &request.placed;
        // as many entries as are stored, which a batch may share, and the past with them
        let axes = |of: &TensorSpec, placed: &Placed| {
            let [_, heads, len, dim] = of.layout.shape;
            [placed.spec.layout.shape[0], heads, len, dim]
        };
        let bytes = |of, placed| axes(of, placed).iter().product::<usize>() * of.element.size_bytes();
        let before = bytes(&spec.key, key) + bytes(&spec.value, value);
        let mut converted = Self { tensors: vec![], instead: vec![], elements: vec![], before, after: before };
        for (name, of) in [("key", &spec.key), ("value", &spec.value)] {
            if of.element != Element::I8 && spec.paged.is_none() {
                continue;
            }
            if kv.format().is_some() || kv.page_len().is_some() {
                let found = if spec.paged.is_some() { "pages" } else { "I8" };
                return Err(Error::NotConvertible { name, found });
            }
            // as it is
            return Ok(converted);
        }
        let (inputs, order) = (operands.as_inputs(), request.order);
        let pages = match kv.page_len() {
            None => None,
            Some(page_len) => Some(Pages::new(problem, opened.contents(), page_len)?),
        };
        converted.after = 0;
        converted.instead = vec!["key", "value", "kv", "qkv", "past_key", "past_value"];
        for (name, scale_name, data, of, placed) in [
            ("key", "key_scale", inputs.key, &spec.key, key),
            ("value", "value_scale", inputs.value, &spec.value, value),
        ] {
            let format = kv.or(KvFormat::Float(of.element));
            let axes = axes(of, placed);
            let from = Layout::bhld(axes).with_strides(of.layout.strides);
            let there = apart::numbers(data, &from, &order.layout(axes))?;
            let (axes, numbers) = match &pages {
                Some(pages) => pages.cut(&there, axes, order.layout(axes), |axes| order.layout(axes)),
                None => (axes, there),
            };
            let (tensor, scale) = format.of(axes, &|axes| order.layout(axes))?;
            let (stored, scales) = stored(name, &tensor, scale.as_ref(), &numbers)?;
            let now = match &scales {
                Some(scales) => Quantized { bytes: bytes_of(&stored), scales: scales.clone() }.to_f32(),
                None => stored.to_f32(),
            };
            converted.tensors.push(owned(name, stored, order.swap(axes).to_vec()));
            if let (Some(scales), Some(scale)) = (scales, scale) {
                converted.tensors.push(owned(scale_name, scales, order.swap(scale.layout.shape).to_vec()));
            }
            converted.elements.push((name, numbers, now));
        }
        if let Some(pages) = pages {
            converted.tensors.extend(pages.tensors(problem));
            // pages are as many keys as bias and mask speak of
            if request.padded {
                converted.tensors.extend(apart::widened(opened, &inputs));
                converted.instead.extend(["bias", "mask"]);
            }
        }
        converted.after = converted
            .tensors
            .iter()
            .filter(|tensor| !apart::PAIRS.contains(&tensor.name.as_str()))
            .map(|tensor| tensor.bytes.len())
            .sum();
        for tensor in apart::queries(opened, &inputs)? {
            converted.instead.push(tensor.0);
            converted.tensors.push(tensor.1);
        }
        Ok(converted)
    }
}

fn bytes_of(data: &TensorData) -> Vec<i8> {
    match data {
        TensorData::I8(bytes) => bytes.clone(),
        _ => vec![],
    }
}

fn owned(name: &str, data: TensorData, shape: Vec<usize>) -> Stored<'static> {
    let Stored { name, dtype, shape, bytes } = Stored::of(name, data.as_ref(), shape);
    Stored { name, dtype, shape, bytes: bytes.into_owned().into() }
}

fn stored(
    name: &'static str,
    tensor: &TensorSpec,
    scale: Option<&TensorSpec>,
    numbers: &[f32],
) -> Result<(TensorData, Option<TensorData>), Error> {
    let Some(scale) = scale else { return Ok((TensorData::from_f32(tensor.element, numbers.to_vec()), None)) };
    let block = tensor.layout.shape[3] / scale.layout.shape[3].max(1);
    let quantized = Quantized::new(numbers, block, scale.element).map_err(|source| Error::Quantize { name, source })?;
    Ok((TensorData::I8(quantized.bytes), Some(quantized.scales)))
}

/// Keys and values side by side, to be cut.
struct Pages {
    page_len: usize,
    kv_len: usize,
    /// Pages of each entry of the key's batch.
    of_entry: usize,
    /// Whether the file has key lengths of its own.
    has_lens: bool,
}

impl Pages {
    fn new(problem: &AttentionProblem, contents: &Contents, page_len: usize) -> Result<Self, Error> {
        let (spec, kv_len) = (problem.spec(), problem.kv_len());
        let by_diagonal = spec.causal.is_some()
            || spec.window_left.is_some()
            || spec.window_right.is_some()
            || spec.alibi_slopes.is_some();
        let as_wide = spec.bias.is_some_and(|bias| bias.layout.strides[3] != 0)
            || spec.mask.is_some_and(|mask| mask.strides[3] != 0);
        let full = page_len > 0 && kv_len.is_multiple_of(page_len);
        if by_diagonal && problem.diagonal() == Diagonal::BottomRight && !full && !as_wide {
            return Err(Error::PagedDiagonal { kv_len, page_len });
        }
        let of_entry = kv_len.div_ceil(page_len.max(1));
        if !page_len.is_power_of_two() || page_len > MAX_PAGE_LEN {
            return Err(ProblemError::PageLen { page_len }.into());
        }
        Ok(Self { page_len, kv_len, of_entry, has_lens: contents.info("kv_lens").is_some() })
    }

    /// The pages of a tensor, zeros behind the last token, and their shape.
    fn cut(
        &self,
        numbers: &[f32],
        axes: [usize; 4],
        from: Layout,
        layout: impl Fn([usize; 4]) -> Layout,
    ) -> ([usize; 4], Vec<f32>) {
        let [batch, heads, _, width] = axes;
        let axes = [batch * self.of_entry, heads, self.page_len, width];
        let to = layout(axes);
        let mut pages = vec![0.0; to.elements().unwrap_or(0)];
        for b in 0..batch {
            for h in 0..heads {
                for j in 0..self.kv_len {
                    let page = b * self.of_entry + j / self.page_len.max(1);
                    let (start, end) = (to.index([page, h, j % self.page_len.max(1), 0]), from.index([b, h, j, 0]));
                    pages[start..start + width].copy_from_slice(&numbers[end..end + width]);
                }
            }
        }
        (axes, pages)
    }

    /// The table, and key lengths where the last page is not full and nothing else says so.
    fn tensors(&self, problem: &AttentionProblem) -> Vec<Stored<'static>> {
        let batch = problem.batch();
        let shared = problem.spec().key.layout.strides[0] == 0;
        let page = |b: usize, n: usize| if shared { n } else { b * self.of_entry + n };
        let table = (0..batch).flat_map(|b| (0..self.of_entry).map(move |n| page(b, n)));
        let words = |numbers: &mut dyn Iterator<Item = usize>| -> Vec<u8> {
            numbers.flat_map(|n| i32::try_from(n).unwrap_or(i32::MAX).to_le_bytes()).collect()
        };
        let integers = |name: &str, shape: Vec<usize>, bytes: Vec<u8>| Stored {
            name: name.to_owned(),
            dtype: Dtype::I32,
            shape,
            bytes: bytes.into(),
        };
        let mut tensors = vec![integers("block_table", vec![batch, self.of_entry], words(&mut table.into_iter()))];
        if !self.has_lens && !self.kv_len.is_multiple_of(self.page_len.max(1)) {
            tensors.push(integers("kv_lens", vec![batch], words(&mut std::iter::repeat_n(self.kv_len, batch))));
        }
        tensors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_are_in_shares_of_the_size() {
        assert_eq!(cost(&[1.0, -1.0], &[1.0, -1.5]), "off by 35.355 % of its size (rms), 50.00 % at most");
        assert_eq!(cost(&[0.0], &[0.5]), "all zeros, off by 5.000e-1 at most");
    }

    #[test]
    fn converted_files_are_told_from_others() {
        assert!(is_converted(br#"..{"__metadata__":{"converted_by":"cross-attention"},"key":{}}"#));
        assert!(!is_converted(br#"..{"__metadata__":{"causal":"top_left"},"key":{}}"#));
    }
}
