//! Why a file was not written.

use std::io;
#[cfg(feature = "threads")]
use std::path::Path;
use std::path::PathBuf;

/// Why a file was not written. What was at the path is as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OutputError {
    /// The system refused.
    #[error("cannot write {}", path.display())]
    Io {
        /// The path that was asked for.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// There can be no new file in the folder.
    #[error("cannot write {}: no file can be made in {}", path.display(), folder.display())]
    Folder {
        /// The path that was asked for.
        path: PathBuf,
        /// The folder of what it leads to.
        folder: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// What is there can neither be replaced nor written to.
    #[error(
        "cannot write {}: it is {kind}, needs a new name, a regular file, a character device, or a FIFO that is read",
        path.display()
    )]
    Kind {
        /// The path that was asked for.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// Nobody reads the FIFO.
    #[error("cannot write {}: nobody reads this FIFO; start its reader first", path.display())]
    NoReader {
        /// The path that was asked for.
        path: PathBuf,
    },
    /// A file of another kind is there.
    #[error(
        "cannot write {}: it holds {bytes} bytes that are not {what}, and is not overwritten; name another file, or \
         remove it",
        path.display()
    )]
    NotOurs {
        /// The path that was asked for.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// What could be replaced.
        what: &'static str,
    },
    /// The file that is there belongs to somebody else, and cannot be replaced by one that does.
    #[error(
        "cannot write {}: it belongs to user {user}, group {group}, and no other file can be given to them; name \
         another file, or remove it",
        path.display()
    )]
    Owner {
        /// The path that was asked for.
        path: PathBuf,
        /// Owner of what is there.
        user: u32,
        /// Group of what is there.
        group: u32,
        /// The system's words.
        source: io::Error,
    },
}

impl OutputError {
    /// Why, without the path.
    #[cfg(feature = "threads")]
    pub(crate) fn reason(&self, path: &Path) -> String {
        let text = self.in_full();
        text.strip_prefix(&format!("cannot write {}: ", path.display())).unwrap_or(&text).to_owned()
    }

    /// The message, with the system's words.
    #[must_use]
    pub fn in_full(&self) -> String {
        match std::error::Error::source(self) {
            Some(source) => format!("{self}: {source}"),
            None => self.to_string(),
        }
    }
}
