//! `bench` of shapes and files, its rows in every form, saved, compared and drawn.

use std::fs;

use serde_json::Value;

use super::{Folder, bad, good, program, small};

const SHAPE: [&str; 8] = ["--q-heads", "2", "--q-len", "5", "--kv-len", "7", "--head-dim", "8"];
const QUICK: [&str; 5] = ["bench", "--device", "cpu", "--seconds", "0"];

fn rows(flags: &[&str]) -> Vec<Value> {
    let said = good(&[&QUICK[..], flags, &["--json"]].concat());
    said.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_shape_of_ones_own() {
    let more = ["--kv-heads", "1", "--causal", "bottom_right", "--mask", "--softcap", "30", "--element", "f16"];
    let row = &rows(&[&SHAPE[..], &more].concat())[0];
    assert_eq!(
        (&row["workload"], &row["element"], &row["output"]),
        (&"1x2/1x5x7x8".into(), &"f16".into(), &"f16".into())
    );
    assert_eq!(row["terms"], serde_json::json!(["softcap 30", "causal bottom_right", "mask"]));
    assert!(row["median_ms"].as_f64().unwrap() > 0.0 && row["max_abs_error"].is_number(), "{row}");
    assert!(row["kernel"].is_string() && row["kernel_choice"] == "auto" && row["backward"] == false, "{row}");
    let row = &rows(&[&SHAPE[..], &["--backward"]].concat())[0];
    assert_eq!(row["gradients"], serde_json::json!(["d_query", "d_key", "d_value"]));
    // half a shape, two sources at once, options that would change nothing
    for usage in [
        &["bench", "--q-heads", "2"][..],
        &["bench", "--mask"],
        &["bench", "gqa", "--q-heads", "2", "--q-len", "5", "--kv-len", "7", "--head-dim", "8"],
        &["bench", "gqa", "--causal", "top_left"],
        &["bench", "--scale", "2"],
        &["bench", "gqa", "--file", "x"],
        &["bench", "--file", "x", "--shapes", "y"],
        &["bench", "--file", "x", "--element", "f16"],
        &["bench", "--probs"],
        &["bench", "--fail-if-slower", "5"],
        &["bench", "--compare", "x"],
        &["bench", "--compare", "x", "y", "--seconds", "1"],
        &["bench", "--compare", "x", "y", "--fail-if-slower", "-1"],
        &["bench", "--json", "--format", "csv"],
        &["bench", "gqa", "--way", "ring"],
        &["bench", "gqa", "--on-all"],
        &["bench", "gqa", "--mpi", "--backward"],
        &["bench", "gqa", "--mpi", "--kernel", "fused"],
        &["bench", "gqa", "--mpi", "--list"],
        &["bench", "gqa", "--mpi", "--latency-us", "0"],
    ] {
        assert_eq!(program(usage).status.code(), Some(2), "{usage:?}");
    }
    for nothing_to_compare in [&["bench", "gqa", "--device", "cpu"][..], &["bench", "gqa", "--list"]] {
        assert!(bad(&[nothing_to_compare, &["--fail-if-slower", "5"]].concat()).contains("--compare"));
    }
    // streams where files are
    for (usage, said) in [
        (&["bench", "gqa", "--save", "-"][..], "--json prints them"),
        (&["bench", "gqa", "--plot", "-"], "name it .svg or .png"),
        (&["bench", "--file", "-"], "name a file"),
        (&["bench", "--compare", "-", "-"], "one of them can be"),
    ] {
        let message = bad(usage);
        assert!(message.contains(said), "{usage:?}: {message}");
    }
    if cfg!(not(feature = "mpi")) {
        assert!(bad(&["bench", "gqa", "--mpi"]).contains("--features cli,mpi"));
    }
    // what there is no memory for is said, and nothing is cut short
    let huge = ["--q-heads", "1024", "--q-len", "1000000000", "--kv-len", "4", "--head-dim", "64"];
    assert!(bad(&[&QUICK[..], &huge].concat()).contains("more memory than there is"));
}

#[test]
fn files_and_their_gradients() {
    let folder = Folder::new();
    let input = folder.write("in.safetensors", &small(), &[("causal", "top_left")]);
    let row = &rows(&["--file", &input])[0];
    assert_eq!((&row["workload"], &row["q_len"], &row["kv_len"]), (&input.clone().into(), &3.into(), &5.into()));
    assert_eq!(row["terms"], serde_json::json!(["causal top_left", "returns lse"]));
    let row = &rows(&["--file", &input, "--causal", "none", "--output-type", "f16"])[0];
    assert_eq!((&row["terms"], &row["output"]), (&serde_json::json!(["returns lse"]), &"f16".into()));
    assert!(bad(&[&QUICK[..], &["--file", &input, "--backward"]].concat()).contains("d_output is missing"));
    let mut tensors = small();
    tensors.push(super::f32s("d_output", &[2, 4, 3, 6], super::wave(0.3)));
    tensors.push(super::f32s("bias", &[3, 5], super::wave(0.4)));
    let input = folder.write("backward.safetensors", &tensors, &[]);
    let row = &rows(&["--file", &input, "--backward"])[0];
    assert_eq!(row["gradients"], serde_json::json!(["d_query", "d_key", "d_value", "d_bias"]));
    for (name, bytes) in [("cut", &fs::read(&input).unwrap()[..100]), ("none", b"")] {
        fs::write(folder.at(name), bytes).unwrap();
        let said = bad(&[&QUICK[..], &["--file", &input, &folder.at(name)]].concat());
        assert!(said.contains(name) && said.contains("not a whole safetensors file"), "{said}");
    }
}

#[test]
fn shapes_of_a_file_in_every_form() {
    let folder = Folder::new();
    let (file, saved) = (folder.at("shapes.json"), folder.at("rows.jsonl"));
    let shapes = r#"[{"name": "a, b", "q_heads": 2, "q_len": 5, "kv_len": 7, "head_dim": 8, "alibi": true},
                     {"q_heads": 1, "q_len": 1, "kv_len": 32, "head_dim": 32, "kv": "int8_32", "pages": 16}]"#;
    fs::write(&file, shapes).unwrap();
    let csv = good(&[&QUICK[..], &["--shapes", &file, "--format", "csv", "--save", &saved]].concat());
    let lines: Vec<_> = csv.lines().collect();
    let names: Vec<_> = lines[0].split(',').collect();
    assert!(lines.len() == 3 && lines[1].starts_with("\"a, b\",1,2,2,5,7,8,8,f32,"), "{csv}");
    let row: Value = serde_json::from_str(fs::read_to_string(&saved).unwrap().lines().next().unwrap()).unwrap();
    // every value has a column, but for lists that need JSON; and every column is known there
    let flat = |name: &&String| !["blocks_ms", "kernels"].contains(&name.as_str());
    for name in row.as_object().unwrap().keys().filter(flat) {
        assert!(names.contains(&name.as_str()), "{name} has no column");
    }
    for name in names.iter().filter(|name| **name != "error") {
        assert!(row.get(name).is_some(), "{name} is no value: {row}");
    }
    for name in ["cpu", "rustc", "commit", "version"] {
        assert!(row[name].as_str().is_some_and(|text| !text.is_empty()), "{name}: {row}");
    }
    for name in ["threads", "min_ms", "p25_ms", "p75_ms", "p99_ms", "max_ms", "mean_ms", "warmup_rounds"] {
        assert!(row[name].as_f64().is_some_and(|number| number > 0.0), "{name}: {row}");
    }
    let number = |name: &str| row[name].as_f64().unwrap();
    assert!(number("min_ms") <= number("p10_ms") && number("median_ms") <= number("p75_ms"), "{row}");
    assert_eq!(row["blocks_ms"].as_array().unwrap().len() as u64, row["rounds"].as_u64().unwrap().min(32));
    let said = good(&[&QUICK[..], &["--shapes", &file, "--format", "markdown"]].concat());
    assert!(said.contains("| workload | batch x heads") && said.contains("\n| a, b | 1 x 2 x 5 x 7 x 8 |"), "{said}");
    // a file that does not end
    #[cfg(unix)]
    assert!(bad(&["bench", "--shapes", "/dev/zero"]).contains("is longer than"));
    fs::write(&file, shapes.replace("alibi", "alibbi")).unwrap();
    let said = bad(&["bench", "--shapes", &file]);
    assert!(
        said.contains("shape 1 \"a, b\"") && said.contains("\"alibbi\"") && said.contains("is alibi meant?"),
        "{said}"
    );
}

