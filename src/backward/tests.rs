//! The oracle of gradients against finite differences of the oracle of attention, and what is refused.

use super::*;
use crate::cpu::reference;
use crate::inputs::{AttentionData, AttentionInputs};
use crate::problem::{AlibiSlopes, Diagonal};
use crate::tensor::TensorData;
use crate::terms::OwnedTerms;
use crate::weights::{HeadReduce, Keys, Select};

/// Half of the step of a difference. Inputs are multiples of 2^-8, so that steps are exact.
const STEP: f32 = 1.0 / 256.0;

fn numbers(random: &mut fastrand::Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| f32::from(random.i16(-256..=256)) / 256.0).collect()
}

/// A problem with most terms at once: two heads of three share keys that the batch shares, a softcap, a bias over some axes, ALiBi,
/// sinks, a window, a mask and a row that sees nothing.
fn everything() -> (BackwardSpec, AttentionData, Vec<f32>) {
    let mut random = fastrand::Rng::with_seed(7);
    let (query, key, value) = ([2, 4, 3, 3], [1, 2, 5, 3], [1, 2, 5, 2]);
    let f32 = |shape| TensorSpec::f32(Layout::bhld(shape));
    let mut spec = AttentionSpec::from_tensors(f32(query), f32(key), f32(value));
    spec.softcap = Some(1.5);
    spec.scale = Some(0.75);
    spec.bias = Some(f32([1, 4, 1, 5]));
    spec.mask = Some(Layout::bhld([2, 1, 3, 5]));
    spec.alibi_slopes = Some(AlibiSlopes::PerBatchAndHead);
    spec.sinks = true;
    spec.window_left = Some(3);
    spec.offset = Some(Diagonal::Fixed(1));
    let len = |shape: [usize; 4]| shape.iter().product();
    let mut mask = vec![true; 30];
    mask[5..10].fill(false);
    mask[17] = false;
    let data = AttentionData {
        query: TensorData::F32(numbers(&mut random, len(query))),
        key: TensorData::F32(numbers(&mut random, len(key))),
        value: TensorData::F32(numbers(&mut random, len(value))),
        terms: OwnedTerms {
            bias: Some(TensorData::F32(numbers(&mut random, 20))),
            mask: Some(mask),
            alibi_slopes: Some(numbers(&mut random, 8)),
            sinks: Some(numbers(&mut random, 4)),
            ..OwnedTerms::default()
        },
    };
    let mut backward = BackwardSpec::all(spec);
    backward.d_lse = true;
    backward.d_scale = true;
    backward.d_weights = Some(WeightsSpec {
        heads: Select::List(vec![3, 1, 3]),
        reduce: HeadReduce::Mean,
        rows: Select::List(vec![2, 0]),
        keys: Keys::Segments(vec![0..2, 1..5]),
    });
    let given = numbers(&mut random, 2 * 4 * 3 * 2 + 2 * 4 * 3 + 2 * 2 * 2);
    (backward, data, given)
}

/// What the gradients are of: the sum of everything that has one, times it, in f64.
fn loss(spec: &BackwardSpec, inputs: &AttentionInputs<'_>, [d_output, d_lse, d_weights]: [&[f32]; 3]) -> f64 {
    let problem = BackwardProblem::new(spec.clone()).unwrap();
    let forward = problem.forward();
    let mut total = 0.0;
    for n in 0..forward.rows() {
        let (b, h, i) = crate::cpu::row_place(forward, n);
        let row = reference::row(forward, inputs, b, h, i);
        let width = row.output.len();
        total += row.output.iter().zip(&d_output[n * width..]).map(|(o, d)| o * f64::from(*d)).sum::<f64>();
        total += row.lse.max(-1e3) * f64::from(d_lse[n]);
        // heads 3, 1 and 3, their mean; rows 2 and 0; keys 0..2 and 1..5
        let times = [0.0, 1.0, 0.0, 2.0][h] / 3.0;
        for (place, of) in [2, 0].into_iter().enumerate() {
            for (segment, keys) in [0..2, 1..5].into_iter().enumerate().filter(|_| of == i) {
                let mass: f64 = row.probs[keys].iter().sum();
                total += times * mass * f64::from(d_weights[(b * 2 + place) * 2 + segment]);
            }
        }
    }
    total
}

