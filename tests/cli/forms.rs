//! Tensors in other forms, score matrices, keys of before, and parts that are merged.

use safetensors::Dtype;

use super::{Folder, Results, Tensor, assert_close, bad, f16s, f32s, good, small, wave};

/// Numbers of a tensor `[batch, heads, len, dim]`, where each is known by its place.
fn at([b, h, i, d]: [usize; 4]) -> f32 {
    wave(0.7)(((b * 11 + h) * 13 + i) * 17 + d)
}

/// A tensor of that shape, in the order of the axes that `order` puts first.
fn laid(
    name: &'static str,
    [batch, heads, len, dim]: [usize; 4],
    inside: bool,
    value: impl Fn([usize; 4]) -> f32,
) -> Tensor {
    if inside {
        let place = |n: usize| [n / dim / heads / len, n / dim % heads, n / dim / heads % len, n % dim];
        f32s(name, &[batch, len, heads, dim], |n| value(place(n)))
    } else {
        let place = |n: usize| [n / dim / len / heads, n / dim / len % heads, n / dim % len, n % dim];
        f32s(name, &[batch, heads, len, dim], |n| value(place(n)))
    }
}

fn of(shift: usize) -> impl Fn([usize; 4]) -> f32 {
    move |[b, h, i, d]| at([b, h + 3 * shift, i + 5 * shift, d])
}

/// The same bytes with other axes.
fn shaped(name: &'static str, (_, dtype, _, bytes): Tensor, shape: &[usize]) -> Tensor {
    (name, dtype, shape.to_vec(), bytes)
}

/// Rows of `[batch, len, ..]` side by side.
fn beside(name: &'static str, parts: &[Tensor], tokens: usize, shape: &[usize]) -> Tensor {
    let rows = (0..tokens).flat_map(|token| {
        parts.iter().flat_map(move |(.., bytes)| {
            let row = bytes.len() / tokens;
            bytes[token * row..][..row].to_vec()
        })
    });
    (name, Dtype::F32, shape.to_vec(), rows.collect())
}

const Q: [usize; 4] = [2, 4, 3, 8];
const K: [usize; 4] = [2, 2, 5, 8];
const V: [usize; 4] = [2, 2, 5, 6];

fn plain() -> Vec<Tensor> {
    vec![laid("query", Q, false, of(0)), laid("key", K, false, of(1)), laid("value", V, false, of(2))]
}

#[test]
fn heads_may_be_joined_or_packed() {
    let folder = Folder::new();
    let wanted = folder.run(&plain(), &[("layout", "bhld")], &[]);
    let inside = [laid("query", Q, true, of(0)), laid("key", K, true, of(1)), laid("value", V, true, of(2))];
    let wanted_inside = folder.run(&inside, &[("layout", "blhd")], &[]);
    let [query, key, value] = inside;
    let joined_query = shaped("query", query, &[2, 3, 32]);
    let joined =
        [joined_query.clone(), shaped("key", key.clone(), &[2, 5, 16]), shaped("value", value.clone(), &[2, 5, 12])];
    for (metadata, flags) in
        [(&[][..], &["--q-heads", "4", "--kv-heads", "2"][..]), (&[("q_heads", "4"), ("kv_heads", "2")], &["--verify"])]
    {
        let found = folder.run(&joined, metadata, flags);
        assert_eq!((found.shape("output"), found.shape("lse")), (&[2, 3, 24][..], &[2, 4, 3][..]));
        assert_eq!(found.values("output"), wanted_inside.values("output"));
        assert_eq!(found.values("lse"), wanted.values("lse"));
    }
    // keys and values of one tensor, their widths unequal
    let kv = beside("kv", &[key, value], 10, &[2, 5, 28]);
    let found = folder.run(&[joined_query, kv.clone()], &[], &["--q-heads", "4", "--kv-heads", "2"]);
    assert_eq!(found.values("output"), wanted_inside.values("output"));
    let found = folder.run(&[laid("query", Q, false, of(0)), kv], &[], &["--kv-heads", "2", "--verify"]);
    assert_eq!(found.tensors["output"], wanted.tensors["output"]);

    // equal heads: five axes, and rows
    let [q, k, v] = [0, 1, 2].map(|n| laid("part", [2, 4, 3, 8], true, of(n)));
    let apart = [
        shaped("query", q.clone(), &[2, 3, 4, 8]),
        shaped("key", k.clone(), &[2, 3, 4, 8]),
        shaped("value", v.clone(), &[2, 3, 4, 8]),
    ];
    let wanted = folder.run(&apart, &[("layout", "blhd")], &[]);
    for (shape, flags) in [(&[2, 3, 3, 4, 8][..], &[][..]), (&[2, 3, 96], &["--q-heads", "4"])] {
        let found = folder.run(&[beside("qkv", &[q.clone(), k.clone(), v.clone()], 6, shape)], &[], flags);
        assert_eq!(found.values("output"), wanted.values("output"), "{shape:?}");
        assert_eq!(found.shape("output").len(), if shape.len() == 5 { 4 } else { 3 });
    }
    let five = beside("kv", &[k, v], 6, &[2, 3, 2, 4, 8]);
    let query = shaped("query", q, &[2, 3, 4, 8]);
    let found = folder.run(&[query, five], &[("layout", "blhd")], &[]);
    assert_eq!(found.values("output"), wanted.values("output"));
}

