//! NumPy's formats, standard input and output, JSON.

use std::fs;
use std::io::Write;
use std::process::{Command, Output, Stdio};

use safetensors::Dtype;
use serde_json::Value;

use super::{Folder, Results, Tensor, bad, f16s, f32s, good, program, small, wave};

/// Runs the program with bytes on standard input.
fn fed(args: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_cross-attention"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    std::thread::scope(|scope| {
        // one that refuses before it has read everything is no fault of this test
        scope.spawn(move || stdin.write_all(input));
        child.wait_with_output().unwrap()
    })
}

fn said(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!said.contains("panicked"), "{said}");
    said
}

/// An array as NumPy writes it.
fn npy(descr: &str, shape: &str, bytes: &[u8]) -> Vec<u8> {
    let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n");
    let len = u16::try_from(header.len()).unwrap().to_le_bytes();
    [b"\x93NUMPY\x01\x00", &len[..], header.as_bytes(), bytes].concat()
}

/// What `tests/golden/numpy/make.py` writes, as safetensors.
fn as_numpy_has_it() -> Vec<Tensor> {
    let number = |n: usize| ((7 * n % 11) as f32 - 5.0) / 4.0;
    let mask = (0..15).map(|n| u8::from(n % 4 != 3)).collect();
    vec![
        f32s("query", &[1, 2, 3, 4], number),
        f32s("key", &[1, 1, 5, 4], number),
        f16s("value", &[1, 1, 5, 6], number),
        ("mask", Dtype::BOOL, vec![3, 5], mask),
        ("kv_lens", Dtype::I64, vec![1], 4i64.to_le_bytes().to_vec()),
    ]
}

#[test]
fn an_archive_of_numpy_says_the_same_as_a_file() {
    let folder = Folder::new();
    let metadata = [("scale", "0.25"), ("causal", "bottom_right"), ("window_left", "3")];
    let wanted = folder.run(&as_numpy_has_it(), &metadata, &["--verify"]);
    let input = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/numpy/small.npz");
    let output = folder.at("from_numpy.safetensors");
    assert_eq!(good(&["run", input, "-o", &output, "--device", "cpu", "-q"]), "");
    assert_eq!(Results::read(&output), wanted);
    assert!(good(&["explain", input, "--device", "cpu"]).contains("kv_lens"));
    // to NumPy and back, metadata too, and over what was written before
    let (npz, back) = (folder.at("x.npz"), folder.at("back.safetensors"));
    for _ in 0..2 {
        good(&["convert", &folder.at("in.safetensors"), "-o", &npz]);
    }
    good(&["convert", &npz, "-o", &back]);
    good(&["run", &back, "-o", &output, "--device", "cpu"]);
    assert_eq!(Results::read(&output), wanted);
    // what somebody else wrote stays
    fs::copy(input, folder.at("theirs.npz")).unwrap();
    assert!(bad(&["run", &back, "-o", &folder.at("theirs.npz"), "--device", "cpu"]).contains("not overwritten"));
}

#[test]
fn arrays_are_given_by_name() {
    let folder = Folder::new();
    let wanted = folder.run(&small(), &[], &[]);
    let mut args = vec!["run".to_owned()];
    for (name, _, shape, bytes) in small() {
        let shape = format!("{shape:?}").replace('[', "(").replace(']', ")");
        fs::write(folder.at(&format!("{name}_of_mine.npy")), npy("<f4", &shape, &bytes)).unwrap();
        args.push(format!("{name}={}", folder.at(&format!("{name}_of_mine.npy"))));
    }
    let run = |output: &str, more: &[&str]| {
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        program(&[&args[..], &["-o", output, "--device", "cpu"], more].concat())
    };
    let (whole, one) = (folder.at("out.safetensors"), folder.at("out.npy"));
    assert!(run(&whole, &[]).status.success());
    assert_eq!(Results::read(&whole), wanted);
    assert!(run(&one, &[]).status.success());
    let written = fs::read(&one).unwrap();
    let bytes: Vec<u8> = wanted.values("output").iter().flat_map(|number| number.to_le_bytes()).collect();
    assert!(written.len().is_multiple_of(64) && written.ends_with(&bytes));
    assert!(String::from_utf8_lossy(&written[10..128]).contains("'shape': (2, 4, 3, 6)"));
    for (output, more, why) in [
        (&one, &[][..], "not overwritten"),
        (&folder.at("two.npy"), &["--probs"], "would have to hold output, probs"),
        (&folder.at("x.npz"), &["--output-type", "bf16"], "NumPy has no type for"),
        (&folder.at("folder/"), &[], "has no name of its own"),
    ] {
        let output = run(output, more);
        assert!(!output.status.success() && said(&output).contains(why), "{why}: {}", said(&output));
    }
    let alone = folder.at("query_of_mine.npy");
    assert!(bad(&["run", &alone, "-o", &whole, "--device", "cpu"]).contains("query=FILE.npy"));
    fs::write(&alone, npy("<f8", "(1, 1, 1, 1)", &0.1f64.to_le_bytes())).unwrap();
    let refused = said(&run(&whole, &[]));
    assert!(refused.contains("query_of_mine.npy: array query: element 0 is 0.1 in 64 bits"), "{refused}");
    fs::write(&alone, npy("|O", "(1,)", b"")).unwrap();
    assert!(said(&run(&whole, &[])).contains("query_of_mine.npy"));
}