#[test]
fn the_list_in_every_form() {
    for (format, wanted) in [
        ("json", r#"{"about":"grouped heads"#),
        ("csv", "gqa,1,32,8,128,2048,128,128,"),
        ("markdown", "| gqa | batch 1, q_heads 32, kv_heads 8"),
    ] {
        let said = good(&["bench", "gqa", "--list", "--format", format]);
        assert!(said.contains(wanted) && !said.contains("perceiver"), "{format}: {said}");
    }
    assert_eq!(good(&["bench", "--list", "--json"]).lines().count(), cross_attention::workload::all().len());
}

#[test]
fn saved_rows_are_added_and_other_files_left_alone() {
    let folder = Folder::new();
    let saved = folder.at("rows.jsonl");
    let save = |path: &str| {
        [&QUICK[..], &SHAPE, &["--save", path]].concat().iter().map(|x| (*x).to_owned()).collect::<Vec<_>>()
    };
    let run = |args: Vec<String>| good(&args.iter().map(String::as_str).collect::<Vec<_>>());
    run(save(&saved));
    run([save(&saved), vec!["--runs".to_owned(), "2".to_owned()]].concat());
    let rows = fs::read_to_string(&saved).unwrap();
    let runs: Vec<_> = rows.lines().map(|row| serde_json::from_str::<Value>(row).unwrap()["run"].as_u64()).collect();
    assert_eq!(runs, [Some(1), Some(1), Some(2)]);
    // what cannot be kept is still printed
    #[cfg(target_os = "linux")]
    {
        let output = program(&[&QUICK[..], &SHAPE, &["--save", "/dev/full"]].concat());
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stdout).contains("1x2x5x7x8"));
        assert!(String::from_utf8_lossy(&output.stderr).contains("cannot write /dev/full"));
    }
    let other = folder.at("notes.txt");
    fs::write(&other, "not rows").unwrap();
    let refused = |path: &str| bad(&save(path).iter().map(String::as_str).collect::<Vec<_>>());
    assert!(refused(&other).contains("not rows of this program"));
    fs::write(&other, fs::read_to_string(&saved).unwrap() + "{\"cut").unwrap();
    assert!(refused(&other).contains("line 4 is no row"));
    assert!(refused(&folder.at("no/such/folder")).contains("cannot write"));
    assert!(fs::read_to_string(&other).unwrap().ends_with("{\"cut"));
}

