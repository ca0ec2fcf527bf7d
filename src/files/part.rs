//! Files beside their targets: gone when nobody finishes them.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use super::target::folder;

/// Removes what unfinished [`OutputFile`](super::OutputFile)s of this process have written so far: for a program that is
/// about to end by a signal, after which nothing of it is dropped. From here on none can be opened or finished.
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
pub(super) struct PartFile(PathBuf);

impl PartFile {
    /// A new file in the folder of `target`. One that takes the place of another is nobody else's to read until then.
    pub(super) fn beside(target: &Path, private: bool) -> io::Result<(Self, File)> {
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

    pub(super) fn move_to(self, target: &Path) -> io::Result<()> {
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
