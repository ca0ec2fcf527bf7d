//! `run --backward`: gradients of files, in the shapes of their inputs; what `bench` and `explain` say of the backward.

use std::path::Path;

use safetensors::tensor::Dtype;

use crate::{Folder, Results, Tensor, assert_close, bad, f16s, f32s, good, program, small, wave};

fn with_gradient(more: &[Tensor]) -> Vec<Tensor> {
    [&small()[..], &[f32s("d_output", &[2, 4, 3, 6], wave(1.1))], more].concat()
}

#[test]
fn gradients_of_others_files() {
    let folder = Folder::new();
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/backward");
    let cases = cases.to_str().unwrap();
    let out = folder.at("out");
    good(&["run", cases, "-o", &out, "--backward", "--device", "cpu", "--verify", "--quiet"]);
    assert_eq!(folder.list("out").len(), 31);
    for name in folder.list("out") {
        let (want, got) = (std::fs::read(format!("{cases}/{name}")).unwrap(), Results::read(folder.at("out/") + &name));
        let want = safetensors::SafeTensors::deserialize(&want).unwrap();
        for (expected, view) in want.iter().filter(|(name, _)| name.starts_with("expected_")) {
            let gradient = expected.trim_start_matches("expected_");
            assert_eq!(got.shape(gradient), view.shape(), "{name}: {gradient}");
        }
        let beside = got.tensors.len() - 2;
        assert_eq!(beside, want.names().iter().filter(|name| name.starts_with("expected_")).count(), "{name}");
    }
}

#[test]
fn gradients_have_the_shapes_of_their_inputs() {
    let folder = Folder::new();
    let bias = f32s("bias", &[3, 5], wave(0.3));
    let plain = folder.run(&with_gradient(std::slice::from_ref(&bias)), &[], &["--backward", "--verify"]);
    assert_eq!(plain.shape("d_query"), [2, 4, 3, 8]);
    assert_eq!(plain.shape("d_bias"), [3, 5]);
    // the same with heads inside, and the gradient of the log-sum-exp of nothing
    let turned = |name: &'static str, [b, h, l, d]: [usize; 4], step: f32| {
        f32s(name, &[b, l, h, d], move |n| {
            let [entry, token, head, column] = [n / (l * h * d), n / (h * d) % l, n / d % h, n % d];
            wave(step)(((entry * h + head) * l + token) * d + column)
        })
    };
    let inside = [
        turned("query", [2, 4, 3, 8], 0.7),
        turned("key", [2, 2, 5, 8], 1.3),
        turned("value", [2, 2, 5, 6], 0.9),
        turned("d_output", [2, 4, 3, 6], 1.1),
        f32s("d_lse", &[2, 4, 3], |_| 0.0),
        bias,
    ];
    let inside = folder.run(&inside, &[("layout", "blhd")], &["--backward", "--verify"]);
    assert_eq!(inside.shape("d_key"), [2, 5, 2, 8]);
    assert_close(inside.values("d_bias"), plain.values("d_bias"), 1e-5);
    for (b, l, h, d) in [(1, 4, 1, 7), (0, 2, 1, 0)] {
        let [inside, plain] = [
            inside.values("d_key")[((b * 5 + l) * 2 + h) * 8 + d],
            plain.values("d_key")[((b * 2 + h) * 5 + l) * 8 + d],
        ];
        assert_close(&[inside], &[plain], 1e-5);
    }
    // f16 in, f32 out; a batch that shares its keys has one gradient of them
    let shared = [
        small()[0].clone(),
        f16s("key", &[1, 2, 5, 8], wave(1.3)),
        f16s("value", &[1, 2, 5, 6], wave(0.9)),
        f16s("d_output", &[2, 4, 3, 6], wave(1.1)),
    ];
    let shared = folder.run(&shared, &[], &["--backward", "--verify"]);
    assert_eq!((shared.shape("d_key"), shared.tensors["d_key"].0), (&[1, 2, 5, 8][..], Dtype::F32));
    // a result may be replaced by another
    good(&["run", &folder.at("in.safetensors"), "-o", &folder.at("out.safetensors"), "--backward", "--device", "cpu"]);
    // by the oracle the same
    let by_oracle = folder.at("oracle.safetensors");
    good(&["run", &folder.at("in.safetensors"), "-o", &by_oracle, "--backward", "--device", "oracle"]);
    assert_close(Results::read(&by_oracle).values("d_key"), shared.values("d_key"), 1e-5);
}