#[test]
fn heads_that_do_not_fit_are_refused() {
    let folder = Folder::new();
    let refused = |tensors: &[Tensor], flags: &[&str]| {
        let input = folder.write("in.safetensors", tensors, &[]);
        bad(&[&["run", &input, "-o", &folder.at("out"), "--device", "cpu"], flags].concat())
    };
    let joined = |width| vec![f32s("query", &[1, 3, width], wave(1.0)), f32s("kv", &[1, 5, 30], wave(1.0))];
    assert!(
        refused(&joined(32), &[])
            .contains("query has shape [1, 3, 32], [batch, len, heads * dim], which needs q_heads")
    );
    assert!(
        refused(&joined(33), &["--q-heads", "4"])
            .contains("query has shape [1, 3, 33], needs [batch, len, heads * dim]")
    );
    assert!(refused(&joined(32), &["--q-heads", "0"]).contains("with q_heads 0"));
    assert!(refused(&joined(32), &["--q-heads", "4"]).contains("kv has shape [1, 5, 30], needs rows of kv_heads"));
    let said = refused(&[joined(32), vec![f32s("key", &[1, 5, 30], wave(1.0))]].concat(), &["--q-heads", "4"]);
    assert!(said.contains("kv holds key already"), "{said}");
    assert!(refused(&small(), &["--q-heads", "3"]).contains("query has 4 heads, q_heads says 3"));
    assert!(refused(&small(), &["--kv-heads", "4"]).contains("key has 2 heads, kv_heads says 4"));
    assert!(refused(&[f32s("qkv", &[1, 2, 4, 8], wave(1.0))], &[]).contains("[batch, len, 3, heads, dim]"));
    let packed = f32s("qkv", &[1, 2, 3, 1, 8], wave(1.0));
    let said = refused(&[packed, f32s("d_output", &[1, 2, 1, 8], wave(1.0))], &["--backward"]);
    assert!(said.contains("there is a qkv or kv"), "{said}");
}

#[test]
fn every_stage_of_the_scores_is_written() {
    let folder = Folder::new();
    let mut tensors = small();
    tensors.push(f32s("bias", &[3, 5], |n| if n == 7 { f32::NEG_INFINITY } else { n as f32 / 8.0 }));
    let all = folder.run(&tensors, &[("softcap", "0.5")], &["--scores", "masked,scaled,capped", "--probs", "--verify"]);
    let plain = folder.run(&tensors, &[("softcap", "0.5")], &[]);
    assert_eq!(all.tensors["output"], plain.tensors["output"]);
    let [scaled, capped, masked, probs] =
        ["scores_scaled", "scores_capped", "scores_masked", "probs"].map(|name| all.values(name));
    assert_eq!(all.shape("scores_masked"), [2, 4, 3, 5]);
    // by hand: scale * q . k of head 2, row 1, key 3 of the second entry, in f64
    let (query, key) = (wave(0.7), wave(1.3));
    let dot: f64 =
        (0..8).map(|d| f64::from(query(((4 + 2) * 3 + 1) * 8 + d)) * f64::from(key(((2 + 1) * 5 + 3) * 8 + d))).sum();
    let off = f64::from(scaled[((4 + 2) * 3 + 1) * 5 + 3]) - dot / 8f64.sqrt();
    assert!(off.abs() < 1e-5, "{off}");
    for (n, &score) in scaled.iter().enumerate() {
        assert_close(&[capped[n]], &[0.5 * (score / 0.5).tanh()], 1e-6);
        let place = n % 15;
        if place == 7 {
            assert!(masked[n] == f32::NEG_INFINITY && probs[n] == 0.0);
        } else {
            assert_close(&[masked[n]], &[capped[n] + place as f32 / 8.0], 1e-6);
            assert_close(&[probs[n]], &[(masked[n] - all.values("lse")[n / 5]).exp()], 1e-6);
        }
    }
}

