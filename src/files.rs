//! Files that are whole at their path or not there: written beside it, then moved, and nothing is replaced that is not ours.
//!
//! What is written to a path by this crate, or by its program, goes through [`OutputFile`]. A regular file is replaced in
//! one step and keeps its mode and its owner; a link is followed, and what it points to is replaced. A character device
//! (`/dev/null`, a terminal) and a FIFO that somebody reads are written to as they are. Everything else is refused.

mod error;
mod lock;
mod part;
mod target;
#[cfg(all(test, unix))]
mod tests;

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

pub use error::OutputError;
pub use lock::UpdateLock;
pub use part::remove_unfinished;

use self::part::PartFile;
use self::target::{Target, find, folder, open_fifo, take_over};

/// What a file that may be replaced looks like.
#[derive(Clone, Copy, Debug)]
pub struct Ours {
    /// In words, as in "it is not *a picture*".
    pub what: &'static str,
    /// Whether a file that starts with these bytes is one; it is given as much of the start as [`HEAD_BYTES`] holds.
    pub is: fn(&[u8]) -> bool,
}

impl Ours {
    /// Whatever is there may be replaced.
    pub const ANYTHING: Self = Self { what: "anything", is: |_| true };
}

/// Bytes of a file that are read to tell what it is.
pub const HEAD_BYTES: u64 = 64 << 10;

/// A file that is being written.
///
/// Dropped before [`finish`](Self::finish), it leaves the path as it was.
#[derive(Debug)]
pub struct OutputFile {
    path: PathBuf,
    to: To,
}

#[derive(Debug)]
enum To {
    /// A file beside the target, to be moved there.
    Beside { part: PartFile, writer: BufWriter<File>, target: PathBuf, replaced: Option<Box<Metadata>> },
    /// A device or a FIFO.
    Through(BufWriter<File>),
}

impl OutputFile {
    /// Opens a path for writing. A file that is there and has any content is replaced only if it is `ours`.
    ///
    /// # Errors
    /// [`OutputError`], as the path was found.
    pub fn create(path: &Path, ours: Ours) -> Result<Self, OutputError> {
        let failed = |source| OutputError::Io { path: path.to_owned(), source };
        let to = match find(path, ours)? {
            Target::Regular { target, replaced } => {
                let (part, file) = PartFile::beside(&target, replaced.is_some())
                    .map_err(|source| OutputError::Folder { path: path.to_owned(), folder: folder(&target), source })?;
                To::Beside { part, writer: BufWriter::new(file), target, replaced: replaced.map(Box::new) }
            }
            Target::Device => To::Through(BufWriter::new(OpenOptions::new().write(true).open(path).map_err(failed)?)),
            Target::Fifo => To::Through(BufWriter::new(open_fifo(path)?)),
        };
        Ok(Self { path: path.to_owned(), to })
    }

    /// Whether [`create`](Self::create) would do, as far as can be told without touching what is there.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn check(path: &Path, ours: Ours) -> Result<(), OutputError> {
        match find(path, ours)? {
            // a reader would take the first opening and closing for all there is
            Target::Device | Target::Fifo => Ok(()),
            Target::Regular { .. } => Self::create(path, ours).map(drop),
        }
    }

    /// Writes the whole file.
    ///
    /// # Errors
    /// As [`create`](Self::create) and [`finish`](Self::finish).
    pub fn write(path: &Path, ours: Ours, bytes: &[u8]) -> Result<(), OutputError> {
        let mut file = Self::create(path, ours)?;
        file.write_all(bytes).map_err(|source| OutputError::Io { path: path.to_owned(), source })?;
        file.finish()
    }

    /// Moves what was written to its path; it is there now, whole.
    ///
    /// # Errors
    /// [`OutputError::Io`], [`OutputError::Owner`].
    pub fn finish(self) -> Result<(), OutputError> {
        let Self { path, to } = self;
        let failed = |source| OutputError::Io { path: path.clone(), source };
        match to {
            To::Through(mut writer) => writer.flush().map_err(failed),
            To::Beside { part, writer, target, replaced } => {
                {
                    // closed before it is moved
                    let file = writer.into_inner().map_err(|error| failed(error.into_error()))?;
                    if let Some(replaced) = &replaced {
                        take_over(&path, &file, replaced)?;
                        // so that a crash leaves the old bytes or the new ones, not a name for none
                        file.sync_all().map_err(failed)?;
                    }
                }
                part.move_to(&target).map_err(failed)
            }
        }
    }
}

impl Write for OutputFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.to {
            To::Beside { writer, .. } | To::Through(writer) => writer.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.to {
            To::Beside { writer, .. } | To::Through(writer) => writer.flush(),
        }
    }
}

/// Opens a file to read it; nothing but a regular file, for a FIFO or a device may keep its reader waiting for ever.
#[cfg(feature = "threads")]
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    if std::fs::metadata(path)?.is_file() { File::open(path) } else { Err(io::Error::other("it is no regular file")) }
}
