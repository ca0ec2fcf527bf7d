//! Selected attention weights on the CPU: as f64 has them, over the case table and random cases; what is refused; plans.

use cross_attention::dispatch::Rejection;
use cross_attention::plan::WeightsPlan;
use cross_attention::weights::{HeadReduce, Keys, Select, WeightsError, WeightsProblem, WeightsSpec};
use cross_attention::{
    AttentionInputs, AttentionProblem, AttentionSpec, Device, DeviceCaps, DeviceClass, InputError, TensorData, cpu,
};
use proptest::prelude::*;

use crate::common::case::Case;
use crate::common::recipe::Scores;
use crate::common::{cases, random, weights};
use crate::properties::config;

fn check(case: &Case, number: u64) -> Result<(), String> {
    let (problem, data) = (case.problem(), case.data());
    let spec = weights::selection(&problem, number);
    let lse = weights::lse(&problem, &data);
    let wanted = WeightsProblem::new(&problem, &spec).map_err(|error| format!("{case}\n{error}"))?;
    let got = cpu::weights(&wanted, &data.as_inputs(), &lse).map_err(|error| format!("{case}\n{error}"))?;
    assert_eq!(wanted.shape().iter().product::<usize>(), got.len());
    if case.recipe.poison {
        let clean = cpu::weights(&wanted, &case.clean().data().as_inputs(), &lse).expect("the data fits");
        let bits = |weights: &[f32]| weights.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        if bits(&clean) != bits(&got) {
            return Err(format!("{case}\n{spec:?}: what is not allowed changes the weights"));
        }
    }
    weights::compare(case, &data, &lse, &spec, &got)
}

#[test]
fn every_case_of_the_table() {
    let mut failures = Vec::new();
    let table = cases::all();
    assert!(table.len() > 100);
    for (n, case) in table.iter().enumerate() {
        // the oracle takes long for the largest, and one selection shows what there is to see
        let few = if case.problem().rows() * case.problem().kv_len() > 100_000 { 1 } else { 5 };
        for number in 0..few {
            failures.extend(check(case, if number == 0 { 0 } else { n as u64 * 8 + number }).err());
        }
    }
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n\n"));
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_selection_of_a_random_case(case in random::case(), number in any::<u64>()) {
        check(&case, number).map_err(TestCaseError::fail)?;
    }
}

#[test]
fn faults_are_seen() {
    let case = Case::new("weights_faults", "that the comparison sees faults", 1, [4, 2], [5, 70], [16, 16])
        .drawn(Scores::Spread(2.0));
    let (problem, data) = (case.problem(), case.data());
    let lse = weights::lse(&problem, &data);
    let run = |spec: &WeightsSpec| {
        let wanted = WeightsProblem::new(&problem, spec).expect("a sound selection");
        cpu::weights(&wanted, &data.as_inputs(), &lse).expect("the data fits")
    };
    let spec = |head: usize, row: usize, segment| WeightsSpec {
        heads: Select::List(vec![head]),
        reduce: HeadReduce::Each,
        rows: Select::List(vec![row]),
        keys: Keys::Segments(vec![segment]),
    };
    let right = spec(2, 3, 10..60);
    assert!(weights::compare(&case, &data, &lse, &right, &run(&right)).is_ok());
    for wrong in [spec(3, 3, 10..60), spec(2, 2, 10..60), spec(2, 3, 10..59), spec(2, 3, 11..60)] {
        assert!(weights::compare(&case, &data, &lse, &right, &run(&wrong)).is_err(), "{wrong:?}");
    }
    let other: Vec<_> = lse.iter().map(|lse| lse + 1e-4).collect();
    assert!(weights::compare(&case, &data, &other, &right, &run(&right)).is_err());
}

