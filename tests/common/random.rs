//! Random cases over all that can be asked, small enough for every implementation: short ones in any layout, and long ones
//! whose keys are split among workgroups.
//!
//! `TRIALS` says how many of each; `SEED` gives other ones.

use cross_attention::{AlibiSlopes, Diagonal, Element, Layout, ScoreStage, TensorSpec};
use proptest::option;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngSeed, TestRunner};

use super::case::{Case, arranged};
use super::recipe::{Ranges, Scores};

/// How random cases are drawn: so many unless `TRIALS` says otherwise, from `SEED`. None is kept in a file: what they turn up
/// becomes a case of the table.
pub(crate) fn config(cases: u32) -> Config {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let cases = number("TRIALS").map_or(cases, |trials| u32::try_from(trials).expect("not that many"));
    let seed = RngSeed::Fixed(number("SEED").unwrap_or(1));
    Config { cases, failure_persistence: None, rng_seed: seed, ..Config::default() }
}

#[allow(dead_code, reason = "not every test binary draws them all at once")]
/// As many cases as are asked for, the same for the same seed.
pub(crate) fn drawn(strategy: &impl Strategy<Value = Case>, cases: u32) -> Vec<Case> {
    let config = config(cases);
    let wanted = config.cases;
    let mut runner = TestRunner::new(config);
    let mut case = || strategy.new_tree(&mut runner).expect("nothing is filtered out").current();
    (0..wanted).map(|_| case()).collect()
}

/// A case with a few thousand scores at most.
pub(crate) fn case() -> impl Strategy<Value = Case> {
    of_shape(shape())
}

/// A case with 1024 to 5000 keys and few rows.
pub(crate) fn long_case() -> impl Strategy<Value = Case> {
    let shape = (1..3usize, 1..3usize, 1..3usize, 1..5usize, 1024..5001usize, [1..20usize, 1..20usize]).prop_map(
        |(batch, kv_heads, group, q_len, kv_len, widths)| Shape { batch, kv_heads, group, q_len, kv_len, widths },
    );
    of_shape(shape)
}

fn of_shape(shape: impl Strategy<Value = Shape>) -> impl Strategy<Value = Case> {
    (shape, numbers(), masks(), (results(), storage(), any::<u16>().no_shrink())).prop_flat_map(
        |(shape, numbers, masks, (results, storage, seed))| {
            let case = shape.case(format!("random_{seed}"));
            let case = storage.ask(results.ask(masks.ask(numbers.ask(case))));
            let of = case.spec.clone();
            let inputs = (laid(of.query), laid(of.key), laid(of.value), proptest::array::uniform2(any::<bool>()));
            let scales = (laid(of.key_scale.unwrap_or(of.key)), laid(of.value_scale.unwrap_or(of.value)));
            (Just(case), inputs, scales, written(of.output)).prop_map(
                |(case, (query, key, value, shared), scales, output)| {
                    case.spec(|spec| {
                        (spec.query, spec.key, spec.value, spec.output) = (query, key, value, output);
                        spec.key_scale = spec.key_scale.map(|_| scales.0);
                        spec.value_scale = spec.value_scale.map(|_| scales.1);
                        // one context for the whole batch
                        for (tensor, shared) in [&mut spec.key, &mut spec.value].into_iter().zip(shared) {
                            if shared && spec.paged.is_none() {
                                tensor.layout.strides[0] = 0;
                            }
                        }
                    })
                },
            )
        },
    )
}

#[derive(Clone, Debug)]
struct Shape {
    batch: usize,
    kv_heads: usize,
    group: usize,
    q_len: usize,
    kv_len: usize,
    widths: [usize; 2],
}

impl Shape {
    fn case(&self, name: String) -> Case {
        let Self { batch, kv_heads, group, q_len, kv_len, widths } = *self;
        Case::new(name, "a random case", batch, [group * kv_heads, kv_heads], [q_len, kv_len], widths)
    }
}

/// How the tensors are stored.
#[derive(Clone, Debug)]
struct Storage {
    elements: [Element; 4],
    /// of keys and of values: the element of the scales, and how many of the possible numbers of blocks
    bytes: [Option<(Element, usize)>; 2],
    page_len: Option<u32>,
    /// fewer pages than are needed
    shared_pages: bool,
}

impl Storage {
    fn ask(&self, mut case: Case) -> Case {
        case = case.stored(self.elements);
        let kv_len = case.spec.key.layout.shape[2];
        if let Some(page_len) = self.page_len {
            case = case.paged(1 << page_len);
            if self.shared_pages && kv_len > 0 {
                case = case.pages(2);
            }
        }
        // sizes that a scale in f16 does not hold
        let extreme = (case.recipe.value_size - 1.0).abs() > 0.0 || matches!(case.recipe.scores, Scores::Shifted(_));
        let blocks = |width: usize, n: usize| {
            let divisors: Vec<usize> = (1..=width).filter(|blocks| width.is_multiple_of(*blocks)).collect();
            divisors[n % divisors.len()]
        };
        let [key, value] = self.bytes.map(|bytes| bytes.map(|(of, n)| (if extreme { Element::F32 } else { of }, n)));
        if let Some((element, n)) = key {
            case = case.clone().key_i8(element, blocks(case.spec.key.layout.shape[3], n));
        }
        if let Some((element, n)) = value {
            case = case.clone().value_i8(element, blocks(case.spec.value.layout.shape[3], n));
        }
        case
    }
}

