//! The two calls of the operating system that the language cannot vouch for.

#![expect(unsafe_code, reason = "each block says what makes it sound")]

use std::fs::File;

use memmap2::Mmap;

/// Keeps libraries that a driver loads from complaining, on the program's standard error, that there is no folder for
/// sockets. To be called before anything else.
pub(crate) fn quiet_libraries() {
    const NAME: &str = "XDG_RUNTIME_DIR";
    if std::env::var_os(NAME).is_some_and(|folder| !folder.is_empty()) {
        return;
    }
    // nothing can be in a folder below a device, so that nobody else can put a socket there
    // SAFETY: the first call of `main`, while there is one thread; nobody reads the environment meanwhile.
    unsafe { std::env::set_var(NAME, "/dev/null/no-runtime-folder") }
}

/// A file's bytes, read from the disk where and when they are looked at.
pub(crate) fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is read only and lent as bytes; no reference of a type that some bytes are not valid for is made of
    // it. Another program that writes to the file meanwhile changes numbers that are read, as it would for a file that is
    // read bit by bit; one that cuts it short ends this program. Results replace whole files and never write into one.
    unsafe { Mmap::map(file) }
}
