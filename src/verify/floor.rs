//! How far sound kernels may be apart: the floor of the tolerance rule, row by row.
//!
//! Its derivation stands at the head of [`verify`](super).

use super::rounding::{DIVISION, SIGMAS, TINY, U, VANISHING, exp_error, round};
use super::yardstick::Twin;
use crate::cpu::reference::{self, Stored};
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
        // nothing times infinity is nothing here: no error stays none, and what is multiplied by 0 is 0 whatever its error
        let times = |x: f64, size: f64| if x == 0.0 || size == 0.0 { 0.0 } else { x * size };
        let size = factor.abs();
        Self {
            variance: times(self.variance, size * size),
            at_worst: times(self.at_worst, size),
            plain: times(self.plain, size),
        }
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
        let rounding = if value.is_finite() && !round(value).is_finite() { f64::INFINITY } else { U * value.abs() };
        let plain = self.plain + if is_f32(value) && self.plain == 0.0 { 0.0 } else { rounding };
        if same(round(value - off), round(value + off)) {
            return Self { plain, ..Self::default() };
        }
        Self { plain, ..self.plus(Self::rounding(value)) }
    }

    /// What `function` of a number is off by that is off by this; `function` gives the largest difference that an error of
    /// its argument may make. A slope would do for small errors only: it forbids a large one what the function bends away
    /// from, and allows it more than the function ever gives.
    fn through(self, function: impl Fn(f64) -> f64) -> Self {
        let total = self.total();
        let plain = if self.plain > 0.0 { function(self.plain) } else { 0.0 };
        if total == 0.0 {
            return Self { plain, ..Self::default() };
        }
        if !total.is_finite() {
            return Self { variance: 0.0, at_worst: function(total), plain };
        }
        Self { plain, ..self.times(function(total) / total) }
    }

    /// Of `factor * exp(x)`, where `x` is off by this. A power that has no f64 may still have an error that has one, and the
    /// other way round.
    fn of_power(self, x: f64, factor: f64) -> Self {
        if x.is_nan() || x == f64::NEG_INFINITY {
            // every kernel has NaN, or a power of 0
            return Self::default();
        }
        self.through(
            |off| if off < 1.0 { factor * x.exp() * off.exp_m1() } else { factor * ((x + off).exp() - x.exp()) },
        )
    }

    /// Of `cap * tanh(x / cap)`, where `x` is off by this.
    fn of_cap(self, x: f64, cap: f64) -> Self {
        let capped = |x: f64| cap * (x / cap).tanh();
        self.through(|off| {
            if off < 1e-6 * cap {
                // the difference of two numbers that near has no digits left
                return off * ((x.abs() - off).max(0.0) / cap).cosh().powi(-2);
            }
            // what may be infinity less infinity may be anything
            let [below, above] = [x - off, x + off].map(|x| (!x.is_nan()).then(|| capped(x)));
            (above.unwrap_or(cap) - capped(x)).max(capped(x) - below.unwrap_or(-cap))
        })
    }

    /// The same, where it is known that the number is off by no more than this.
    fn at_most(self, most: f64) -> Self {
        let plain = self.plain.min(most);
        if self.total() <= most { Self { plain, ..self } } else { Self { plain, ..Self::worst(most) } }
    }
}

fn same(a: f32, b: f32) -> bool {
    a.total_cmp(&b).is_eq()
}

fn is_f32(value: f64) -> bool {
    f64::from(round(value)).total_cmp(&value).is_eq()
}

