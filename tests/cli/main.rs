//! The program from outside: files in, files and lines out, exit codes.

#![cfg(feature = "cli")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod backward;
mod bench;
mod door;
mod driver;
mod examples;
mod files;
mod formats;
mod forms;
mod maps;
mod memory;
mod run;
mod stored;
mod taken;
mod together;
mod words;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use driver::{Folder, Results, Tensor, assert_close, bad, f16s, f32s, good, program, small, wave};

#[test]
fn a_plan_is_explained() {
    let folder = Folder::new();
    let input = folder.write("in.safetensors", &small(), &[("causal", "end_of_keys")]);
    let said = good(&["explain", &input, "--device", "cpu"]);
    assert!(said.contains("q_len 3, kv_len 5") && said.contains("causal end_of_keys"), "{said}");
    let shape = ["explain", "--q-heads", "8", "--q-len", "4096", "--kv-len", "77", "--head-dim", "40"];
    let said = good(&[&shape[..], &["--bias", "--device", "cpu"]].concat());
    assert!(said.contains("head_dim 40") && said.contains("bias f32") && said.contains("cpu_"), "{said}");
    assert!(bad(&[&shape[..], &["--kv-heads", "3", "--device", "cpu"]].concat()).contains("does not divide"));
}

#[test]
fn shaders_of_a_plan_are_written_with_a_list() {
    let folder = Folder::new();
    let shape = ["shaders", "--q-heads", "8", "--q-len", "1", "--kv-len", "1500", "--head-dim", "64"];
    let written = |name: &str, flags: &[&str]| {
        let out = folder.at(name);
        let said = good(&[&shape[..], flags, &["-o", &out]].concat());
        let list: serde_json::Value =
            serde_json::from_slice(&fs::read(format!("{out}/manifest.json")).unwrap()).unwrap();
        (said, list["shaders"].as_array().unwrap().clone())
    };
    // the keys are split over workgroups and merged
    let (said, shaders) =
        written("split", &["--device-class", "discrete", "--target", "hlsl,spirv", "--element", "f16"]);
    assert!(said.contains("2 shaders"), "{said}");
    assert_eq!((shaders.len(), folder.list("split").len()), (2, 5));
    assert_eq!(shaders[0]["elements"], serde_json::json!({ "query": "f16", "key": "f16", "value": "f16" }));
    assert_eq!(shaders[0]["chosen_for"][0]["class"], "discrete");
    let spirv = shaders[0]["files"].as_array().unwrap().iter().find(|file| file["target"] == "spirv").unwrap();
    let bytes = fs::read(folder.at(&format!("split/{}", spirv["file"].as_str().unwrap()))).unwrap();
    assert_eq!(bytes[..4], 0x0723_0203u32.to_le_bytes());
    // a kernel that is asked for by name, and would not be chosen
    let (_, shaders) = written("fused", &["--kernel", "fused", "--target", "wgsl"]);
    assert_eq!((&shaders[0]["kernel"], &shaders[0]["chosen_for"]), (&"fused".into(), &serde_json::json!([])));
    let (_, shaders) = written("subgroups", &["--kernel", "tiled", "--subgroup-size", "32", "--target", "wgsl-web"]);
    let text =
        fs::read_to_string(folder.at(&format!("subgroups/{}", shaders[0]["files"][0]["file"].as_str().unwrap())));
    assert!(text.unwrap().contains("\nenable subgroups;\n"));
}

#[test]
fn shaders_that_cannot_be_written_are_refused() {
    let folder = Folder::new();
    let shape = ["shaders", "--q-heads", "8", "--q-len", "70", "--kv-len", "77", "--head-dim", "256"];
    let refused = |name: &str, flags: &[&str]| bad(&[&shape[..], flags, &["-o", &folder.at(name)]].concat());
    good(&[&shape[..], &["-o", &folder.at("full")]].concat());
    assert!(refused("full", &[]).contains("--force"));
    good(&[&shape[..], &["--force", "-o", &folder.at("full")]].concat());
    assert!(refused("full/manifest.json", &[]).contains("is a file; name a folder"));
    assert!(refused("cpu", &["--kernel", "cpu_fused"]).contains("has no shaders"));
    assert!(refused("cpu", &["--device", "cpu"]).contains("has no shaders"));
    let large = ["--kernel", "tiled", "--device-class", "discrete", "--workgroup-memory", "65536", "--target", "hlsl"];
    assert!(refused("large", &large).contains("--workgroup-memory 32768"));
    assert!(refused("narrow", &["--workgroup-memory", "64"]).contains("no kernel can compute this"));
    for name in ["cpu", "large", "narrow"] {
        assert!(!Path::new(&folder.at(name)).exists(), "{name}");
    }
}

