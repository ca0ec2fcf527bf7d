//! What becomes of files that are there: devices, FIFOs, links, files of others, modes; what is left after Ctrl-C.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{Folder, Results, bad, good, program, small, wave};

/// Runs the small problem on the CPU into `output`.
fn run_to(folder: &Folder, output: &str) -> std::process::Output {
    let input = folder.write("in.safetensors", &small(), &[]);
    program(&["run", &input, "-o", output, "--device", "cpu", "-q"])
}

#[test]
fn the_same_command_writes_the_same_bytes() {
    let folder = Folder::new();
    let written = |name: &str| {
        assert!(run_to(&folder, &folder.at(name)).status.success());
        fs::read(folder.at(name)).unwrap()
    };
    let first = written("first");
    for n in 0..8 {
        assert!(written(&format!("again {n}")) == first);
    }
}

#[test]
fn files_of_others_stay() {
    let folder = Folder::new();
    let input = folder.write("in.safetensors", &small(), &[]);
    let weights = folder.write("weights.safetensors", &small(), &[]);
    let whole = fs::read(&weights).unwrap();
    for name in ["text", "text.csv", "text.png"] {
        fs::write(folder.at(name), "a letter").unwrap();
    }
    let said = bad(&["run", &input, "-o", &weights, "--device", "cpu"]);
    assert!(said.contains("weights.safetensors: it holds") && said.contains("not overwritten"), "{said}");
    assert!(bad(&["run", &input, "-o", &folder.at("text"), "--device", "cpu"]).contains("not overwritten"));
    for name in ["text.csv", "text.png"] {
        let said = bad(&["map", &input, "--out", &folder.at(name), "--device", "cpu"]);
        assert!(said.contains("not overwritten"), "{said}");
        // an empty file is nobody's, and a map is ours
        fs::write(folder.at("empty"), "").unwrap();
        let ours = folder.at(&name.replace("text", "map"));
        fs::rename(folder.at("empty"), &ours).unwrap();
        for _ in 0..2 {
            good(&["map", &input, "--out", &ours, "--device", "cpu"]);
        }
    }
    assert!(fs::read(&weights).unwrap() == whole);
    for name in ["text", "text.csv", "text.png"] {
        assert_eq!(fs::read_to_string(folder.at(name)).unwrap(), "a letter");
    }
    assert!(!folder.list(".").iter().any(|name| name.contains(".part")));
}

#[cfg(unix)]
#[test]
fn what_is_no_regular_file_is_written_through_or_refused() {
    use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
    let folder = Folder::new();
    let at = |name: &str| folder.at(name);
    assert!(run_to(&folder, "/dev/null").status.success());
    assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    let wanted = {
        assert!(run_to(&folder, &at("plain")).status.success());
        fs::read(at("plain")).unwrap()
    };
    // a FIFO: refused while nobody reads it, then written to
    assert!(Command::new("mkfifo").arg(at("fifo")).status().unwrap().success());
    let refused = run_to(&folder, &at("fifo"));
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("nobody reads"));
    let reader = Command::new("cat").arg(at("fifo")).stdout(Stdio::piped()).spawn().unwrap();
    while !run_to(&folder, &at("fifo")).status.success() {
        std::thread::yield_now();
    }
    assert!(reader.wait_with_output().unwrap().stdout == wanted);
    assert!(fs::metadata(at("fifo")).unwrap().file_type().is_fifo());
    // standard output, with nothing of ours between
    let input = at("in.safetensors");
    assert!(program(&["run", &input, "-o", "/dev/stdout", "--device", "cpu"]).stdout == wanted);
    // a link stays, and what it points to is replaced if it is ours
    fs::copy(at("plain"), at("target")).unwrap();
    fs::set_permissions(at("target"), PermissionsExt::from_mode(0o600)).unwrap();
    symlink("target", at("link")).unwrap();
    assert!(run_to(&folder, &at("link")).status.success());
    assert!(fs::symlink_metadata(at("link")).unwrap().is_symlink());
    assert!(fs::read(at("target")).unwrap() == wanted);
    assert_eq!(fs::metadata(at("target")).unwrap().permissions().mode() & 0o777, 0o600);
    fs::write(at("letter"), "a letter").unwrap();
    symlink("letter", at("to a letter")).unwrap();
    assert!(!run_to(&folder, &at("to a letter")).status.success());
    assert_eq!(fs::read_to_string(at("letter")).unwrap(), "a letter");
}

/// The writing is held up by a FIFO that is read slowly, and the first output stands half written meanwhile.
#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_leaves_nothing_half_written() {
    let folder = Folder::new();
    fs::create_dir(folder.at("out")).unwrap();
    // long enough to be caught at it
    let long = [
        super::f32s("query", &[1, 8, 2048, 16], wave(0.7)),
        super::f32s("key", &[1, 8, 2048, 16], wave(1.3)),
        super::f32s("value", &[1, 8, 2048, 16], wave(0.9)),
    ];
    let input = folder.write("in.safetensors", &long, &[]);
    let mut caught = 0;
    for signal in ["INT", "TERM"] {
        for _ in 0..20 {
            let args = ["run", &input, "-o", &folder.at("out/x"), "--device", "cpu", "--probs", "-q"];
            let mut child = Command::new(env!("CARGO_BIN_EXE_cross-attention")).args(args).spawn().unwrap();
            // until the file beside it is there, or all is done
            let half = loop {
                if folder.list("out").iter().any(|name| name.contains(".part") && seen_growing(&folder, name)) {
                    break true;
                }
                if child.try_wait().unwrap().is_some() {
                    break false;
                }
            };
            if half {
                assert!(Command::new("kill").args(["-s", signal, &child.id().to_string()]).status().unwrap().success());
                let status = child.wait().unwrap();
                caught += usize::from(!status.success());
            }
            assert!(folder.list("out").iter().all(|name| name == "x"), "{:?}", folder.list("out"));
            if Path::new(&folder.at("out/x")).exists() {
                // whole, as it was not cut short
                assert_eq!(Results::read(folder.at("out/x")).tensors.len(), 3);
                fs::remove_file(folder.at("out/x")).unwrap();
            }
            if caught > 0 && signal == "INT" || caught > 1 {
                break;
            }
        }
    }
    assert!(caught >= 1, "never caught while it was writing");
}

#[cfg(target_os = "linux")]
#[test]
fn what_a_signal_leaves_of_all_shaders_is_told() {
    let folder = Folder::new();
    let args = ["shaders", "--all", "--kernel", "split", "-o", &folder.at("out"), "--jobs", "1"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_cross-attention"));
    let child = command.args(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let started = std::time::Instant::now();
    while !Path::new(&folder.at("out")).exists() || folder.list("out").len() < 3 {
        assert!(started.elapsed().as_secs() < 60, "nothing is written");
    }
    assert!(Command::new("kill").args(["-s", "TERM", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("without manifest.json"), "{said}");
    assert!(folder.list("out").iter().all(|name| name.ends_with(".wgsl")), "{:?}", folder.list("out"));
}

#[cfg(target_os = "linux")]
fn seen_growing(folder: &Folder, name: &str) -> bool {
    fs::metadata(folder.at(&format!("out/{name}"))).is_ok_and(|found| found.len() > 0)
}
