//! What is refused, and that the refusal says what was asked, what was found and what would do.

use cross_attention::cpu::{self, CpuKernel, MergeError, PartialState};
use cross_attention::engine::Kind;
use cross_attention::{
    AttentionData, AttentionInputs, AttentionProblem, AttentionSpec, Diagonal, Element, InputError, Layout, MAX_LEN,
    ProblemError, ScoreStage, TensorData, TensorSpec,
};

use crate::common::case::Case;
use crate::common::recipe::Ranges;

fn spec() -> AttentionSpec {
    AttentionSpec::new([2, 6, 5, 8], [2, 3, 7, 8])
}

fn refused(change: impl FnOnce(&mut AttentionSpec)) -> ProblemError {
    let mut spec = spec();
    change(&mut spec);
    AttentionProblem::new(spec).expect_err("must be refused")
}

#[test]
fn counts_that_are_zero() {
    let shapes = [
        ("q_heads", [2, 0, 5, 8], [2, 3, 7, 8]),
        ("kv_heads", [2, 6, 5, 8], [2, 0, 7, 8]),
        ("head_dim", [2, 6, 5, 0], [2, 3, 7, 0]),
    ];
    for (name, query, key) in shapes {
        assert_eq!(AttentionProblem::new(AttentionSpec::new(query, key)), Err(ProblemError::Zero { name }));
    }
    let error = refused(|spec| spec.value.layout.shape[3] = 0);
    assert_eq!(error, ProblemError::Zero { name: "v_head_dim" });
    assert_eq!(error.to_string(), "v_head_dim is 0, needs at least 1 (batch, q_len and kv_len may be 0)");
}

#[test]
fn sequences_that_are_too_long() {
    let long = MAX_LEN + 1;
    let error = refused(|spec| spec.query.layout = Layout::bhld([1, 1, long, 8]));
    assert_eq!(error, ProblemError::TooLong { name: "q_len", len: long, max: MAX_LEN });
    let error = refused(|spec| spec.key.layout.shape[2] = usize::MAX);
    assert_eq!(error, ProblemError::TooLong { name: "kv_len", len: usize::MAX, max: MAX_LEN });
}

#[test]
fn heads_that_cannot_be_shared_out() {
    let error = AttentionProblem::new(AttentionSpec::new([1, 8, 1, 8], [1, 3, 1, 8])).expect_err("3 of 8");
    assert_eq!(error, ProblemError::Heads { q_heads: 8, kv_heads: 3 });
    let error = AttentionProblem::new(AttentionSpec::new([1, 3, 1, 8], [1, 6, 1, 8])).expect_err("6 of 3");
    assert_eq!(error, ProblemError::Heads { q_heads: 3, kv_heads: 6 });
}

#[test]
fn shapes_that_do_not_fit() {
    let bias = |shape| Some(TensorSpec::f32(Layout::bhld(shape)));
    type Change = Box<dyn Fn(&mut AttentionSpec)>;
    let changes: [(&str, Change); 10] = [
        ("key", Box::new(|spec| spec.key.layout.shape[0] = 3)),
        ("key", Box::new(|spec| spec.key.layout.shape[3] = 4)),
        ("value", Box::new(|spec| spec.value.layout.shape[1] = 1)),
        ("value", Box::new(|spec| spec.value.layout.shape[2] = 1)),
        ("output", Box::new(|spec| spec.output.layout.shape[0] = 1)),
        ("output", Box::new(|spec| spec.output.layout.shape[3] = 9)),
        ("bias", Box::new(move |spec| spec.bias = bias([2, 3, 5, 7]))),
        ("bias", Box::new(move |spec| spec.bias = bias([2, 6, 5, 6]))),
        ("mask", Box::new(|spec| spec.mask = Some(Layout::bhld([2, 6, 7, 5])))),
        ("mask", Box::new(|spec| spec.mask = Some(Layout::bhld([0, 1, 1, 1])))),
    ];
    for (tensor, change) in changes {
        let error = refused(change);
        assert!(matches!(error, ProblemError::Shape { name, .. } if name == tensor), "{tensor}: {error:?}");
    }
}

