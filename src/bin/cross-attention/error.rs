//! Why the program could not do what it was asked.

use crate::text::ShownPath as _;
use std::error::Error as _;
use std::path::{Path, PathBuf};

/// Everything the program itself refuses; the library's refusals are wrapped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Backward(#[from] cross_attention::backward::BackwardError),
    #[error(transparent)]
    Bench(#[from] crate::bench::error::BenchError),
    #[error("{}", path.shown())]
    Input { path: PathBuf, source: Box<Self> },
    #[error("cannot read it")]
    Read { source: std::io::Error },
    #[error("it is not a whole safetensors file: {reason}")]
    Format { reason: String },
    #[error("it is not a whole .npz file: {reason}")]
    Archive { reason: String },
    #[error("array {name}: {reason}")]
    Array { name: String, reason: String },
    #[error("the name {name:?} is given twice")]
    Twice { name: String },
    #[error(
        "it is a single array, which has no name; give it as query=FILE.npy (key=…, value=…), or save several with numpy.savez"
    )]
    Nameless,
    #[error("standard input is a terminal; send it a file")]
    StdinTerminal,
    #[error("standard input (-) can be read once, and is given more than once")]
    StdinTwice,
    #[error("standard output is a terminal; send it to a file or a program, or name a file")]
    StdoutTerminal,
    #[error("{count} results cannot be told apart on standard output (-); name a folder")]
    OneToStdout { count: usize },
    #[error("--json and the result would both go to standard output; name another output")]
    JsonStdout,
    #[error("{} has no name of its own to be given in {}; name a file", input.shown(), output.shown())]
    NeedsFile { input: PathBuf, output: PathBuf },
    #[error("arrays (NAME=FILE.npy) make one input together, and {} is another one; give them in two calls", file.shown())]
    MixedInputs { file: PathBuf },
    #[error("a single array (.npy) would have to hold {}; write an .npz or a safetensors file", names.join(", "))]
    OneArray { names: Vec<String> },
    #[error("{name} is of {dtype}, which NumPy has no type for; take another type, or a safetensors file")]
    NoNumpyType { name: String, dtype: safetensors::Dtype },
    #[error("{packed} holds {part} already, and {part} is there too; leave one out")]
    Packed { packed: &'static str, part: &'static str },
    #[error("{name} has shape {found:?}, [batch, len, heads * dim], which needs {flag}, as flag or in the metadata")]
    NoHeads { name: &'static str, found: Vec<usize>, flag: &'static str },
    #[error("{name} has {found} heads, {flag} says {asked}")]
    Heads { name: &'static str, flag: &'static str, asked: usize, found: usize },
    #[error("--layout is the order of tensors of 4 axes, and {} has an order of its own; leave it out", named(found))]
    NoOrder { found: [&'static str; 3] },
    #[error("{given} is there without {missing}; a past needs both past_key and past_value")]
    HalfPast { given: &'static str, missing: &'static str },
    #[error("past_key and past_value stand before keys and values of F32, F16 or BF16 side by side; these are {found}")]
    PastForm { found: &'static str },
    #[error(
        "{name} has shape {found:?}, needs {wanted:?}, each axis may also be 1; --pad-mask hides the keys behind its end, as \
         ONNX's Attention does"
    )]
    ShortMask { name: &'static str, found: [usize; 4], wanted: [usize; 4] },
    #[error(
        "gradients are of query, key and value as tensors of their own, and there is {found}; write them out first"
    )]
    BackwardInput { found: &'static str },
    #[error(
        "gradients are of an output of f32, which `run` writes as {asked} after they are computed; leave --output-type out"
    )]
    BackwardOutput { asked: cross_attention::Element },
    #[error("it has no {name}: it holds [{}], and a part to merge needs output and lse", found.join(", "))]
    NotPartial { name: &'static str, found: Vec<String> },
    #[error(
        "its rows [batch, q_heads, q_len, v_head_dim] are {found:?}, those of {} are {wanted:?}; parts are of the same queries",
        first.shown()
    )]
    PartShape { found: [usize; 4], wanted: [usize; 4], first: PathBuf },
    #[error("{given} is there without {missing}; a part has both, or its lse alone")]
    HalfState { given: &'static str, missing: &'static str },
    #[error(
        "lse{row:?} is {lse}, and row_max {max} with row_sum {sum} there say something else; write the part again with `run \
         --row-state`, or leave row_max and row_sum out"
    )]
    PartState { row: [usize; 3], lse: f32, max: f32, sum: f32 },
    #[error("{} is given twice, and a key counts once; give each part once", input.shown())]
    PartTwice { input: PathBuf },
    #[error(transparent)]
    Merge(#[from] cross_attention::cpu::MergeError),
    #[error("tensor d_output is missing: --backward needs the gradient of the output")]
    NoGradient,
    #[error("tensor {name} is missing: the file holds {found}, needs at least query, key and value")]
    MissingTensor { name: &'static str, found: String },
    #[error("{given} is there without {missing}; row ranges need both row_start and row_end")]
    HalfRange { given: &'static str, missing: &'static str },
    #[error("{name} has element type {found}, possible: {possible}")]
    ElementType { name: &'static str, found: safetensors::Dtype, possible: &'static str },
    #[error("rows of {width} columns are no whole blocks of 32; --kv int8 has one scale for a row of any width")]
    KvWidth { width: usize },
    #[error("{name} cannot be stored in that format: {source}")]
    Quantize { name: &'static str, source: cross_attention::quantize::QuantizeError },
    #[error(
        "{name} is stored as {found} already; --kv and --pages take F32, F16 and BF16 that lie side by side, and without them \
         the file is copied in the format of the new one"
    )]
    NotConvertible { name: &'static str, found: &'static str },
    #[error(
        "{kv_len} keys do not fill pages of {page_len}, and causal bottom_right counts from the end of the last one; \
         write causal end_of_keys, which counts from the last key"
    )]
    PagedDiagonal { kv_len: usize, page_len: usize },
    #[error("{name} has shape {found:?}, needs {wanted}")]
    Rank { name: &'static str, found: Vec<usize>, wanted: String },
    #[error("{name}[{batch}] is {found}, possible: 0 to {most}, the tokens of the sequence")]
    Length { name: &'static str, batch: usize, found: i64, most: usize },
    #[error("option {name} is {found:?}, needs {wanted}")]
    Option { name: &'static str, found: String, wanted: &'static str },
    #[error("{path} holds no file named *.safetensors or *.npz")]
    EmptyFolder { path: PathBuf },
    #[error("cannot list {path}")]
    List { path: PathBuf, source: std::io::Error },
    #[error("{first} and {second} would both be written to {output}; give them in two calls, or rename one")]
    SameOutput { first: PathBuf, second: PathBuf, output: PathBuf },
    #[error("{output} is an input; name another output")]
    OutputIsInput { output: PathBuf },
    #[error("{path} is not empty; name another folder, or write into it with --force")]
    NotEmpty { path: PathBuf },
    #[error("{path} holds {written} of {count} shaders, without manifest.json")]
    PartlyWritten { path: PathBuf, written: usize, count: usize, source: Box<Error> },
    #[error("head_dim is {found:?}, a shape has one; --all takes several")]
    SeveralWidths { found: Vec<usize> },
    #[error("--all has no shaders of head_dim {found}, possible: {possible}; those of another width by a shape")]
    CatalogWidth { found: usize, possible: String },
    #[error(
        "--all has no shaders of {kernel}, which no device of its list can run; name a shape, and an adapter that can"
    )]
    NotInCatalog { kernel: &'static str },
    #[error("cannot start threads: {reason}; --jobs with fewer")]
    Threads { reason: String },
    #[error("{what} has no shaders; name a GPU kernel, and an adapter or a class of devices")]
    NoShaders { what: &'static str },
    #[error(
        "{shader} needs {needed} bytes of workgroup memory, {target} allows {found}; plan with --workgroup-memory {found}"
    )]
    TargetMemory { shader: String, target: &'static str, needed: u64, found: u64 },
    #[error("{shader} cannot be written as {target}, this is a fault of the program: {reason}")]
    Translate { shader: &'static str, target: &'static str, reason: String },
    #[error("cannot write into {}; several inputs, or a folder, need a folder to write to", path.shown())]
    OutputFolder { path: PathBuf, source: std::io::Error },
    #[error("{} is a file; name a folder to write into", path.shown())]
    NotAFolder { path: PathBuf },
    #[error("cannot write into the folder {}", path.shown())]
    Folder { path: PathBuf, source: std::io::Error },
    #[error("cannot make {}, the folder of the output", path.shown())]
    MakeFolder { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Output(#[from] cross_attention::files::OutputError),
    #[error("cannot draw the picture for {}", path.shown())]
    Picture { path: PathBuf, source: std::io::Error },
    #[error("{name} of shape {shape:?} is larger than memory can be addressed")]
    TooLarge { name: &'static str, shape: [usize; 4] },
    #[error("--{axis} {asked}: {wrong}; the file has {len} {}{}", if *axis == "segments" { "keys" } else { axis }, possible(*len))]
    Positions { axis: &'static str, asked: String, wrong: &'static str, len: usize },
    #[error("{path} is neither a picture nor a table; name it .png, .svg or .csv, or say --format")]
    MapFormat { path: PathBuf },
    #[error("{flag} is about the colors of a picture, and {path} is a table; leave it out, or name a .png or .svg")]
    ColorsOfTable { flag: &'static str, path: PathBuf },
    #[error("--scale-each is about several panels, and the heads become one; say --reduce none too, or leave it out")]
    OnePanel,
    #[error("--batch is {found}, possible: 0 to {}", batch.saturating_sub(1))]
    Batch { found: usize, batch: usize },
    #[error("there are no weights to write: [batch, heads, rows, columns] is {shape:?}")]
    NoWeights { shape: [usize; 4] },
    #[error(
        "the picture would have {width} x {height} pixels, at most {max} are drawn; choose fewer heads, take their mean, or \
         write a table (.csv)"
    )]
    LargePicture { width: usize, height: usize, max: usize },
    #[error("cannot start another process of this program")]
    Probe { source: std::io::Error },
    #[error("there is no subcommand {name}, possible: {possible}{meant}")]
    NoPage { name: String, possible: String, meant: String },
    #[error("cannot write to standard output")]
    Stdout { source: std::io::Error },
    #[error("this would take {bytes} bytes, more memory than there is")]
    Memory { bytes: u128 },
    #[error("the device gave no {name} back; this is a fault of the library")]
    NotReturned { name: &'static str },
    #[error("the result is off: {report}")]
    Verify { report: String },
    #[error("{device} has no choices to tune; --device gpu, an adapter's number, or part of its name")]
    NotTunable { device: String },
    #[error("{warning}; it is not overwritten: name another file, or remove it")]
    NotACache { warning: cross_attention::tune::TuneWarning },
    #[error("{path} is not a pipeline cache, and is not overwritten: name another file, or remove it")]
    NotAPipelineCache { path: PathBuf },
    #[error("{count} choices gave wrong results and are rejected; this is a fault of a kernel or of the driver")]
    WrongChoices { count: usize },
    #[error("no choice was right and timed, so none is kept")]
    NothingChosen,
    #[error(transparent)]
    Attention(#[from] cross_attention::Error),
}

/// Names of tensors, each once.
fn named(found: &[&str]) -> String {
    let mut names = found.to_vec();
    names.dedup();
    names.join(", ")
}

/// The numbers of so many things.
fn possible(count: usize) -> String {
    count.checked_sub(1).map_or_else(String::new, |last| format!(", 0 to {last}"))
}

impl From<cross_attention::ProblemError> for Error {
    fn from(error: cross_attention::ProblemError) -> Self {
        Self::Attention(error.into())
    }
}

impl From<cross_attention::InputError> for Error {
    fn from(error: cross_attention::InputError) -> Self {
        Self::Attention(error.into())
    }
}

impl Error {
    /// Why a folder cannot be written to.
    pub(crate) fn folder(path: &Path, source: std::io::Error) -> Self {
        let path = path.to_owned();
        if path.is_file() { Self::NotAFolder { path } } else { Self::Folder { path, source } }
    }

    /// What is wrong with an input file.
    pub(crate) fn format(reason: impl Into<String>) -> Self {
        Self::Format { reason: reason.into() }
    }

    /// What is wrong with an archive of arrays, unless it could not be read.
    pub(crate) fn archive(error: zip::result::ZipError) -> Self {
        match error {
            zip::result::ZipError::Io(source) if source.kind() != std::io::ErrorKind::UnexpectedEof => {
                Self::Read { source }
            }
            error => Self::Archive { reason: error.to_string() },
        }
    }

    /// The message, followed by the causes that it does not already tell.
    pub(crate) fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            let message = error.to_string();
            if !text.contains(&message) {
                text = format!("{text}: {message}");
            }
            cause = error.source();
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let source = std::io::Error::other("disk is gone");
        assert_eq!(Error::Read { source }.chain(), "cannot read it: disk is gone");
    }
}
