//! What a path leads to, and whether it may be written to.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

use super::{HEAD_BYTES, Ours, OutputError};

/// Where a path leads.
#[cfg_attr(not(unix), allow(dead_code, reason = "elsewhere there are no such files"))]
pub(super) enum Target {
    /// To a regular file, or to nothing; links are followed.
    Regular {
        target: PathBuf,
        replaced: Option<Metadata>,
    },
    Device,
    Fifo,
}

pub(super) fn folder(path: &Path) -> PathBuf {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned()
}

/// Where a path leads, and whether it may be written to.
pub(super) fn find(path: &Path, ours: Ours) -> Result<Target, OutputError> {
    let failed = |source| OutputError::Io { path: path.to_owned(), source };
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Ok(Target::Regular { target: end_of_links(path).map_err(failed)?, replaced: None });
        }
        Err(error) => return Err(failed(error)),
    };
    let kind = metadata.file_type();
    let refused = |kind| Err(OutputError::Kind { path: path.to_owned(), kind });
    if kind.is_dir() {
        return refused("a folder");
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if kind.is_char_device() {
            return Ok(Target::Device);
        }
        if kind.is_fifo() {
            return Ok(Target::Fifo);
        }
        if kind.is_block_device() {
            return refused("a block device");
        }
        if kind.is_socket() {
            return refused("a socket");
        }
    }
    if !kind.is_file() {
        return refused("no regular file");
    }
    // a file that this user may not write to is not written to by a detour; neither is one that is something else
    OpenOptions::new().write(true).open(path).map_err(failed)?;
    if metadata.len() > 0 {
        let mut head = vec![];
        File::open(path).and_then(|file| file.take(HEAD_BYTES).read_to_end(&mut head)).map_err(failed)?;
        if !(ours.is)(&head) {
            return Err(OutputError::NotOurs { path: path.to_owned(), bytes: metadata.len(), what: ours.what });
        }
    }
    let target = std::fs::canonicalize(path).map_err(failed)?;
    Ok(Target::Regular { target, replaced: Some(metadata) })
}

/// Where links end that lead to nothing yet.
fn end_of_links(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    // as many as the system follows
    for _ in 0..40 {
        match std::fs::read_link(&path) {
            Ok(next) => path = folder(&path).join(next),
            Err(_) => return Ok(path),
        }
    }
    Err(io::Error::other("too many links"))
}

/// A FIFO with a reader; without one, opening it would wait for ever.
#[cfg(unix)]
pub(super) fn open_fifo(path: &Path) -> Result<File, OutputError> {
    use std::os::unix::fs::OpenOptionsExt;
    // the same on all systems of one family
    const O_NONBLOCK: i32 = if cfg!(any(target_os = "linux", target_os = "android")) { 0o4000 } else { 4 };
    const ENXIO: i32 = 6;
    let failed = |source: io::Error| match source.raw_os_error() {
        Some(ENXIO) => OutputError::NoReader { path: path.to_owned() },
        _ => OutputError::Io { path: path.to_owned(), source },
    };
    let held = OpenOptions::new().write(true).custom_flags(O_NONBLOCK).open(path).map_err(failed)?;
    // writes shall wait for the reader; while the first is held, this one has no need to
    let file = OpenOptions::new().write(true).open(path).map_err(failed)?;
    drop(held);
    Ok(file)
}

#[cfg(not(unix))]
pub(super) fn open_fifo(path: &Path) -> Result<File, OutputError> {
    OpenOptions::new().write(true).open(path).map_err(|source| OutputError::Io { path: path.to_owned(), source })
}

/// Gives a new file the owner and the mode of the one it replaces.
#[cfg(unix)]
pub(super) fn take_over(path: &Path, file: &File, replaced: &Metadata) -> Result<(), OutputError> {
    use std::os::unix::fs::{MetadataExt, fchown};
    let failed = |source| OutputError::Io { path: path.to_owned(), source };
    let new = file.metadata().map_err(failed)?;
    let (user, group) = (replaced.uid(), replaced.gid());
    let other = |old: u32, new: u32| (old != new).then_some(old);
    if (user, group) != (new.uid(), new.gid()) {
        fchown(file, other(user, new.uid()), other(group, new.gid())).map_err(|source| OutputError::Owner {
            path: path.to_owned(),
            user,
            group,
            source,
        })?;
    }
    file.set_permissions(replaced.permissions()).map_err(failed)
}

#[cfg(not(unix))]
pub(super) fn take_over(path: &Path, file: &File, replaced: &Metadata) -> Result<(), OutputError> {
    let failed = |source| OutputError::Io { path: path.to_owned(), source };
    file.set_permissions(replaced.permissions()).map_err(failed)
}
