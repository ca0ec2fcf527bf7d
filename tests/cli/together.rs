//! Several runs that write to one file, and files that may not grow.

use std::process::Command;

use super::{Folder, program, small};

#[test]
fn rows_of_runs_at_the_same_time_are_all_kept() {
    let folder = Folder::new();
    let file = folder.at("rows.jsonl");
    let shape = "--q-heads 1 --q-len 2 --kv-len 4 --head-dim 4 --device cpu --seconds 0.001 --runs 12 --save";
    let args: Vec<&str> = shape.split(' ').chain([&file[..]]).collect();
    std::thread::scope(|scope| {
        let run = || assert!(program(&[&["bench"], &args[..]].concat()).status.success());
        let runs: Vec<_> = (0..3).map(|_| scope.spawn(run)).collect();
        runs.into_iter().for_each(|run| run.join().unwrap());
    });
    assert_eq!(std::fs::read_to_string(&file).unwrap().lines().count(), 3 * 12);
}

/// A limit of the system's, not a full disk: the signal that comes with it must not end the program in the middle.
#[cfg(target_os = "linux")]
#[test]
fn a_file_that_may_not_grow_leaves_nothing() {
    let folder = Folder::new();
    folder.write("in.safetensors", &small(), &[]);
    let called = "ulimit -f 0; exec \"$0\" run in.safetensors -o out.safetensors --device cpu";
    let told = Command::new("bash")
        .args(["-c", called, env!("CARGO_BIN_EXE_cross-attention")])
        .current_dir(&folder.0)
        .output()
        .unwrap();
    assert_eq!(told.status.code(), Some(1), "{told:?}");
    assert!(String::from_utf8(told.stderr).unwrap().contains("out.safetensors"));
    assert_eq!(folder.list("."), ["in.safetensors"]);
}
