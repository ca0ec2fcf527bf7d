//! Right results that the tolerance rule once refused, each beside wrong ones that it must refuse still.

use cross_attention::cpu::{self, CpuKernel, reference};
use cross_attention::verify::{Report, verify};
use cross_attention::{
    AttentionInputs, AttentionOutput, AttentionProblem, AttentionSpec, Element, Layout, RowState, ScoreStage,
    TensorData, TensorSpec, f16,
};

/// One query row over some keys, with a value of one column each.
struct Row {
    query: Vec<f32>,
    /// one after the other
    keys: Vec<f32>,
    values: Vec<f32>,
    softcap: Option<f32>,
    sinks: Option<Vec<f32>>,
    scores: Option<ScoreStage>,
    output: Element,
}

impl Row {
    fn problem(&self) -> AttentionProblem {
        let width = self.query.len();
        let mut spec = AttentionSpec::new([1, 1, 1, width], [1, 1, self.values.len(), width]);
        spec.value.layout = Layout::bhld([1, 1, self.values.len(), 1]);
        spec.output = TensorSpec { element: self.output, layout: Layout::bhld([1, 1, 1, 1]) };
        (spec.scale, spec.softcap, spec.scores) = (Some(1.0), self.softcap, self.scores);
        (spec.lse, spec.row_state, spec.sinks) = (true, true, self.sinks.is_some());
        AttentionProblem::new(spec).expect("sound")
    }

    fn inputs(&self) -> AttentionInputs<'_> {
        let mut inputs = AttentionInputs::new(&self.query, &self.keys, &self.values);
        inputs.terms.sinks = self.sinks.as_deref();
        inputs
    }

    /// What the oracle says, rounded once.
    fn right(&self) -> AttentionOutput {
        let problem = self.problem();
        reference::attention(&problem, &self.inputs()).expect("it fits").to_output(&problem)
    }

    /// The right output with something else in its place.
    fn with(&self, change: impl Fn(&mut AttentionOutput)) -> Report {
        let mut output = self.right();
        change(&mut output);
        verify(&self.problem(), &self.inputs(), &output).expect("it fits")
    }
}

fn passes(report: &Report) {
    assert!(report.passed() && report.beyond_f32 == 0, "{report}");
}

fn fails(report: &Report) {
    assert!(!report.passed(), "{report}");
}

fn set_output(output: &mut AttentionOutput, x: f32) {
    output.output = TensorData::F32(vec![x]);
}

/// Such a score has no error, and the cap that it becomes has next to none.
#[test]
fn an_infinite_score_under_a_cap_is_the_cap() {
    for infinity in [f32::INFINITY, f32::NEG_INFINITY] {
        for scores in [None, Some(ScoreStage::Capped), Some(ScoreStage::Masked), Some(ScoreStage::Probs)] {
            let row = Row {
                query: vec![1.0, 0.5],
                keys: vec![infinity, 1.0, 0.5, 0.25],
                values: vec![2.0, 3.0],
                softcap: Some(0.1),
                sinks: Some(vec![0.5]),
                scores,
                output: Element::F32,
            };
            passes(&row.with(|_| {}));
            for kernel in CpuKernel::ALL {
                let output = cpu::attention_with(kernel, &row.problem(), &row.inputs()).expect("it fits");
                passes(&verify(&row.problem(), &row.inputs(), &output).expect("it fits"));
            }
            fails(&row.with(|output| output.output = TensorData::F32(vec![f32::NAN])));
            fails(&row.with(|output| set_output(output, output.output.to_f32()[0] * (1.0 + 1e-4))));
            fails(&row.with(|output| output.lse.as_mut().expect("asked for")[0] += 1e-4));
            if scores.is_some() {
                fails(&row.with(|output| output.scores.as_mut().expect("asked for")[0] += 1e-4));
            }
        }
    }
}

/// 0.3 is lost where it is added to 10^7. The cap of 0.1 is flat there, and is not 0.04 steeper than it is further down; and
/// what a score is off by, a capped one is not off by if that is more than two caps.
#[test]
fn what_is_lost_before_a_cap_is_bounded_by_the_cap() {
    for (last, right) in [(0.3f32, 0.1 * 3f32.tanh()), (0.0, 0.0)] {
        let row = Row {
            query: vec![1.0; 3],
            keys: vec![1e7 + 1.0, -1e7 - 1.0, last],
            values: vec![2.0],
            softcap: Some(0.1),
            sinks: None,
            scores: Some(ScoreStage::Capped),
            output: Element::F32,
        };
        let scored = |x: f32| row.with(|output| output.scores = Some(vec![x]));
        passes(&scored(right));
        // added up in another order
        passes(&scored(0.0));
        for beyond in [right + 0.21, right - 0.21, f32::NAN] {
            let wrong = scored(beyond);
            assert!(!wrong.passed(), "{beyond}: {wrong}");
        }
    }
}