#[test]
fn archives_that_are_damaged_are_refused() {
    let folder = Folder::new();
    let whole = fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/numpy/small.npz")).unwrap();
    let input = folder.at("in.npz");
    let step = whole.len() / 12;
    let mut files: Vec<Vec<u8>> = (1..12).map(|n| whole[..n * step].to_vec()).collect();
    // a byte of the middle of what is compressed
    let mut flipped = whole.clone();
    flipped[120] ^= 0xff;
    files.push(flipped);
    files.push(b"PK\x05\x06".iter().copied().chain([0; 18]).collect());
    for (n, bytes) in files.iter().enumerate() {
        fs::write(&input, bytes).unwrap();
        let said = bad(&["run", &input, "-o", &folder.at("out"), "--device", "cpu"]);
        assert!(said.contains("in.npz"), "{n}: {said}");
    }
}

#[test]
fn standard_input_and_output_are_files() {
    let folder = Folder::new();
    let input = folder.write("in.safetensors", &small(), &[("scael", "1")]);
    let bytes = fs::read(&input).unwrap();
    good(&["run", &input, "-o", &folder.at("out"), "--device", "cpu"]);
    let wanted = fs::read(folder.at("out")).unwrap();
    let through = fed(&["run", "-", "-o", "-", "--device", "cpu"], &bytes);
    // notes and lines are elsewhere
    assert!(through.stdout == wanted && said(&through).contains("standard input: metadata \"scael\""));
    let explained = fed(&["explain", "-", "--device", "cpu"], &bytes);
    assert!(String::from_utf8_lossy(&explained.stdout).contains("kv_len 5"), "{}", said(&explained));
    let table = fed(&["map", "-", "--out", "-", "--format", "csv", "--device", "cpu"], &bytes);
    assert!(table.stdout.starts_with(b"heads,row,label,key 0"), "{}", said(&table));
    let converted = fed(&["convert", "-", "-o", "-", "--kv", "f16"], &bytes);
    assert!(said(&converted).contains("output: off by"));
    assert!(fed(&["run", "-", "-o", &folder.at("half"), "--device", "cpu"], &converted.stdout).status.success());
    assert_ne!(Results::read(folder.at("half")).values("output"), Results::read(folder.at("out")).values("output"));
    // the format is that of the input
    let npz = fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/numpy/small.npz")).unwrap();
    let archive = fed(&["run", "-", "-o", "-", "--device", "cpu"], &npz);
    assert!(archive.stdout.starts_with(b"PK\x03\x04"), "{}", said(&archive));
    for (args, input, why) in [
        (&["run", "-", "-", "-o", "x"][..], &bytes[..], "more than once"),
        (&["run", "-", "-o", &folder.at("none/")], &bytes, "has no name of its own"),
        (&["run", "-", "-o", "-", "--json"], &bytes, "both go to standard output"),
        (&["run", &input, &input, "-o", "-"], &bytes, "cannot be told apart"),
        (&["map", "-", "--out", "-"], &bytes, "--format"),
        (&["run", "-", "-o", "-"], b"", "standard input: it is not a whole safetensors file"),
        (&["run", "-", "-o", "-"], &bytes[..99], "standard input: it is not a whole safetensors file"),
    ] {
        let output = fed(&[args, &["--device", "cpu"]].concat(), input);
        assert!(output.status.code() == Some(1) && said(&output).contains(why), "{args:?}: {}", said(&output));
        assert!(output.stdout.is_empty());
    }
}

