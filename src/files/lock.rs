//! One change of a file at a time.

use std::fs::{File, TryLockError};
use std::path::Path;

use super::OutputError;
use super::target::folder;

/// Held while a file is read, changed and replaced by [`OutputFile`](super::OutputFile), so that what another process, or another
/// thread, changes meanwhile is not lost: they wait for each other. Ends when dropped, or with the process.
///
/// The file itself is replaced and cannot be what is locked. On Unix it is its folder, which other uses of the folder do not notice;
/// elsewhere a file beside it, whose name ends in `.lock` and which stays.
#[derive(Debug)]
pub struct UpdateLock {
    _held: File,
}

impl UpdateLock {
    /// Waits until nobody else holds the lock of this path.
    ///
    /// # Errors
    /// [`OutputError::Folder`] where the folder cannot be locked.
    pub fn of(path: &Path) -> Result<Self, OutputError> {
        // through links, as the file is replaced
        let target = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let failed = |source| OutputError::Folder { path: path.to_owned(), folder: folder(&target), source };
        let held = open(&target).map_err(failed)?;
        match held.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => held.lock().map_err(failed)?,
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        Ok(Self { _held: held })
    }
}

#[cfg(unix)]
fn open(target: &Path) -> std::io::Result<File> {
    File::open(folder(target))
}

#[cfg(not(unix))]
fn open(target: &Path) -> std::io::Result<File> {
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push(".lock");
    File::options().create(true).truncate(false).write(true).open(target.with_file_name(name))
}
