//! `run`: a file in, a file out, on the CPU.

use std::fs;
use std::path::PathBuf;

use safetensors::tensor::Dtype;

use super::{Folder, Results, assert_close, bad, f16s, f32s, good, program, small, wave};

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
    assert!(said.contains("─┐ most at") && said.contains("mean of heads 0-3 of 4, batch entry 0 of 2"), "{said}");
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
