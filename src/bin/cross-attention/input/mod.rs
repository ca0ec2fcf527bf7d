//! An input: what tensors it holds, checked, and their bytes; of a safetensors file mapped and not copied.

mod npy;
mod npz;
mod safetensors;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Cursor, IsTerminal, Read, Seek};
use std::path::{Path, PathBuf};

use ::safetensors::tensor::TensorInfo;
use indicatif::ProgressBar;
use memmap2::Mmap;

use crate::error::Error;
use crate::file::reserved;
use crate::options::Metadata;
use crate::system;

/// Files that are shorter are read: that costs less than a map.
const MAPPED_FROM: u64 = 1 << 20;

/// Where an input comes from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    File(PathBuf),
    Stdin,
    /// Arrays of NumPy, each a file, with the names that they shall have.
    Arrays(Vec<(String, PathBuf)>),
}

/// How tensors are written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Safetensors,
    Npz,
    /// One array of NumPy.
    Npy,
}

impl Format {
    /// What the name of a file says; one that says nothing is safetensors.
    pub(crate) fn of_name(path: &Path) -> Self {
        let is = |wanted: &str| path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(wanted));
        match (is("npz"), is("npy")) {
            (true, _) => Self::Npz,
            (_, true) => Self::Npy,
            _ => Self::Safetensors,
        }
    }

    /// What a file is that starts so.
    fn of_start(start: &[u8]) -> Self {
        if start.starts_with(b"PK\x03\x04") || start.starts_with(b"PK\x05\x06") {
            Self::Npz
        } else if start.starts_with(npy::MAGIC) {
            Self::Npy
        } else {
            Self::Safetensors
        }
    }
}

/// Whether a path stands for standard input or standard output.
pub(crate) fn is_dash(path: &Path) -> bool {
    path.as_os_str() == "-"
}

impl Source {
    /// A file, or standard input for `-`.
    pub(crate) fn of(path: &Path) -> Self {
        if is_dash(path) { Self::Stdin } else { Self::File(path.to_owned()) }
    }

    /// An array with its name, as `query=FILE.npy`.
    pub(crate) fn array(argument: &Path) -> Option<(String, PathBuf)> {
        let (name, path) = argument.to_str()?.split_once('=')?;
        let named = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        let path = Path::new(path);
        (named && Format::of_name(path) == Format::Npy).then(|| (name.to_owned(), path.to_owned()))
    }

    /// What errors call it.
    pub(crate) fn label(&self) -> PathBuf {
        match self {
            Self::File(path) => path.clone(),
            Self::Stdin => "standard input".into(),
            Self::Arrays(arrays) => {
                arrays.iter().map(|(_, path)| path.display().to_string()).collect::<Vec<_>>().join(", ").into()
            }
        }
    }

    /// The files that are read.
    pub(crate) fn files(&self) -> Vec<&Path> {
        match self {
            Self::File(path) => vec![path],
            Self::Stdin => vec![],
            Self::Arrays(arrays) => arrays.iter().map(|(_, path)| path.as_path()).collect(),
        }
    }

    /// Bytes to be read, where that is known.
    pub(crate) fn len(&self) -> u64 {
        self.files().into_iter().filter_map(|path| std::fs::metadata(path).ok()).map(|found| found.len()).sum()
    }
}

/// The tensors of an input, which is as long as they say.
#[derive(Debug)]
pub(crate) struct Contents {
    tensors: BTreeMap<String, TensorInfo>,
    /// Where the tensors start.
    data_start: usize,
    pub(crate) metadata: Metadata,
    /// How the input was written down.
    pub(crate) format: Format,
}

impl Contents {
    /// The tensor of this name.
    pub(crate) fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Names of all tensors, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    /// The bytes of a tensor in those of its input.
    pub(crate) fn data<'a>(&self, file: &'a [u8], info: &TensorInfo) -> &'a [u8] {
        let (start, end) = info.data_offsets;
        file.get(self.data_start + start..self.data_start + end).unwrap_or_default()
    }

    /// The tensors of bytes that are a safetensors file.
    ///
    /// # Errors
    /// [`Error::Format`].
    #[cfg(test)]
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Error> {
        safetensors::parse(bytes, bytes.len() as u64)
    }

    /// Reads what an input holds, and of a file nothing but that.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Format`], [`Error::Array`].
    pub(crate) fn read(source: &Source) -> Result<Self, Error> {
        let Source::File(path) = source else { return Ok(Bytes::open(source, &ProgressBar::hidden())?.0) };
        Self::of_file(path).map_err(|error| as_named(path, error))
    }

    fn of_file(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Read { source };
        let (mut file, file_len) = open(path)?;
        let Some(file_len) = file_len else { return Ok(Bytes::read(file)?.0) };
        let mut start = vec![];
        file.by_ref().take(safetensors::LEN_BYTES).read_to_end(&mut start).map_err(failed)?;
        match Format::of_start(&start) {
            Format::Safetensors => {
                let header_len = safetensors::header_len(&start, file_len)?;
                file.take(header_len).read_to_end(&mut start).map_err(failed)?;
                safetensors::parse(&start, file_len)
            }
            Format::Npz => npz::headers(rewound(file)?),
            Format::Npy => Err(Error::Nameless),
        }
    }
}

/// The bytes of an input.
#[derive(Debug)]
pub(crate) enum Bytes {
    Mapped(Mmap),
    Read(Vec<u8>),
}

