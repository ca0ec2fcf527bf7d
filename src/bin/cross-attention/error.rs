//! Why the program could not do what it was asked.

use std::error::Error as _;
use std::path::PathBuf;

/// Everything the program itself refuses; the library's refusals are wrapped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Backward(#[from] cross_attention::backward::BackwardError),
    #[error("{}", path.display())]
    Input { path: PathBuf, source: Box<Self> },
    #[error("cannot read it")]
    Read { source: std::io::Error },
    #[error("it is not a whole safetensors file: {reason}")]
    Format { reason: String },
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
    #[error("{name} is stored as {found} already; convert takes F32, F16 and BF16 that lie side by side")]
    NotConvertible { name: &'static str, found: String },
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
    #[error("{path} holds no file named *.safetensors")]
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
    #[error("{what} has no shaders; name a GPU kernel, and an adapter or a class of devices")]
    NoShaders { what: &'static str },
    #[error(
        "{shader} needs {needed} bytes of workgroup memory, {target} allows {found}; plan with --workgroup-memory {found}"
    )]
    TargetMemory { shader: String, target: &'static str, needed: u64, found: u64 },
    #[error("{shader} cannot be written as {target}, this is a fault of the program: {reason}")]
    Translate { shader: &'static str, target: &'static str, reason: String },
    #[error("cannot write into {}; several inputs, or a folder, need a folder to write to", path.display())]
    OutputFolder { path: PathBuf, source: std::io::Error },
    #[error("cannot write into the folder {}", path.display())]
    Folder { path: PathBuf, source: std::io::Error },
    #[error("cannot make {}, the folder of the output", path.display())]
    MakeFolder { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Output(#[from] cross_attention::files::OutputError),
    #[error("cannot draw the picture for {}", path.display())]
    Picture { path: PathBuf, source: std::io::Error },
    #[error("{name} of shape {shape:?} is larger than memory can be addressed")]
    TooLarge { name: &'static str, shape: [usize; 4] },
    #[error("--{axis} {asked}: {wrong}; the file has {len} {}{}", if *axis == "segments" { "keys" } else { axis }, possible(*len))]
    Positions { axis: &'static str, asked: String, wrong: &'static str, len: usize },
    #[error("{path} is neither a picture nor a table; name it .png or .csv")]
    MapFormat { path: PathBuf },
    #[error("--batch is {found}, possible: 0 to {}", batch.saturating_sub(1))]
    Batch { found: usize, batch: usize },
    #[error("there are no weights to write: [batch, heads, rows, columns] is {shape:?}")]
    NoWeights { shape: [usize; 4] },
    #[error(
        "the picture would have {width} x {height} pixels, at most {max} are drawn; choose fewer heads, take their mean, or \
         write a table (.csv)"
    )]
    LargePicture { width: usize, height: usize, max: usize },
    #[error("cannot write to standard output")]
    Stdout { source: std::io::Error },
    #[error("the results would take {bytes} bytes, more memory than there is")]
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
    /// What is wrong with an input file.
    pub(crate) fn format(reason: impl Into<String>) -> Self {
        Self::Format { reason: reason.into() }
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
