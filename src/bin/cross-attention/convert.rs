//! `convert`: a file's keys and values in another format, and what that costs.

use std::path::PathBuf;

use cross_attention::files::Ours;
use cross_attention::quantize::Quantized;
use cross_attention::{AttentionProblem, Diagonal, Element, MAX_PAGE_LEN, ProblemError, TensorData, TensorSpec, cpu};
use safetensors::Dtype;

use crate::error::Error;
use crate::file::{self, Opened, Wish};
use crate::input::Contents;
use crate::options::OptionFlags;
use crate::results::{Stored, save};
use crate::shape::{KvFlags, KvFormat};
use crate::terminal::Terminal;

const EXAMPLE: &str = "\
Examples:
  cross-attention convert capture.safetensors -o small.safetensors --kv int8_32
  cross-attention convert capture.safetensors -o pages.safetensors --kv bf16 --pages 16";

/// Write a file's keys and values in another format, and say what that costs
///
/// Everything else of the file is copied as it is. Keys and values are those of `run`, of F32, F16 or BF16; with --pages they
/// are cut into pages, and a block_table says which holds what. The cost is that of the elements, and of the output that a
/// CPU computes from them.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// A safetensors file as `run` takes it
    #[arg(value_name = "INPUT")]
    input: PathBuf,
    /// Where to write
    #[arg(short, long = "output", value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    kv: KvFlags,
}

/// What a file must be that is replaced.
const CONVERTED: Ours = Ours { what: "a file that this program converted", is: is_converted };

/// The metadata that tells it.
const MARK: &str = "converted_by";

fn is_converted(head: &[u8]) -> bool {
    let text = format!("\"{MARK}\":\"cross-attention\"");
    head.windows(text.len()).any(|bytes| bytes == text.as_bytes())
}

/// Converts a file.
///
/// # Errors
/// A file that is refused or holds what cannot be converted; what keeps the result from being written.
pub(crate) fn convert(args: &Args, terminal: &mut Terminal) -> Result<(), Error> {
    let named = |source| Error::Input { path: args.input.clone(), source: Box::new(source) };
    let flags = OptionFlags::default();
    let wish = Wish { output: Element::F32, probs: false, backward: false };
    let opened = Opened::open(&args.input, &flags, wish, terminal).map_err(named)?;
    opened.request.warn(&args.input, terminal);
    let converted = Converted::new(&opened, args.kv).map_err(named)?;

    let mut tensors: Vec<Stored<'_>> = vec![];
    let contents = opened.contents();
    let replaced = ["key", "value", "key_scale", "value_scale"];
    for name in contents.names().into_iter().filter(|name| !replaced.contains(&name.as_str())) {
        let Some(info) = contents.info(&name) else { continue };
        let bytes = opened.data(info).into();
        tensors.push(Stored { dtype: info.dtype, shape: info.shape.clone(), bytes, name });
    }
    let mut metadata: Vec<(&str, &str)> =
        opened.request.metadata.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    metadata.retain(|(name, _)| *name != MARK);
    metadata.push((MARK, "cross-attention"));
    let bytes: usize = converted.tensors.iter().map(|tensor| tensor.bytes.len()).sum();
    let before: usize = ["key", "value"].iter().filter_map(|name| contents.info(name)).map(file::bytes_of).sum();
    tensors.extend(converted.tensors);
    let bar = terminal.start_bytes("writing", tensors.iter().map(|tensor| tensor.bytes.len() as u64).sum());
    let written = save(&args.output, CONVERTED, &metadata, tensors, &bar);
    bar.finish_and_clear();
    written?;

    terminal.line(format_args!("{}: keys and values of {before} bytes take {bytes}", args.output.display()))?;
    // what was written is read as any file is
    let again = Opened::open(&args.output, &flags, wish, terminal)?;
    let work = terminal.start_work("comparing with what was there");
    let outputs = [&opened, &again].map(|opened| {
        let operands = opened.operands()?;
        cpu::attention(&opened.request.problem, &operands.as_inputs())
            .map_err(|error| Error::from(cross_attention::Error::from(error)))
    });
    work.finish_and_clear();
    let [there, now] = outputs;
    for (name, there, now) in converted.elements {
        terminal.line(format_args!("  {name}: {}", cost(&there, &now)))?;
    }
    terminal.line(format_args!("  output: {}", cost(&there?.output.to_f32(), &now?.output.to_f32())))
}

/// What numbers are off by, in shares of their size.
fn cost(there: &[f32], now: &[f32]) -> String {
    let finite = || there.iter().zip(now).map(|(a, b)| (f64::from(*a), f64::from(*b))).filter(|(a, _)| a.is_finite());
    let count = finite().count().max(1) as f64;
    let size = (finite().map(|(a, _)| a * a).sum::<f64>() / count).sqrt();
    let off = (finite().map(|(a, b)| (a - b) * (a - b)).sum::<f64>() / count).sqrt();
    let most = finite().map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    if size == 0.0 {
        return format!("all zeros, off by {most:.3e} at most");
    }
    format!("off by {:.3} % of its size (rms), {:.2} % at most", off / size * 100.0, most / size * 100.0)
}

/// Keys and values as they are written.
struct Converted {
    tensors: Vec<Stored<'static>>,
    /// Name, elements that were there, and what they are now.
    elements: Vec<(&'static str, Vec<f32>, Vec<f32>)>,
}

impl Converted {
    fn new(opened: &Opened, kv: KvFlags) -> Result<Self, Error> {
        let request = &opened.request;
        let problem = &request.problem;
        let spec = problem.spec();
        let (operands, order) = (opened.operands()?, request.order);
        let inputs = operands.as_inputs();
        let pages = match kv.page_len() {
            None => None,
            Some(page_len) => Some(Pages::new(problem, opened.contents(), page_len)?),
        };
        let mut converted = Self { tensors: vec![], elements: vec![] };
        for (name, scale_name, data, of) in
            [("key", "key_scale", inputs.key, &spec.key), ("value", "value_scale", inputs.value, &spec.value)]
        {
            if of.element == Element::I8 || spec.paged.is_some() {
                let found = if spec.paged.is_some() { "pages".to_owned() } else { "I8".to_owned() };
                return Err(Error::NotConvertible { name, found });
            }
            let format = kv.or(KvFormat::Float(of.element));
            // in the order of the file, whose rows lie side by side
            let held = opened.contents().info(name).map(|info| info.shape.clone()).unwrap_or_default();
            let axes = order.swap(<[usize; 4]>::try_from(held).unwrap_or_default());
            let there: Vec<f32> = (0..data.len()).map(|n| data.get(n)).collect();
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
        from: cross_attention::Layout,
        layout: impl Fn([usize; 4]) -> cross_attention::Layout,
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
