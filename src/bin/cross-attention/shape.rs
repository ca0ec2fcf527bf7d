//! A problem described by flags, or read from a file.

use std::path::PathBuf;

use cross_attention::{AlibiSlopes, AttentionProblem, AttentionSpec, Element, Layout, ScoreStage, TensorSpec};

use crate::error::Error;
use crate::file::{self, Wish};
use crate::options::{Metadata, OptionFlags};
use crate::terminal::Terminal;

/// The problem of an input file, or of a shape.
#[derive(Debug, clap::Args)]
pub(crate) struct ProblemFlags {
    /// A safetensors file as `run` takes it; without one, the shape is given by flags
    #[arg(value_name = "INPUT", conflicts_with = "shape")]
    pub(crate) input: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) shape: ShapeFlags,
    /// Element type of the output, f32, f16 or bf16
    #[arg(long, value_name = "TYPE", default_value_t = Element::F32)]
    output_type: Element,
    /// Return the attention weights too
    #[arg(long)]
    probs: bool,
    #[command(flatten)]
    options: OptionFlags,
}

impl ProblemFlags {
    /// The problem.
    ///
    /// # Errors
    /// A file or options that cannot be read, and what the library refuses.
    pub(crate) fn problem(&self, terminal: &Terminal) -> Result<AttentionProblem, Error> {
        match &self.input {
            Some(path) => {
                let wish = Wish { output: self.output_type, probs: self.probs };
                file::problem(path, &self.options, wish, terminal)
            }
            None => self.shape.problem(&self.options, self.output_type, self.probs, terminal),
        }
    }
}

/// A shape, needed where the argument of the id `input` is not given.
#[derive(Debug, clap::Args)]
#[group(id = "shape", multiple = true)]
#[command(next_help_heading = "Shape")]
pub(crate) struct ShapeFlags {
    /// Entries of the batch [default: 1]
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Heads of the query
    #[arg(long, value_name = "N", required_unless_present = "input")]
    q_heads: Option<usize>,
    /// Heads of key and value [default: those of the query]
    #[arg(long, value_name = "N")]
    kv_heads: Option<usize>,
    /// Length of the query, in tokens
    #[arg(long, value_name = "TOKENS", required_unless_present = "input")]
    q_len: Option<usize>,
    /// Length of key and value, in tokens
    #[arg(long, value_name = "TOKENS", required_unless_present = "input")]
    kv_len: Option<usize>,
    /// Width of a query or key row
    #[arg(long, value_name = "N", required_unless_present = "input")]
    head_dim: Option<usize>,
    /// Width of a value row [default: that of a key row]
    #[arg(long, value_name = "N")]
    v_head_dim: Option<usize>,
    /// Element type of query, key and value, f32, f16 or bf16 [default: f32]
    #[arg(long, value_name = "TYPE")]
    pub(crate) element: Option<Element>,
    /// With an additive bias [batch, q_heads, q_len, kv_len]
    #[arg(long)]
    bias: bool,
    /// With a boolean mask [batch, q_heads, q_len, kv_len]
    #[arg(long)]
    mask: bool,
    /// With query lengths [batch]
    #[arg(long)]
    q_lens: bool,
    /// With key lengths [batch]
    #[arg(long)]
    kv_lens: bool,
    /// With a range of keys for each row
    #[arg(long)]
    row_ranges: bool,
    /// With ALiBi slopes, one for each head
    #[arg(long)]
    alibi: bool,
    /// With attention sinks
    #[arg(long)]
    sinks: bool,
    /// Return the log-sum-exp too (`run` always does)
    #[arg(long)]
    lse: bool,
}

impl ShapeFlags {
    /// The problem that the flags describe.
    ///
    /// # Errors
    /// Options that cannot be read, and what the library refuses.
    pub(crate) fn problem(
        &self,
        options: &OptionFlags,
        output: Element,
        probs: bool,
        terminal: &Terminal,
    ) -> Result<AttentionProblem, Error> {
        // clap has seen to it that what has no default is given
        let [q_heads, q_len, kv_len, head_dim] =
            [self.q_heads, self.q_len, self.kv_len, self.head_dim].map(Option::unwrap_or_default);
        let batch = self.batch.unwrap_or(1);
        let kv_heads = self.kv_heads.unwrap_or(q_heads);
        let options = options.over(&Metadata::new())?;
        let element = self.element.unwrap_or(Element::F32);
        let tensor = |axes| TensorSpec { element, layout: options.layout.layout(axes) };
        let mut spec = AttentionSpec::from_tensors(
            tensor([batch, q_heads, q_len, head_dim]),
            tensor([batch, kv_heads, kv_len, head_dim]),
            tensor([batch, kv_heads, kv_len, self.v_head_dim.unwrap_or(head_dim)]),
        );
        let layout = options.layout.layout(spec.output.layout.shape);
        spec.output = TensorSpec { element: output, layout };
        options.apply(&mut spec);
        let scores = Layout::bhld([batch, q_heads, q_len, kv_len]);
        spec.bias = self.bias.then_some(TensorSpec::f32(scores));
        spec.mask = self.mask.then_some(scores);
        spec.q_lens = self.q_lens;
        spec.kv_lens = self.kv_lens;
        spec.row_ranges = self.row_ranges;
        spec.alibi_slopes = self.alibi.then_some(AlibiSlopes::PerHead);
        spec.sinks = self.sinks;
        spec.lse = self.lse;
        spec.scores = probs.then_some(ScoreStage::Probs);
        for note in options.idle(&spec) {
            terminal.note(format_args!("warning: {note}"));
        }
        Ok(AttentionProblem::new(spec)?)
    }
}