#[test]
fn a_rounded_output_does_not_reach_the_gradients() {
    let folder = Folder::new();
    let tensors = with_gradient(&[]);
    let (full, half) = (
        folder.run(&tensors, &[], &["--backward"]),
        folder.run(&tensors, &[], &["--backward", "--output-type", "f16", "--verify"]),
    );
    assert_eq!(half.tensors["output"].0, Dtype::F16);
    for name in ["d_query", "d_key", "d_value"] {
        assert_eq!(half.tensors[name], full.tensors[name], "{name}");
    }
    // the same output as without gradients
    let alone = folder.run(&small(), &[], &["--output-type", "f16"]);
    assert_eq!(alone.tensors["output"], half.tensors["output"]);
}

#[test]
fn what_has_no_gradient_is_named() {
    let folder = Folder::new();
    let i8s = |name: &'static str, shape: &[usize]| -> Tensor {
        (name, Dtype::I8, shape.to_vec(), (0u8..=255).cycle().step_by(7).take(shape.iter().product()).collect())
    };
    let stored = [
        small()[0].clone(),
        i8s("key", &[2, 2, 5, 8]),
        i8s("value", &[2, 2, 5, 6]),
        f32s("key_scale", &[2, 2, 5, 1], |_| 0.01),
        f32s("value_scale", &[2, 2, 5, 1], |_| 0.01),
        f32s("d_output", &[2, 4, 3, 6], wave(1.1)),
    ];
    let (input, output) = (folder.write("in.safetensors", &stored, &[]), folder.at("out.safetensors"));
    for command in [
        &["run", &input, "-o", &output, "--backward", "--device", "cpu"][..],
        &["explain", &input, "--backward", "--device", "cpu"],
    ] {
        let told = program(command);
        let said = String::from_utf8_lossy(&told.stderr);
        assert!(told.status.success() && said.contains("no d_key, d_value"), "{command:?}: {said}");
    }
    let names: Vec<_> = Results::read(&output).tensors.into_keys().filter(|name| name.starts_with("d_")).collect();
    assert_eq!(names, ["d_query"]);
}

#[test]
fn a_file_is_explained_as_it_is_run() {
    let folder = Folder::new();
    let explained = |tensors: &[Tensor]| {
        let input = folder.write("in.safetensors", tensors, &[]);
        program(&["explain", &input, "--backward", "--device", "cpu"])
    };
    let told = explained(&with_gradient(&[f32s("d_lse", &[2, 4, 3], |_| 1.0)]));
    assert!(told.status.success() && told.stderr.is_empty(), "{}", String::from_utf8_lossy(&told.stderr));
    let told = explained(&small());
    assert!(!told.status.success() && String::from_utf8_lossy(&told.stderr).contains("d_output is missing"));
    // shapes are told as the file has them
    let turned = [
        f32s("query", &[2, 3, 4, 8], wave(0.7)),
        f32s("key", &[2, 5, 2, 8], wave(1.3)),
        f32s("value", &[2, 5, 2, 6], wave(0.9)),
        f32s("d_output", &[2, 4, 3, 6], wave(1.1)),
    ];
    let input = folder.write("turned.safetensors", &turned, &[("layout", "blhd")]);
    let said = bad(&["run", &input, "-o", &folder.at("x"), "--backward", "--device", "cpu"]);
    assert!(said.contains("d_output has shape [2, 4, 3, 6], needs [2, 3, 4, 6]"), "{said}");
    // a slip of the pen
    let slip = [&small()[..], &[f32s("d_outputs", &[2, 4, 3, 6], wave(1.1))]].concat();
    let input = folder.write("slip.safetensors", &slip, &[]);
    let said = bad(&["run", &input, "-o", &folder.at("y.safetensors"), "--device", "cpu", "--backward"]);
    assert!(said.contains("is d_output meant?"), "{said}");
    let input = folder.write("in.safetensors", &with_gradient(&[]), &[]);
    for command in ["explain", "bench"] {
        let file: &[&str] = if command == "bench" { &["--file", &input] } else { &[&input] };
        let said = bad(&[&[command, "--backward", "--output-type", "f16", "--device", "cpu"], file].concat());
        assert!(said.contains("leave --output-type out"), "{said}");
    }
}