#[test]
fn timings_are_lines_of_json() {
    let said = good(&["bench", "whisper_decode", "qformer", "--device", "cpu", "--seconds", "0.05", "--json"]);
    assert_eq!(said.lines().count(), 2);
    for (n, line) in said.lines().enumerate() {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        let texts = ["workload", "device", "adapter", "driver", "kernel", "element", "timing", "backend"];
        for name in texts.into_iter().chain(["peak_timing", "roof"]) {
            assert!(row[name].is_string(), "{name}: {row}");
        }
        let times = ["median_ms", "p10_ms", "p90_ms", "first_ms", "first_run_ms", "prepare_ms", "device_ms", "plan_us"];
        let rates = ["gflops", "gbps", "peak_gflops", "peak_gbps", "flops_per_byte", "roof_share"];
        for name in times.into_iter().chain(rates) {
            assert!(row[name].as_f64().is_some_and(|number| number > 0.0), "{name}: {row}");
        }
        for name in ["max_abs_error", "rounds", "kv_len", "pipelines"] {
            assert!(row[name].is_number(), "{name}: {row}");
        }
        // of a device of wgpu only
        for name in ["bind_us", "bind_wgpu_us", "encode_us", "encode_wgpu_us", "kernels"] {
            assert!(row[name].is_null(), "{name}: {row}");
        }
        assert_eq!((row["timing"].as_str(), row["cold"].as_bool()), (Some("cpu"), Some(n == 0)));
        let number = |name: &str| row[name].as_f64().unwrap();
        let same =
            |found: f64, wanted: f64| assert!((found / wanted - 1.0).abs() < 1e-9, "{found}, not {wanted}: {row}");
        same(number("flops_per_byte"), number("gflops") / number("gbps"));
        let compute = number("flops_per_byte") >= number("peak_gflops") / number("peak_gbps");
        assert_eq!(row["roof"], if compute { "compute" } else { "memory" });
        let share =
            if compute { number("gflops") / number("peak_gflops") } else { number("gbps") / number("peak_gbps") };
        same(number("roof_share"), share);
    }
}

#[test]
fn timings_are_a_table() {
    let said = good(&["bench", "whisper_decode", "--device", "cpu", "--seconds", "0"]);
    let lines: Vec<_> = said.lines().collect();
    let starts = |n: usize, with: &str| assert!(lines[n].starts_with(with), "{said}");
    starts(0, "device: cpu");
    starts(2, "peak: ");
    starts(3, "cold start: ");
    assert!(lines[2].contains("GFLOP/s") && lines[2].contains("GB/s"), "{said}");
    assert!(said.contains("of roof") && said.contains("whisper_decode") && said.contains('%'), "{said}");
    // the oracle has no limits to compare with
    let said = good(&["bench", "whisper_decode", "--device", "oracle", "--seconds", "0", "--json"]);
    let row: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert!(row["peak_gflops"].is_null() && row["roof"].is_null() && row["roof_share"].is_null(), "{row}");
    let list = good(&["bench", "--list"]);
    for name in ["sd15_64", "sdxl_32", "whisper_prefill", "square_1k", "long_kv", "perceiver", "gqa"] {
        assert!(list.contains(name), "{name}: {list}");
    }
}

#[test]
fn tuning_is_for_gpus() {
    let folder = Folder::new();
    let file = folder.at("tune.json");
    let shape = ["--q-heads", "2", "--q-len", "3", "--kv-len", "5", "--head-dim", "8"];
    let said = bad(&[&["tune", "--device", "cpu", "--cache", &file], &shape[..]].concat());
    assert!(said.contains("has no choices to tune; --device gpu"), "{said}");
    assert!(!Path::new(&file).exists());
    // a cache that the device has no use for
    let output = program(&[&["explain", "--device", "cpu", "--tune-cache", &file], &shape[..]].concat());
    assert!(output.status.success());
    assert!(String::from_utf8(output.stderr).unwrap().starts_with("warning: cpu"));
    for usage in [
        &["tune"][..],
        &["tune", "--workload", "no_such_workload"],
        &["tune", "--workload", "gqa", "--q-heads", "2"],
        &["tune", "--q-heads", "2", "--q-len", "3", "--kv-len", "5"],
        &["tune", "--workload", "gqa", "--seconds", "-1"],
        &["bench", "--tune-cache", "x", "--kernel", "fused"],
    ] {
        assert_eq!(program(usage).status.code(), Some(2), "{usage:?}");
    }
}

