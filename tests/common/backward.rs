//! Gradients of the cases: what is given and asked is drawn from a case's name, and compared with the oracle element by element.

use cross_attention::backward::{BackwardInputs, BackwardProblem, BackwardSpec, Gradients};
use cross_attention::verify::verify_backward;
use cross_attention::weights::{HeadReduce, Keys, Select, WeightsSpec};
use cross_attention::{AttentionData, AttentionOutput, Element, Layout, TensorData, TensorRef, TensorSpec, cpu};

use super::case::Case;
use super::golden::{File, Numbers};
use super::recipe::allowed;

/// An implementation: a problem and its inputs, to gradients or a message.
pub(crate) type RunBackward<'a> = dyn Fn(&BackwardProblem, &BackwardInputs<'_>) -> Result<Gradients, String> + 'a;

/// A backward call with all that it needs.
pub(crate) struct BackwardCase {
    pub(crate) problem: BackwardProblem,
    pub(crate) data: AttentionData,
    pub(crate) forward: AttentionOutput,
    pub(crate) d_output: TensorData,
    pub(crate) d_lse: Option<Vec<f32>>,
    pub(crate) d_weights: Option<Vec<f32>>,
}

impl BackwardCase {
    /// The gradients of a case: all that there are, from an output's gradient in some element, in some elements and layouts;
    /// `None` where the problem has none. Where the case is poisoned so are the gradients of rows that see no key.
    pub(crate) fn of(case: &Case) -> Option<Self> {
        let mut random = fastrand::Rng::with_seed(
            case.name.bytes().fold(7u64, |seed, byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte))),
        );
        let mut attention = case.spec.clone();
        attention.scores = None;
        let mut spec = BackwardSpec::all(attention);
        let element = |random: &mut fastrand::Rng| match random.u8(0..6) {
            0 => Element::F16,
            1 => Element::Bf16,
            _ => Element::F32,
        };
        spec.d_output.element = element(&mut random);
        for gradient in [&mut spec.d_query, &mut spec.d_key, &mut spec.d_value, &mut spec.d_bias].into_iter().flatten()
        {
            gradient.element = element(&mut random);
            if random.u8(0..4) == 0 {
                gradient.layout = Layout::blhd(gradient.layout.shape);
            }
        }
        (spec.d_lse, spec.d_scale) = (random.bool(), random.bool());
        let problem = case.problem();
        // what the batch shares has a gradient for each entry, or the sum of these
        let summed = random.bool();
        let shared = |of: &TensorSpec| of.layout.strides[0] == 0;
        for (input, gradient) in [(&problem.spec().key, &mut spec.d_key), (&problem.spec().value, &mut spec.d_value)] {
            if let (Some(gradient), true) = (gradient, summed && shared(input)) {
                let [_, heads, len, width] = gradient.layout.shape;
                gradient.layout = Layout::bhld([1, heads, len, width]);
            }
        }
        let [batch, heads, q_len, kv_len] = problem.score_shape();
        if random.u8(0..4) == 0 && batch * heads * q_len * kv_len > 0 {
            let pick = |random: &mut fastrand::Rng, len: usize| match random.u8(0..3) {
                0 => Select::All,
                _ => Select::List((0..random.usize(1..4)).map(|_| random.usize(0..len)).collect()),
            };
            let segment = |random: &mut fastrand::Rng| {
                let start = random.usize(0..kv_len);
                start..random.usize(start..=kv_len)
            };
            spec.d_weights = Some(WeightsSpec {
                heads: pick(&mut random, heads),
                reduce: [HeadReduce::Each, HeadReduce::Mean, HeadReduce::Sum][random.usize(0..3)],
                rows: pick(&mut random, q_len),
                keys: if random.bool() {
                    Keys::Each(pick(&mut random, kv_len))
                } else {
                    Keys::Segments(vec![segment(&mut random), segment(&mut random)])
                },
            });
        }
        let backward = BackwardProblem::new(spec).ok()?;
        let data = case.data();
        let mut numbers = |len: usize| (0..len).map(|_| 2.0 * random.f32() - 1.0).collect::<Vec<f32>>();
        let d_lse = backward.spec().d_lse.then(|| numbers(problem.rows()));
        let d_weights = backward.weights().map(|weights| numbers(weights.elements()));
        let spec = backward.spec().d_output;
        let mut d_output = numbers(spec.layout.extent()?);
        if case.recipe.poison {
            for (b, h, i) in (0..batch).flat_map(|b| (0..heads).flat_map(move |h| (0..q_len).map(move |i| (b, h, i)))) {
                let inputs = data.as_inputs();
                if !(0..kv_len).any(|j| allowed(&problem, &inputs, [b, h, i, j]) == (true, true)) {
                    (0..problem.v_head_dim()).for_each(|d| d_output[spec.layout.index([b, h, i, d])] = f32::NAN);
                }
            }
        }
        let forward = cpu::attention(backward.forward(), &data.as_inputs()).ok()?;
        let d_output = TensorData::from_f32(spec.element, d_output);
        Some(Self { problem: backward, data, forward, d_output, d_lse, d_weights })
    }

    pub(crate) fn inputs(&self) -> BackwardInputs<'_> {
        let new = BackwardInputs::new(self.data.as_inputs(), &self.forward, &self.d_output);
        let mut inputs = new.expect("the forward returns maximum and sum");
        (inputs.d_lse, inputs.d_weights) = (self.d_lse.as_deref(), self.d_weights.as_deref());
        inputs
    }
}