/// A score of 5 that is lost where it is added to 3 10^10. Weights, outputs and sums may then be anything that weights,
/// outputs and sums can be, and nothing else.
#[test]
fn what_is_lost_from_a_score_leaves_a_mean_a_mean() {
    let row = |scores| Row {
        query: vec![1.0; 3],
        keys: vec![3e10, -3e10, 5.0, 0.0, 0.0, 4.0],
        values: vec![1.0, 2.0],
        softcap: None,
        sinks: None,
        scores,
        output: Element::F32,
    };
    let bare = row(None);
    passes(&bare.with(|_| {}));
    // as if the first score were 0
    let lost = |output: &mut AttentionOutput| {
        set_output(output, 1.982_014);
        output.lse = Some(vec![4.018_15]);
        output.row_state = Some(RowState { row_max: vec![4.0], row_sum: vec![1.018_316] });
    };
    passes(&bare.with(lost));
    for beyond in [0.5, 2.1, f32::NAN, f32::INFINITY] {
        fails(&bare.with(|output| set_output(output, beyond)));
    }
    for beyond in [1e5, -1e5, f32::NAN] {
        fails(&bare.with(|output| output.lse = Some(vec![beyond])));
    }
    let weights = row(Some(ScoreStage::Probs));
    passes(&weights.with(|output| {
        lost(output);
        output.scores = Some(vec![0.017_986_21, 0.982_013_8]);
    }));
    fails(&weights.with(|output| output.scores = Some(vec![-0.1, 1.1])));
}

/// A mean of values near f32's end whose sign is lost with the score: an f16 is infinite to one side or the other. Where the
/// sign is certain, the other side is wrong.
#[test]
fn a_sign_that_is_lost_may_overflow_to_either_side() {
    let row = |second: f32| Row {
        query: vec![1.0; 3],
        keys: vec![3e10, -3e10, 5.0, 0.0, 0.0, 4.0],
        values: vec![1e38, second],
        softcap: None,
        sinks: None,
        scores: None,
        output: Element::F16,
    };
    let gives = |second: f32, x: f16| row(second).with(|output| output.output = TensorData::F16(vec![x]));
    passes(&gives(-1.05e38, f16::INFINITY));
    passes(&gives(-1.05e38, f16::NEG_INFINITY));
    passes(&gives(1.05e38, f16::INFINITY));
    for wrong in [f16::NEG_INFINITY, f16::MAX, f16::ZERO, f16::NAN] {
        fails(&gives(1.05e38, wrong));
    }
    fails(&gives(-1.05e38, f16::NAN));
}

/// A score of negative infinity beside nothing but a sink: no key has any mass.
#[test]
fn a_row_without_mass_may_be_zero_beside_a_sink() {
    let row = |sinks: Option<Vec<f32>>, keys: Vec<f32>, values: Vec<f32>| Row {
        query: vec![-1.0],
        keys,
        values,
        softcap: None,
        sinks,
        scores: None,
        output: Element::F32,
    };
    let alone = row(Some(vec![0.5]), vec![f32::INFINITY], vec![f32::INFINITY]);
    for right in [0.0, f32::NAN] {
        passes(&alone.with(|output| set_output(output, right)));
    }
    for wrong in [1.0, 1e-30, -1e-30] {
        fails(&alone.with(|output| set_output(output, wrong)));
    }
    // beside a key that has mass, what is seen is not left out
    let beside = row(Some(vec![0.5]), vec![f32::INFINITY, 1.0], vec![f32::NAN, 1.0]);
    fails(&beside.with(|output| set_output(output, 0.0)));
}

/// Columns that are all alike, so that the roundings of a dot product are too: in chains of 16 one after the other they are
/// more than in 16 chains side by side, and in one chain, by chance, next to none.
#[test]
fn dot_products_in_chains_one_after_the_other() {
    let seen = |kernel| {
        for seed in 0..400u32 {
            let number = |n: u32| ((seed * 57 + n).wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0;
            let row = Row {
                query: (0..55).map(|n| f16::from_f32(number(n)).to_f32()).collect(),
                keys: vec![number(99); 55],
                values: vec![1.0],
                softcap: None,
                sinks: None,
                scores: Some(ScoreStage::Scaled),
                output: Element::F32,
            };
            let output = cpu::attention_with(kernel, &row.problem(), &row.inputs()).expect("it fits");
            passes(&verify(&row.problem(), &row.inputs(), &output).expect("it fits"));
            // a column left out
            let short = row.right().scores.expect("asked for")[0] - row.query[7] * row.keys[7];
            if (row.query[7] * row.keys[7]).abs() > 1e-3 {
                fails(&row.with(|output| output.scores = Some(vec![short])));
            }
        }
    };
    CpuKernel::ALL.into_iter().for_each(seen);
}
