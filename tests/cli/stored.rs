//! Keys and values in other formats: what `run` takes, what `convert` writes, what `explain` says of them.

use safetensors::tensor::Dtype;

use crate::{Folder, Results, Tensor, bad, f16s, f32s, good, small, wave};

fn bytes(name: &'static str, shape: &[usize], value: impl Fn(usize) -> i8) -> Tensor {
    let bytes = (0..shape.iter().product()).map(|index| value(index).cast_unsigned()).collect();
    (name, Dtype::I8, shape.to_vec(), bytes)
}

fn i32s(name: &'static str, shape: &[usize], values: &[i32]) -> Tensor {
    (name, Dtype::I32, shape.to_vec(), values.iter().flat_map(|value| value.to_le_bytes()).collect())
}

fn bf16s(name: &'static str, shape: &[usize], value: impl Fn(usize) -> f32) -> Tensor {
    let bytes = |index| cross_attention::bf16::from_f32(value(index)).to_le_bytes();
    (name, Dtype::BF16, shape.to_vec(), (0..shape.iter().product()).flat_map(bytes).collect())
}

fn near(a: &Results, b: &Results, most: f32) {
    let [a, b] = [a, b].map(|results| &results.tensors["output"].2);
    assert_eq!(a.len(), b.len());
    let off = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
    assert!(off <= most, "off by {off}");
}

#[test]
fn bf16_goes_in_and_out() {
    let folder = Folder::new();
    let f32 = folder.run(&small(), &[], &["--verify"]);
    let tensors = [
        bf16s("query", &[2, 4, 3, 8], wave(0.7)),
        bf16s("key", &[2, 2, 5, 8], wave(1.3)),
        bf16s("value", &[2, 2, 5, 6], wave(0.9)),
        bf16s("bias", &[3, 5], |_| 0.5),
    ];
    let result = folder.run(&tensors, &[], &["--verify", "--output-type", "bf16"]);
    assert_eq!(result.tensors["output"].0, Dtype::BF16);
    near(&f32, &result, 0.1);
}

/// A number from -128 to 127 for each place.
fn byte(n: usize) -> i8 {
    u8::try_from(n * 37 % 255).unwrap_or(0).cast_signed()
}

#[test]
fn bytes_need_scales() {
    let folder = Folder::new();
    let key = bytes("key", &[2, 2, 5, 8], byte);
    let with = |more: &[Tensor]| [&[small()[0].clone(), key.clone(), small()[2].clone()], more].concat();
    let scale = |shape: &[usize]| f32s("key_scale", shape, |n| 0.01 + n as f32 * 1e-4);
    let result = folder.run(&with(&[scale(&[2, 2, 5, 4])]), &[], &["--verify"]);
    // the same numbers in f32
    let expanded = |n: usize| {
        let scale = 0.01 + (n / 2) as f32 * 1e-4;
        f32::from(byte(n)) * scale
    };
    let same = [small()[0].clone(), f32s("key", &[2, 2, 5, 8], expanded), small()[2].clone()];
    near(&result, &folder.run(&same, &[], &[]), 1e-5);
    folder.run(&with(&[f16s("key_scale", &[1, 2, 5, 1], |_| 0.01)]), &[], &[]);

    let refused = |tensors: &[Tensor]| {
        let input = folder.write("bad.safetensors", tensors, &[]);
        let said = bad(&["run", &input, "-o", &folder.at("no.safetensors"), "--device", "cpu"]);
        assert!(!std::path::Path::new(&folder.at("no.safetensors")).exists());
        said
    };
    let said = refused(&with(&[]));
    assert!(said.contains("key holds i8 and needs key_scale"), "{said}");
    let said = refused(&with(&[scale(&[2, 2, 5, 3])]));
    assert!(said.contains("key_scale has 3 blocks a row, which does not divide the width of 8"), "{said}");
    let said = refused(&with(&[scale(&[2, 2, 4, 4])]));
    assert!(said.contains("key_scale has shape [2, 2, 4, 4], needs [2, 2, 5, 4] (batch may also be 1)"), "{said}");
    let said = refused(&[small(), vec![scale(&[2, 2, 5, 4])]].concat());
    assert!(said.contains("key_scale is given, but key holds f32; only i8 has scales"), "{said}");
    let said = refused(&[vec![bytes("query", &[2, 4, 3, 8], |_| 1)], small()[1..].to_vec()].concat());
    assert!(said.contains("query has element type I8, possible: F32, F16, BF16"), "{said}");
}

