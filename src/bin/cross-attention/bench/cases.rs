//! What is timed: named workloads, a shape of the user's own, files, or shapes out of a file.

use std::path::{Path, PathBuf};

use cross_attention::workload::{self, Workload};
use cross_attention::{AttentionProblem, AttentionSpec, Element, ScoreStage};

use super::{Args, shapes};
use crate::error::Error;
use crate::explain::terms;
use crate::file::{self, FileFlags, Wish};
use crate::input::{Contents, Source};
use crate::options::{AxisOrder, Metadata};
use crate::terminal::Terminal;
use crate::text::ShownPath as _;

/// One attention to time.
#[derive(Debug)]
pub(super) struct Case {
    pub(super) name: String,
    /// What was asked for, as far as a refused problem can be described.
    pub(super) shape: Shape,
    /// Where its numbers are; without it they are made from the name.
    pub(super) file: Option<PathBuf>,
}

/// What tells one case from another, in words.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    pub(super) batch: usize,
    pub(super) q_heads: usize,
    pub(super) kv_heads: usize,
    pub(super) q_len: usize,
    pub(super) kv_len: usize,
    pub(super) head_dim: usize,
    pub(super) v_head_dim: usize,
    pub(super) element: &'static str,
    pub(super) kv: String,
    pub(super) page_len: Option<usize>,
    pub(super) output: &'static str,
    pub(super) layout: &'static str,
    pub(super) scale: Option<f32>,
    /// All that it has besides query, key, value and output.
    pub(super) terms: Vec<String>,
}

/// A case, and its problem, or why that is refused.
pub(super) type Asked = (Case, Result<AttentionProblem, String>);

/// The cases that the flags ask for.
///
/// # Errors
/// A file or a shape that is refused. A named workload that the flags do not fit is a case that fails.
pub(super) fn cases(args: &Args, terminal: &Terminal) -> Result<Vec<Asked>, Error> {
    if let Some(path) = &args.shapes {
        let case = |shapes::Named { name, problem, order }| (Case::of(name, &problem, order), Ok(problem));
        return Ok(shapes::read(path, terminal)?.into_iter().map(case).collect());
    }
    if !args.file.is_empty() {
        if let Some(asked) = args.output_type.filter(|asked| args.backward && *asked != Element::F32) {
            return Err(Error::BackwardOutput { asked });
        }
        return args.file.iter().map(|path| of_file(args, path, terminal)).collect();
    }
    let element = args.shape.element.unwrap_or(Element::F32);
    if args.shape.is_given() {
        let output = args.output_type.unwrap_or(element);
        let problem = args.shape.problem(args.kv, &args.options, output, args.scores(), terminal)?;
        let order = args.options.over(&Metadata::new())?.layout;
        return Ok(vec![(Case::of(None, &problem, order), Ok(problem))]);
    }
    let named = |workload: Workload| {
        let problem = super::stored(&workload, element, args.kv).map_err(|error| error.chain());
        let shape = match &problem {
            Ok(problem) => Shape::of(problem, AxisOrder::Bhld),
            Err(_) => Shape::refused(&workload.spec, element, args),
        };
        (Case { name: workload.name.to_owned(), shape, file: None }, problem)
    };
    Ok(workloads(&args.names).into_iter().map(named).collect())
}

/// The workloads of these names; all if none is given.
pub(super) fn workloads(names: &[String]) -> Vec<Workload> {
    if names.is_empty() { workload::all() } else { names.iter().filter_map(|name| workload::find(name)).collect() }
}

/// The case of a file, of which only the header is looked at.
fn of_file(args: &Args, path: &Path, terminal: &Terminal) -> Result<Asked, Error> {
    let source = Source::File(path.to_owned());
    let request = Contents::read(&source).and_then(|contents| file::request(&contents, &args.reading(), args.wish()));
    let request = request.map_err(|source| Error::Input { path: path.to_owned(), source: Box::new(source) })?;
    request.warn(path, terminal);
    let shape = Shape::of(&request.problem, request.order);
    Ok((Case { name: path.shown(), shape, file: Some(path.to_owned()) }, Ok(request.problem)))
}