/// A sum of products: its value, and what the roundings of its partial sums may be off by, in chains side by side or one
/// after the other, whichever is more: kernels do both.
///
/// Kernels add in orders of their own. That the partial sums of one order are f32s says nothing of those of another, so a
/// sum counts as exact where it is in every order: its terms are multiples of one power of two, and all of them together are
/// less than 2^24 of it.
fn dot(query: &[f64], key: impl Iterator<Item = f64>) -> (f64, Off) {
    let (mut sum, mut plain, mut squares) = (0.0, 0.0, [0.0f64; LANES]);
    let mut lanes = [0.0f64; LANES];
    // of products and of sums apart
    let (mut all, mut unit) = (0.0, f64::INFINITY);
    let mut of_products = [0.0; 2];
    // one chain after the other: the running one, and those before it
    let (mut chain, mut chains, mut chain_squares) = (0.0f64, 0.0f64, 0.0f64);
    for (n, (q, k)) in query.iter().zip(key).enumerate() {
        let lane = &mut lanes[n % LANES];
        let product = q * k;
        sum += product;
        *lane += product;
        if n % LANES == 0 {
            chains += chain;
            chain_squares += chains * chains;
            chain = 0.0;
        }
        chain += product;
        chain_squares += chain * chain;
        squares[n % LANES] += *lane * *lane;
        plain += sum.abs();
        (all, unit) = (all + product.abs(), unit.min(lowest_bit(product)));
        if !is_f32(product) {
            of_products = [of_products[0] + product * product, of_products[1] + product.abs()];
        }
    }
    let mut squares: f64 = squares.iter().sum();
    lanes.iter().fold(0.0, |sum, lane| {
        let sum = sum + lane;
        squares += sum * sum;
        sum
    });
    squares = squares.max(chain_squares + sum * sum);
    if !sum.is_finite() {
        // an infinity among the numbers is none of rounding
        return (sum, Off::default());
    }
    if all < unit * f64::from(1 << 24) {
        (squares, plain) = (0.0, 0.0);
    }
    let [product_squares, products] = of_products;
    (sum, Off { variance: (squares + product_squares) * U * U / 3.0, at_worst: 0.0, plain: U * (plain + products) })
}

/// The largest power of two that a number is a multiple of; infinity for 0.
fn lowest_bit(x: f64) -> f64 {
    if x == 0.0 || !x.is_finite() {
        return f64::INFINITY;
    }
    // products of f32s are normal in f64
    let zeros = (x.to_bits() | 1 << 52).trailing_zeros();
    let exponent = i32::try_from(x.to_bits() >> 52 & 0x7ff).unwrap_or_default() - 1075;
    f64::powi(2.0, exponent + zeros.cast_signed())
}

/// The same for sums over keys, `width` of them side by side. Weights are hardly ever exact: everything is rounded.
struct Sums {
    width: usize,
    count: usize,
    lanes: Vec<f64>,
    in_order: Vec<f64>,
    squares: Vec<f64>,
    plain: Vec<f64>,
}

impl Sums {
    fn new(width: usize) -> Self {
        let zeros = || vec![0.0; width];
        let lanes = vec![0.0; LANES * width];
        Self { width, count: 0, lanes, in_order: zeros(), squares: zeros(), plain: zeros() }
    }

    fn add(&mut self, prob: f64, values: &[f64]) {
        let lane = &mut self.lanes[self.count % LANES * self.width..][..self.width];
        self.count += 1;
        let sums = self.in_order.iter_mut().zip(lane).zip(self.squares.iter_mut().zip(&mut self.plain));
        for (((sum, lane), (squares, plain)), value) in sums.zip(values) {
            let term = prob * value;
            *sum += term;
            *lane += term;
            *squares += term * term + *lane * *lane;
            *plain += term.abs() + sum.abs();
        }
    }