#[test]
fn results_past_all_memory() {
    // one element stands for every tensor, and 2^52 bytes of output
    let shape = [16, 1 << 16, MAX_LEN, 1];
    let one = TensorSpec::f32(Layout::bhld([1; 4]).broadcast_to(shape).expect("from one element"));
    let key = TensorSpec::f32(Layout::bhld([1; 4]).broadcast_to([16, 1 << 16, 1, 1]).expect("from one element"));
    let mut spec = AttentionSpec::from_tensors(one, key, key);
    spec.output = TensorSpec::f32(Layout::bhld(shape));
    for lse in [false, true] {
        spec.lse = lse;
        let problem = AttentionProblem::new(spec.clone()).expect("sound, but large");
        let inputs = AttentionInputs::new(&[1.0f32][..], &[1.0f32][..], &[1.0f32][..]);
        for kernel in CpuKernel::ALL {
            let error = cpu::attention_with(kernel, &problem, &inputs).expect_err("no machine has that");
            assert!(matches!(error, InputError::Memory { .. }), "{error:?}");
        }
        let error = cpu::prepare(&problem).run(&inputs).expect_err("no machine has that");
        assert!(matches!(error, InputError::Memory { .. }), "{error:?}");
        let error = cpu::reference::attention(&problem, &inputs).expect_err("no machine has that");
        assert!(matches!(error, InputError::Memory { .. }), "{error:?}");
    }
}

#[test]
fn tensors_past_all_memory() {
    let error = refused(|spec| spec.key.layout.strides[2] = usize::MAX / 2);
    assert!(matches!(error, ProblemError::Overflow { name: "key", .. }), "{error:?}");
    let error = refused(|spec| spec.value.layout.offset = usize::MAX);
    assert!(matches!(error, ProblemError::Overflow { name: "value", .. }), "{error:?}");
    // every tensor is fine by itself, but the scores are not
    let long = |heads| Layout::bhld([1, 1, 1, 1]).broadcast_to([16, heads, MAX_LEN, 1]).expect("from one element");
    let mut spec = spec();
    spec.query = TensorSpec::f32(long(4));
    (spec.key, spec.value) = (spec.query, spec.query);
    spec.output = TensorSpec::f32(Layout::bhld([16, 4, MAX_LEN, 1]));
    assert!(AttentionProblem::new(spec.clone()).is_ok());
    spec.scores = Some(ScoreStage::Probs);
    let error = AttentionProblem::new(spec).expect_err("2^68 bytes of scores");
    assert!(matches!(error, ProblemError::Overflow { name: "scores", .. }), "{error:?}");
}

#[test]
fn outputs_written_twice() {
    for strides in [[0, 40, 8, 1], [240, 40, 8, 0], [240, 40, 7, 1], [240, 0, 8, 1]] {
        let error = refused(|spec| spec.output.layout.strides = strides);
        assert_eq!(error, ProblemError::OutputOverlaps { shape: [2, 6, 5, 8], strides });
    }
}

#[test]
fn numbers_that_mean_nothing() {
    for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let error = refused(|spec| spec.scale = Some(scale));
        assert!(matches!(error, ProblemError::Scale { .. }), "{scale}: {error:?}");
    }
    for softcap in [f32::NAN, f32::INFINITY, 0.0, -0.0, -1.0] {
        let error = refused(|spec| spec.softcap = Some(softcap));
        assert!(matches!(error, ProblemError::Softcap { .. }), "{softcap}: {error:?}");
    }
    let error = refused(|spec| {
        spec.causal = Some(Diagonal::BottomRight);
        spec.offset = Some(Diagonal::TopLeft);
    });
    assert_eq!(error, ProblemError::TwoDiagonals { causal: Diagonal::BottomRight, offset: Diagonal::TopLeft });
}

fn everything() -> Case {
    Case::new("refusals", "inputs that do not fit", 2, [4, 2], [3, 5], [8, 6])
        .bias(Element::F32, "bhqk")
        .mask("b11k")
        .kv_lens(&[5, 2])
        .ranges(Ranges::Wild)
        .alibi()
        .sinks(0.0)
}

/// What both kernels and the oracle say of everything's data after a change; they must agree.
fn refused_inputs(spec: impl FnOnce(&mut AttentionSpec), data: impl FnOnce(&mut AttentionData)) -> InputError {
    let case = everything();
    let mut changed = case.data();
    data(&mut changed);
    let problem = case.spec(spec).problem();
    let inputs = changed.as_inputs();
    let error = inputs.check(&problem).expect_err("must be refused");
    for kernel in CpuKernel::ALL {
        assert_eq!(cpu::attention_with(kernel, &problem, &inputs), Err(error.clone()), "{kernel}");
    }
    assert_eq!(cpu::reference::attention(&problem, &inputs), Err(error.clone()));
    error
}