fn storage() -> impl Strategy<Value = Storage> {
    let element = || prop_oneof![3 => Just(Element::F32), 2 => Just(Element::F16), 2 => Just(Element::Bf16)];
    let elements = [element(), element(), element(), element()];
    let bytes = || option::weighted(0.25, (prop_oneof![Just(Element::F32), Just(Element::F16)], 0..24usize));
    (elements, [bytes(), bytes()], option::weighted(0.3, 0..9u32), any::<bool>())
        .prop_map(|(elements, bytes, page_len, shared_pages)| Storage { elements, bytes, page_len, shared_pages })
}

fn shape() -> impl Strategy<Value = Shape> {
    let q_len = prop_oneof![8 => 1..20usize, 1 => Just(0)];
    let kv_len = prop_oneof![6 => 1..40usize, 3 => 60..140usize, 1 => Just(0)];
    let width = || prop_oneof![3 => 1..24usize, 1 => 24..72usize];
    (0..4usize, 1..4usize, 1..4usize, q_len, kv_len, [width(), width()]).prop_map(
        |(batch, kv_heads, group, q_len, kv_len, widths)| Shape { batch, kv_heads, group, q_len, kv_len, widths },
    )
}

#[derive(Clone, Debug)]
struct NumberTerms {
    scale: Option<f32>,
    softcap: Option<f32>,
    bias: Option<(Element, String, f32)>,
    common: f32,
    padding: Option<(f32, f32)>,
    alibi: Option<AlibiSlopes>,
    sinks: Option<f32>,
    scores: Scores,
    value_size: f32,
}

impl NumberTerms {
    fn ask(&self, mut case: Case) -> Case {
        case.spec.scale = self.scale;
        case.spec.softcap = self.softcap;
        case.spec.alibi_slopes = self.alibi;
        case = case.drawn(self.scores);
        if let Some((element, axes, forbids)) = &self.bias {
            case = case.bias(*element, axes).bias_forbids(*forbids).common(self.common);
            case.recipe.padding = self.padding;
            if *element == Element::F16 && self.common.abs() > 1e4 {
                case.recipe.bias_common = 0.0;
            }
        }
        case = case.value_size(self.value_size);
        match self.sinks {
            Some(around) => case.sinks(around),
            None => case,
        }
    }
}

fn numbers() -> impl Strategy<Value = NumberTerms> {
    let scale = option::of(prop_oneof![Just(0.0f32), Just(1.0), -2.0..2.0f32]);
    let bias_element = prop_oneof![Just(Element::F32), Just(Element::F16), Just(Element::Bf16)];
    let bias = option::of((bias_element, axes(), prop_oneof![Just(0.0f32), 0.0..0.9f32]));
    let scores = prop_oneof![
        4 => (0.1..8.0f32).prop_map(Scores::Spread),
        1 => (-1.0..1.0f32).prop_map(Scores::Rising),
        1 => (0..140usize).prop_map(Scores::Dominant),
        1 => (-500.0..500.0f32).prop_map(Scores::Shifted),
        1 => prop_oneof![Just(1e4f32), Just(-1e4), Just(1e6), Just(-1e6)].prop_map(Scores::Shifted),
        1 => Just(Scores::Equal),
    ];
    let common = prop_oneof![6 => Just(0.0f32), 1 => Just(1e4), 1 => Just(1e6), 1 => Just(-1e6)];
    let padding = prop_oneof![Just(-1e4f32), Just(-1e9), Just(f32::MIN)];
    let padding = option::weighted(0.3, (padding, prop_oneof![Just(1.0f32), 0.0..1.0f32]));
    let value_size = prop_oneof![8 => Just(1.0f32), 1 => Just(1e38), 1 => Just(1e-30)];
    let alibi = option::of(prop_oneof![Just(AlibiSlopes::PerHead), Just(AlibiSlopes::PerBatchAndHead)]);
    let terms = (scale, option::of(0.1..30.0f32), bias, alibi, option::of(-5.0..5.0f32));
    (terms, scores, common, padding, value_size).prop_map(
        |((scale, softcap, bias, alibi, sinks), scores, common, padding, value_size)| NumberTerms {
            scale,
            softcap,
            bias,
            common,
            padding,
            alibi,
            sinks,
            scores,
            value_size,
        },
    )
}

#[derive(Clone, Debug)]
struct MaskTerms {
    mask: Option<(String, f32, bool)>,
    /// shares of rows and keys, one for each batch entry
    lens: [Option<[f32; 3]>; 2],
    ranges: Option<Ranges>,
    causal: Option<Diagonal>,
    windows: [Option<u32>; 2],
    offset: Option<Diagonal>,
    poison: bool,
}

