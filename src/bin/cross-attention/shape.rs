//! A problem described by flags, or read from a file.

use std::path::PathBuf;

use cross_attention::backward::{BackwardProblem, BackwardSpec};
use cross_attention::{AlibiSlopes, AttentionProblem, AttentionSpec, Element, Layout, Paged, ScoreStage, TensorSpec};

use crate::backward::{self, Backward};
use crate::error::Error;
use crate::file::{self, FileFlags, Opened, Wish};
use crate::input::Source;
use crate::options::{Metadata, OptionFlags};
use crate::terminal::Terminal;

/// The problem of an input file, or of a shape.
#[derive(Debug, clap::Args)]
#[command(
    mut_arg("q_heads", |flag| flag.required_unless_present("input")),
    mut_arg("q_len", |flag| flag.required_unless_present("input")),
    mut_arg("kv_len", |flag| flag.required_unless_present("input")),
    mut_arg("head_dim", |flag| flag.required_unless_present("input"))
)]
pub(crate) struct ProblemFlags {
    /// A file as `run` takes it (safetensors or .npz, - for standard input); without one, the shape is given by flags, of
    /// which --q-heads and --kv-heads also say how to read a file
    #[arg(value_name = "INPUT", conflicts_with_all = [
        "batch", "q_len", "kv_len", "head_dim", "v_head_dim", "element", "bias", "mask", "q_lens", "kv_lens", "row_ranges",
        "alibi", "sinks", "lse", "KvFlags",
    ])]
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
    /// Return a score matrix too: scaled (before the softcap), capped (after it), masked (after bias and masks) or probs
    #[arg(long, value_name = "STAGE", conflicts_with = "probs")]
    scores: Option<ScoreStage>,
    /// Let a file's bias and mask be shorter than the keys: those behind their end are hidden, as in ONNX
    // what a shape by flags needs stands against it: clap asks for nothing that conflicts with what is there
    #[arg(long, conflicts_with = "kv_len")]
    pad_mask: bool,
    #[command(flatten)]
    options: OptionFlags,
}

impl ProblemFlags {
    /// The problem.
    ///
    /// # Errors
    /// A file or options that cannot be read, and what the library refuses.
    pub(crate) fn problem(&self, terminal: &Terminal) -> Result<AttentionProblem, Error> {
        let scores = if self.probs { Some(ScoreStage::Probs) } else { self.scores };
        match &self.input {
            Some(path) => {
                let wish = Wish { output: self.output_type, scores, ..Wish::PLAIN };
                file::problem(path, &self.file_flags(), wish, terminal)
            }
            None => self.shape.problem(self.kv, &self.options, self.output_type, scores, terminal),
        }
    }

    /// The gradients of all inputs: of a file those that `run --backward` computes of it, of a shape those of an attention as it
    /// would be trained.
    ///
    /// # Errors
    /// As [`problem`](Self::problem), and what has no gradient.
    pub(crate) fn backward(&self, terminal: &mut Terminal) -> Result<BackwardProblem, Error> {
        let told = |left_out: Option<String>, terminal: &Terminal| {
            left_out.iter().for_each(|left_out| terminal.note(format_args!("warning: {left_out}")));
        };
        let Some(path) = &self.input else {
            let spec = BackwardSpec::all(self.problem(terminal)?.spec().clone());
            told(backward::left_out(&spec), terminal);
            return Ok(BackwardProblem::new(spec)?);
        };
        if self.output_type != Element::F32 {
            return Err(Error::BackwardOutput { asked: self.output_type });
        }
        let source = Source::of(path);
        let named = |error| Error::Input { path: source.label(), source: Box::new(error) };
        let opened = Opened::open(&source, &self.file_flags(), Wish::BACKWARD, terminal).map_err(named)?;
        opened.request.warn(&source.label(), terminal);
        let backward = Backward::new(&opened).map_err(named)?;
        told(backward.left_out, terminal);
        Ok(backward.problem)
    }