/// A row as it is saved, with times around `ms`.
fn row(name: &str, ms: f64) -> String {
    let blocks: Vec<f64> = (0..32).map(|n| ms * (1.0 + 0.001 * f64::from(n % 7))).collect();
    serde_json::json!({
        "workload": name, "device": "cpu", "adapter": "cpu", "kernel": "fused", "element": "f32", "median_ms": ms,
        "blocks_ms": blocks, "commit": format!("of {ms}"),
    })
    .to_string()
}

#[test]
fn files_are_compared() {
    let folder = Folder::new();
    let (old, new) = (folder.at("old.jsonl"), folder.at("new.jsonl"));
    let failed = r#"{"workload": "broken", "device": "cpu", "adapter": "cpu", "element": "f32", "error": "no memory"}"#;
    let rows = |rows: &[String]| rows.join("\n");
    fs::write(&old, rows(&[row("same", 1.0), row("slow", 1.0), row("fast", 2.0), row("gone", 1.0)])).unwrap();
    fs::write(
        &new,
        rows(&[row("same", 1.0001), row("slow", 1.1), row("fast", 1.0), row("more", 1.0), failed.to_owned()]),
    )
    .unwrap();
    let compare = ["bench", "--compare", &old, &new];
    let said = good(&compare);
    let line = |name: &str| said.lines().find(|line| line.starts_with(name)).unwrap_or_default();
    assert!(line("same").contains("undecided") && line("slow").contains("slower?"), "{said}");
    assert!(
        line("slow").contains("1.100") && line("fast").contains("faster?") && said.contains("fewer than 5 runs"),
        "{said}"
    );
    assert!(said.contains(&format!("only in {old}: gone (f32)")), "{said}");
    assert!(
        said.contains(&format!("only in {new}: more (f32)")) || said.contains("more (f32); broken (f32)"),
        "{said}"
    );
    assert!(
        said.contains("commit: of 1, of 2 -> ") && said.contains("no memory") && said.contains("geometric mean"),
        "{said}"
    );
    let json = good(&[&compare[..], &["--json"]].concat());
    let slow: Value = serde_json::from_str(json.lines().nth(1).unwrap()).unwrap();
    assert!(slow["ratio_low"].as_f64().unwrap() > 1.08 && slow["ratio_high"].as_f64().unwrap() < 1.12, "{slow}");
    assert!(bad(&[&compare[..], &["--fail-if-slower", "5"]].concat()).contains("\"slow (f32)\""));
    good(&[&compare[..], &["--fail-if-slower", "15"]].concat());
    // of five runs each, how those differ counts
    let runs = |name: &str, ms: [f64; 5]| rows(&ms.map(|ms| row(name, ms)));
    let (near, far) = ([1.0, 1.2, 1.1, 1.3, 1.05], [1.5, 1.7, 1.6, 1.8, 1.55]);
    for (new_ms, wanted) in [(near, "undecided"), (far, "slower")] {
        let [old_path, new_path] = [folder.at("five"), folder.at("more")];
        fs::write(&old_path, runs("a", near)).unwrap();
        fs::write(&new_path, runs("a", new_ms)).unwrap();
        let said = good(&["bench", "--compare", &old_path, &new_path, "--format", "csv"]);
        assert!(said.contains(&format!(",{wanted},")), "{said}");
    }
    // what fails now and did not is a failure too
    fs::write(&new, rows(&[row("same", 1.0), failed.replace("broken", "slow")])).unwrap();
    assert!(bad(&[&compare[..], &["--fail-if-slower", "15"]].concat()).contains("\"slow (f32)\""));
    // nothing in common, nothing there, something else
    fs::write(&new, row("other", 1.0)).unwrap();
    assert!(bad(&compare).contains("no row of"));
    for (text, wanted) in
        [("", "holds no row"), ("{}", "line 1 is no row"), ("\n{\"workload\": \"a\", \"median_ms\": 0}", "line 2")]
    {
        fs::write(&new, text).unwrap();
        assert!(bad(&compare).contains(wanted), "{text}");
    }
    fs::remove_file(&new).unwrap();
    assert!(bad(&compare).contains("cannot read"));
}

#[test]
fn rates_are_drawn_under_the_roofs() {
    let folder = Folder::new();
    for (name, start) in [("plot.svg", &b"<svg "[..]), ("plot.PNG", b"\x89PNG")] {
        let plot = [&QUICK[..], &SHAPE, &["--plot", &folder.at(name)]]
            .concat()
            .iter()
            .map(|x| (*x).to_owned())
            .collect::<Vec<_>>();
        good(&plot.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(fs::read(folder.at(name)).unwrap().starts_with(start), "{name}");
    }
    let svg = fs::read_to_string(folder.at("plot.svg")).unwrap();
    for text in ["FLOP a byte", "GFLOP/s", "GB/s", ">1x2x5x7x8<"] {
        assert!(svg.contains(text), "{text}: {svg}");
    }
    assert!(bad(&["bench", "gqa", "--plot", &folder.at("plot.pdf")]).contains("name it .svg or .png"));
    fs::write(folder.at("text.svg"), "text").unwrap();
    assert!(bad(&["bench", "gqa", "--plot", &folder.at("text.svg")]).contains("not a picture"));
}