#[test]
fn a_past_stands_before_the_keys() {
    let folder = Folder::new();
    let whole = folder.run(&plain(), &[("causal", "fixed:2")], &[]);
    let (k, v) = (of(1), of(2));
    let later = |value: &dyn Fn([usize; 4]) -> f32, [b, h, i, d]: [usize; 4]| value([b, h, i + 2, d]);
    let past =
        |inside| vec![laid("past_key", [2, 2, 2, 8], inside, of(1)), laid("past_value", [2, 2, 2, 6], inside, of(2))];
    let mut tensors = past(false);
    tensors.push(laid("query", Q, false, of(0)));
    tensors.push(laid("key", [2, 2, 3, 8], false, |place| later(&k, place)));
    tensors.push(laid("value", [2, 2, 3, 6], false, |place| later(&v, place)));
    let found = folder.run(&tensors, &[("causal", "fixed:2")], &["--verify"]);
    assert_eq!(found.values("output"), whole.values("output"));
    let input = Results::read(folder.write("whole.safetensors", &plain(), &[("", "")]));
    for (present, name) in [("present_key", "key"), ("present_value", "value")] {
        assert_eq!(found.tensors[present], input.tensors[name]);
    }
    // joined heads, as ONNX has them: the past still has four axes
    tensors[2] = shaped("query", laid("query", Q, true, of(0)), &[2, 3, 32]);
    tensors[3] = shaped("key", laid("key", [2, 2, 3, 8], true, |place| later(&k, place)), &[2, 3, 16]);
    tensors[4] = shaped("value", laid("value", [2, 2, 3, 6], true, |place| later(&v, place)), &[2, 3, 12]);
    let joined = folder.run(&tensors, &[("causal", "fixed:2")], &["--q-heads", "4", "--kv-heads", "2"]);
    assert_eq!(joined.values("lse"), whole.values("lse"));
    assert_eq!(joined.tensors["present_key"], found.tensors["present_key"]);

    let refused = |tensors: &[Tensor]| {
        let input = folder.write("in.safetensors", tensors, &[("causal", "top_left")]);
        bad(&["run", &input, "-o", &folder.at("out"), "--device", "cpu"])
    };
    let with = |past: &[Tensor]| [&small()[..], past].concat();
    assert!(refused(&with(&past(false)[..1])).contains("past_key is there without past_value"));
    let said = refused(&with(&[f16s("past_key", &[2, 2, 2, 8], wave(1.0)), past(false)[1].clone()]));
    assert!(said.contains("past_key has element type F16, possible: F32"), "{said}");
    let said = refused(&with(&[past(false)[0].clone(), f32s("past_value", &[2, 2, 1, 6], wave(1.0))]));
    assert!(
        said.contains("past_value has shape [2, 2, 1, 6], needs [batch, heads, len, dim] = [2, 2, 2, 6]"),
        "{said}"
    );
    let said = refused(&with(&[f32s("past_key", &[1, 2, 2, 8], wave(1.0)), past(false)[1].clone()]));
    assert!(said.contains("= [2, 2, any, 8]"), "{said}");
}

#[test]
fn short_masks_hide_the_keys_behind_their_end() {
    let folder = Folder::new();
    let mask = |keys: usize| {
        let bytes = (0..3 * keys).map(|n| u8::from(n % keys < 3 && n != 1)).collect();
        ("mask", Dtype::BOOL, vec![3, keys], bytes)
    };
    let short_mask: Tensor = ("mask", Dtype::BOOL, vec![3, 3], (0..9).map(|n| u8::from(n != 1)).collect());
    let wanted = folder.run(&[&small()[..], &[mask(5)]].concat(), &[], &[]);
    let short = [&small()[..], &[short_mask]].concat();
    assert_eq!(folder.run(&short, &[], &["--pad-mask", "--verify"]).tensors, wanted.tensors);
    assert_eq!(folder.run(&short, &[("pad_mask", "true")], &[]).tensors, wanted.tensors);
    let bias = |keys: usize| {
        let value = move |n: usize| if n % keys < 3 { (n % keys + n / keys) as f32 } else { f32::NEG_INFINITY };
        f16s("bias", &[3, keys], value)
    };
    let wanted = folder.run(&[&small()[..], &[bias(5)]].concat(), &[], &[]);
    let short = [&small()[..], &[bias(3)]].concat();
    assert_eq!(folder.run(&short, &[], &["--pad-mask"]).tensors, wanted.tensors);
    let input = folder.write("in.safetensors", &short, &[]);
    let said = bad(&["run", &input, "-o", &folder.at("out"), "--device", "cpu"]);
    assert!(said.contains("bias has shape [1, 1, 3, 3], needs [2, 4, 3, 5]") && said.contains("--pad-mask"), "{said}");
    // one column is for all keys, as ever
    folder.run(&[&small()[..], &[f32s("bias", &[3, 1], wave(1.0))]].concat(), &[], &["--pad-mask"]);
}