#[test]
fn inputs_that_are_missing_or_not_asked_for() {
    type Change = fn(&mut AttentionData);
    type Ask = fn(&mut AttentionSpec);
    let tensors: [(&str, Change, Ask); 7] = [
        ("bias", |data| data.terms.bias = None, |spec| spec.bias = None),
        ("mask", |data| data.terms.mask = None, |spec| spec.mask = None),
        ("kv_lens", |data| data.terms.kv_lens = None, |spec| spec.kv_lens = false),
        ("row_start", |data| data.terms.row_start = None, |spec| spec.row_ranges = false),
        ("row_end", |data| data.terms.row_end = None, |_| {}),
        ("alibi_slopes", |data| data.terms.alibi_slopes = None, |spec| spec.alibi_slopes = None),
        ("sinks", |data| data.terms.sinks = None, |spec| spec.sinks = false),
    ];
    for (name, remove, unask) in tensors {
        assert_eq!(refused_inputs(|_| {}, remove), InputError::Missing { name });
        if name != "row_end" {
            assert_eq!(refused_inputs(unask, |_| {}), InputError::Unexpected { name });
        }
    }
    let error = refused_inputs(|spec| spec.row_ranges = false, |data| data.terms.row_start = None);
    assert_eq!(error, InputError::Unexpected { name: "row_end" });
    assert_eq!(error.to_string(), "row_end is given but the spec does not ask for it");
}

#[test]
fn inputs_of_another_type() {
    let half = |data: &mut TensorData| *data = TensorData::from_f32(Element::F16, data.to_f32());
    let refuse = |change: &dyn Fn(&mut AttentionData)| refused_inputs(|_| {}, change);
    let error = |name| InputError::Element { name, wanted: Kind::F32, found: Kind::F16 };
    assert_eq!(refuse(&|data| half(&mut data.query)), error("query"));
    assert_eq!(refuse(&|data| half(&mut data.key)), error("key"));
    assert_eq!(refuse(&|data| half(&mut data.value)), error("value"));
    assert_eq!(refuse(&|data| data.terms.bias.iter_mut().for_each(half)), error("bias"));
}

#[test]
fn inputs_that_are_too_short() {
    let cut = |data: &mut TensorData| *data = TensorData::F32(data.to_f32()[..7].to_vec());
    let refuse = |change: &dyn Fn(&mut AttentionData)| refused_inputs(|_| {}, change);
    let error = |name, needed| InputError::TooShort { name, needed, found: 7 };
    assert_eq!(refuse(&|data| cut(&mut data.query)), error("query", 2 * 4 * 3 * 8));
    assert_eq!(refuse(&|data| cut(&mut data.key)), error("key", 2 * 2 * 5 * 8));
    assert_eq!(refuse(&|data| cut(&mut data.value)), error("value", 2 * 2 * 5 * 6));
    assert_eq!(refuse(&|data| data.terms.bias.iter_mut().for_each(cut)), error("bias", 2 * 4 * 3 * 5));
    assert_eq!(refuse(&|data| data.terms.mask = Some(vec![true; 7])), error("mask", 2 * 5));
}

#[test]
fn lists_of_another_length() {
    let refuse = |change: fn(&mut AttentionData)| refused_inputs(|_| {}, change);
    let error = |name, wanted| InputError::Len { name, wanted, found: 3 };
    assert_eq!(refuse(|data| data.terms.kv_lens = Some(vec![1; 3])), error("kv_lens", 2));
    assert_eq!(refuse(|data| data.terms.row_start = Some(vec![1; 3])), error("row_start", 6));
    assert_eq!(refuse(|data| data.terms.row_end = Some(vec![1; 3])), error("row_end", 6));
    assert_eq!(refuse(|data| data.terms.alibi_slopes = Some(vec![1.0; 3])), error("alibi_slopes", 4));
    assert_eq!(refuse(|data| data.terms.sinks = Some(vec![1.0; 3])), error("sinks", 4));
}

#[test]
fn more_keys_than_there_are() {
    let error = refused_inputs(|_| {}, |data| data.terms.kv_lens = Some(vec![5, 6]));
    assert_eq!(error, InputError::Length { name: "kv_lens", batch: 1, found: 6, most: 5 });
    assert_eq!(error.to_string(), "kv_lens[1] is 6, the sequence has 5 tokens");
}

#[test]
fn states_that_do_not_fit_each_other() {
    let whole = PartialState { output: &[0.0; 6], lse: &[0.0; 3] };
    assert_eq!(cpu::merge(&[], 2), Err(MergeError::NoParts));
    let fewer = PartialState { output: &[0.0; 4], lse: &[0.0; 2] };
    assert_eq!(cpu::merge(&[whole, fewer], 2), Err(MergeError::Lse { part: 1, wanted: 3, found: 2 }));
    let narrow = PartialState { output: &[0.0; 3], lse: &[0.0; 3] };
    assert_eq!(cpu::merge(&[whole, narrow], 2), Err(MergeError::Output { part: 1, rows: 3, v_head_dim: 2, found: 3 }));
}
