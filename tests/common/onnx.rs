//! ONNX's published `Attention` cases as problems of ours; see `tests/golden/README.md`.

use cross_attention::{AttentionData, AttentionSpec, Diagonal, Layout, ScoreStage, TensorData, TensorSpec, Terms, f16};
use safetensors::Dtype;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::golden::{File, Numbers, Stored};
use super::recipe::places;

/// One case: what we ask, and what ONNX stored as the answer.
pub(crate) struct OnnxCase {
    pub(crate) name: String,
    pub(crate) spec: AttentionSpec,
    pub(crate) data: AttentionData,
    /// Y in the output's layout.
    pub(crate) output: Vec<f32>,
    /// `qk_matmul_output`, where stored.
    pub(crate) scores: Option<Vec<f32>>,
    /// Whether the stored results were rounded to 16 bits.
    pub(crate) rounded: bool,
    /// Distance of the stored Y from a float64 recomputation.
    pub(crate) exact_distance: f64,
    pub(crate) rtol: f32,
    pub(crate) atol: f32,
}

#[derive(Deserialize)]
struct Manifest {
    cases: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    name: String,
    file: String,
    sha256: String,
    attributes: Attributes,
    layout: String,
    dims: Dims,
    rtol: f32,
    atol: f32,
    exact_y_max_abs_diff: f64,
}

#[derive(Deserialize)]
struct Attributes {
    is_causal: u32,
    scale: Option<f32>,
    softcap: f32,
    qk_matmul_output_mode: usize,
    left_window_size: i64,
    right_window_size: i64,
}

#[derive(Deserialize)]
struct Dims {
    batch: usize,
    q_heads: usize,
    kv_heads: usize,
    q_len: usize,
    kv_len: usize,
    past_len: usize,
    total_kv_len: usize,
    head_dim: usize,
    v_head_dim: usize,
}

/// Every case of the manifest.
pub(crate) fn all() -> Vec<OnnxCase> {
    let manifest = File::open("tests/golden/onnx/manifest.json");
    let manifest: Manifest = serde_json::from_slice(manifest.bytes()).expect("the manifest is JSON of this form");
    manifest.cases.iter().map(read).collect()
}