#[test]
fn pages_are_found_by_a_table() {
    let folder = Folder::new();
    // two entries of three pages of two tokens each; the last page of each holds one
    let pages = |name, width: usize, step| f32s(name, &[7, 2, 2, width], wave(step));
    let with = |table: &[i32]| {
        let tensors = [small()[0].clone(), pages("key", 8, 1.3), pages("value", 6, 0.9)];
        let more = [i32s("block_table", &[2, 3], table), i32s("kv_lens", &[2], &[5, 3])];
        [&tensors[..], &more[..]].concat()
    };
    // behind the second page of the second entry nothing is looked at
    let table = [4, 0, 6, 2, 5, -1];
    let result = folder.run(&with(&table), &[], &["--verify"]);
    let flat = |name, width: usize, step: f32| {
        f32s(name, &[2, 2, 6, width], move |n| {
            let [b, h, j, d] = [n / (12 * width), n / (6 * width) % 2, n / width % 6, n % width];
            let page = usize::try_from(table[b * 3 + j / 2]).unwrap_or(0);
            wave(step)(((page * 2 + h) * 2 + j % 2) * width + d)
        })
    };
    let tensors = [small()[0].clone(), flat("key", 8, 1.3), flat("value", 6, 0.9), i32s("kv_lens", &[2], &[5, 3])];
    near(&result, &folder.run(&tensors, &[], &[]), 1e-6);

    let refused = |tensors: &[Tensor]| {
        let input = folder.write("bad.safetensors", tensors, &[]);
        bad(&["run", &input, "-o", &folder.at("no.safetensors"), "--device", "cpu"])
    };
    let said = refused(&with(&[4, 0, 7, 2, 5, -1]));
    assert!(said.contains("block_table[0][2] is 7, there are 7 pages, counted from 0"), "{said}");
    let said = refused(&with(&[4, 0, 6, -2, 5, -1]));
    assert!(said.contains("block_table[1][0] is -2"), "{said}");
    let mut odd = with(&table);
    odd[3] = i32s("block_table", &[1, 6], &[0; 6]);
    let said = refused(&odd);
    assert!(said.contains("block_table has shape [1, 6], needs [batch, pages of an entry] = [2, any]"), "{said}");
}

#[test]
fn a_file_is_converted_at_a_stated_cost() {
    let folder = Folder::new();
    let wide = [
        f32s("query", &[2, 4, 3, 64], wave(0.7)),
        f32s("key", &[1, 2, 21, 64], wave(1.3)),
        f32s("value", &[1, 2, 21, 32], wave(0.9)),
        f32s("alibi_slopes", &[4], |_| 0.25),
    ];
    let options = [("causal", "end_of_keys"), ("scale", "0.05")];
    let plain = folder.run(&wide, &options, &[]);
    let input = folder.write("wide.safetensors", &wide, &options);
    let output = folder.at("small.safetensors");
    for (flags, most) in [
        (&["--kv", "bf16"][..], 0.05),
        (&["--kv", "int8"], 0.05),
        (&["--kv", "int8_32"], 0.05),
        (&["--pages", "8"], 1e-6),
        (&["--kv", "int8_32", "--pages", "16"], 0.05),
    ] {
        let said = good(&[&["convert", &input, "-o", &output], flags].concat());
        assert!(said.contains("  key: off by ") && said.contains("  output: off by "), "{said}");
        let result = folder.at("result.safetensors");
        good(&["run", &output, "-o", &result, "--device", "cpu", "--verify"]);
        near(&plain, &Results::read(&result), most);
        let said = good(&["explain", &output, "--device", "cpu"]);
        assert!(said.contains("bytes of keys and values"), "{said}");
    }
    let said = bad(&["convert", &output, "-o", &folder.at("again.safetensors"), "--kv", "f16"]);
    assert!(said.contains("stored as pages already"), "{said}");
    let said = bad(&["convert", &input, "-o", &input, "--kv", "f16"]);
    assert!(said.contains("not a file that this program converted"), "{said}");
    let narrow = folder.write("narrow.safetensors", &small(), &[("causal", "bottom_right")]);
    let said = bad(&["convert", &narrow, "-o", &output, "--kv", "int8_32"]);
    assert!(said.contains("rows of 8 columns are no whole blocks of 32; --kv int8"), "{said}");
    let said = bad(&["convert", &narrow, "-o", &output, "--pages", "4"]);
    assert!(said.contains("5 keys do not fill pages of 4") && said.contains("end_of_keys"), "{said}");
    let said = bad(&["convert", &narrow, "-o", &output, "--pages", "3"]);
    assert!(said.contains("page_len is 3") || said.contains("pages of 3"), "{said}");
}

#[test]
fn shapes_are_planned_and_timed_as_they_are_stored() {
    let shape = ["--q-heads", "2", "--q-len", "1", "--kv-len", "100", "--head-dim", "64", "--device", "cpu"];
    let bytes = |flags: &[&str]| -> u64 {
        let said = good(&[&["explain"], &shape[..], flags].concat());
        let line = said.lines().find(|line| line.starts_with("kv_bytes")).unwrap().to_owned();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let f32 = 2 * 2 * 100 * 64 * 4;
    assert_eq!(bytes(&[]), f32);
    assert_eq!(bytes(&["--kv", "bf16"]), f32 / 2);
    assert_eq!(bytes(&["--kv", "int8"]), f32 / 4 + 2 * 2 * 100 * 4);
    assert_eq!(bytes(&["--kv", "int8_32"]), f32 / 4 + 2 * 2 * 100 * 2 * 2);
    assert_eq!(bytes(&["--pages", "16"]), f32 + 7 * 4);
    let said =
        good(&["bench", "sd15_8", "--kv", "int8_32", "--pages", "16", "--seconds", "0", "--device", "cpu", "--json"]);
    assert!(said.contains("\"kv\":\"int8_32\"") && said.contains("\"page_len\":16"), "{said}");
}
