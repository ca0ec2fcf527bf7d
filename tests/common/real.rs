//! Attention that trained models computed on real input; origins in `tests/golden/README.md`.

use cross_attention::{AttentionData, AttentionSpec, Layout, TensorData, TensorSpec, Terms};

use super::golden::{File, Numbers};

/// One attention of a model with its exact result.
pub(crate) struct Capture {
    pub(crate) name: String,
    pub(crate) spec: AttentionSpec,
    pub(crate) data: AttentionData,
    pub(crate) output: Vec<f32>,
    pub(crate) lse: Vec<f32>,
    /// What another f32 implementation was off by, where that is noted with the data.
    pub(crate) error_of_others: Option<f32>,
}

pub(crate) fn all() -> Vec<Capture> {
    let mut captures = vec![];
    for layer in [1, 3] {
        captures.push(whisper(layer));
    }
    captures.extend(lightglue(4, 2.0e-4));
    captures.extend([0, 2].map(annalog));
    captures
}

/// 39 tokens of text look at 1500 frames of sound.
fn whisper(layer: u32) -> Capture {
    let result = File::open(&format!("tests/golden/whisper/layer{layer}.safetensors"));
    let [query, key, value] = if layer == 3 {
        // the example of the binary
        let inputs = File::open("examples/data/whisper.safetensors");
        ["query", "key", "value"].map(|name| inputs.real(name))
    } else {
        ["q", "k", "v"].map(|name| result.real(name))
    };
    let shapes = [[1, 6, 39, 64], [1, 6, 1500, 64]];
    capture(format!("whisper_layer_{layer}"), shapes, [query, key, value], &result, ["out", "lse"], Some(1.5e-6))
}

/// Keypoints of two photographs look at each other.
fn lightglue(layer: u32, error: f32) -> [Capture; 2] {
    let file = File::open(&format!("tests/golden/lightglue/layer{layer}.safetensors"));
    let (left, right) = ([1, 4, 600, 64], [1, 4, 517, 64]);
    let data = |names: [&str; 3]| names.map(|name| file.real(name));
    [
        ("right", [left, right], ["qk0", "qk1", "v1"], ["out0", "lse0"]),
        ("left", [right, left], ["qk1", "qk0", "v0"], ["out1", "lse1"]),
    ]
    .map(|(to, shapes, names, results)| {
        capture(format!("lightglue_layer_{layer}_to_{to}"), shapes, data(names), &file, results, Some(error))
    })
}

/// A molecule that is being written looks at the one it is made from; a batch with padding.
fn annalog(layer: u32) -> Capture {
    let file = File::open("tests/golden/annalog/cross_attention.safetensors");
    let named = |name: &str| format!("layer{layer}.{name}");
    let data = ["q", "k", "v"].map(|name| file.real(&named(name)));
    let results = [named("out"), named("lse")];
    let results = [results[0].as_str(), results[1].as_str()];
    let mut capture = capture(format!("annalog_layer_{layer}"), [[4, 8, 36, 32]; 2], data, &file, results, None);
    capture.spec.mask = Some(Layout::bhld([4, 1, 1, 36]));
    capture.data.terms.mask = match file.tensor("key_keep").numbers {
        Numbers::Bool(keep) => Some(keep),
        other => panic!("key_keep is {other:?}"),
    };
    capture
}

fn capture(
    name: String,
    [query, key]: [[usize; 4]; 2],
    data: [TensorData; 3],
    file: &File,
    [output, lse]: [&str; 2],
    error_of_others: Option<f32>,
) -> Capture {
    let of = |shape, data: &TensorData| TensorSpec { element: data.as_ref().element(), layout: Layout::bhld(shape) };
    let mut spec = AttentionSpec::from_tensors(of(query, &data[0]), of(key, &data[1]), of(key, &data[2]));
    spec.output = TensorSpec::f32(Layout::bhld(query));
    spec.lse = true;
    let [query, key, value] = data;
    let data = AttentionData { query, key, value, terms: Terms::default() };
    Capture { name, spec, data, output: file.real(output).to_f32(), lse: file.real(lse).to_f32(), error_of_others }
}
