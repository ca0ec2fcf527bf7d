//! Tensors as a file: of safetensors or NumPy, whole or not there, or on standard output.

use std::borrow::Cow;
use std::io::{self, BufWriter, ErrorKind, IsTerminal, Stdout, Write};
use std::path::Path;

use cross_attention::files::{Ours, OutputError, OutputFile};
use cross_attention::{Element, TensorRef};
use indicatif::ProgressBar;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::error::Error;
use crate::file::reserved;
use crate::input::{Format, is_dash};
use crate::numpy;

/// Bytes between two steps of the bar.
const PART: usize = 8 << 20;

/// Where tensors go, and how they are written down.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    path: &'a Path,
    format: Format,
}

impl<'a> Place<'a> {
    /// A file whose name says its format; standard output gets that of the input.
    pub(crate) fn new(path: &'a Path, input: Format) -> Self {
        let format = match input {
            _ if !is_dash(path) => Format::of_name(path),
            Format::Safetensors => Format::Safetensors,
            Format::Npz | Format::Npy => Format::Npz,
        };
        Self { path, format }
    }

    pub(crate) const fn format(self) -> Format {
        self.format
    }

    /// What a file must be that is replaced, where one of safetensors must be so.
    const fn ours(self, ours: Ours) -> Ours {
        match self.format {
            Format::Safetensors => ours,
            Format::Npz => numpy::NPZ,
            Format::Npy => numpy::NPY,
        }
    }

    /// The bytes of a file.
    ///
    /// # Errors
    /// [`Error::NoNumpyType`] for what the format cannot hold, [`Error::Memory`].
    pub(crate) fn encode(
        self,
        metadata: &[(&str, &str)],
        tensors: Vec<Stored<'_>>,
        bar: &ProgressBar,
    ) -> Result<Vec<u8>, Error> {
        let len: usize = tensors.iter().map(|tensor| tensor.bytes.len()).sum();
        let mut bytes = reserved(len)?;
        if self.format != Format::Safetensors {
            numpy::check(self.format, &tensors)?;
        }
        let written = match self.format {
            Format::Safetensors => write_tensors(&mut bytes, metadata, tensors, bar),
            Format::Npz | Format::Npy => numpy::write_npz(&mut bytes, metadata, &tensors, bar),
        };
        written.map_err(|source| OutputError::Io { path: self.path.to_owned(), source })?;
        Ok(bytes)
    }

    /// Writes what [`encode`](Self::encode) gave.
    ///
    /// # Errors
    /// [`Error::Output`], [`Error::Stdout`].
    pub(crate) fn write(self, ours: Ours, bytes: &[u8]) -> Result<(), Error> {
        write(self.path, self.ours(ours), bytes)
    }

    /// Whether [`save`] would do, as far as can be told without touching what is there.
    ///
    /// # Errors
    /// [`Error::Output`], [`Error::StdoutTerminal`].
    pub(crate) fn check(self, ours: Ours) -> Result<(), Error> {
        if is_dash(self.path) { check_stdout() } else { Ok(OutputFile::check(self.path, self.ours(ours))?) }
    }
}

/// Whether bytes may go to standard output.
///
/// # Errors
/// [`Error::StdoutTerminal`].
pub(crate) fn check_stdout() -> Result<(), Error> {
    if io::stdout().is_terminal() { Err(Error::StdoutTerminal) } else { Ok(()) }
}

/// Writes the bytes of a file, to a path or for `-` to standard output.
///
/// # Errors
/// [`Error::Output`], [`Error::Stdout`].
pub(crate) fn write(path: &Path, ours: Ours, bytes: &[u8]) -> Result<(), Error> {
    let mut sink = Sink::open(path, ours)?;
    sink.put(path, |sink| sink.write_all(bytes))?;
    sink.finish()
}

/// A file or standard output.
pub(crate) enum Sink {
    File(OutputFile),
    /// `None` where nobody reads any more.
    Stdout(Option<BufWriter<Stdout>>),
}

impl Sink {
    fn open(path: &Path, ours: Ours) -> Result<Self, Error> {
        Ok(if is_dash(path) {
            Self::Stdout(Some(BufWriter::new(io::stdout())))
        } else {
            Self::File(OutputFile::create(path, ours)?)
        })
    }

    /// Does some writing, and names the place if it fails.
    fn put(&mut self, path: &Path, what: impl FnOnce(&mut Self) -> io::Result<()>) -> Result<(), Error> {
        what(self).map_err(|source| match self {
            Self::File(_) => OutputError::Io { path: path.to_owned(), source }.into(),
            Self::Stdout(_) => Error::Stdout { source },
        })
    }