#[test]
fn rows_add_up_to_one_and_a_sink_takes_its_share() {
    let case = Case::new("weights_mass", "the mass of a row", 2, [4, 2], [5, 70], [16, 16]);
    let whole = WeightsSpec { keys: Keys::Segments(vec![0..70, 0..0]), ..WeightsSpec::default() };
    let mass = |case: &Case| {
        let (problem, data) = (case.problem(), case.data());
        let inputs = data.as_inputs();
        let devices = [Device::Cpu, Device::Oracle];
        devices.map(|device| {
            let run = device.attention_with_weights(&problem, &inputs, &whole);
            let result = pollster::block_on(run).expect("all is well");
            assert_eq!(result.shape, [2, 4, 5, 2]);
            let plain = pollster::block_on(device.attention(&problem, &inputs)).expect("all is well");
            assert_eq!(result.attention.output, plain.output);
            assert!(result.attention.lse.is_some());
            result.weights
        })
    };
    for weights in mass(&case) {
        assert!(weights.chunks(2).all(|row| (row[0] - 1.0).abs() < 1e-5 && row[1].to_bits() == 0), "{weights:?}");
    }
    for weights in mass(&case.sinks(2.0)) {
        assert!(weights.chunks(2).all(|row| row[0] > 0.0 && row[0] < 1.0), "{weights:?}");
    }
}

#[test]
fn value_and_sinks_are_not_looked_at() {
    let case = Case::new("weights_no_value", "inputs that weights do not need", 1, [2, 2], [3, 9], [8, 8]).sinks(0.0);
    let (problem, data) = (case.problem(), case.data());
    let lse = weights::lse(&problem, &data);
    let wanted = WeightsProblem::new(&problem, &WeightsSpec::default()).expect("all of them");
    let with = cpu::weights(&wanted, &data.as_inputs(), &lse).expect("the data fits");
    let nothing: &[f32] = &[];
    let mut inputs = AttentionInputs { value: nothing.into(), ..data.as_inputs() };
    inputs.terms.sinks = None;
    assert_eq!(cpu::weights(&wanted, &inputs, &lse), Ok(with));
}

#[test]
fn refusals_say_what_is_there() {
    let problem = AttentionProblem::new(AttentionSpec::new([1, 2, 3, 4], [1, 2, 5, 4])).expect("a sound spec");
    let refused = |spec: WeightsSpec| WeightsProblem::new(&problem, &spec).expect_err("to be refused");
    let of = |heads, rows, keys| WeightsSpec { heads, rows, keys, reduce: HeadReduce::Mean };
    let error = refused(of(Select::List(vec![1, 2]), Select::All, Keys::default()));
    assert_eq!(error, WeightsError::OutOfRange { axis: "heads", n: 1, found: 2, len: 2 });
    assert_eq!(error.to_string(), "heads[1] is 2, there are 2, counted from 0");
    let error = refused(of(Select::All, Select::Range(1..4), Keys::default()));
    assert_eq!(error, WeightsError::PastTheEnd { axis: "rows", start: 1, end: 4, len: 3 });
    let (start, end) = (3, 2);
    let error = refused(of(Select::All, Select::All, Keys::Each(Select::Range(start..end))));
    assert_eq!(error, WeightsError::Backwards { axis: "keys", start, end });
    let error = refused(of(Select::All, Select::All, Keys::Segments(vec![0..5, 4..6])));
    assert_eq!(error, WeightsError::PastTheEnd { axis: "segments", start: 4, end: 6, len: 5 });
    for (axis, spec) in [
        ("heads", of(Select::List(vec![]), Select::All, Keys::default())),
        ("rows", of(Select::All, Select::Range(2..2), Keys::default())),
        ("keys", of(Select::All, Select::All, Keys::Each(Select::List(vec![])))),
        ("segments", of(Select::All, Select::All, Keys::Segments(vec![]))),
    ] {
        assert_eq!(refused(spec), WeightsError::Empty { axis });
    }
    let mut large = AttentionSpec::new([1 << 30, 1, 1, 1], [1, 1, 1, 1]);
    large.query.layout.strides[0] = 0;
    large.query.layout.shape[2] = 1 << 29;
    large.output.layout.shape[2] = 1 << 29;
    large.output.layout = cross_attention::Layout::bhld(large.output.layout.shape);
    large.key.layout.shape[2] = 1 << 29;
    large.value.layout.shape[2] = 1 << 29;
    let large = AttentionProblem::new(large).expect("a sound spec");
    let error = WeightsProblem::new(&large, &WeightsSpec::default()).expect_err("to be refused");
    assert_eq!(error, WeightsError::Overflow { shape: [1 << 30, 1, 1 << 29, 1 << 29] });
    // as many elements as can be counted, but not their bytes
    let one = |shape| cross_attention::Layout::bhld([1; 4]).broadcast_to(shape).expect("from one element");
    let mut large = AttentionSpec::new([1 << 8, 1 << 6, 1 << 20, 1], [1, 1, 1, 1]);
    large.query.layout = one([1 << 8, 1 << 6, 1 << 20, 1]);
    (large.key.layout, large.value.layout) = (one([1 << 8, 1 << 6, 1 << 28, 1]), one([1 << 8, 1 << 6, 1 << 28, 1]));
    let large = AttentionProblem::new(large).expect("a sound spec");
    let error = WeightsProblem::new(&large, &WeightsSpec::default()).expect_err("to be refused");
    assert_eq!(error, WeightsError::Overflow { shape: [1 << 8, 1 << 6, 1 << 20, 1 << 28] });

    let wanted = WeightsProblem::new(&problem, &WeightsSpec::default()).expect("all of them");
    let (query, key) = (vec![0.5f32; 24], vec![0.25f32; 40]);
    let inputs = AttentionInputs::new(&query, &key, &key);
    let short = cpu::weights(&wanted, &inputs, &[0.0; 5]);
    assert_eq!(short, Err(InputError::Len { name: "lse", wanted: 6, found: 5 }));
    for (name, row_max, row_sum) in [("row_max", 5, 6), ("row_sum", 6, 5)] {
        let state = cross_attention::RowState { row_max: vec![0.0; row_max], row_sum: vec![1.0; row_sum] };
        let short = cpu::weights(&wanted, &inputs, &state);
        assert_eq!(short, Err(InputError::Len { name, wanted: 6, found: 5 }));
    }
    let halves = TensorData::zeros(cross_attention::Element::F16, 24);
    let inputs = AttentionInputs { query: halves.as_ref(), ..inputs };
    assert!(matches!(cpu::weights(&wanted, &inputs, &[0.0; 6]), Err(InputError::Element { name: "query", .. })));
}