impl Bytes {
    /// Opens an input; a bar shows how much of it is there.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Format`], [`Error::Array`], [`Error::Nameless`], [`Error::StdinTerminal`].
    pub(crate) fn open(source: &Source, bar: &ProgressBar) -> Result<(Contents, Self), Error> {
        match source {
            Source::File(path) => Self::of_file(path, bar).map_err(|error| as_named(path, error)),
            Source::Stdin => {
                let stdin = std::io::stdin();
                if stdin.is_terminal() { Err(Error::StdinTerminal) } else { Self::read(stdin.lock()) }
            }
            Source::Arrays(arrays) => npz::from_files(arrays, |path| Ok(open(path)?.0)),
        }
    }

    fn of_file(path: &Path, bar: &ProgressBar) -> Result<(Contents, Self), Error> {
        let (mut file, len) = open(path)?;
        let Some(len) = len else { return Self::read(file) };
        let mut start = vec![];
        file.by_ref().take(safetensors::LEN_BYTES).read_to_end(&mut start).map_err(|source| Error::Read { source })?;
        match Format::of_start(&start) {
            Format::Npz => npz::read(rewound(file)?),
            Format::Npy => Err(Error::Nameless),
            Format::Safetensors if len >= MAPPED_FROM => {
                let bytes = system::map(&file).map_err(|source| Error::Read { source })?;
                let contents = safetensors::parse(&bytes, bytes.len() as u64)?;
                if !bar.is_hidden() {
                    look_at(&bytes, bar);
                }
                Ok((contents, Self::Mapped(bytes)))
            }
            Format::Safetensors => Self::read((&start[..]).chain(file)),
        }
    }

    /// Reads all there is, whatever it is.
    fn read(mut from: impl Read) -> Result<(Contents, Self), Error> {
        let failed = |source| Error::Read { source };
        let mut bytes = vec![];
        // what has no end is read no further than its header reaches; a reservation that fails is an error of this call
        from.by_ref().take(safetensors::LEN_BYTES).read_to_end(&mut bytes).map_err(failed)?;
        if Format::of_start(&bytes) == Format::Safetensors {
            let cut_off = (bytes.len() as u64) < safetensors::LEN_BYTES;
            let header_len = safetensors::header_len(&bytes, if cut_off { bytes.len() as u64 } else { u64::MAX })?;
            from.by_ref().take(header_len).read_to_end(&mut bytes).map_err(failed)?;
            let rest = safetensors::described_len(&bytes)?.saturating_sub(bytes.len() as u64);
            // one more: what follows the tensors is told
            from.take(rest.saturating_add(1)).read_to_end(&mut bytes).map_err(failed)?;
        } else {
            from.read_to_end(&mut bytes).map_err(failed)?;
        }
        Self::of(bytes)
    }

    /// The tensors of bytes that are a whole file and stay with the caller.
    ///
    /// # Errors
    /// As [`of`](Self::of); [`Error::Memory`].
    pub(crate) fn copied(bytes: &[u8]) -> Result<(Contents, Self), Error> {
        if Format::of_start(bytes) == Format::Npz {
            return npz::read(Cursor::new(bytes));
        }
        let mut copy = reserved(bytes.len())?;
        copy.extend_from_slice(bytes);
        Self::of(copy)
    }

    /// The tensors of bytes that are a whole file.
    ///
    /// # Errors
    /// [`Error::Format`], [`Error::Array`], [`Error::Nameless`].
    pub(crate) fn of(bytes: Vec<u8>) -> Result<(Contents, Self), Error> {
        match Format::of_start(&bytes) {
            Format::Safetensors => Ok((safetensors::parse(&bytes, bytes.len() as u64)?, Self::Read(bytes))),
            Format::Npz => npz::read(Cursor::new(bytes)),
            Format::Npy => Err(Error::Nameless),
        }
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Read(bytes) => bytes,
        }
    }
}

/// Looks at every page, so that they are read from the disk now and in order, while somebody watches.
fn look_at(bytes: &[u8], bar: &ProgressBar) {
    const PART: usize = 16 << 20;
    const PAGE: usize = 4096;
    for (n, part) in bytes.chunks(PART).enumerate() {
        std::hint::black_box(part.iter().step_by(PAGE).fold(0u8, |sum, byte| sum.wrapping_add(*byte)));
        bar.set_position((n * PART + part.len()) as u64);
    }
}

/// What is wrong with a file that starts as no archive, and has the name of one.
fn as_named(path: &Path, error: Error) -> Error {
    match error {
        Error::Format { .. } if Format::of_name(path) == Format::Npz && !path.is_dir() => {
            Error::Archive { reason: "it does not start as a zip archive does, with PK".to_owned() }
        }
        error => error,
    }
}

/// A file, and its length if it is a regular one.
fn open(path: &Path) -> Result<(File, Option<u64>), Error> {
    let failed = |source| Error::Read { source };
    let metadata = std::fs::metadata(path).map_err(failed)?;
    if metadata.is_dir() {
        return Err(Error::format("it is a folder"));
    }
    let file = File::open(path).map_err(failed)?;
    Ok((file, metadata.is_file().then_some(metadata.len())))
}

fn rewound(mut file: File) -> Result<std::io::BufReader<File>, Error> {
    file.rewind().map_err(|source| Error::Read { source })?;
    Ok(std::io::BufReader::new(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_have_names() {
        let array = |text: &str| Source::array(Path::new(text));
        assert_eq!(array("query=a/q.npy"), Some(("query".to_owned(), "a/q.npy".into())));
        assert_eq!(array("query=x=y.NPY"), Some(("query".to_owned(), "x=y.NPY".into())));
        for other in ["q.npy", "=q.npy", "a/b=q.npy", "query=q.npz", "query="] {
            assert_eq!(array(other), None, "{other}");
        }
    }
}
