//! Files that are whole at their path or not there: written beside it, then moved, and nothing is replaced that is not ours.
//!
//! What is written to a path by this crate, or by its program, goes through [`OutputFile`]. A regular file is replaced in
//! one step and keeps its mode and its owner; a link is followed, and what it points to is replaced. A character device
//! (`/dev/null`, a terminal) and a FIFO that somebody reads are written to as they are. Everything else is refused.

use std::collections::BTreeSet;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

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

/// Where a path leads.
#[cfg_attr(not(unix), allow(dead_code, reason = "elsewhere there are no such files"))]
enum Target {
    /// To a regular file, or to nothing; links are followed.
    Regular {
        target: PathBuf,
        replaced: Option<Metadata>,
    },
    Device,
    Fifo,
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

/// Removes what unfinished [`OutputFile`]s of this process have written so far: for a program that is about to end by a
/// signal, after which nothing of it is dropped. From here on none can be opened or finished.
pub fn remove_unfinished() {
    let mut unfinished = unfinished();
    for part in std::mem::take(&mut unfinished.parts) {
        // what cannot be removed now never can be
        let _ = std::fs::remove_file(part);
    }
    unfinished.ending = true;
}

/// Files beside their targets.
struct Unfinished {
    parts: BTreeSet<PathBuf>,
    ending: bool,
}

static UNFINISHED: Mutex<Unfinished> = Mutex::new(Unfinished { parts: BTreeSet::new(), ending: false });

fn unfinished() -> std::sync::MutexGuard<'static, Unfinished> {
    UNFINISHED.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A file that is gone when dropped.
#[derive(Debug)]
struct PartFile(PathBuf);

impl PartFile {
    /// A new file in the folder of `target`. One that takes the place of another is nobody else's to read until then.
    fn beside(target: &Path, private: bool) -> io::Result<(Self, File)> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let folder = folder(target);
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, if private { 0o600 } else { 0o666 });
        #[cfg(not(unix))]
        let _ = private;
        loop {
            let n = COUNT.fetch_add(1, Ordering::Relaxed);
            let path = folder.join(format!(".cross-attention-{}-{n}.part", std::process::id()));
            let mut unfinished = unfinished();
            if unfinished.ending {
                return Err(ErrorKind::Interrupted.into());
            }
            match options.open(&path) {
                Ok(file) => {
                    unfinished.parts.insert(path.clone());
                    return Ok((Self(path), file));
                }
                // left by another process that had this number
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn move_to(self, target: &Path) -> io::Result<()> {
        let mut unfinished = unfinished();
        if unfinished.ending {
            return Err(ErrorKind::Interrupted.into());
        }
        std::fs::rename(&self.0, target)?;
        unfinished.parts.remove(&self.0);
        Ok(())
    }
}

impl Drop for PartFile {
    fn drop(&mut self) {
        if unfinished().parts.remove(&self.0) {
            // there is nobody to tell
            let _ = std::fs::remove_file(&self.0);
        }
    }
}

/// Opens a file to read it; nothing but a regular file, for a FIFO or a device may keep its reader waiting for ever.
#[cfg(feature = "native")]
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    if std::fs::metadata(path)?.is_file() { File::open(path) } else { Err(io::Error::other("it is no regular file")) }
}

fn folder(path: &Path) -> PathBuf {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned()
}

/// Where a path leads, and whether it may be written to.
fn find(path: &Path, ours: Ours) -> Result<Target, OutputError> {
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
fn open_fifo(path: &Path) -> Result<File, OutputError> {
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
fn open_fifo(path: &Path) -> Result<File, OutputError> {
    OpenOptions::new().write(true).open(path).map_err(|source| OutputError::Io { path: path.to_owned(), source })
}

/// Gives a new file the owner and the mode of the one it replaces.
#[cfg(unix)]
fn take_over(path: &Path, file: &File, replaced: &Metadata) -> Result<(), OutputError> {
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
fn take_over(path: &Path, file: &File, replaced: &Metadata) -> Result<(), OutputError> {
    let failed = |source| OutputError::Io { path: path.to_owned(), source };
    file.set_permissions(replaced.permissions()).map_err(failed)
}

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
    #[cfg(feature = "native")]
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

#[cfg(all(test, unix))]
#[expect(clippy::expect_used, reason = "helpers of tests")]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::process::Command;

    use super::*;

    const MARKED: Ours = Ours { what: "marked", is: |head| head.starts_with(b"mark") };

    /// A folder of its own.
    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().expect("a folder")
    }

    fn names(folder: &tempfile::TempDir) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(folder.path())
            .expect("a folder")
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name in UTF-8"))
            .collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_not_finished_leaves_nothing() {
        let folder = folder();
        let path = folder.path().join("x");
        let mut file = OutputFile::create(&path, Ours::ANYTHING).unwrap();
        file.write_all(b"half").unwrap();
        assert_eq!(names(&folder).len(), 1);
        drop(file);
        assert!(names(&folder).is_empty());
        OutputFile::write(&path, Ours::ANYTHING, b"whole").unwrap();
        assert_eq!((names(&folder), std::fs::read(&path).unwrap()), (vec!["x".to_owned()], b"whole".to_vec()));
    }

    #[test]
    fn a_file_of_another_kind_stays() {
        let folder = folder();
        let path = folder.path().join("x");
        for (there, replaced) in [("", true), ("mark 1", true), ("a letter", false)] {
            std::fs::write(&path, there).unwrap();
            let written = OutputFile::write(&path, MARKED, b"mark 2");
            assert_eq!(written.is_ok(), replaced, "{there:?}: {written:?}");
            std::fs::write(&path, there).unwrap();
            assert_eq!(OutputFile::check(&path, MARKED).is_ok(), replaced, "{there:?}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), there);
        }
        assert_eq!(names(&folder), ["x"]);
    }

    #[test]
    fn mode_and_owner_are_kept() {
        let folder = folder();
        let path = folder.path().join("x");
        std::fs::write(&path, "old").unwrap();
        let group = std::fs::metadata(&path).unwrap().gid() + 1;
        // only root can; for others the mode is tested alone
        let given = std::os::unix::fs::chown(&path, None, Some(group)).is_ok();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
        OutputFile::write(&path, Ours::ANYTHING, b"new").unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o7777, 0o640);
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert!(!given || metadata.gid() == group);
    }

    #[test]
    fn links_are_followed_and_stay() {
        let folder = folder();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("sub")).unwrap();
        std::fs::write(at("sub/target"), "old").unwrap();
        symlink("sub/target", at("link")).unwrap();
        symlink("link", at("link of a link")).unwrap();
        symlink("sub/new", at("to nothing")).unwrap();
        symlink("round", at("round")).unwrap();
        OutputFile::write(&at("link of a link"), Ours::ANYTHING, b"one").unwrap();
        OutputFile::write(&at("to nothing"), Ours::ANYTHING, b"two").unwrap();
        assert!(OutputFile::write(&at("round"), Ours::ANYTHING, b"three").is_err());
        for (name, content) in [("sub/target", "one"), ("sub/new", "two")] {
            assert_eq!(std::fs::read_to_string(at(name)).unwrap(), content);
        }
        for link in ["link", "link of a link", "to nothing", "round"] {
            assert!(std::fs::symlink_metadata(at(link)).unwrap().is_symlink(), "{link}");
        }
    }

    #[test]
    fn a_fifo_is_written_to_where_it_is_read() {
        let folder = folder();
        let path = folder.path().join("fifo");
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        let refused = OutputFile::create(&path, MARKED).unwrap_err();
        assert!(matches!(refused, OutputError::NoReader { .. }), "{refused}");
        assert!(OutputFile::check(&path, MARKED).is_ok());
        let reader = std::thread::spawn({
            let path = path.clone();
            move || std::fs::read(path).unwrap()
        });
        // until the reader has opened it, there is none
        let bytes = vec![7; 1 << 20];
        let written = loop {
            match OutputFile::write(&path, MARKED, &bytes) {
                Err(OutputError::NoReader { .. }) => std::thread::yield_now(),
                written => break written,
            }
        };
        written.unwrap();
        assert!(reader.join().unwrap() == bytes);
        assert!(!std::fs::metadata(&path).unwrap().is_file());
        assert_eq!(names(&folder), ["fifo"]);
    }

    #[test]
    fn devices_folders_and_sockets_are_not_replaced() {
        let folder = folder();
        let socket = folder.path().join("socket");
        let _bound = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for (path, kind) in [(folder.path(), "a folder"), (&socket, "a socket")] {
            let refused = OutputFile::create(path, Ours::ANYTHING).unwrap_err();
            assert!(refused.to_string().contains(kind), "{refused}");
        }
        OutputFile::write(Path::new("/dev/null"), MARKED, b"gone").unwrap();
        #[cfg(target_os = "linux")]
        {
            let full = OutputFile::write(Path::new("/dev/full"), MARKED, b"never there").unwrap_err();
            assert!(matches!(full, OutputError::Io { .. }), "{full}");
        }
        let nowhere = OutputFile::create(&folder.path().join("no/x"), Ours::ANYTHING).unwrap_err();
        assert!(nowhere.in_full().contains("no file can be made in"), "{}", nowhere.in_full());
    }
}
