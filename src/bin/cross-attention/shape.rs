//! A problem described by flags, or read from a file.

use std::path::PathBuf;

use cross_attention::{AlibiSlopes, AttentionProblem, AttentionSpec, Element, Layout, Paged, ScoreStage, TensorSpec};

use crate::error::Error;
use crate::file::{self, Wish};
use crate::options::{Metadata, OptionFlags};
use crate::terminal::Terminal;

/// The problem of an input file, or of a shape.
#[derive(Debug, clap::Args)]
pub(crate) struct ProblemFlags {
    /// A safetensors file as `run` takes it; without one, the shape is given by flags
    #[arg(value_name = "INPUT", conflicts_with_all = ["shape", "KvFlags"])]
    pub(crate) input: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) shape: ShapeFlags,
    #[command(flatten)]
    kv: KvFlags,
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
                let wish = Wish { output: self.output_type, probs: self.probs, backward: false };
                file::problem(path, &self.options, wish, terminal)
            }
            None => self.shape.problem(self.kv, &self.options, self.output_type, self.probs, terminal),
        }
    }
}

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub(crate) struct KvFlags {
    /// How keys and values are stored: f32, f16, bf16, int8 (a scale each row) or int8_32 (one for 32 columns)
    #[arg(long, value_name = "FORMAT")]
    kv: Option<KvFormat>,
    /// Keys and values in pages of so many tokens, a power of two up to 256
    #[arg(long, value_name = "TOKENS")]
    pages: Option<usize>,
}

/// A format of keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KvFormat {
    Float(Element),
    /// Signed bytes, an f32 scale for each row.
    Int8,
    /// Signed bytes, an f16 scale for 32 columns.
    Int8By32,
}

/// Columns that have one scale in `int8_32`.
const BLOCK: usize = 32;

impl KvFormat {
    const ALL: [Self; 5] =
        [Self::Float(Element::F32), Self::Float(Element::F16), Self::Float(Element::Bf16), Self::Int8, Self::Int8By32];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Float(element) => element.name(),
            Self::Int8 => "int8",
            Self::Int8By32 => "int8_32",
        }
    }

    /// A tensor in this format, and its scales where it has any.
    ///
    /// # Errors
    /// [`Error::KvWidth`] for rows that are no whole blocks.
    pub(crate) fn of(
        self,
        axes: [usize; 4],
        layout: &impl Fn([usize; 4]) -> Layout,
    ) -> Result<(TensorSpec, Option<TensorSpec>), Error> {
        let [batch, heads, len, width] = axes;
        let tensor = |element, axes| TensorSpec { element, layout: layout(axes) };
        let bytes = |scale, blocks| (tensor(Element::I8, axes), Some(tensor(scale, [batch, heads, len, blocks])));
        match self {
            Self::Float(element) => Ok((tensor(element, axes), None)),
            Self::Int8 => Ok(bytes(Element::F32, 1)),
            Self::Int8By32 if width.is_multiple_of(BLOCK) => Ok(bytes(Element::F16, width / BLOCK)),
            Self::Int8By32 => Err(Error::KvWidth { width }),
        }
    }
}

impl std::str::FromStr for KvFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let possible = Self::ALL.map(Self::name).join(", ");
        Self::ALL.into_iter().find(|format| format.name() == text).ok_or_else(|| format!("possible: {possible}"))
    }
}

impl KvFlags {
    /// Stores keys and values of a spec as the flags say.
    ///
    /// # Errors
    /// As [`KvFormat::of`].
    pub(crate) fn apply(self, spec: &mut AttentionSpec, layout: impl Fn([usize; 4]) -> Layout) -> Result<(), Error> {
        if self.kv.is_none() && self.pages.is_none() {
            return Ok(());
        }
        let axes = |tensor: &TensorSpec| tensor.layout.shape;
        let [mut key, mut value] = [axes(&spec.key), axes(&spec.value)];
        if let Some(page_len) = self.pages {
            let [batch, _, kv_len, _] = key;
            // a length of 0 is refused with the problem
            let table_len = kv_len.div_ceil(page_len.max(1));
            for axes in [&mut key, &mut value] {
                (axes[0], axes[2]) = (batch * table_len, page_len);
            }
            spec.paged = Some(Paged { table_len, kv_len });
        }
        let formats = [spec.key.element, spec.value.element].map(|element| self.kv.unwrap_or(KvFormat::Float(element)));
        (spec.key, spec.key_scale) = formats[0].of(key, &layout)?;
        (spec.value, spec.value_scale) = formats[1].of(value, &layout)?;
        Ok(())
    }

    /// In a word or two, where anything is asked for.
    pub(crate) fn words(self) -> Option<String> {
        let kv = self.kv.map(|kv| format!("kv {}", kv.name()));
        let pages = self.pages.map(|page_len| format!("pages of {page_len}"));
        let words: Vec<_> = kv.into_iter().chain(pages).collect();
        (!words.is_empty()).then(|| words.join(", "))
    }

    /// The format that is asked for, or another one.
    pub(crate) fn or(self, other: KvFormat) -> KvFormat {
        self.kv.unwrap_or(other)
    }

    pub(crate) fn format(self) -> Option<&'static str> {
        self.kv.map(KvFormat::name)
    }

    pub(crate) const fn page_len(self) -> Option<usize> {
        self.pages
    }
}

/// A shape, needed where the argument of the id `input` is not given. No flags are flattened in, for clap then leaves the group empty.
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
        kv: KvFlags,
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
        kv.apply(&mut spec, |axes| options.layout.layout(axes))?;
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