    /// How a file is read.
    fn file_flags(&self) -> FileFlags {
        let (q_heads, kv_heads) = (self.shape.q_heads, self.shape.kv_heads);
        FileFlags { options: self.options.clone(), q_heads, kv_heads, pad_mask: self.pad_mask }
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

/// A shape: whole, or not there but for its element type. No flags are flattened in, for clap then leaves the group empty.
#[derive(Debug, clap::Args)]
#[group(id = "shape", multiple = true)]
#[command(next_help_heading = "Shape")]
pub(crate) struct ShapeFlags {
    /// Entries of the batch [default: 1]
    #[arg(long, value_name = "N", requires = "q_heads")]
    batch: Option<usize>,
    /// Heads of the query
    #[arg(long, value_name = "N", requires = "q_len")]
    q_heads: Option<usize>,
    /// Heads of key and value [default: those of the query]
    #[arg(long, value_name = "N", requires = "q_heads")]
    kv_heads: Option<usize>,
    /// Length of the query, in tokens
    #[arg(long, value_name = "TOKENS", requires = "kv_len")]
    q_len: Option<usize>,
    /// Length of key and value, in tokens
    #[arg(long, value_name = "TOKENS", requires = "head_dim")]
    kv_len: Option<usize>,
    /// Width of a query or key row
    #[arg(long, value_name = "N", requires = "q_heads")]
    head_dim: Option<usize>,
    /// Width of a value row [default: that of a key row]
    #[arg(long, value_name = "N", requires = "q_heads")]
    v_head_dim: Option<usize>,
    /// Element type of query, key and value, f32, f16 or bf16 [default: f32]
    #[arg(long, value_name = "TYPE")]
    pub(crate) element: Option<Element>,
    /// With an additive bias [batch, q_heads, q_len, kv_len]
    #[arg(long, requires = "q_heads")]
    bias: bool,
    /// With a boolean mask [batch, q_heads, q_len, kv_len]
    #[arg(long, requires = "q_heads")]
    mask: bool,
    /// With query lengths [batch]
    #[arg(long, requires = "q_heads")]
    q_lens: bool,
    /// With key lengths [batch]
    #[arg(long, requires = "q_heads")]
    kv_lens: bool,
    /// With a range of keys for each row
    #[arg(long, requires = "q_heads")]
    row_ranges: bool,
    /// With ALiBi slopes, one for each head
    #[arg(long, requires = "q_heads")]
    alibi: bool,
    /// With attention sinks
    #[arg(long, requires = "q_heads")]
    sinks: bool,
    /// Return the log-sum-exp too (`run` always does)
    #[arg(long, requires = "q_heads")]
    lse: bool,
}

impl ShapeFlags {
    /// Whether there is one.
    pub(crate) const fn is_given(&self) -> bool {
        self.q_heads.is_some()
    }

    /// The problem that the flags describe.
    ///
    /// # Errors
    /// Options that cannot be read, and what the library refuses.
    pub(crate) fn problem(
        &self,
        kv: KvFlags,
        options: &OptionFlags,
        output: Element,
        scores: Option<ScoreStage>,
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
        let of_pairs = Layout::bhld([batch, q_heads, q_len, kv_len]);
        spec.bias = self.bias.then_some(TensorSpec::f32(of_pairs));
        spec.mask = self.mask.then_some(of_pairs);
        spec.q_lens = self.q_lens;
        spec.kv_lens = self.kv_lens;
        spec.row_ranges = self.row_ranges;
        spec.alibi_slopes = self.alibi.then_some(AlibiSlopes::PerHead);
        spec.sinks = self.sinks;
        spec.lse = self.lse;
        spec.scores = scores;
        for note in options.idle(&spec) {
            terminal.note(format_args!("warning: {note}"));
        }
        Ok(AttentionProblem::new(spec)?)
    }
}