#[test]
fn parts_merge_into_the_whole() {
    let folder = Folder::new();
    let (k, v) = (of(1), of(2));
    for inside in [false, true] {
        let layout = [("layout", if inside { "blhd" } else { "bhld" })];
        let query = || laid("query", Q, inside, of(0));
        let whole = [query(), laid("key", K, inside, of(1)), laid("value", V, inside, of(2))];
        let whole = folder.run(&whole, &layout, &["--row-state"]);
        let mut parts = vec![];
        for (start, len) in [(0, 2), (2, 3)] {
            let tensors = [
                query(),
                laid("key", [2, 2, len, 8], inside, |[b, h, i, d]| k([b, h, i + start, d])),
                laid("value", [2, 2, len, 6], inside, |[b, h, i, d]| v([b, h, i + start, d])),
            ];
            let input = folder.write("part.safetensors", &tensors, &layout);
            parts.push(folder.at(&format!("part-{start}.safetensors")));
            good(&["run", &input, "-o", &parts[parts.len() - 1], "--device", "cpu", "--row-state", "-q"]);
        }
        let output = folder.at("merged.safetensors");
        let said = good(&["merge", &parts[0], &parts[1], "-o", &output]);
        assert!(
            said.contains("2 parts of batch 2, q_heads 4, q_len 3, v_head_dim 6 merged by maximum and sum"),
            "{said}"
        );
        let merged = Results::read(&output);
        for name in ["output", "lse", "row_max", "row_sum"] {
            assert_eq!(merged.shape(name), whole.shape(name), "{name}");
            assert_close(merged.values(name), whole.values(name), 1e-5);
        }
        // a result of before is replaced, and one part is itself
        good(&["merge", &parts[0], "-o", &output, "-q"]);
        assert_close(Results::read(&output).values("output"), Results::read(&parts[0]).values("output"), 1e-6);
    }
    let lse_alone = folder.at("lse.safetensors");
    let input = folder.at("part.safetensors");
    good(&["run", &input, "-o", &lse_alone, "--device", "cpu"]);
    let part = folder.at("part-2.safetensors");
    let said = good(&["merge", &part, &lse_alone, "-o", &folder.at("out.npz"), "--output-type", "f16"]);
    assert!(said.contains("not all have row_max"), "{said}");

    let refused = |args: &[&str]| bad(&[&["merge", "-o", &folder.at("none")], args].concat());
    assert!(refused(&[&part, &input]).contains("part.safetensors: it has no output: it holds [key, query, value]"));
    let other = folder.write(
        "other.safetensors",
        &[f32s("output", &[2, 3, 4, 5], wave(1.0)), f32s("lse", &[2, 3, 4], wave(1.0))],
        &[],
    );
    let said = refused(&[&part, &other]);
    assert!(said.contains("are [2, 3, 4, 5]") && said.contains("are [2, 4, 3, 6]"), "{said}");
    let lse = folder.write("lse.x", &[f32s("output", &[2, 3, 4, 5], wave(1.0))], &[]);
    assert!(refused(&[&lse]).contains("it has no lse"));
    let unlike =
        folder.write("unlike.x", &[f32s("output", &[2, 3, 4, 5], wave(1.0)), f32s("lse", &[2, 4, 3], wave(1.0))], &[]);
    assert!(refused(&[&unlike]).contains("--layout"));
    assert!(bad(&["merge", &part, "-o", &part]).contains("is an input"));
    assert!(refused(&[&part, &part]).contains("a key counts once"));
    assert!(refused(&[&part, "--output-type", "i8"]).contains("f32, f16 or bf16"));
    assert!(refused(&["-", "-"]).contains("more than once"));
}

#[test]
fn results_that_are_no_numbers_are_told() {
    let folder = Folder::new();
    let mut tensors = small();
    tensors[0] = f32s("query", &[2, 4, 3, 8], |_| f32::NAN);
    let input = folder.write("nan.safetensors", &tensors, &[]);
    let said = good(&["run", &input, "-o", &folder.at("out.safetensors"), "--device", "cpu", "--verify"]);
    assert!(said.contains("144 elements of the output are infinite or NaN"), "{said}");
    // what is not finite has no size that it could be off by
    let said = good(&["convert", &input, "-o", &folder.at("half.safetensors"), "--kv", "f16"]);
    assert!(said.contains("output: none is finite; 144 are infinite or NaN, as they were"), "{said}");
}
