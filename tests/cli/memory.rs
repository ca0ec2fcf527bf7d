//! Sizes that there is no memory for are refused; nothing ends by an abort.

use std::fs;
use std::process::Command;

use super::{Folder, f32s, good, program, small, wave};

#[test]
fn a_plan_takes_no_memory() {
    for head_dim in ["1073741824", "1099511627776"] {
        let shape = ["--q-heads", "1", "--q-len", "1", "--kv-len", "1", "--head-dim", head_dim];
        let output = program(&[&["explain", "--device", "cpu"], &shape[..]].concat());
        let code = output.status.code();
        assert!(matches!(code, Some(0 | 1)), "{code:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn a_plan_needs_the_header_alone() {
    let folder = Folder::new();
    let input = folder.write("in.safetensors", &small(), &[("causal", "top_left")]);
    let bytes = fs::read(&input).unwrap();
    // the header says 4 GiB of keys; the file is as long, and has no bytes
    let header = br#"{"query":{"dtype":"F32","shape":[1,1,1,64],"data_offsets":[0,256]},"key":{"dtype":"F32","shape":[1,1,16777216,64],"data_offsets":[256,4294967552]},"value":{"dtype":"F32","shape":[1,1,16777216,1],"data_offsets":[4294967552,4362076416]}}"#;
    let file = fs::File::create(folder.at("sparse.safetensors")).unwrap();
    std::io::Write::write_all(&mut &file, &(header.len() as u64).to_le_bytes()).unwrap();
    std::io::Write::write_all(&mut &file, header).unwrap();
    file.set_len(8 + header.len() as u64 + 4_362_076_416).unwrap();
    let said = good(&["explain", &folder.at("sparse.safetensors"), "--device", "cpu"]);
    assert!(said.contains("kv_len 16777216"), "{said}");
    // and a file that is shorter than its header says is told from a whole one all the same
    fs::write(&input, &bytes[..bytes.len() - 1]).unwrap();
    let output = program(&["explain", &input, "--device", "cpu"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("its header describes"));
}

/// Calls the program with `ulimit -v` in steps: it does what it is asked to, or says why not.
#[cfg(target_os = "linux")]
fn with_little_memory(args: &str, mib: std::ops::RangeInclusive<usize>) {
    let (mut done, mut refused) = (0, 0);
    for mib in mib.step_by(40) {
        let run = format!("ulimit -v {} && exec {} {args}", mib << 10, env!("CARGO_BIN_EXE_cross-attention"));
        let output = Command::new("sh").args(["-c", &run]).env("RAYON_NUM_THREADS", "2").output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        match output.status.code() {
            Some(0) => done += 1,
            Some(1) => {
                refused += 1;
                assert!(said.contains("error: "), "{mib} MiB: {said}");
            }
            // not even the program itself could be loaded
            Some(126 | 127) => {}
            code => panic!("{args} in {mib} MiB: {code:?}: {said}"),
        }
    }
    assert!(done > 0 && refused > 0, "{args}: {done} done, {refused} refused");
}

#[cfg(target_os = "linux")]
#[test]
fn little_memory_is_an_error_and_no_abort() {
    let folder = Folder::new();
    // weights of 64 MiB
    let tensors = [
        f32s("query", &[1, 4, 1024, 16], wave(0.7)),
        f32s("key", &[1, 4, 4096, 16], wave(1.3)),
        f32s("value", &[1, 4, 4096, 16], wave(0.9)),
    ];
    let (input, output) = (folder.write("in.safetensors", &tensors, &[]), folder.at("out.safetensors"));
    with_little_memory(&format!("run {input} -o {output} --device cpu --probs -q"), 40..=640);
    for (name, most) in [("map.png", 400), ("map.svg", 400), ("map.csv", 640)] {
        let output = folder.at(name);
        with_little_memory(&format!("map {input} --out {output} --reduce none --heads 0-1 --device cpu -q"), 40..=most);
    }
}