impl MaskTerms {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a small length")]
    fn ask(&self, mut case: Case) -> Case {
        let [batch, ..] = case.spec.query.layout.shape;
        let [q_len, kv_len] = [case.spec.query, case.spec.key].map(|tensor| tensor.layout.shape[2] as f32);
        if let Some((axes, keeps, blank_rows)) = &self.mask {
            case = case.mask(axes);
            (case.recipe.mask_keeps, case.recipe.blank_rows) = (*keeps, *blank_rows);
        }
        let lens = |shares: [f32; 3], all: f32| -> Vec<u32> {
            shares[..batch].iter().map(|share| (share * all).min(all) as u32).collect()
        };
        if let Some(shares) = self.lens[0] {
            case = case.q_lens(&lens(shares, q_len));
        }
        if let Some(shares) = self.lens[1] {
            case = case.kv_lens(&lens(shares, kv_len));
        }
        if let Some(ranges) = self.ranges {
            case = case.ranges(ranges);
        }
        case.spec.causal = self.causal;
        [case.spec.window_left, case.spec.window_right] = self.windows;
        case.spec.offset = if self.causal.is_some() { None } else { self.offset };
        case.recipe.poison = self.poison;
        case
    }
}

fn masks() -> impl Strategy<Value = MaskTerms> {
    let mask = option::of((axes(), 0.0..1.0f32, any::<bool>()));
    let share = || prop_oneof![4 => 0.0..1.0f32, 1 => Just(0.0f32), 2 => Just(1.0f32)];
    let q_lens = option::weighted(0.3, proptest::array::uniform3(share()));
    let lens = (q_lens, option::of(proptest::array::uniform3(share()))).prop_map(|(q_lens, kv_lens)| [q_lens, kv_lens]);
    let ranges = option::weighted(0.3, prop_oneof![Just(Ranges::Wild), (1..70i32).prop_map(Ranges::Segments)]);
    let window = || option::weighted(0.3, prop_oneof![8 => 0..80u32, 1 => Just(u32::MAX)]);
    (mask, lens, ranges, option::of(diagonal()), [window(), window()], option::of(diagonal()), any::<bool>()).prop_map(
        |(mask, lens, ranges, causal, windows, offset, poison)| MaskTerms {
            mask,
            lens,
            ranges,
            causal,
            windows,
            offset,
            poison,
        },
    )
}

fn diagonal() -> impl Strategy<Value = Diagonal> {
    prop_oneof![
        Just(Diagonal::TopLeft),
        Just(Diagonal::BottomRight),
        Just(Diagonal::EndOfKeys),
        (-30..150i32).prop_map(Diagonal::Fixed),
    ]
}

#[derive(Clone, Debug)]
struct Results {
    lse: bool,
    scores: Option<ScoreStage>,
}

impl Results {
    fn ask(&self, case: Case) -> Case {
        // scores before the masks hold what a poisoned key makes of them
        let before_masks = matches!(self.scores, Some(ScoreStage::Scaled | ScoreStage::Capped));
        let case = if before_masks { case.clean() } else { case };
        case.spec(|spec| (spec.lse, spec.scores) = (self.lse, self.scores))
    }
}

fn results() -> impl Strategy<Value = Results> {
    let stage = prop_oneof![
        Just(ScoreStage::Scaled),
        Just(ScoreStage::Capped),
        Just(ScoreStage::Masked),
        Just(ScoreStage::Probs),
    ];
    (any::<bool>(), option::weighted(0.25, stage)).prop_map(|(lse, scores)| Results { lse, scores })
}

/// Any of the axes of a score matrix, as [`Case::bias`] takes them.
fn axes() -> impl Strategy<Value = String> {
    any::<[bool; 4]>().prop_map(|full| {
        full.into_iter().zip("bhqk".chars()).map(|(full, axis)| if full { axis } else { '1' }).collect()
    })
}

/// The tensor in any memory order, with gaps and an offset.
fn written(tensor: TensorSpec) -> impl Strategy<Value = TensorSpec> {
    let order = Just([0, 1, 2, 3]).prop_shuffle();
    let gaps = proptest::array::uniform4(prop_oneof![2 => Just(0usize), 1 => 1..6usize]);
    let anywhere = (order, gaps, 0..9usize).prop_map(|(order, gaps, offset)| (order, gaps, Some(offset)));
    let plain = Just(([0, 1, 2, 3], [0; 4], None));
    prop_oneof![plain, anywhere].prop_map(move |(order, gaps, offset)| {
        let shape = tensor.layout.shape;
        let layout = match offset {
            None => Layout::bhld(shape),
            Some(offset) => arranged(shape, order, gaps, offset),
        };
        TensorSpec { layout, ..tensor }
    })
}

/// The same, and in a few cases with an axis that repeats.
fn laid(tensor: TensorSpec) -> impl Strategy<Value = TensorSpec> {
    (written(tensor), option::weighted(0.1, 0..4usize)).prop_map(|(mut tensor, repeated)| {
        if let Some(axis) = repeated {
            tensor.layout.strides[axis] = 0;
        }
        tensor
    })
}