#[test]
fn a_pipeline_cache_that_is_not_used_is_a_warning() {
    let folder = Folder::new();
    let (input, cache) = (folder.write("in.safetensors", &small(), &[]), folder.at("pipelines"));
    let run = ["run", &input, "-o", &folder.at("out"), "--device", "cpu", "--pipeline-cache", &cache];
    let output = program(&run);
    assert!(output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("warning: pipeline cache") && said.contains("has no pipeline caches"), "{said}");
    assert!(!PathBuf::from(cache).exists());
}

#[test]
fn devices_are_listed_where_there_are_none_too() {
    for environment in [None, Some(("WGPU_ADAPTER_NAME", "no such adapter"))] {
        for flags in [&["devices"][..], &["devices", "--json"]] {
            let mut command = Command::new(env!("CARGO_BIN_EXE_cross-attention"));
            let output = command.args(flags).envs(environment).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let said = String::from_utf8(output.stdout).unwrap();
            assert!(said.contains("auto"), "{said}");
        }
    }
}

const WHISPER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/whisper.safetensors");

/// Fields of a line, where no field holds a comma.
fn fields(line: &str) -> Vec<&str> {
    line.split(',').map(|field| field.trim_matches('"')).collect()
}

#[test]
fn a_map_is_a_table() {
    let folder = Folder::new();
    let input = folder.write("labelled.safetensors", &small(), &[("row_labels", r#"[" It", "was \"it\""]"#)]);
    let probs = folder.run(&small(), &[], &["--probs"]);
    let probs = probs.values("probs");
    let table = |flags: &[&str]| {
        let output = folder.at("map.csv");
        good(&[&["map", &input, "--out", &output, "--device", "cpu", "--quiet"], flags].concat());
        fs::read_to_string(output).unwrap()
    };
    // [2, 4, 3, 5]: entry 1, heads 3 and 0, rows 1 and 2, keys 4, 0 and 1
    let text = table(&["--batch", "1", "--heads", "3,0", "--rows", "1-2", "--keys", "4,0-1", "--reduce", "none"]);
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[0], "heads,row,label,key 4,key 0,key 1");
    assert!(lines[1].starts_with(r#""head 3",1,"was ""it""","#), "{text}");
    assert_eq!(lines.len(), 5);
    for (line, (head, row)) in lines[1..].iter().zip([(3, 1), (3, 2), (0, 1), (0, 2)]) {
        let fields = fields(line);
        assert_eq!(fields[..2], [format!("head {head}"), row.to_string()]);
        let got: Vec<f32> = fields[3..].iter().map(|field| field.parse().unwrap()).collect();
        let wanted = [4, 0, 1].map(|key| probs[((4 + head) * 3 + row) * 5 + key]);
        assert_close(&got, &wanted, 1e-6);
    }
    // the mean over all heads, and the mass of two ranges
    let text = table(&["--segments", "0-2,3-4", "--rows", "0"]);
    let lines: Vec<_> = text.lines().collect();
    assert_eq!((lines[0], lines.len()), ("heads,row,label,keys 0 to 2,keys 3 to 4", 2));
    assert!(lines[1].starts_with(r#""mean of heads 0 1 2 3",0,"It","#), "{text}");
    let got: Vec<f32> = fields(lines[1])[3..].iter().map(|field| field.parse().unwrap()).collect();
    let mass = |keys: std::ops::Range<usize>| (0..4).flat_map(|h| &probs[h * 15..][keys.clone()]).sum::<f32>() / 4.0;
    assert_close(&got, &[mass(0..3), mass(3..5)], 1e-6);
}

#[test]
fn maps_that_cannot_be_are_refused() {
    let folder = Folder::new();
    let input = folder.write("in.safetensors", &small(), &[]);
    let refused = |output: &str, flags: &[&str]| {
        let output = folder.at(output);
        let said = bad(&[&["map", &input, "--device", "cpu", "--out", &output], flags].concat());
        assert!(!Path::new(&output).exists());
        said
    };
    assert!(refused("x.png", &["--heads", "4"]).contains("the file has 4 heads, 0 to 3"));
    assert!(refused("x.png", &["--rows", "1-3"]).contains("--rows 1-3: it reaches past the end; the file has 3 rows"));
    assert!(
        refused("x.csv", &["--segments", "0-9"])
            .contains("--segments 0-9: it reaches past the end; the file has 5 keys")
    );
    assert!(refused("x.csv", &["--batch", "2"]).contains("--batch is 2, possible: 0 to 1"));
    assert!(refused("x.gif", &[]).contains("name it .png, .svg or .csv"));
    assert!(refused("none/x.png", &[]).contains("cannot write"));
    assert_eq!(program(&["map", &input, "--out", "x.png", "--heads", "two"]).status.code(), Some(2));
    let list = folder.list(".");
    assert_eq!(list, ["in.safetensors"]);
}
