//! How far sound kernels may be apart: the floor of the tolerance rule, row by row.
//!
//! Its derivation stands at the head of [`verify`](super).

use super::yardstick::Twin;
use super::{DIVISION, SIGMAS, TINY, U, VANISHING, exp_error, round};
use crate::cpu::reference;
use crate::inputs::AttentionInputs;
use crate::problem::{AttentionProblem, ScoreStage};

/// Chains of partial sums.
const LANES: usize = 16;

/// What an f32 number may be off by.
#[derive(Clone, Copy, Default)]
pub(super) struct Off {
    /// Of independent roundings.
    variance: f64,
    /// Of functions with a stated error.
    at_worst: f64,
    /// What sums in order and correct functions are off by at most.
    plain: f64,
}

impl Off {
    pub(super) fn total(self) -> f64 {
        SIGMAS * self.variance.sqrt() + self.at_worst
    }

    fn times(self, factor: f64) -> Self {
        let size = factor.abs();
        Self { variance: self.variance * size * size, at_worst: self.at_worst * size, plain: self.plain * size }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            variance: self.variance + other.variance,
            at_worst: self.at_worst + other.at_worst,
            plain: self.plain + other.plain,
        }
    }

    fn worst(at_worst: f64) -> Self {
        Self { at_worst, plain: at_worst, ..Self::default() }
    }

    fn rounding(value: f64) -> Self {
        let size = U * value.abs();
        Self { variance: size * size / 3.0, at_worst: 0.0, plain: size }
    }

    /// `value` is rounded to f32. Where all that it may be rounds to one number, every kernel has that number.
    fn rounded(self, value: f64) -> Self {
        let off = self.total();
        let plain = self.plain + if is_f32(value) && self.plain == 0.0 { 0.0 } else { U * value.abs() };
        if same(round(value - off), round(value + off)) {
            return Self { plain, ..Self::default() };
        }
        Self { plain, ..self.plus(Self::rounding(value)) }
    }

    /// An error `e` of an exponent changes a power by a factor of `exp(e)`; for all but huge errors, by `1 + e`.
    fn grown(self) -> Self {
        let total = self.total();
        if total < 1e-3 {
            return Self { plain: self.plain.exp_m1(), ..self };
        }
        Self { plain: self.plain.exp_m1(), ..self.times(total.exp_m1() / total) }
    }
}

fn same(a: f32, b: f32) -> bool {
    a.total_cmp(&b).is_eq()
}

fn is_f32(value: f64) -> bool {
    f64::from(round(value)).total_cmp(&value).is_eq()
}

/// The partial sums of a sum in chains side by side, which are then added up; and in order.
#[derive(Clone, Copy, Default)]
struct Chains {
    count: usize,
    in_order: f64,
    lanes: [f64; LANES],
    squares: f64,
    plain: f64,
}

impl Chains {
    /// `term` is itself rounded, unless it is an f32.
    fn add(&mut self, term: f64) {
        let rounds = |x: f64| if is_f32(x) { 0.0 } else { x.abs() };
        let lane = &mut self.lanes[self.count % LANES];
        self.count += 1;
        self.in_order += term;
        *lane += term;
        let (term, lane) = (rounds(term), rounds(*lane));
        self.squares += term * term + lane * lane;
        self.plain += term + rounds(self.in_order);
    }

    fn off(&self) -> Off {
        let (mut sum, mut squares) = (0.0, self.squares);
        for lane in self.lanes {
            sum += lane;
            squares += if is_f32(sum) { 0.0 } else { sum * sum };
        }
        Off { variance: squares * U * U / 3.0, at_worst: 0.0, plain: U * self.plain }
    }
}

/// What one score is after each stage, and what it may be off by.
pub(super) struct Score {
    pub(super) scaled: (f32, Off),
    pub(super) capped: (f32, Off),
    pub(super) masked: (f32, Off),
}

