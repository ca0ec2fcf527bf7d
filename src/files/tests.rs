#![expect(clippy::expect_used, reason = "helpers of tests")]

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