#[cfg(unix)]
#[test]
fn a_reader_that_has_gone_is_no_error() {
    let folder = Folder::new();
    let input = folder.write("in.safetensors", &small(), &[]);
    let run =
        format!("{} run {input} -o - --device cpu -q --probs; echo $? >&2", env!("CARGO_BIN_EXE_cross-attention"));
    let output = Command::new("sh").args(["-c", &format!("{{ {run}; }} | true")]).output().unwrap();
    assert_eq!(said(&output).trim(), "0");
}

#[test]
fn a_stream_without_an_end_is_refused_by_its_start() {
    let folder = Folder::new();
    let run =
        format!("{} run - -o {} --device cpu", env!("CARGO_BIN_EXE_cross-attention"), folder.at("out.safetensors"));
    let output = Command::new("sh").args(["-c", &format!("yes | tr '\\n' '\\0' | {run}")]).output().unwrap();
    assert!(!output.status.success() && said(&output).contains("header"), "{}", said(&output));
    let zeros = Command::new("sh").args(["-c", &format!("cat /dev/zero | {run}")]).output().unwrap();
    assert!(!zeros.status.success() && said(&zeros).contains("header"), "{}", said(&zeros));
}

#[test]
fn a_name_of_two_lines_is_one() {
    let folder = Folder::new();
    let said = bad(&["run", "a\nerror: fake\nb.safetensors", "-o", &folder.at("out"), "--device", "cpu"]);
    assert!(said.contains("a\\u000aerror: fake") && said.lines().count() < 4, "{said}");
}

#[test]
fn lines_of_json_say_what_was_done() {
    let folder = Folder::new();
    let input = folder.write("in.safetensors", &small(), &[("causal", "top_left"), ("scael", "1")]);
    let output = folder.at("out.safetensors");
    let object = |text: &str| -> Value { serde_json::from_str(text).unwrap() };
    let said =
        good(&["run", &input, "-o", &output, "--device", "cpu", "--json", "--verify", "--scores", "scaled,probs"]);
    let record = object(&said);
    assert_eq!(record["tensors"], serde_json::json!(["lse", "output", "scores_scaled", "probs"]));
    assert_eq!((&record["problem"]["kv_len"], &record["problem"]["terms"][0]), (&5.into(), &"causal top_left".into()));
    assert!(record["kernel"].as_str().unwrap().starts_with("cpu") && record["ms"].as_f64().unwrap() > 0.0);
    for of in ["attention", "probs"] {
        assert_eq!(record["verified"][of]["passed"], true, "{record}");
    }
    assert!(record["notes"][0].as_str().unwrap().contains("scael"));
    let plain = object(&good(&["run", &input, "-o", &output, "--device", "cpu", "--json"]));
    assert!(plain["verified"].is_null() && plain["output"] == output.as_str());
    let plan = object(&good(&["explain", &input, "--device", "cpu", "--json"]));
    assert!(plan["plan"].as_str().unwrap().contains("cpu") && plan["problem"] == plain["problem"], "{plan}");
    // a file that fails has a sentence, and the others their objects
    fs::create_dir(folder.at("many")).unwrap();
    for (name, tensors) in [("a", &small()[..]), ("b", &small()[..2]), ("c", &small()[..])] {
        folder.write(&format!("many/{name}.safetensors"), tensors, &[]);
    }
    let ran = program(&["run", &folder.at("many"), "-o", &folder.at("results"), "--device", "cpu", "--json"]);
    assert_eq!((ran.status.code(), String::from_utf8_lossy(&ran.stdout).lines().count()), (Some(1), 2));
    assert!(String::from_utf8_lossy(&ran.stderr).contains("b.safetensors: tensor value is missing"));
}

#[test]
fn a_large_folder_takes_no_more_than_its_files() {
    let folder = Folder::new();
    fs::create_dir(folder.at("many")).unwrap();
    let tensors = [
        f32s("query", &[1, 1, 2, 4], wave(0.7)),
        f32s("key", &[1, 1, 3, 4], wave(1.3)),
        f32s("value", &[1, 1, 3, 4], wave(0.9)),
    ];
    let one = folder.write("one.safetensors", &tensors, &[]);
    let bytes = fs::read(one).unwrap();
    for n in 0..600 {
        fs::write(folder.at(&format!("many/{n:03}.safetensors")), &bytes).unwrap();
    }
    let start = std::time::Instant::now();
    good(&["run", &folder.at("many"), "-o", &folder.at("results"), "--device", "cpu"]);
    assert_eq!(folder.list("results").len(), 600);
    // 0.2 s where nothing else runs
    assert!(start.elapsed().as_secs() < 30, "{:?}", start.elapsed());
}