/// The score of a pair with exact sums, each step rounded to f32 once, and what it may be off by.
pub(super) fn score(
    problem: &AttentionProblem,
    inputs: &AttentionInputs<'_>,
    [b, h, i]: [usize; 3],
    j: usize,
) -> Score {
    let spec = problem.spec();
    let query = reference::load(inputs.query, &spec.query.layout, [b, h, i]);
    let key = reference::load(inputs.key, &spec.key.layout, [b, h / problem.group_size(), j]);
    let mut chains = Chains::default();
    query.zip(key).for_each(|(q, k)| chains.add(q * k));
    let scale = f64::from(problem.scale());
    let dot = chains.in_order;
    let exact = scale * f64::from(round(dot));
    let mut off = chains.off().rounded(dot).times(scale).rounded(exact);
    off.at_worst += if exact.abs() > 0.0 && exact.abs() < TINY { TINY } else { 0.0 };
    let mut score = round(exact);
    let scaled = (score, off);
    if let Some(cap) = spec.softcap.map(f64::from) {
        let exact = f64::from(score);
        let x = 2.0 * exact.abs() / cap;
        let t = (-x).exp();
        let slope = 4.0 * t / ((1.0 + t) * (1.0 + t));
        let exponential = cap * slope / 2.0 * (exp_error(x) + U * x);
        let capped = cap * (exact / cap).tanh();
        off = off.times(slope).plus(Off::worst(exponential + (DIVISION + 2.0 * U) * capped.abs()));
        score = round(capped);
    }
    let capped = (score, off);
    if let Some((bias, of)) = inputs.bias.zip(spec.bias.as_ref()) {
        let exact = f64::from(score) + f64::from(bias.get(of.layout.index([b, h, i, j])));
        off = off.rounded(exact);
        score = round(exact);
    }
    if let Some(slopes) = inputs.alibi_slopes {
        let distance = (i as i64 + problem.offset(inputs.kv_len(problem, b)) - j as i64).abs() as f64;
        let slope = f64::from(slopes[h]);
        let term = slope * f64::from(round(distance));
        // the distance, if it has more than 24 bits, and the product, which may be part of a fused difference
        let of_term = Off::rounding(if is_f32(distance) { 0.0 } else { slope * distance });
        let of_term = of_term.plus(Off::rounding(if is_f32(term) { 0.0 } else { term }));
        let exact = f64::from(score) - f64::from(round(term));
        off = off.plus(of_term).rounded(exact);
        score = round(exact);
    }
    Score { scaled, capped, masked: (score, off) }
}

/// The floors of one row: what sound kernels may differ by, before the result is rounded to its element.
pub(super) struct Bounds {
    /// `[v_head_dim]`
    pub(super) columns: Vec<Column>,
    pub(super) lse: Bound,
    /// Of the mass that maximum and sum stand for, relative.
    pub(super) state: Bound,
    /// Of the sum of a row's returned weights.
    pub(super) mass: f64,
    /// error of weights that all keys have in common, relative
    common: Off,
    /// No key has any weight, so the output is exactly zero.
    pub(super) empty: bool,
}

/// What may be off, and what the direct algorithm in order may be off by at most.
#[derive(Clone, Copy, Default)]
pub(super) struct Bound {
    pub(super) floor: f64,
    pub(super) plain: f64,
}

impl Bound {
    const fn exact() -> Self {
        Self { floor: 0.0, plain: 0.0 }
    }
}

#[derive(Clone, Default)]
pub(super) struct Column {
    pub(super) bound: Bound,
    /// `sum p_j |v_j|`
    pub(super) magnitude: f64,
    /// An infinite value has a weight too small for f32.
    pub(super) vanishing_infinity: bool,
}