impl Args {
    /// What a file's results shall be.
    pub(super) fn wish(&self) -> Wish {
        if self.backward {
            return Wish::BACKWARD;
        }
        Wish { output: self.output_type.unwrap_or(Element::F32), scores: self.scores(), ..Wish::PLAIN }
    }

    /// The matrix that is returned too.
    fn scores(&self) -> Option<ScoreStage> {
        self.probs.then_some(ScoreStage::Probs)
    }

    /// How a file is read: what no flag of `bench` says, its metadata may.
    pub(super) fn reading(&self) -> FileFlags {
        FileFlags { options: self.options.clone(), ..FileFlags::default() }
    }
}

impl Case {
    fn of(name: Option<String>, problem: &AttentionProblem, order: AxisOrder) -> Self {
        let shape = Shape::of(problem, order);
        let name = name.unwrap_or_else(|| shape.short().replace(' ', ""));
        Self { name, shape, file: None }
    }
}

impl Shape {
    fn of(problem: &AttentionProblem, order: AxisOrder) -> Self {
        let spec = problem.spec();
        Self {
            batch: problem.batch(),
            q_heads: problem.q_heads(),
            kv_heads: problem.kv_heads(),
            q_len: problem.q_len(),
            kv_len: problem.kv_len(),
            head_dim: problem.head_dim(),
            v_head_dim: problem.v_head_dim(),
            element: spec.query.element.name(),
            kv: stored_as(spec),
            page_len: spec.paged.map(|_| spec.key.layout.shape[2]),
            output: spec.output.element.name(),
            layout: match order {
                AxisOrder::Bhld => "bhld",
                AxisOrder::Blhd => "blhd",
            },
            scale: spec.scale,
            terms: terms(problem),
        }
    }

    fn refused(spec: &AttentionSpec, element: Element, args: &Args) -> Self {
        let [batch, q_heads, q_len, head_dim] = spec.query.layout.shape;
        let [_, kv_heads, kv_len, _] = spec.key.layout.shape;
        let v_head_dim = spec.value.layout.shape[3];
        let element = element.name();
        let (kv, page_len) = (args.kv.format().unwrap_or(element).to_owned(), args.kv.page_len());
        let (layout, scale) = ("bhld", spec.scale);
        let terms = vec![];
        Self {
            batch,
            q_heads,
            kv_heads,
            q_len,
            kv_len,
            head_dim,
            v_head_dim,
            element,
            kv,
            page_len,
            output: element,
            layout,
            scale,
            terms,
        }
    }

    /// `batch x q_heads/kv_heads x q_len x kv_len x head_dim/v_head_dim`, where equal ones are named once.
    pub(super) fn short(&self) -> String {
        let pair = |first, second| if first == second { format!("{first}") } else { format!("{first}/{second}") };
        let (heads, dim) = (pair(self.q_heads, self.kv_heads), pair(self.head_dim, self.v_head_dim));
        format!("{} x {heads} x {} x {} x {dim}", self.batch, self.q_len, self.kv_len)
    }

    /// Element types, and how keys and values are stored where that is another way.
    pub(super) fn elements(&self) -> String {
        let mut text = self.element.to_owned();
        if self.kv != self.element {
            text += &format!(", kv {}", self.kv);
        }
        if let Some(page_len) = self.page_len {
            text += &format!(", pages of {page_len}");
        }
        if self.output != self.element {
            text += &format!(", output {}", self.output);
        }
        text
    }
}

/// The format of the keys, by the name that `--kv` has for it.
fn stored_as(spec: &AttentionSpec) -> String {
    match spec.key_scale.map(|scale| scale.layout.shape[3]) {
        None => spec.key.element.name().to_owned(),
        Some(0 | 1) => "int8".to_owned(),
        Some(blocks) => format!("int8_{}", spec.key.layout.shape[3] / blocks),
    }
}