    /// Of column `d`. Each partial sum may be rescaled once more.
    fn off(&self, d: usize) -> Off {
        let (mut sum, mut squares) = (0.0, self.squares[d]);
        for lane in self.lanes.chunks_exact(self.width) {
            sum += lane[d];
            squares += sum * sum;
        }
        Off { variance: 2.0 * squares * U * U / 3.0, at_worst: 0.0, plain: U * self.plain[d] }
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
    query: &[f64],
    [b, h, i]: [usize; 3],
    j: usize,
) -> Score {
    let spec = problem.spec();
    let key = reference::stored(problem, inputs, Stored::Key, [b, h / problem.group_size(), j]);
    let (dot, of_dot) = dot(query, key);
    let scale = f64::from(problem.scale());
    let exact = scale * f64::from(round(dot));
    let mut off = of_dot.rounded(dot).times(scale).rounded(exact);
    off.at_worst += if exact.abs() > 0.0 && exact.abs() < TINY { TINY } else { 0.0 };
    let mut score = round(exact);
    let scaled = (score, off);
    if let Some(cap) = spec.softcap.map(f64::from) {
        let exact = f64::from(score);
        let x = 2.0 * exact.abs() / cap;
        let t = (-x).exp();
        let slope = 4.0 * t / ((1.0 + t) * (1.0 + t));
        // of an infinite score `t` is 0, without an error
        let exponential = if slope > 0.0 { cap * slope / 2.0 * (exp_error(x) + U * x) } else { 0.0 };
        let capped = cap * (exact / cap).tanh();
        off = off.of_cap(exact, cap).plus(Off::worst(exponential + (DIVISION + 2.0 * U) * capped.abs()));
        score = round(capped);
    }
    let capped = (score, off);
    if let Some((bias, of)) = inputs.terms.bias.zip(spec.bias.as_ref()) {
        let exact = f64::from(score) + f64::from(bias.get(of.layout.index([b, h, i, j])));
        off = off.rounded(exact);
        score = round(exact);
    }
    if let Some(slope) = inputs.slope(problem, b, h) {
        let distance = (inputs.diagonal(problem, b, i) - j as i64).abs() as f64;
        let slope = f64::from(slope);
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
    /// How much more a weight may be off by for what the mass of the row is off by.
    mass_moves: f64,
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
    /// How far the values of keys, and the sink's 0, are from the output: it is a mean of them, whatever the weights.
    spread: f64,
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
        let width = problem.v_head_dim();
        let live = || (0..problem.kv_len()).filter(|&j| oracle.allowed[j]);
        let n = live().count() as f64;
        // what a weight is off by: its score, the difference to the maximum, the exponential of it
        let mut largest = 0.0f64;
        let mut weight = |score: f32, off: Off| {
            let x = f64::from(score) - twin.max;
            let exponent = off.rounded_difference(x, twin.of_max).plus(Off::worst(exp_error(x)));
            let weight = exponent.of_power(x, 1.0 / twin.sum);
            if weight.total() > 0.0 {
                largest = largest.max(exponent.total());
            }
            weight
        };
        let mut offs = vec![Off::default(); width];
        let mut sums = Sums::new(width);
        let mut values = vec![0.0; width];
        let mut flushed = vec![0.0; width];
        let mut columns = vec![Column::default(); width];
        let (mut common, mut total) = (Off::default(), Sums::new(1));
        if twin.sink_prob > 0.0 {
            common = weight(twin.sink, Off::default());
            total.add(twin.sink_prob, &[1.0]);
            for ((of, column), output) in offs.iter_mut().zip(&mut columns).zip(&twin.output) {
                *of = common.times(*output);
                column.spread = output.abs();
            }
        }
        for j in live() {
            let prob = twin.probs[j];
            let off = weight(twin.scores[j], twin.offs[j]);
            common = common.plus(off);
            if prob > 0.0 {
                total.add(prob, &[1.0]);
            }
            let value = reference::stored(problem, inputs, Stored::Value, [b, h / problem.group_size(), j]);
            values.iter_mut().zip(value).for_each(|(v, value)| *v = value);
            if prob > 0.0 {
                sums.add(prob, &values);
            }
            for (d, &v) in values.iter().enumerate() {
                flushed[d] += TINY * v.abs();
                columns[d].vanishing_infinity |= v.is_infinite() && oracle.probs[j] < VANISHING;
                if prob > 0.0 {
                    columns[d].magnitude += prob * v.abs();
                }
                if prob > 0.0 || off.total() > 0.0 {
                    let apart = v - twin.output[d];
                    offs[d] = offs[d].plus(off.times(apart));
                    columns[d].spread = columns[d].spread.max(apart.abs());
                }
            }
        }
        let of_total = total.off(0);
        let division = Off::worst(DIVISION);
        let mass_moves = 1.0 + common.total();
        for (d, column) in columns.iter_mut().enumerate() {
            let output = twin.output[d];
            let off = offs[d].times(mass_moves).at_most(column.spread);
            let off = off.plus(sums.off(d)).plus(of_total.plus(division).times(output));
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
        let floor = relative.floor.min(largest + of_total.total() + n * TINY);
        let lse = Bound { floor: of_lse(floor), plain: of_lse(relative.plain) };
        Self {
            columns,
            lse,
            state: relative,
            mass: 2.0 * SIGMAS * state.variance.sqrt() + state.at_worst + DIVISION + n * TINY + U,
            common: state.plus(division),
            mass_moves,
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
            Some(ScoreStage::Scaled) => of(score(problem, inputs, &twin.query, row, j).scaled),
            Some(ScoreStage::Capped) => of(score(problem, inputs, &twin.query, row, j).capped),
            Some(ScoreStage::Masked) if oracle.allowed[j] => of((twin.scores[j], twin.offs[j])),
            Some(ScoreStage::Masked) => (f64::NEG_INFINITY, Bound::exact(), true),
            Some(ScoreStage::Probs) if oracle.allowed[j] && !self.empty => {
                let x = f64::from(twin.scores[j]) - twin.max;
                let own = twin.offs[j].rounded_difference(x, twin.of_max).plus(Off::worst(exp_error(x)));
                let own = own.of_power(x, 1.0 / twin.sum).plus(self.common.times(twin.probs[j]));
                let off = own.times(self.mass_moves).at_most(twin.probs[j].max(1.0 - twin.probs[j]));
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