impl Bounds {
    pub(super) fn new(
        problem: &AttentionProblem,
        inputs: &AttentionInputs<'_>,
        [b, h, _]: [usize; 3],
        oracle: &reference::Row,
        twin: &Twin,
    ) -> Self {
        let spec = problem.spec();
        let width = problem.v_head_dim();
        let live = || (0..problem.kv_len()).filter(|&j| oracle.allowed[j]);
        let n = live().count() as f64;
        // what an exponent is off by: its score, the difference to the maximum; and the exponential of it
        let power = |score: f32, off: Off| {
            let x = f64::from(score) - twin.max;
            off.rounded_difference(x, twin.of_max).plus(Off::worst(exp_error(x))).grown()
        };
        let mut offs = vec![Off::default(); width];
        let mut sums = vec![Chains::default(); width];
        let mut flushed = vec![0.0; width];
        let mut columns = vec![Column::default(); width];
        let (mut common, mut total) = (Off::default(), Chains::default());
        if twin.sink_prob > 0.0 {
            let off = power(twin.sink, Off::default());
            common = off.times(twin.sink_prob);
            total.add(twin.sink_prob);
            for (of, output) in offs.iter_mut().zip(&twin.output) {
                *of = off.times(twin.sink_prob * output);
            }
        }
        for j in live() {
            let prob = twin.probs[j];
            let off = if prob > 0.0 { power(twin.scores[j], twin.offs[j]) } else { Off::default() };
            if prob > 0.0 {
                common = common.plus(off.times(prob));
                total.add(prob);
            }
            let value = reference::load(inputs.value, &spec.value.layout, [b, h / problem.group_size(), j]);
            for (d, v) in value.enumerate() {
                flushed[d] += TINY * v.abs();
                columns[d].vanishing_infinity |= v.is_infinite() && oracle.probs[j] < VANISHING;
                if prob > 0.0 {
                    columns[d].magnitude += prob * v.abs();
                    sums[d].add(prob * v);
                    offs[d] = offs[d].plus(off.times(prob * (v - twin.output[d])));
                }
            }
        }
        // each sum may be rescaled as often as something is added to it
        let twice = |mut off: Off| {
            off.variance *= 2.0;
            off
        };
        let of_total = twice(total.off());
        let division = Off::worst(DIVISION);
        for (d, column) in columns.iter_mut().enumerate() {
            let output = twin.output[d];
            let off = offs[d].plus(twice(sums[d].off())).plus(of_total.plus(division).times(output));
            // a weight is divided before it is multiplied, or the sum is: a rounding more of each term at most
            let plain = off.plain + 2.0 * U * column.magnitude + flushed[d] + TINY;
            column.bound = Bound { floor: off.total() + flushed[d] + TINY, plain };
        }
        let state = common.plus(of_total);
        let relative = Bound { floor: state.total() + n * TINY, plain: state.plain + n * TINY };
        let ln_sum = (twin.lse - twin.max).abs();
        let logarithm = if ln_sum <= std::f64::consts::LN_2 { 2f64.powi(-21) } else { 6.0 * U * ln_sum };
        let rounded = U * (twin.lse.abs() + 2.0 * twin.max.abs());
        let of_lse = |bound: f64| bound + logarithm + rounded;
        let lse = Bound { floor: of_lse(relative.floor), plain: of_lse(relative.plain) };
        Self {
            columns,
            lse,
            state: relative,
            mass: 2.0 * SIGMAS * state.variance.sqrt() + state.at_worst + DIVISION + n * TINY + U,
            common: state.plus(division),
            empty: n == 0.0 || oracle.lse == f64::NEG_INFINITY,
        }
    }

    /// What the twin has for the returned score of key `j`, its bound, and whether it must be exact.
    pub(super) fn score(
        &self,
        problem: &AttentionProblem,
        inputs: &AttentionInputs<'_>,
        row: [usize; 3],
        j: usize,
        (oracle, twin): (&reference::Row, &Twin),
    ) -> (f64, Bound, bool) {
        let of = |(value, off): (f32, Off)| {
            let value = f64::from(value);
            // the roundings that twin and kernel have in common, and the plain algorithm too
            let plain = off.plain + U * value.abs() + TINY;
            (value, Bound { floor: off.total() + TINY, plain }, false)
        };
        match problem.spec().scores {
            Some(ScoreStage::Scaled) => of(score(problem, inputs, row, j).scaled),
            Some(ScoreStage::Capped) => of(score(problem, inputs, row, j).capped),
            Some(ScoreStage::Masked) if oracle.allowed[j] => of((twin.scores[j], twin.offs[j])),
            Some(ScoreStage::Masked) => (f64::NEG_INFINITY, Bound::exact(), true),
            Some(ScoreStage::Probs) if oracle.allowed[j] && !self.empty => {
                let x = f64::from(twin.scores[j]) - twin.max;
                let own = twin.offs[j].rounded_difference(x, twin.of_max).plus(Off::worst(exp_error(x))).grown();
                let off = own.plus(self.common).times(twin.probs[j]);
                let plain = off.plain + 2.0 * U * twin.probs[j] + TINY;
                (twin.probs[j], Bound { floor: off.total() + TINY, plain }, false)
            }
            Some(ScoreStage::Probs) | None => (0.0, Bound::exact(), true),
        }
    }
}

impl Off {
    /// The difference of a score and the row's maximum, which has an error of its own. That is common to all keys, but may
    /// make the difference round another way.
    fn rounded_difference(self, x: f64, max: Self) -> Self {
        let off = self.total() + max.total();
        if same(round(x - off), round(x + off)) || is_f32(x) {
            return self;
        }
        self.plus(Self::rounding(x))
    }
}