/// A case: every gradient within the oracle's bounds, and blind to what is not allowed.
pub(crate) fn case_with(case: &Case, run: &RunBackward<'_>) -> Result<(), String> {
    let Some(backward) = BackwardCase::of(case) else { return Ok(()) };
    let named = |error: String| format!("{case}\n  {:?}\n{error}", backward.problem.spec().d_weights);
    let inputs = backward.inputs();
    let gradients = run(&backward.problem, &inputs).map_err(named)?;
    let report = verify_backward(&backward.problem, &inputs, &gradients).map_err(|error| named(error.to_string()))?;
    if !report.passed() {
        return Err(named(report.to_string()));
    }
    if case.recipe.poison {
        let mut clean = BackwardCase::of(&case.clean()).ok_or("no gradients without the poison")?;
        // the same results of the forward, whose bits are compared elsewhere
        clean.forward = backward.forward.clone();
        let other = run(&clean.problem, &clean.inputs()).map_err(named)?;
        let (first, other) = (bits(&gradients), bits(&other));
        // the sign of a zero that is left of something below f32's range may be that of a 0 times anything
        let differ = |(a, b): (&u32, &u32)| a != b && (a | b) << 1 != 0;
        if let Some(at) = first.iter().zip(&other).position(differ) {
            let [a, b] = [first[at], other[at]].map(f32::from_bits);
            return Err(named(format!("what is not allowed changes number {at} of all: {a:e}, and {b:e} without it")));
        }
    }
    Ok(())
}

/// Every number of gradients as bits.
pub(crate) fn bits(of: &Gradients) -> Vec<u32> {
    let tensors = [&of.d_query, &of.d_key, &of.d_value, &of.d_bias].into_iter().flatten();
    let numbers = [&of.d_alibi_slopes, &of.d_sinks].into_iter().flatten().flatten().chain(&of.d_scale);
    let bits = |x: f32| x.to_bits();
    tensors.flat_map(|tensor| tensor.to_f32().into_iter().map(bits)).chain(numbers.copied().map(bits)).collect()
}

/// Names of the files of gradients that others computed.
pub(crate) fn golden() -> Vec<String> {
    (0..31).map(|n| format!("tests/golden/backward/case{n:02}.safetensors")).collect()
}