#[test]
fn gradients_are_slopes() {
    let (spec, data, given) = everything();
    let (d_output, rest) = given.split_at(48);
    let (d_lse, d_weights) = rest.split_at(24);
    let given = [d_output, d_lse, d_weights];
    let problem = BackwardProblem::new(spec.clone()).unwrap();
    let inputs = data.as_inputs();
    let forward = crate::cpu::attention(problem.forward(), &inputs).unwrap();
    let mut backward = BackwardInputs::new(inputs, &forward, d_output).unwrap();
    (backward.d_lse, backward.d_weights) = (Some(d_lse), Some(d_weights));
    let oracle = reference::backward(&problem, &backward).unwrap();

    let slope = |change: &dyn Fn(&mut AttentionData, &mut BackwardSpec, f32)| {
        let [below, above] = [-STEP, STEP].map(|step| {
            let (mut data, mut spec) = (data.clone(), spec.clone());
            change(&mut data, &mut spec, step);
            loss(&spec, &data.as_inputs(), given)
        });
        (above - below) / (2.0 * f64::from(STEP))
    };
    let mut compared = 0;
    let mut compare = |name: &str, n: usize, found: f64, slope: f64| {
        // the third derivative times the square of the step
        assert!((found - slope).abs() <= 3e-4 * (1.0 + slope.abs()), "{name} {n}: {found}, but the slope is {slope}");
        compared += 1;
    };
    fn f32s(data: &mut TensorData) -> &mut Vec<f32> {
        match data {
            TensorData::F32(data) => data,
            other => panic!("{other:?}"),
        }
    }
    for (n, &found) in oracle.d_query.values.iter().enumerate() {
        compare("d_query", n, found, slope(&|data, _, step| f32s(&mut data.query)[n] += step));
    }
    for (n, &found) in oracle.d_key.values.iter().enumerate() {
        compare("d_key", n, found, slope(&|data, _, step| f32s(&mut data.key)[n] += step));
    }
    for (n, &found) in oracle.d_value.values.iter().enumerate() {
        compare("d_value", n, found, slope(&|data, _, step| f32s(&mut data.value)[n] += step));
    }
    for (n, &found) in oracle.d_bias.values.iter().enumerate() {
        compare("d_bias", n, found, slope(&|data, _, step| f32s(data.terms.bias.as_mut().unwrap())[n] += step));
    }
    for (n, &found) in oracle.d_alibi_slopes.values.iter().enumerate() {
        let change = |data: &mut AttentionData, _: &mut BackwardSpec, step| {
            data.terms.alibi_slopes.as_mut().unwrap()[n] += step;
        };
        compare("d_alibi_slopes", n, found, slope(&change));
    }
    for (n, &found) in oracle.d_sinks.values.iter().enumerate() {
        compare("d_sinks", n, found, slope(&|data, _, step| data.terms.sinks.as_mut().unwrap()[n] += step));
    }
    compare(
        "d_scale",
        0,
        oracle.d_scale.values[0],
        slope(&|_, spec, step| {
            spec.attention.scale = spec.attention.scale.map(|scale| scale + step);
        }),
    );
    assert_eq!(compared, 72 + 30 + 20 + 20 + 8 + 4 + 1);
    // a row that sees nothing has no gradient
    assert!(oracle.d_query.values[3..6].iter().all(|d| *d == 0.0), "{:?}", &oracle.d_query.values[..9]);

    // and the CPU path agrees, whatever the instructions
    for level in crate::cpu::SimdLevel::available() {
        let gradients = crate::cpu::CpuBackward::new(&problem, level).run(&backward).unwrap();
        let report = crate::verify::verify_backward(&problem, &backward, &gradients).unwrap();
        assert!(report.passed() && report.elements == 155, "{level}: {report}");
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let (good, ..) = everything();
    type Change = fn(&mut BackwardSpec);
    let cases: [(Change, &str); 10] = [
        (|s| s.attention.scale = Some(f32::NAN), "scale is NaN, needs a finite number"),
        (|s| s.attention.scores = Some(crate::ScoreStage::Probs), "ask for chosen weights (d_weights) instead"),
        (|s| s.d_output.layout.shape[3] = 3, "d_output has shape [2, 4, 3, 3], needs [2, 4, 3, 2]"),
        (
            |s| s.d_key = Some(TensorSpec::f32(Layout::bhld([3, 2, 5, 3]))),
            "d_key has shape [3, 2, 5, 3], needs [2, 2, 5, 3] (batch may be 1 where the batch shares them)",
        ),
        (
            |s| s.d_bias = Some(TensorSpec::f32(Layout::bhld([1, 1, 1, 5]))),
            "d_bias has shape [1, 1, 1, 5], needs [2, 4, 3, 5] (1 along axes where the bias has 1)",
        ),
        (|s| s.d_query = Some(TensorSpec::i8(Layout::bhld([2, 4, 3, 3]))), "d_query holds i8, needs f32, f16 or bf16"),
        (
            |s| s.d_value = Some(TensorSpec::f32(Layout::bhld([1, 2, 5, 2]).with_strides([0, 0, 2, 1]))),
            "d_value with shape [1, 2, 5, 2] and strides [0, 0, 2, 1] has elements that share a place",
        ),
        (|s| (s.attention.bias, s.d_scale) = (None, false), "d_bias is asked for, but the attention has no bias"),
        (|s| s.attention.sinks = false, "d_sinks is asked for, but the attention has no sinks"),
        (|s| s.d_weights = Some(WeightsSpec { rows: Select::List(vec![3]), ..WeightsSpec::default() }), "d_weights: "),
    ];
    for (change, wanted) in cases {
        let mut spec = good.clone();
        change(&mut spec);
        let error = BackwardProblem::new(spec).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}, not {wanted}");
    }
    // stored bytes and pages have no gradient of their own
    let mut spec = good.clone();
    spec.attention.key.element = Element::I8;
    spec.attention.key_scale = Some(TensorSpec::f32(Layout::bhld([1, 2, 5, 1])));
    let error = BackwardProblem::new(spec.clone()).unwrap_err().to_string();
    assert!(error.contains("d_key is asked for, but keys and values are stored in signed bytes"), "{error}");
    let all = BackwardSpec::all(spec.attention);
    assert!(all.d_key.is_none() && all.d_value.is_some() && BackwardProblem::new(all).is_ok());
}
