//! Layers on the CPU, and reading their weights.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use cross_attention::layer::{
    Biases, CrossAttention, LayerConfig, LayerError, LayerWeights, LoadError, Names, Norm, NormKind, Role,
};
use cross_attention::{Device, Element, Error, TensorData};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::common::layer::{CHECKS, weights};

#[test]
fn on_the_cpu() {
    for (name, check) in CHECKS {
        check(&Device::Cpu).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[test]
fn the_oracle_has_no_layers() {
    let config = LayerConfig::new(4, 4, 2);
    let layer = CrossAttention::new(config.clone(), weights(&config, Element::F32)).unwrap();
    assert_eq!(layer.on_blocking(&Device::Oracle).unwrap_err(), Error::Layer(LayerError::Oracle));
}

type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

fn file(tensors: &Tensors) -> Vec<u8> {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(_, _, data)| data.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), bytes)| (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

fn load(tensors: &Tensors, names: &Names, config: &LayerConfig) -> Result<LayerWeights, LoadError> {
    LayerWeights::load(&SafeTensors::deserialize(&file(tensors)).unwrap(), names, config)
}

/// A projection's rows below one another, as a weight and a bias.
fn stacked(weights: &LayerWeights, roles: &[Role], inner: usize) -> (Vec<usize>, Vec<f32>, Vec<f32>) {
    let of = |role: &Role| match role {
        Role::Query => &weights.query,
        Role::Key => &weights.key,
        Role::Value => &weights.value,
        Role::Output => &weights.output,
    };
    let weight: Vec<f32> = roles.iter().flat_map(|role| of(role).weight.to_f32()).collect();
    let bias: Vec<f32> = roles.iter().flat_map(|role| of(role).bias.clone().unwrap()).collect();
    (vec![weight.len() / inner, inner], weight, bias)
}

#[test]
fn every_way_of_naming() {
    use Role::{Key, Output, Query, Value};
    let config = LayerConfig::new(12, 12, 3);
    let wanted = weights(&config, Element::F32);
    type Held<'a> = &'a [(&'a str, &'a str, &'a [Role])];
    let names: [(Names, Held<'_>); 4] = [
        (
            Names::torch_packed("a."),
            &[
                ("a.in_proj_weight", "a.in_proj_bias", &[Query, Key, Value]),
                ("a.out_proj.weight", "a.out_proj.bias", &[Output]),
            ],
        ),
        (
            Names::hugging_face("a."),
            &[
                ("a.q_proj.weight", "a.q_proj.bias", &[Query]),
                ("a.k_proj.weight", "a.k_proj.bias", &[Key]),
                ("a.v_proj.weight", "a.v_proj.bias", &[Value]),
                ("a.out_proj.weight", "a.out_proj.bias", &[Output]),
            ],
        ),
        (
            Names::diffusers("a."),
            &[
                ("a.to_q.weight", "a.to_q.bias", &[Query]),
                ("a.to_k.weight", "a.to_k.bias", &[Key]),
                ("a.to_v.weight", "a.to_v.bias", &[Value]),
                ("a.to_out.0.weight", "a.to_out.0.bias", &[Output]),
            ],
        ),
        (
            Names::ctranslate2("a/").clone(),
            &[
                ("a/linear_0.weight", "a/linear_0.bias", &[Query]),
                ("a/linear_1.weight", "a/linear_1.bias", &[Key, Value]),
                ("a/linear_2.weight", "a/linear_2.bias", &[Output]),
            ],
        ),
    ];
    for (names, tensors) in names {
        let mut all = vec![];
        for &(weight, bias, roles) in tensors {
            let (shape, rows, biases) = stacked(&wanted, roles, 12);
            all.push((weight.to_owned(), shape, rows));
            all.push((bias.to_owned(), vec![biases.len()], biases));
        }
        if all[0].0.starts_with("a/") {
            // slashes throughout
            all.iter_mut().for_each(|(name, ..)| *name = name.replace('.', "/"));
        }
        assert_eq!(load(&all, &names, &config).unwrap(), wanted);
    }
}

#[test]
fn torch_with_other_widths() {
    let config = LayerConfig::new(12, 7, 3);
    let wanted = weights(&config, Element::F32);
    let mut tensors = vec![];
    for (role, name, inner) in
        [(Role::Query, "q_proj_weight", 12), (Role::Key, "k_proj_weight", 7), (Role::Value, "v_proj_weight", 7)]
    {
        let (shape, rows, _) = stacked(&wanted, &[role], inner);
        tensors.push((name.to_owned(), shape, rows));
    }
    let biases =
        [&wanted.query, &wanted.key, &wanted.value].map(|projection| projection.bias.clone().unwrap()).concat();
    tensors.push(("in_proj_bias".to_owned(), vec![36], biases));
    let (shape, rows, bias) = stacked(&wanted, &[Role::Output], 12);
    tensors.push(("out_proj.weight".to_owned(), shape, rows));
    tensors.push(("out_proj.bias".to_owned(), vec![12], bias));
    assert_eq!(load(&tensors, &Names::torch_separate(""), &config).unwrap(), wanted);
    // packed names ask for one width
    let error = load(&tensors, &Names::torch_packed(""), &config).unwrap_err();
    assert_eq!(error.to_string(), "the file has no tensor in_proj_weight, needs one of shape [36, 12]");
}

#[test]
fn what_does_not_fit_is_named() {
    let norm = Some(Norm { kind: NormKind::Rms, epsilon: 1e-6, bias: false });
    let config = LayerConfig { biases: Biases::NONE, key_norm: norm, ..LayerConfig::new(4, 6, 2) };
    let wanted = weights(&config, Element::F32);
    let good: Tensors = [("q_proj", &wanted.query, 4), ("k_proj", &wanted.key, 6), ("v_proj", &wanted.value, 6)]
        .into_iter()
        .chain([("out_proj", &wanted.output, 4)])
        .map(|(name, projection, inner)| {
            let data = projection.weight.to_f32();
            (format!("{name}.weight"), vec![data.len() / inner, inner], data)
        })
        .chain([("k_norm.weight".to_owned(), vec![2], wanted.key_norm.as_ref().unwrap().weight.clone())])
        .collect();
    let names = Names::hugging_face("");
    assert_eq!(load(&good, &names, &config).unwrap(), wanted);
    let with = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = good.clone();
        change(&mut tensors);
        load(&tensors, &names, &config).unwrap_err().to_string()
    };
    assert_eq!(
        with(&|tensors| tensors[1].1 = vec![6, 4]),
        "k_proj.weight has shape [6, 4], needs [4, 6]; transposed it would fit: weights are [out, in]"
    );
    assert_eq!(with(&|tensors| tensors[1].1 = vec![3, 8]), "k_proj.weight has shape [3, 8], needs [4, 6]");
    assert_eq!(
        with(&|tensors| drop(tensors.remove(4))),
        "the file has no tensor k_norm.weight, needs one of shape [2]"
    );
    let extra = with(&|tensors| tensors.push(("q_proj.bias".to_owned(), vec![4], vec![0.0; 4])));
    assert!(extra.starts_with("the file has a tensor q_proj.bias, the config says there is none"), "{extra}");
    let data = [0u8; 16];
    let integers = TensorView::new(Dtype::I32, vec![2, 2], &data[..]).unwrap();
    let bytes = safetensors::serialize([("q_proj.weight", integers)], None).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let error = LayerWeights::load(&file, &names, &LayerConfig::new(2, 2, 1)).unwrap_err();
    assert_eq!(error.to_string(), "q_proj.weight holds I32, needs F32, F16 or BF16");
}

#[test]
fn bf16_is_read_exactly() {
    let config = LayerConfig { biases: Biases::NONE, ..LayerConfig::new(1, 1, 1) };
    // 1.5, -2, 2^-129, 3
    let words = [0x3fc0u16, 0xc000, 0x0010, 0x4040].map(u16::to_le_bytes);
    let names = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight"];
    let views = names
        .iter()
        .zip(&words)
        .map(|(name, word)| (*name, TensorView::new(Dtype::BF16, vec![1, 1], &word[..]).unwrap()));
    let bytes = safetensors::serialize(views, None).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let weights = LayerWeights::load(&file, &Names::hugging_face(""), &config).unwrap();
    let values = [&weights.query, &weights.key, &weights.value, &weights.output].map(|p| p.weight.clone());
    assert_eq!(values, [1.5, -2.0, 2f32.powi(-129), 3.0].map(|x| TensorData::F32(vec![x])));
}

#[test]
fn configs_and_weights_are_compared() {
    let config = LayerConfig::new(8, 6, 2);
    let good = weights(&config, Element::F32);
    let refused = |config: LayerConfig, weights: LayerWeights| CrossAttention::new(config, weights).unwrap_err();
    let zero = LayerConfig { v_head_dim: 0, ..config.clone() };
    assert_eq!(refused(zero, good.clone()), LayerError::Zero { name: "v_head_dim" });
    let odd = LayerConfig { kv_heads: 3, ..config.clone() };
    assert_eq!(refused(odd, good.clone()), LayerError::Heads { heads: 2, kv_heads: 3 });
    let mut short = good.clone();
    short.key.bias = Some(vec![0.0; 7]);
    assert_eq!(refused(config.clone(), short), LayerError::Weight { name: "key.bias", wanted: 8, found: 7 });
    let mut bare = good.clone();
    bare.output.bias = None;
    assert_eq!(refused(config.clone(), bare), LayerError::Missing { name: "output.bias" });
    let without = LayerConfig { biases: Biases::NONE, ..config };
    assert_eq!(refused(without, good), LayerError::Unexpected { name: "query.bias" });
}