#[test]
fn what_is_missing_or_does_not_fit_is_told() {
    let folder = Folder::new();
    let refused = |tensors: &[Tensor]| {
        let (input, output) = (folder.write("bad.safetensors", tensors, &[]), folder.at("none.safetensors"));
        let said = bad(&["run", &input, "-o", &output, "--backward", "--device", "cpu"]);
        assert!(!Path::new(&output).exists(), "{said}");
        said
    };
    let said = refused(&small());
    assert!(said.contains("d_output is missing"), "{said}");
    let wrong = [&small()[..], &[f32s("d_output", &[2, 4, 3, 5], |_| 1.0)]].concat();
    let said = refused(&wrong);
    assert!(said.contains("d_output has shape [2, 4, 3, 5], needs [2, 4, 3, 6]"), "{said}");
    let flat = [&small()[..], &[f32s("d_output", &[24, 6], |_| 1.0)]].concat();
    let said = refused(&flat);
    assert!(said.contains("d_output") && said.contains("4 axes"), "{said}");
    let said = refused(&with_gradient(&[f32s("d_lse", &[2, 12], |_| 1.0)]));
    assert!(said.contains("d_lse") && said.contains("[2, 4, 3]"), "{said}");
    // without the flag it is told that the tensor means nothing
    let input = folder.write("in.safetensors", &with_gradient(&[]), &[]);
    let output = program(&["run", &input, "-o", &folder.at("x"), "--device", "cpu"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.contains("\"d_output\" is not one of attention's"), "{said}");
}

#[test]
fn the_backward_is_timed_and_explained() {
    let said = good(&["bench", "whisper_decode", "--backward", "--device", "cpu", "--seconds", "0", "--json"]);
    let row: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    assert_eq!(row["kernel"], "cpu_backward");
    assert!(row["median_ms"].as_f64().unwrap() > 0.0 && row.get("error").is_none(), "{said}");
    // the CPU's plan is made together with its memory, which is no time of a plan
    assert!(row["plan_us"].is_null() && row["prepare_ms"].is_number(), "{said}");
    let shape = ["--q-heads", "8", "--q-len", "4096", "--kv-len", "77", "--head-dim", "40"];
    // a matrix that is returned has no gradient, and is not dropped without a word
    for returned in [&["--probs"][..], &["--scores", "masked"]] {
        let usage = program(&[&["explain", "--backward", "--device", "cpu"], &shape[..], returned].concat());
        assert_eq!(usage.status.code(), Some(2), "{returned:?}");
    }
    for stage in ["scaled", "capped", "masked"] {
        let said = good(&[&["explain", "--device", "cpu", "--scores", stage], &shape[..]].concat());
        assert!(said.contains(&format!("returns scores_{stage}")), "{said}");
    }
    let said = good(&[&["explain", "--backward", "--device", "cpu"], &shape[..]].concat());
    assert!(said.contains("cpu_backward, many queries") && said.contains("rows in 4 parts"), "{said}");
}