    fn finish(mut self) -> Result<(), Error> {
        if let Self::Stdout(_) = self {
            return self.flush().map_err(|source| Error::Stdout { source });
        }
        match self {
            Self::File(file) => Ok(file.finish()?),
            Self::Stdout(_) => Ok(()),
        }
    }

    /// Writes to standard output, until its reader has gone away (`| head`).
    fn through<T>(&mut self, what: impl FnOnce(&mut BufWriter<Stdout>) -> io::Result<T>, gone: T) -> io::Result<T> {
        let Self::Stdout(Some(stdout)) = self else { return Ok(gone) };
        match what(stdout) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                if let Self::Stdout(stdout) = self
                    && let Some(stdout) = stdout.take()
                {
                    // what is left has no reader, and would be tried again
                    let _ = stdout.into_parts();
                }
                Ok(gone)
            }
            done => done,
        }
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::File(file) => file.write(bytes),
            Self::Stdout(_) => self.through(|stdout| stdout.write(bytes), bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::File(file) => file.flush(),
            Self::Stdout(_) => self.through(Write::flush, ()),
        }
    }
}

/// A tensor as a file holds it.
#[derive(Debug)]
pub(crate) struct Stored<'a> {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Little-endian.
    pub(crate) bytes: Cow<'a, [u8]>,
}

impl<'a> Stored<'a> {
    /// Elements in host memory.
    pub(crate) fn of(name: &str, data: TensorRef<'a>, shape: Vec<usize>) -> Self {
        let dtype = match data.element() {
            Element::F16 => Dtype::F16,
            Element::Bf16 => Dtype::BF16,
            Element::I8 => Dtype::I8,
            _ => Dtype::F32,
        };
        let mut bytes = Cow::Borrowed(data.as_bytes());
        if cfg!(target_endian = "big") {
            // each number turned round
            bytes.to_mut().chunks_mut(data.element().size_bytes()).for_each(<[u8]>::reverse);
        }
        Self { name: name.to_owned(), dtype, shape, bytes }
    }
}

/// Writes tensors to a place, with metadata.
///
/// # Errors
/// [`Error::Output`], [`Error::Stdout`]; [`Error::NoNumpyType`], [`Error::OneArray`] for what a format cannot hold.
pub(crate) fn save(
    place: Place<'_>,
    ours: Ours,
    metadata: &[(&str, &str)],
    tensors: Vec<Stored<'_>>,
    bar: &ProgressBar,
) -> Result<(), Error> {
    if place.format != Format::Safetensors {
        numpy::check(place.format, &tensors)?;
    }
    let mut sink = Sink::open(place.path, place.ours(ours))?;
    sink.put(place.path, |sink| match place.format {
        Format::Safetensors => write_tensors(sink, metadata, tensors, bar),
        Format::Npz => numpy::write_npz(sink, metadata, &tensors, bar),
        Format::Npy => tensors.iter().try_for_each(|tensor| numpy::write_npy(sink, tensor, bar)),
    })?;
    sink.finish()
}

/// Writes bytes, and moves the bar as they go.
pub(crate) fn write_bytes(to: &mut impl Write, bytes: &[u8], bar: &ProgressBar) -> io::Result<()> {
    bytes.chunks(PART).try_for_each(|part| {
        to.write_all(part)?;
        bar.inc(part.len() as u64);
        Ok(())
    })
}

/// Writes a safetensors file: the header, then every tensor as it lies in memory.
pub(crate) fn write_tensors(
    to: &mut impl Write,
    metadata: &[(&str, &str)],
    mut tensors: Vec<Stored<'_>>,
    bar: &ProgressBar,
) -> io::Result<()> {
    // wider elements first, so that all of them are aligned
    tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.dtype.bitsize()));

    // names in the order of the alphabet, so that the same results are the same bytes
    let mut header = Map::new();
    header.insert(
        "__metadata__".to_owned(),
        metadata.iter().map(|(name, text)| ((*name).to_owned(), json!(text))).collect(),
    );
    let mut start = 0;
    for Stored { name, dtype, shape, bytes } in &tensors {
        let end = start + bytes.len();
        let about = json!({ "dtype": format!("{dtype:?}"), "shape": shape, "data_offsets": [start, end] });
        header.insert(name.clone(), about);
        start = end;
    }
    let mut header = Value::Object(header).to_string();
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }

    write_bytes(to, &(header.len() as u64).to_le_bytes(), bar)?;
    write_bytes(to, header.as_bytes(), bar)?;
    tensors.iter().try_for_each(|tensor| write_bytes(to, &tensor.bytes, bar))
}