fn read(entry: &Entry) -> OnnxCase {
    let Entry { name, attributes, dims, .. } = entry;
    let file = File::open(&format!("tests/golden/onnx/{}", entry.file));
    let hash: String = Sha256::digest(file.bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hash, entry.sha256, "{name} is not the file that was published");

    // rank 3 is [batch, len, heads * dim]: the same data, read through another layout
    let tokens_first = match entry.layout.as_str() {
        "BL(HD)" => true,
        "BHLD" => false,
        other => panic!("{name}: layout {other}"),
    };
    let layout = |shape| if tokens_first { Layout::blhd(shape) } else { Layout::bhld(shape) };
    let input = |slot: &str| file.find(&format!("in.{slot}"));
    let real = |slot: &str| input(slot).unwrap_or_else(|| panic!("{name} has no {slot}")).real();

    let of = |data: &TensorData, layout| TensorSpec { element: data.as_ref().element(), layout };
    let query = real("Q");
    let query_of = of(&query, layout([dims.batch, dims.q_heads, dims.q_len, dims.head_dim]));
    let context = |slot: &str, past: &str, present: &str, dim: usize| {
        let (data, layout) = (real(slot), layout([dims.batch, dims.kv_heads, dims.kv_len, dim]));
        let Some(past) = input(past) else { return (of(&data, layout), data) };
        let (data, layout) = append(&past.real(), dims.past_len, &data, &layout);
        assert_eq!(data, file.real(present), "{name}: past and new {slot} side by side");
        (of(&data, layout), data)
    };
    let (key_of, key) = context("K", "past_key", "out.present_key", dims.head_dim);
    let (value_of, value) = context("V", "past_value", "out.present_value", dims.v_head_dim);
    assert_eq!(key_of.layout.shape[2], dims.total_kv_len, "{name}");

    let stored = file.tensor("out.Y");
    let rounded = stored.dtype != Dtype::F32;
    let output_layout = layout([dims.batch, dims.q_heads, dims.q_len, dims.v_head_dim]);
    let mut spec = AttentionSpec::from_tensors(query_of, key_of, value_of);
    spec.output.layout = output_layout;
    spec.lse = true;
    spec.scale = attributes.scale;
    spec.softcap = (attributes.softcap != 0.0).then_some(attributes.softcap);

    let kv_lens = input("nonpad_kv_seqlen").map(|lens| match lens.numbers {
        Numbers::Int(lens) => lens.into_iter().map(|len| u32::try_from(len).expect("a length")).collect::<Vec<_>>(),
        other => panic!("{name}: nonpad_kv_seqlen is {other:?}"),
    });
    spec.kv_lens = kv_lens.is_some();
    let diagonal = match (dims.past_len, &kv_lens) {
        (0, None) => Diagonal::TopLeft,
        (0, Some(_)) => Diagonal::EndOfKeys,
        (past, _) => Diagonal::Fixed(i32::try_from(past).expect("a length")),
    };
    // -1 leaves a window open
    spec.window_left = u32::try_from(attributes.left_window_size).ok();
    spec.window_right = u32::try_from(attributes.right_window_size).ok();
    spec.causal = (attributes.is_causal == 1).then_some(diagonal);
    spec.offset = Some(diagonal);

    let mut data = AttentionData { query, key, value, terms: Terms { kv_lens, ..Terms::default() } };
    if let Some(mask) = input("attn_mask") {
        let (shape, numbers) = widen(mask, dims.total_kv_len);
        match numbers {
            Numbers::Bool(mask) => {
                spec.mask = Some(Layout::bhld(shape));
                data.terms.mask = Some(mask);
            }
            Numbers::Real(bias) => {
                spec.bias = Some(of(&bias, Layout::bhld(shape)));
                data.terms.bias = Some(bias);
            }
            Numbers::Int(_) => panic!("{name}: a mask of integers"),
        }
    }
    let scores = file.find("out.qk_matmul_output");
    let stages = [ScoreStage::Scaled, ScoreStage::Capped, ScoreStage::Masked, ScoreStage::Probs];
    spec.scores = scores.as_ref().map(|_| stages[attributes.qk_matmul_output_mode]);

    OnnxCase {
        name: name.clone(),
        spec,
        data,
        output: stored.real().to_f32(),
        scores: scores.map(|scores| scores.real().to_f32()),
        rounded,
        exact_distance: entry.exact_y_max_abs_diff,
        rtol: entry.rtol,
        atol: entry.atol,
    }
}

/// Past keys or values and new ones as one sequence, `[batch, heads, len, dim]`.
fn append(past: &TensorData, past_len: usize, new: &TensorData, layout: &Layout) -> (TensorData, Layout) {
    let [batch, heads, len, dim] = layout.shape;
    let past_layout = Layout::bhld([batch, heads, past_len, dim]);
    let all = Layout::bhld([batch, heads, past_len + len, dim]);
    let numbers = places(all.shape).map(|[b, h, i, d]| match i.checked_sub(past_len) {
        None => past.as_ref().get(past_layout.index([b, h, i, d])),
        Some(i) => new.as_ref().get(layout.index([b, h, i, d])),
    });
    (TensorData::from_f32(new.as_ref().element(), numbers.collect()), all)
}

/// A mask of any rank as one of rank 4, with keys behind its end forbidden.
fn widen(mask: Stored, kv_len: usize) -> ([usize; 4], Numbers) {
    let mut shape = [1; 4];
    shape[4 - mask.shape.len()..].copy_from_slice(&mask.shape);
    let given = shape[3];
    if given == kv_len {
        return (shape, mask.numbers);
    }
    shape[3] = kv_len;
    let numbers = match mask.numbers {
        Numbers::Bool(mask) => Numbers::Bool(pad(&mask, given, kv_len, false)),
        Numbers::Real(TensorData::F32(bias)) => {
            Numbers::Real(TensorData::F32(pad(&bias, given, kv_len, f32::NEG_INFINITY)))
        }
        Numbers::Real(TensorData::F16(bias)) => {
            Numbers::Real(TensorData::F16(pad(&bias, given, kv_len, f16::NEG_INFINITY)))
        }
        other => panic!("a mask of {other:?}"),
    };
    (shape, numbers)
}

fn pad<T: Copy>(rows: &[T], from: usize, to: usize, with: T) -> Vec<T> {
    rows.chunks_exact(from).flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(with, to - from))).collect()
}