/// Gradients of such a file, within `times` the bounds that it states: 2 for what rounds products before it adds them, where those
/// that the bounds were measured with do not.
pub(crate) fn golden_with(path: &str, times: f32, run: &RunBackward<'_>) -> Result<(), String> {
    let file = File::open(path);
    let metadata = file.metadata();
    let option = |name: &str| metadata.get(name).map(String::as_str);
    let number = |name: &str| option(name).map(|text| text.parse::<f32>().expect("a number"));
    let shape = |name: &str| file.find(name).map(|tensor| <[usize; 4]>::try_from(&tensor.shape[..]).expect("4 axes"));
    let real = |name: &str| file.find(name).map(super::golden::Stored::real);
    let f32s = |name: &str| real(name).map(|data| data.to_f32());
    let integers = |name: &str| {
        file.find(name).map(|tensor| match tensor.numbers {
            Numbers::Int(numbers) => numbers,
            other => panic!("{name} is {other:?}"),
        })
    };
    let small = |name: &str| {
        integers(name).map(|all| all.iter().map(|&n| i32::try_from(n).expect("32 bits")).collect::<Vec<_>>())
    };
    let dense = |name: &str| shape(name).map(|shape| TensorSpec::f32(Layout::bhld(shape)));
    let [query, key, value] = ["query", "key", "value"].map(|name| dense(name).expect("it is there"));
    let mut spec = cross_attention::AttentionSpec::from_tensors(query, key, value);
    (spec.scale, spec.softcap) = (number("scale"), number("softcap"));
    spec.causal = option("causal").map(|text| text.parse().expect("a diagonal"));
    spec.offset = option("offset").map(|text| text.parse().expect("a diagonal"));
    let window = |name: &str| option(name).map(|text| text.parse::<u32>().expect("a window"));
    (spec.window_left, spec.window_right) = (window("window_left"), window("window_right"));
    (spec.bias, spec.mask) = (dense("bias"), shape("mask").map(Layout::bhld));
    spec.kv_lens = file.find("kv_lens").is_some();
    spec.row_ranges = file.find("row_start").is_some();
    spec.alibi_slopes = file.find("alibi_slopes").map(|_| cross_attention::AlibiSlopes::PerHead);
    spec.sinks = file.find("sinks").is_some();
    let mut backward = BackwardSpec::all(spec);
    backward.d_lse = file.find("d_lse").is_some();
    let problem = BackwardProblem::new(backward).map_err(|error| format!("{path}: {error}"))?;
    let data = AttentionData {
        query: file.real("query"),
        key: file.real("key"),
        value: file.real("value"),
        terms: cross_attention::OwnedTerms {
            bias: real("bias"),
            mask: file.find("mask").map(|tensor| match tensor.numbers {
                Numbers::Bool(mask) => mask,
                other => panic!("mask is {other:?}"),
            }),
            kv_lens: small("kv_lens").map(|lens| lens.iter().map(|n| n.unsigned_abs()).collect()),
            row_start: small("row_start"),
            row_end: small("row_end"),
            alibi_slopes: f32s("alibi_slopes"),
            sinks: f32s("sinks"),
            ..cross_attention::OwnedTerms::default()
        },
    };
    let text = |error: cross_attention::InputError| format!("{path}: {error}");
    let forward = cpu::attention(problem.forward(), &data.as_inputs()).map_err(text)?;
    let (d_output, d_lse) = (file.real("d_output"), f32s("d_lse"));
    let mut inputs = BackwardInputs::new(data.as_inputs(), &forward, &d_output).map_err(text)?;
    inputs.d_lse = d_lse.as_deref();
    let gradients = run(&problem, &inputs).map_err(|error| format!("{path}: {error}"))?;
    let tensor = |data: &Option<TensorData>| data.as_ref().map(|data| TensorRef::from(data).to_owned().to_f32());
    for (name, got) in [
        ("d_query", tensor(&gradients.d_query)),
        ("d_key", tensor(&gradients.d_key)),
        ("d_value", tensor(&gradients.d_value)),
        ("d_bias", tensor(&gradients.d_bias)),
        ("d_alibi_slopes", gradients.d_alibi_slopes.clone()),
        ("d_sinks", gradients.d_sinks.clone()),
    ] {
        let (Some(got), Some(want)) = (got, f32s(&format!("expected_{name}"))) else { continue };
        let bound = times * number(&format!("bound_{name}")).expect("a bound");
        assert_eq!(got.len(), want.len(), "{path}: {name}");
        for (at, (got, want)) in got.iter().zip(&want).enumerate() {
            let error = (got - want).abs();
            if error.is_nan() || error > bound {
                return Err(format!(
                    "{path}: {name} at {at}: got {got:e}, want {want:e}, off by {error:e}, allowed {bound:e}"
                ));
            }
        }
    }
    Ok(())
}
