//! The program from outside: files in, files and lines out, exit codes.

#![cfg(feature = "cli")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod backward;
mod files;
mod memory;
mod stored;
mod words;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use cross_attention::f16;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

/// A tensor to write: name, type, shape, little-endian bytes.
type Tensor = (&'static str, Dtype, Vec<usize>, Vec<u8>);

fn f32s(name: &'static str, shape: &[usize], value: impl Fn(usize) -> f32) -> Tensor {
    let bytes = (0..shape.iter().product()).flat_map(|index| value(index).to_le_bytes()).collect();
    (name, Dtype::F32, shape.to_vec(), bytes)
}

fn f16s(name: &'static str, shape: &[usize], value: impl Fn(usize) -> f32) -> Tensor {
    let bytes = (0..shape.iter().product()).flat_map(|index| f16::from_f32(value(index)).to_le_bytes()).collect();
    (name, Dtype::F16, shape.to_vec(), bytes)
}

fn wave(step: f32) -> impl Fn(usize) -> f32 {
    move |index| 2.0 * (index as f32 * step).sin()
}

fn write(path: &Path, tensors: &[Tensor], metadata: &[(&str, &str)]) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        let view = TensorView::new(*dtype, shape.clone(), bytes).unwrap();
        (*name, view)
    });
    let metadata: HashMap<_, _> = metadata.iter().map(|&(name, text)| (name.to_owned(), text.to_owned())).collect();
    fs::write(path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

/// Query [2, 4, 3, 8], key [2, 2, 5, 8], value [2, 2, 5, 6].
fn small() -> Vec<Tensor> {
    vec![
        f32s("query", &[2, 4, 3, 8], wave(0.7)),
        f32s("key", &[2, 2, 5, 8], wave(1.3)),
        f32s("value", &[2, 2, 5, 6], wave(0.9)),
    ]
}

fn program(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cross-attention")).args(args).output().unwrap()
}

/// Runs the program and expects that all went well.
fn good(args: &[&str]) -> String {
    let output = program(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs the program, expects exit code 1 and gives what it said on standard error.
fn bad(args: &[&str]) -> String {
    let output = program(args);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {}", String::from_utf8_lossy(&output.stdout));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!said.contains("panicked"), "{said}");
    said
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn at(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    fn write(&self, name: &str, tensors: &[Tensor], metadata: &[(&str, &str)]) -> String {
        let path = self.at(name);
        write(Path::new(&path), tensors, metadata);
        path
    }

    /// Names of all that is in a folder of this one, hidden files too.
    fn list(&self, name: &str) -> Vec<String> {
        let entries = fs::read_dir(self.at(name)).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Runs one file on the CPU and reads the result.
    fn run(&self, tensors: &[Tensor], metadata: &[(&str, &str)], flags: &[&str]) -> Results {
        let (input, output) = (self.write("in.safetensors", tensors, metadata), self.at("out.safetensors"));
        good(&[&["run", &input, "-o", &output, "--device", "cpu"], flags].concat());
        Results::read(&output)
    }
}

#[derive(Debug, PartialEq)]
struct Results {
    tensors: HashMap<String, (Dtype, Vec<usize>, Vec<f32>)>,
    metadata: HashMap<String, String>,
}

impl Results {
    fn read(path: impl AsRef<Path>) -> Self {
        let bytes = fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.iter().map(|(name, view)| {
            let values = match view.dtype() {
                Dtype::F32 => view.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
                Dtype::BF16 => {
                    let halves = view.data().as_chunks().0.iter();
                    halves.map(|&bytes| cross_attention::bf16::from_le_bytes(bytes).to_f32()).collect()
                }
                Dtype::F16 => {
                    view.data().as_chunks().0.iter().map(|&bytes| f16::from_le_bytes(bytes).to_f32()).collect()
                }
                other => panic!("{name} has type {other}"),
            };
            (name.to_owned(), (view.dtype(), view.shape().to_vec(), values))
        });
        Self { tensors: tensors.collect(), metadata: header.metadata().clone().unwrap() }
    }

    fn shape(&self, name: &str) -> &[usize] {
        &self.tensors[name].1
    }

    fn values(&self, name: &str) -> &[f32] {
        &self.tensors[name].2
    }
}

fn assert_close(got: &[f32], wanted: &[f32], tolerance: f32) {
    assert_eq!(got.len(), wanted.len());
    for (index, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        assert!((got - wanted).abs() <= tolerance, "at {index}: {got}, not {wanted}");
    }
}

#[test]
fn one_file_is_computed() {
    let folder = Folder::new();
    let results = folder.run(&small(), &[], &[]);
    assert_eq!(results.shape("output"), [2, 4, 3, 6]);
    assert_eq!(results.shape("lse"), [2, 4, 3]);
    assert_eq!(results.tensors.len(), 2);
    assert!(results.metadata["device"].starts_with("cpu"));
    assert!(results.metadata["kernel"].starts_with("cpu"));
    assert_eq!(results.metadata["version"], env!("CARGO_PKG_VERSION"));
    let (input, output) = (folder.at("in.safetensors"), folder.at("oracle.safetensors"));
    let said = good(&["run", &input, "-o", &output, "--device", "oracle", "--verify"]);
    assert!(said.starts_with("device: oracle") && said.contains("in.safetensors: batch 2, q_heads 4"), "{said}");
    let oracle = Results::read(&output);
    assert_close(results.values("output"), oracle.values("output"), 1e-5);
    assert_close(results.values("lse"), oracle.values("lse"), 1e-5);
    let said = good(&["run", &input, "-o", &output, "--device", "cpu", "--show"]);
    assert!(said.contains("─┐ most at") && said.contains("key 5 in all"), "{said}");
    assert_eq!(Results::read(&output).tensors.len(), 2);
    assert_eq!(good(&["run", &input, "-o", &folder.at("quiet"), "--device", "cpu", "--quiet"]), "");
}

#[test]
fn weights_are_written_and_add_up() {
    let results = Folder::new().run(&small(), &[("causal", "bottom_right")], &["--probs"]);
    assert_eq!(results.shape("probs"), [2, 4, 3, 5]);
    for row in results.values("probs").chunks(5) {
        assert_close(&[row.iter().sum()], &[1.0], 1e-5);
    }
    // row 0 of 3 sees three of five keys
    assert_close(&results.values("probs")[3..5], &[0.0, 0.0], 0.0);
}

#[test]
fn f16_goes_in_and_out() {
    let folder = Folder::new();
    let mut tensors = small();
    tensors[1] = f16s("key", &[2, 2, 5, 8], wave(1.3));
    tensors[2] = f16s("value", &[1, 2, 5, 6], wave(0.9));
    let wide = folder.run(&tensors, &[], &[]);
    let narrow = folder.run(&tensors, &[], &["--output-type", "f16"]);
    assert_eq!((narrow.tensors["output"].0, narrow.tensors["lse"].0), (Dtype::F16, Dtype::F32));
    assert_close(narrow.values("output"), wide.values("output"), 2e-3);
    assert_close(narrow.values("lse"), wide.values("lse"), 1e-5);
}

#[test]
fn heads_may_stand_inside() {
    let folder = Folder::new();
    // one head and one token: both orders are the same bytes
    let tensors = [
        f32s("query", &[1, 3, 1, 4], wave(0.7)),
        f32s("key", &[1, 5, 1, 4], wave(1.3)),
        f32s("value", &[1, 5, 1, 4], wave(0.9)),
    ];
    let inside = folder.run(&tensors, &[("layout", "blhd")], &[]);
    assert_eq!((inside.shape("output"), inside.shape("lse")), (&[1, 3, 1, 4][..], &[1, 1, 3][..]));
    let turned: Vec<_> = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (*name, *dtype, vec![1, 1, shape[1], 4], bytes.clone()))
        .collect();
    let outside = folder.run(&turned, &[("layout", "blhd")], &["--layout", "bhld"]);
    assert_eq!(outside.shape("output"), [1, 1, 3, 4]);
    assert_eq!(inside.values("output"), outside.values("output"));
}

#[test]
fn flags_override_metadata() {
    let folder = Folder::new();
    let file = [("scale", "0.5"), ("causal", "top_left"), ("window_left", "1"), ("softcap", "3")];
    let asked = folder.run(&small(), &[("scale", "-0.25")], &[]);
    let flags = ["--scale", "-0.25", "--causal", "none", "--window_left", "-1", "--softcap", "0"];
    assert_eq!(folder.run(&small(), &file, &flags).values("output"), asked.values("output"));
    assert_ne!(folder.run(&small(), &file, &[]).values("output"), asked.values("output"));
}

#[test]
fn every_optional_tensor_is_taken() {
    let folder = Folder::new();
    let ints = |values: &[i32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
    let longs = |values: &[i64]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
    let mut tensors = small();
    tensors.extend([
        f16s("bias", &[4, 1, 5], wave(0.3)),
        ("mask", Dtype::BOOL, vec![3, 5], vec![1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1]),
        ("kv_lens", Dtype::I64, vec![2], longs(&[5, 0])),
        ("row_start", Dtype::I32, vec![2, 3], ints(&[0, -7, 1, 0, 0, 0])),
        ("row_end", Dtype::I32, vec![2, 3], ints(&[5, 5, 99, 5, 5, 5])),
        f32s("alibi_slopes", &[4], |head| 0.1 * head as f32),
        f32s("sinks", &[4], |head| head as f32 - 1.0),
    ]);
    let results = folder.run(&tensors, &[], &["--verify", "--probs"]);
    assert_close(&results.values("probs")[5..6], &[0.0], 0.0);
    // the second entry has no keys: zeros, and the sink alone in lse
    assert_close(&results.values("output")[72..], &[0.0; 72], 0.0);
    assert_close(&results.values("lse")[12..15], &[-1.0; 3], 1e-6);
}

#[test]
fn empty_tensors_are_no_error() {
    let folder = Folder::new();
    let empty = |query: [usize; 4], kv: [usize; 4]| {
        vec![f32s("query", &query, wave(1.0)), f32s("key", &kv, wave(1.0)), f32s("value", &kv, wave(1.0))]
    };
    let results = folder.run(&empty([2, 4, 3, 8], [2, 2, 0, 8]), &[], &["--probs"]);
    assert_close(results.values("output"), &[0.0; 192], 0.0);
    assert!(results.values("lse").iter().all(|lse| *lse == f32::NEG_INFINITY));
    assert_eq!(results.shape("probs"), [2, 4, 3, 0]);
    assert_eq!(folder.run(&empty([2, 4, 0, 8], [2, 2, 5, 8]), &[], &[]).shape("output"), [2, 4, 0, 8]);
    assert_eq!(folder.run(&empty([0, 4, 3, 8], [0, 2, 5, 8]), &[], &[]).shape("lse"), [0, 4, 3]);
}

#[test]
fn the_example_of_the_readme_runs() {
    let folder = Folder::new();
    let input = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/whisper.safetensors");
    let said = good(&["run", input, "-o", &folder.at("out"), "--device", "cpu", "--show", "--verify"]);
    let worst = said.lines().find(|line| line.contains("worst │")).unwrap();
    assert!(worst.ends_with("│ 3.80 s"), "{said}");
}

#[test]
fn a_bad_file_stops_no_other() {
    let folder = Folder::new();
    fs::create_dir(folder.at("in")).unwrap();
    folder.write("in/a.safetensors", &small(), &[]);
    let whole = folder.write("in/b.safetensors", &small(), &[]);
    folder.write("in/c.safetensors", &small()[..2], &[]);
    folder.write("in/d.safetensors", &small(), &[]);
    let bytes = fs::read(&whole).unwrap();
    fs::write(whole, &bytes[..bytes.len() - 1]).unwrap();
    let said = bad(&["run", &folder.at("in"), "-o", &folder.at("out"), "--device", "cpu"]);
    assert!(said.contains("b.safetensors: it is not a whole safetensors file"), "{said}");
    assert!(said.contains("c.safetensors: tensor value is missing"), "{said}");
    assert_eq!(folder.list("out"), ["a.safetensors", "d.safetensors"]);
    assert_eq!(Results::read(folder.at("out/a.safetensors")), Results::read(folder.at("out/d.safetensors")));
}

#[test]
fn a_failed_run_leaves_what_was_there() {
    let folder = Folder::new();
    let mut tensors = small();
    tensors.push(f32s("bias", &[3, 4], wave(1.0)));
    fs::create_dir(folder.at("out")).unwrap();
    // a result of before, which a run that goes well would replace
    let good_input = folder.write("in.safetensors", &small(), &[]);
    good(&["run", &good_input, "-o", &folder.at("out"), "--device", "cpu"]);
    let as_it_was = fs::read(folder.at("out/in.safetensors")).unwrap();
    let input = folder.write("in.safetensors", &tensors, &[]);
    let said = bad(&["run", &input, "-o", &folder.at("out"), "--device", "cpu"]);
    assert!(said.contains("bias has shape [1, 1, 3, 4], needs [2, 4, 3, 5]"), "{said}");
    assert!(fs::read(folder.at("out/in.safetensors")).unwrap() == as_it_was);
    assert_eq!(folder.list("out"), ["in.safetensors"]);
}

#[test]
fn refusals_say_what_is_wrong() {
    let folder = Folder::new();
    let input = folder.write("in.safetensors", &small(), &[]);
    let refused = |flags: &[&str]| {
        let out = folder.at("out.safetensors");
        let said = bad(&[&["run", &input, "-o", &out, "--device", "cpu"], flags].concat());
        assert!(!PathBuf::from(out).exists());
        said
    };
    assert!(refused(&["--layout", "blhd"]).contains("key has kv_heads 5, which does not divide q_heads 3"));
    assert!(refused(&["--causal", "top_left", "--offset", "fixed:2"]).contains("there is one diagonal"));
    assert!(refused(&["--kernel", "fused"]).contains("fused"));
    assert!(bad(&["run", &input, "-o", &input, "--device", "cpu"]).contains("is an input"));
    assert!(bad(&["run", &folder.at("gone"), "-o", &folder.at("x"), "--device", "cpu"]).contains("cannot read it"));
    fs::create_dir(folder.at("none")).unwrap();
    assert!(bad(&["run", &folder.at("none"), "-o", &folder.at("x")]).contains("holds no file named *.safetensors"));
    assert!(bad(&["run", &input, "-o", &format!("{input}/x")]).contains("the folder of the output"));
    assert!(bad(&["run", &input, "-o", &folder.at("x"), "--device", "no such adapter"]).contains("no such adapter"));
    for usage in [&["run", &input][..], &["run", &input, "-o", "x", "--scale", "big"], &["bench", "no_such_workload"]] {
        assert_eq!(program(usage).status.code(), Some(2), "{usage:?}");
    }
    let said = String::from_utf8(program(&["bench", "no_such_workload"]).stderr).unwrap();
    assert!(said.contains("whisper_decode"), "{said}");
}

#[test]
fn an_unknown_tensor_is_a_warning() {
    let folder = Folder::new();
    let mut tensors = small();
    tensors.push(f32s("labels", &[3], wave(1.0)));
    let input = folder.write("in.safetensors", &tensors, &[("producer", "somebody")]);
    let output = program(&["run", &input, "-o", &folder.at("out"), "--device", "cpu"]);
    assert!(output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("warning: ") && said.contains("tensor \"labels\""), "{said}");
    assert!(!said.contains("producer"), "{said}");
}

#[cfg(unix)]
#[test]
fn results_are_as_readable_as_other_files() {
    use std::os::unix::fs::PermissionsExt;
    let folder = Folder::new();
    folder.run(&small(), &[], &[]);
    let mode = |name: &str| fs::metadata(folder.at(name)).unwrap().permissions().mode();
    assert_eq!(mode("out.safetensors"), mode("in.safetensors"));
}

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
    assert!(refused("full/manifest.json", &[]).contains("cannot write into"));
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
fn a_map_is_a_picture() {
    let folder = Folder::new();
    let picture = |flags: &[&str]| {
        let output = folder.at("map.png");
        good(&[&["map", WHISPER, "--out", &output, "--device", "cpu"], flags].concat());
        let decoder = png::Decoder::new(std::io::Cursor::new(fs::read(output).unwrap()));
        let mut reader = decoder.read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!((info.color_type, info.bit_depth), (png::ColorType::Rgb, png::BitDepth::Eight));
        ([info.width as usize, info.height as usize], pixels)
    };
    // 535 keys of one pixel and 39 rows of twelve, and labels around them
    let ([width, height], pixels) = picture(&[]);
    assert!((600..900).contains(&width) && (468..600).contains(&height), "{width} x {height}");
    let shades: std::collections::HashSet<_> = pixels.as_chunks::<3>().0.iter().collect();
    assert!(shades.len() > 50, "only {} shades", shades.len());
    // the rows follow the sound: the brightest place moves to the right
    let brightness = |x: usize, y: usize| pixels[3 * (y * width + x)..][..3].iter().map(|&c| u32::from(c)).sum::<u32>();
    let left = (0..width).find(|&x| (24..height - 70).all(|y| brightness(x, y) < 700)).unwrap();
    let brightest = |y: usize| (left..left + 535).max_by_key(|&x| brightness(x, y)).unwrap() - left;
    let row = |n: usize| 14 + 8 + n * 12 + 6;
    assert!(brightest(row(3)) < brightest(row(12)) && brightest(row(12)) < brightest(row(34)));
    // a panel for each head
    let ([wide, high], _) = picture(&["--heads", "0-3", "--reduce", "none"]);
    assert!(wide > width && high > height, "{wide} x {high}");
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
    assert!(refused("x.gif", &[]).contains("name it .png or .csv"));
    assert!(refused("none/x.png", &[]).contains("cannot write"));
    assert_eq!(program(&["map", &input, "--out", "x.png", "--heads", "two"]).status.code(), Some(2));
    let list = folder.list(".");
    assert_eq!(list, ["in.safetensors"]);
}
