//! What the program says: errors name the file and what is possible, nothing is ignored without a word, texts of files are
//! harmless.

use std::fs;
use std::process::Command;

use super::{Folder, bad, f32s, program, small, wave};

/// What it said on standard error where all went well.
fn warned(args: &[&str]) -> String {
    let output = program(args);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    said
}

#[test]
fn every_subcommand_names_the_file() {
    let folder = Folder::new();
    let whole = folder.write("whole.safetensors", &small(), &[]);
    let bytes = fs::read(&whole).unwrap();
    for (name, bytes) in
        [("cut", &bytes[..bytes.len() - 1]), ("head", &bytes[..50]), ("empty", &[]), ("text", b"a letter to you")]
    {
        fs::write(folder.at(name), bytes).unwrap();
    }
    fs::create_dir(folder.at("folder")).unwrap();
    for name in ["gone", "cut", "head", "empty", "text", "folder"] {
        let input = folder.at(name);
        let map = folder.at("map.png");
        let (out, shaders) = (folder.at("out"), folder.at("shaders"));
        let commands: [&[&str]; 4] = [
            &["explain", &input, "--device", "cpu"],
            &["shaders", &input, "-o", &shaders],
            &["run", &input, "-o", &out, "--device", "cpu"],
            &["map", &input, "--out", &map, "--device", "cpu"],
        ];
        for args in commands {
            let said = bad(args);
            assert!(said.contains(&input), "{args:?}: {said}");
        }
    }
}

#[test]
fn unknown_tensors_and_options_are_told_once_everywhere() {
    let folder = Folder::new();
    let mut tensors = small();
    tensors.push(f32s("maks", &[3], wave(1.0)));
    tensors.push(f32s("labels", &[3], wave(1.0)));
    let input = folder.write("in.safetensors", &tensors, &[("scael", "2"), ("is_causal", "true"), ("format", "pt")]);
    let map = folder.at("map.csv");
    let (out, shaders) = (folder.at("out"), folder.at("shaders"));
    let commands: [&[&str]; 4] = [
        &["explain", &input, "--device", "cpu"],
        &["shaders", &input, "-o", &shaders],
        &["run", &input, "-o", &out, "--device", "cpu"],
        &["map", &input, "--out", &map, "--device", "cpu"],
    ];
    for args in commands {
        let said = warned(args);
        assert_eq!(said.matches("2 tensors are not attention's, ignored: \"labels\", \"maks\"").count(), 1, "{said}");
        assert!(said.contains("is mask meant?"), "{said}");
        assert_eq!(said.matches("\"is_causal\", \"scael\"").count(), 1, "{said}");
        assert!(said.contains("is causal, scale meant?") && !said.contains("format"), "{said}");
    }
}

#[test]
fn labels_that_are_none_are_told() {
    let folder = Folder::new();
    let input = folder.write("in.safetensors", &small(), &[("row_labels", "It was"), ("seconds_per_key", "soon")]);
    for args in [
        ["run", &input, "-o", &folder.at("out"), "--device", "cpu", "--show"],
        ["map", &input, "--out", &folder.at("map.csv"), "--device", "cpu", "--reduce=sum"],
    ] {
        let said = warned(&args);
        assert!(said.contains("metadata row_labels is \"It was\", needs a JSON list of 3 strings"), "{said}");
        assert!(said.contains("seconds_per_key"), "{said}");
    }
}

#[test]
fn texts_of_files_do_not_move_the_cursor() {
    let folder = Folder::new();
    let mut tensors = small();
    tensors.push(f32s("\u{1b}[31m\u{202e}red\r\n", &[3], wave(1.0)));
    let metadata = [("scale", "\u{1b}[2J"), ("a\u{7}bell", "1")];
    let input = folder.write("in\u{1b}.safetensors", &tensors, &metadata);
    let out = folder.at("out");
    for args in [
        &["run", &input, "-o", &out, "--device", "cpu"][..],
        &["run", &input, "-o", &out, "--device", "cpu", "--scale", "1", "--show"],
        &["explain", &input, "--device", "cpu"],
    ] {
        let output = program(args);
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        let harmful = |char: char| (char.is_control() && char != '\n') || char == '\u{202e}';
        assert!(!said.contains(harmful), "{said:?}");
        assert!(said.contains("\\u001b"), "{said}");
    }
}

#[test]
fn what_rounds_to_nothing_is_refused() {
    let folder = Folder::new();
    let out = folder.at("out");
    for (name, text) in [("softcap", "1e-46"), ("scale", "1e-50"), ("scale", "1e39"), ("softcap", "1e39")] {
        let input = folder.write("in.safetensors", &small(), &[(name, text)]);
        assert!(bad(&["run", &input, "-o", &out, "--device", "cpu"]).contains(&format!("option {name} is \"{text}\"")));
        let plain = folder.write("plain.safetensors", &small(), &[]);
        let flag = format!("--{name}");
        assert_eq!(program(&["run", &plain, "-o", &out, "--device", "cpu", &flag, text]).status.code(), Some(2));
    }
}

#[test]
fn flags_without_effect_are_refused_or_told() {
    let folder = Folder::new();
    let input = folder.write("in.safetensors", &small(), &[]);
    let out = folder.at("out");
    for usage in [
        &["run", &input, "-o", &out, "-q", "--show"][..],
        &["bench", "--list", "--seconds", "1"],
        &["tune", "--workload", "gqa", "--causal", "top_left"],
        &["tune", "--workload", "gqa", "--output-type", "f16"],
        &["shaders", "--all", "-o", &out, "--scale", "2"],
        &["shaders", "--all", "-o", &out, "--probs"],
        &["bench", "--seconds", "1e30"],
        &["run", &input, "-o", &out, "--device", ""],
        &["run", &input, "-o", &out, "--device", "99999999999999999999"],
    ] {
        assert_eq!(program(usage).status.code(), Some(2), "{usage:?}");
    }
    let said = warned(&["run", &input, "-o", &out, "--device", "CPU", "--offset", "fixed:2"]);
    assert!(said.contains("offset does nothing"), "{said}");
    let said = warned(&["run", &input, "-o", &out, "--device", "Cpu", "--causal", "top_left", "--window-right", "3"]);
    assert!(said.contains("window_right does nothing"), "{said}");
    assert_eq!(
        warned(&["run", &input, "-o", &out, "--device", "cpu", "--offset", "fixed:2", "--window-left", "2"]),
        ""
    );
    // a number is an adapter's number, and never a part of a name
    let said = bad(&["run", &input, "-o", &out, "--device", "4096"]);
    assert!(said.contains("of number 4096"), "{said}");
}

#[test]
fn shapes_are_told_in_the_order_of_the_file() {
    let folder = Folder::new();
    let tensors = [
        f32s("query", &[1, 3, 2, 4], wave(0.7)),
        f32s("key", &[1, 5, 2, 4], wave(1.3)),
        f32s("value", &[1, 6, 2, 4], wave(0.9)),
    ];
    let input = folder.write("in.safetensors", &tensors, &[("layout", "blhd")]);
    let said = bad(&["run", &input, "-o", &folder.at("out"), "--device", "cpu"]);
    assert!(said.contains("value has shape [1, 6, 2, 4], needs [batch, len, heads, dim] = [1, 5, 2, 4]"), "{said}");
}

#[test]
fn only_the_programs_own_lines_are_on_standard_error() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cross-attention"));
    let output = command.arg("devices").env_remove("XDG_RUNTIME_DIR").output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn nothing_is_wrapped_without_a_terminal() {
    let output = program(&["bench", "--list"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.lines().all(|line| !line.starts_with(' ')), "{said}");
}
