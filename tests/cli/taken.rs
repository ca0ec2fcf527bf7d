//! What a file or a flag may say, and what is refused with a word about it.

use safetensors::Dtype;

use super::{Folder, Results, Tensor, assert_close, bad, f32s, good, program, small, wave};

fn bools(name: &'static str, shape: &[usize]) -> Tensor {
    (name, Dtype::BOOL, shape.to_vec(), vec![1; shape.iter().product()])
}

/// The program's refusal of a wrong call.
fn usage(args: &[&str]) -> String {
    let output = program(args);
    assert_eq!(output.status.code(), Some(2), "{args:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_mask_of_any_length_is_padded_where_that_is_asked_for() {
    let folder = Folder::new();
    let with = |name, keys| {
        let pair = if name == "mask" { bools(name, &[3, keys]) } else { f32s(name, &[1, 4, 3, keys], |_| 0.0) };
        [small(), vec![pair]].concat()
    };
    let visible = |keys: u32| {
        let lens = ("kv_lens", Dtype::I32, vec![2], [keys.to_le_bytes(); 2].concat());
        folder.run(&[small(), vec![lens]].concat(), &[], &[])
    };
    for name in ["mask", "bias"] {
        for keys in [0, 1, 3] {
            let found = folder.run(&with(name, keys), &[], &["--pad-mask", "--verify"]);
            let wanted = visible(u32::try_from(keys).unwrap());
            // the same keys in the same arithmetic, summed in another order at most; rows without any are not finite
            let finite = |found: &Results| found.values("lse").iter().map(|lse| lse.max(-99.0)).collect::<Vec<_>>();
            assert_close(&finite(&found), &finite(&wanted), 2e-6);
            assert_close(found.values("output"), wanted.values("output"), 4e-6);
        }
        // one that is for one key and not padded is for all
        assert_close(folder.run(&with(name, 1), &[], &[]).values("lse"), visible(5).values("lse"), 2e-6);
    }
    let input = folder.write("in.safetensors", &with("mask", 0), &[]);
    assert!(bad(&["run", &input, "-o", &folder.at("no"), "--device", "cpu"]).contains("--pad-mask hides"));
}

#[test]
fn every_form_is_converted() {
    let folder = Folder::new();
    let parts = |q: &[usize], kv: &[usize]| {
        vec![f32s("query", q, wave(0.7)), f32s("key", kv, wave(1.3)), f32s("value", kv, wave(0.9))]
    };
    let past = |name, step| f32s(name, &[2, 2, 3, 8], wave(step));
    let files: [(&str, Vec<Tensor>, &[&str]); 7] = [
        ("five axes", vec![f32s("qkv", &[2, 5, 3, 4, 8], wave(0.7))], &[]),
        ("rows", vec![f32s("qkv", &[2, 5, 64], wave(0.7))], &["--q-heads", "4", "--kv-heads", "2"]),
        ("kv", vec![small()[0].clone(), f32s("kv", &[2, 7, 2, 2, 8], wave(1.3))], &[]),
        (
            "three axes",
            [parts(&[2, 5, 32], &[2, 7, 16]), vec![f32s("d_output", &[2, 5, 32], wave(0.3))]].concat(),
            &["--q-heads", "4", "--kv-heads", "2"],
        ),
        (
            "past",
            [parts(&[2, 4, 5, 8], &[2, 2, 7, 8]), vec![past("past_key", 0.2), past("past_value", 0.4)]].concat(),
            &[],
        ),
        ("short", [parts(&[2, 4, 5, 8], &[2, 2, 7, 8]), vec![bools("mask", &[5, 4])]].concat(), &["--pad-mask"]),
        ("shared", parts(&[2, 4, 5, 8], &[1, 2, 7, 8]), &[]),
    ];
    for (name, tensors, flags) in files {
        let wanted = folder.run(&tensors, &[], flags);
        let input = folder.at("in.safetensors");
        for (more, most) in [(&[][..], 0.0), (&["--pages", "4"], 1e-6), (&["--kv", "int8", "--pages", "4"], 0.1)] {
            let (converted, result) = (folder.at("converted.safetensors"), folder.at("result.safetensors"));
            let said = good(&[&["convert", &input, "-o", &converted], flags, more].concat());
            assert!(said.contains("  output: off by "), "{name}: {said}");
            good(&["run", &converted, "-o", &result, "--device", "cpu", "--verify"]);
            let found = Results::read(&result);
            assert_close(found.values("lse"), wanted.values("lse"), most);
            if name == "short" {
                continue;
            }
            if more.is_empty() {
                assert_eq!(Results::read(&converted).shape("query").len(), 4, "{name}");
            }
            assert_eq!(found.shape("output").len(), 4, "{name}");
        }
        // a gradient lies as the output does
        if name == "three axes" {
            good(&[&["convert", &input, "-o", &folder.at("back.safetensors")], flags].concat());
            let back = ["run", &folder.at("back.safetensors"), "-o", &folder.at("d.safetensors"), "--device", "cpu"];
            good(&[&back[..], &["--backward"]].concat());
            let joined = folder.run(&tensors, &[], &[flags, &["--backward"]].concat());
            let sum = |values: &[f32]| values.iter().map(|value| f64::from(*value).abs()).sum::<f64>();
            let (found, wanted) = (Results::read(folder.at("d.safetensors")), sum(joined.values("d_key")));
            assert!((sum(found.values("d_key")) / wanted - 1.0).abs() < 1e-5, "{wanted}");
        }
    }
}

#[test]
fn a_file_that_cannot_be_converted_leaves_none() {
    let folder = Folder::new();
    let lens = ("kv_lens", Dtype::I32, vec![2], [9i32.to_le_bytes(); 2].concat());
    let input = folder.write("in.safetensors", &[small(), vec![lens]].concat(), &[]);
    let said = bad(&["convert", &input, "-o", &folder.at("new"), "--kv", "f16"]);
    assert!(said.contains("in.safetensors: kv_lens[0] is 9"), "{said}");
    assert_eq!(folder.list("."), ["in.safetensors"]);
    let bytes = |name, width| (name, Dtype::I8, vec![2, 2, 5, width], vec![1; 20 * width]);
    let scale = |name| f32s(name, &[2, 2, 5, 1], |_| 0.5);
    let stored = [small()[0].clone(), bytes("key", 8), bytes("value", 6), scale("key_scale"), scale("value_scale")];
    let wanted = folder.run(&stored, &[], &[]);
    let input = folder.at("in.safetensors");
    let said = bad(&["convert", &input, "-o", &folder.at("new"), "--kv", "f16"]);
    assert!(said.contains("key is stored as I8 already") && said.contains("without them"), "{said}");
    // another format alone
    good(&["convert", &input, "-o", &folder.at("new.npz")]);
    good(&["run", &folder.at("new.npz"), "-o", &folder.at("out.safetensors"), "--device", "cpu"]);
    assert_eq!(Results::read(folder.at("out.safetensors")).values("output"), wanted.values("output"));
}

#[test]
fn a_flag_that_would_do_nothing_is_refused() {
    let folder = Folder::new();
    let joined = [f32s("query", &[1, 3, 16], wave(0.7)), f32s("kv", &[1, 5, 32], wave(0.9))];
    let input = folder.write("in.safetensors", &joined, &[]);
    let run = ["run", &input, "-o", &folder.at("out"), "--device", "cpu", "--q-heads", "2"];
    let said = bad(&[&run[..], &["--layout", "blhd"]].concat());
    assert!(said.contains("--layout is the order of tensors of 4 axes, and query, kv has"), "{said}");
    let input = folder.write("packed.safetensors", &[f32s("qkv", &[1, 5, 3, 2, 8], wave(0.7))], &[]);
    let run = ["run", &input, "-o", &folder.at("out"), "--device", "cpu"];
    assert!(bad(&[&run[..], &["--layout", "bhld"]].concat()).contains("and qkv has an order of its own"));
    good(&[&run[..], &["--layout", "blhd"]].concat());

    let map = ["map", &input, "-o", &folder.at("map.png"), "--device", "cpu", "--scale-each"];
    assert!(bad(&map).contains("say --reduce none too"));
    good(&[&map[..], &["--reduce", "none"]].concat());
    let shape = ["shaders", "--q-heads", "2", "--q-len", "8", "--kv-len", "16", "--head-dim", "8", "-o"];
    let said = usage(&[&shape[..], &[&folder.at("s"), "--subgroup-size", "3"]].concat());
    assert!(said.contains("needs a power of two from 4 to 128"), "{said}");
    assert!(usage(&[&run[..], &["--scale", ""]].concat()).contains("needs a finite number, or none"));
    let empty = folder.write("empty.safetensors", &small(), &[("pad_mask", "")]);
    assert!(bad(&["run", &empty, "-o", &folder.at("out")]).contains("option pad_mask is \"\", needs true or false"));
}

#[test]
fn parts_that_contradict_themselves_are_refused() {
    let folder = Folder::new();
    let rows = |name, value: f32| f32s(name, &[1, 1, 4], move |_| value);
    let part = |lse, max, sum| {
        vec![f32s("output", &[1, 1, 4, 1], |_| 1.0), rows("lse", lse), rows("row_max", max), rows("row_sum", sum)]
    };
    let whole = folder.write("0", &part(0.0, 0.0, 1.0), &[]);
    let merged = |second: &[Tensor]| {
        let other = folder.write("1", second, &[]);
        program(&["merge", &whole, &other, "-o", &folder.at("out"), "-q"])
    };
    let refused = |second: &[Tensor]| {
        let output = merged(second);
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(
        refused(&part(5.0, 0.0, 1.0)).contains("lse[0, 0, 0] is 5, and row_max 0 with row_sum 1 there say something")
    );
    assert!(
        refused(&part(0.0, 0.0, -1.0)).contains("row_sum of part 1 is -1 in row 0, needs a finite number from 0 on")
    );
    assert!(refused(&part(0.0, 0.0, 1.0)[..3]).contains("row_max is there without row_sum"));
    let halves = super::f16s("lse", &[1, 1, 4], |_| 0.0);
    assert!(refused(&[part(0.0, 0.0, 1.0)[0].clone(), halves]).contains("lse has element type F16, possible: F32"));
    // rounded, without a key, and without a number
    for (lse, max, sum) in
        [(1e4 + 2f32.ln(), 1e4, 2.0), (f32::NEG_INFINITY, f32::NEG_INFINITY, 0.0), (f32::NAN, f32::NAN, f32::NAN)]
    {
        assert!(merged(&part(lse, max, sum)).status.success(), "{lse}");
    }
}

#[test]
fn a_kernel_has_one_name() {
    let row = |args: &[&str]| -> serde_json::Value { serde_json::from_str(&good(args)).unwrap() };
    let shape = ["--q-heads", "8", "--q-len", "64", "--kv-len", "77", "--head-dim", "40", "--device", "cpu"];
    let name = row(&[&["explain", "--json"], &shape[..]].concat())["kernel"].as_str().unwrap().to_owned();
    let output = program(&["doctor", "--part", "cpu", "--seconds", "0"]);
    let said = String::from_utf8(output.stdout).unwrap();
    let line = said.lines().find(|line| line.contains("\"Kernels\"")).unwrap();
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    for kernel in line["Kernels"].as_array().unwrap() {
        assert!(kernel["kernel"] == name && kernel["strategy"].is_string(), "{kernel}");
    }
}

#[test]
fn what_is_wrong_is_told_with_what_would_do() {
    let folder = Folder::new();
    let input = folder.write("in.safetensors", &small(), &[]);
    let (empty, file) = (folder.at("empty.npz"), folder.at("file.npz"));
    for text in ["", "text before an archive PK"] {
        std::fs::write(&empty, text).unwrap();
        for call in [&["run", &empty, "-o", &folder.at("out")][..], &["explain", &empty]] {
            let said = bad(call);
            assert!(said.contains("not a whole .npz file: it does not start as a zip archive does, with PK"), "{said}");
        }
    }
    // as bzip2, by what both of its lists say
    let mut packed = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/numpy/small.npz")).unwrap();
    for n in 0..packed.len() - 12 {
        match packed[n..n + 4] {
            [b'P', b'K', 3, 4] => packed[n + 8] = 12,
            [b'P', b'K', 1, 2] => packed[n + 10] = 12,
            _ => {}
        }
    }
    std::fs::write(&file, packed).unwrap();
    let said = bad(&["run", &file, "-o", &folder.at("out"), "--device", "cpu"]);
    assert!(said.contains("possible: stored and deflated, as numpy.savez"), "{said}");
    std::fs::write(&file, "text").unwrap();
    let shape = ["--q-heads", "1", "--q-len", "1", "--kv-len", "1", "--head-dim", "8"];
    for call in [&[&["shaders", "-o", &file], &shape[..]].concat()[..], &["man", "-o", &file]] {
        assert!(bad(call).contains("file.npz is a file; name a folder to write into"));
    }
    let said = bad(&["explain", &input, "--backward", "--device", "cpu"]);
    assert!(said.contains("in.safetensors: tensor d_output is missing"), "{said}");
    for (call, wanted) in [
        (&["bench", "qformer", "--seconds", "-1"][..], "needs a number of seconds from 0"),
        (&["map", &input, "-o", "x.png", "--rows", "-1"], "needs numbers and ranges such as 0-4,7"),
        (&["map", &input, "-o", "x.png", "--batch", "-1"], "invalid value '-1'"),
        (&["run", &input, "-o", "x", "--softcap", "-1"], "needs a finite number above 0, or 0 or none for no cap"),
    ] {
        let said = usage(call);
        assert!(said.contains(wanted) && !said.contains("-- -1"), "{said}");
    }
    let help = good(&["run", "--help"]);
    assert!(help.split_whitespace().collect::<Vec<_>>().join(" ").contains("at kv_lens[b] - q_lens[b]"), "{help}");
}