#[test]
fn plans_fit_their_limits_or_say_which_they_do_not() {
    let problem = AttentionProblem::new(AttentionSpec::new([6, 2, 40, 8], [6, 2, 70, 8])).expect("a sound spec");
    let wanted = WeightsProblem::new(&problem, &WeightsSpec::default()).expect("all of them");
    let whole = WeightsPlan::new(&wanted, &DeviceCaps::webgpu_defaults()).expect("it fits");
    assert_eq!((whole.steps().len(), whole.problem()), (1, &wanted));
    // one batch entry's weights are 22400 bytes
    for (limit, steps) in [(3 * 22400, 2), (2 * 22400, 3), (22400, 6)] {
        let caps = DeviceCaps { max_storage_buffer_binding_size: limit + 256, ..DeviceCaps::webgpu_defaults() };
        let plan = WeightsPlan::new(&wanted, &caps).expect("it can be cut");
        assert_eq!(plan.steps().len(), steps, "{limit}");
        assert!(plan.steps().iter().flat_map(|step| &step.bindings).all(|binding| binding.size_bytes <= limit + 256));
    }
    let caps = DeviceCaps { max_storage_buffer_binding_size: 22396, ..DeviceCaps::webgpu_defaults() };
    let Err(Rejection::Binding { slot, needed, found }) = WeightsPlan::new(&wanted, &caps) else {
        panic!("it does not fit");
    };
    assert_eq!((slot.name(), needed, found), ("weights", 22400, 22396));
    let caps = DeviceCaps { max_compute_workgroups_per_dimension: 9, ..DeviceCaps::webgpu_defaults() };
    // 2 heads, 40 rows, 70 keys: 88 workgroups of 64 an entry, and 9 x 9 are possible
    assert!(matches!(WeightsPlan::new(&wanted, &caps), Err(Rejection::Grid { needed: 10, found: 9 })));
    let caps = DeviceCaps { class: DeviceClass::Software, ..DeviceCaps::webgpu_defaults() };
    let long = AttentionProblem::new(AttentionSpec::new([1, 1, 1, 64], [1, 1, 1 << 18, 64])).expect("a sound spec");
    let spec = WeightsSpec { keys: Keys::Segments(std::iter::once(0..1 << 18).collect()), ..WeightsSpec::default() };
    let long = WeightsProblem::new(&long, &spec).expect("one segment");
    assert!(matches!(WeightsPlan::new(&long, &caps), Err(Rejection::Unsupported(_))));
}
