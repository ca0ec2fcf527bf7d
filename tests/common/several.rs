//! What several sources must do, on any device: the same checks offline and on every GPU.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "small numbers of tests, and a scale rounded to f32"
)]

mod refusals;
mod terms;

use cross_attention::sources::{Combine, Gate, Source, SourceInputs, Sources, SourcesOutput};
use cross_attention::{Device, Element, Error, Layout, TensorData, TensorSpec, Terms};

pub(crate) use self::refusals::refusals;
pub(crate) use self::terms::terms;

use super::plain::{Row, Seen, numbers, row};

const BATCH: usize = 2;
const HEADS: [usize; 2] = [4, 2];
const Q_LEN: usize = 3;
const DIM: usize = 8;
const WIDTH: usize = 6;

/// What is asked, apart from the numbers.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    /// Keys of each source.
    pub(crate) lens: Vec<usize>,
    pub(crate) combine: Combine,
    pub(crate) gate: Gate,
    /// Which terms each source has: key lengths, mask, row ranges, weights before, weights after, scale, row weights.
    pub(crate) terms: Vec<[bool; 7]>,
    pub(crate) seed: u64,
}

/// A source with its numbers.
struct Held {
    source: Source,
    key: TensorData,
    value: TensorData,
    kv_lens: Vec<u32>,
    mask: Vec<bool>,
    row_start: Vec<i32>,
    row_end: Vec<i32>,
    key_weights: Vec<f32>,
    after_weights: Vec<f32>,
    row_weights: Vec<f32>,
}

impl Held {
    fn new(asked: &Asked, n: usize) -> Self {
        let len = asked.lens[n];
        let [by_len, masked, ranges, before, after, scaled, by_row] = asked.terms[n];
        let seed = asked.seed * 100 + n as u64 * 10;
        let positive = |seed, count| numbers(seed, count, 1.0).into_iter().map(f32::abs).collect::<Vec<_>>();
        let element = if n % 2 == 1 { Element::F16 } else { Element::F32 };
        let of = |width| TensorSpec { element, layout: Layout::bhld([BATCH, HEADS[1], len, width]) };
        let query = TensorSpec::f32(Layout::bhld([BATCH, HEADS[0], Q_LEN, DIM]));
        let mut source = Source::new(format!("number {n}"), query, of(DIM), of(WIDTH));
        source.spec.kv_lens = by_len;
        source.spec.mask = masked.then(|| Layout::bhld([BATCH, 1, Q_LEN, len]));
        source.spec.row_ranges = ranges;
        source.key_weights = before;
        source.after_weights = after;
        let sum = asked.combine == Combine::Sum;
        source.scale = if sum && scaled { -0.75 } else { 1.0 };
        source.row_weights = sum && by_row;
        let limit = |seed| positive(seed, BATCH * Q_LEN).into_iter().map(|x| (x * len as f32) as i32).collect();
        // a tenth of the weights is 0
        let weights = |seed: u64| positive(seed, BATCH * len).into_iter().map(|x| (x - 0.1).max(0.0) * 3.0).collect();
        let mut held = Self {
            source,
            key: TensorData::F32(numbers(seed, BATCH * HEADS[1] * len * DIM, 2.0)),
            value: TensorData::F32(numbers(seed + 1, BATCH * HEADS[1] * len * WIDTH, 2.0)),
            kv_lens: positive(seed + 2, BATCH).into_iter().map(|x| (x * (len + 1) as f32) as u32).collect(),
            mask: numbers(seed + 3, BATCH * Q_LEN * len, 1.0).into_iter().map(|x| x > -0.4).collect(),
            row_start: vec![0; BATCH * Q_LEN],
            row_end: limit(seed + 4),
            key_weights: weights(seed + 5),
            after_weights: weights(seed + 6),
            row_weights: numbers(seed + 7, BATCH * Q_LEN, 1.0),
        };
        held.poison(len);
        held.key = TensorData::from_f32(element, held.key.to_f32());
        held.value = TensorData::from_f32(element, held.value.to_f32());
        held
    }

    /// NaN where no row may look: behind the key length, and where a weight before the softmax is 0.
    fn poison(&mut self, len: usize) {
        let (mut key, mut value) = (self.key.to_f32(), self.value.to_f32());
        for (b, j) in (0..BATCH).flat_map(|b| (0..len).map(move |j| (b, j))) {
            let behind = self.source.spec.kv_lens && j >= self.kv_lens[b] as usize;
            let forbidden = self.source.key_weights && self.key_weights[b * len + j] == 0.0;
            let left_out = self.source.after_weights && self.after_weights[b * len + j] == 0.0;
            for h in 0..HEADS[1] {
                let at = (b * HEADS[1] + h) * len + j;
                if behind || forbidden {
                    key[at * DIM..(at + 1) * DIM].fill(f32::NAN);
                }
                if behind || forbidden || left_out {
                    value[at * WIDTH..(at + 1) * WIDTH].fill(f32::NAN);
                }
            }
        }
        (self.key, self.value) = (TensorData::F32(key), TensorData::F32(value));
    }

    fn inputs(&self) -> SourceInputs<'_> {
        let Source { spec, key_weights, after_weights, row_weights, .. } = &self.source;
        let terms = Terms {
            kv_lens: spec.kv_lens.then_some((&self.kv_lens).into()),
            mask: spec.mask.is_some().then_some((&self.mask).into()),
            row_start: spec.row_ranges.then_some((&self.row_start).into()),
            row_end: spec.row_ranges.then_some((&self.row_end).into()),
            ..Terms::default()
        };
        SourceInputs {
            terms,
            key_weights: key_weights.then_some(&self.key_weights),
            after_weights: after_weights.then_some(&self.after_weights),
            row_weights: row_weights.then_some((&self.row_weights).into()),
            ..SourceInputs::new(self.key.as_ref(), self.value.as_ref())
        }
    }

    /// Keys and values of batch entry `b` as vectors that the row may see, with ln(weight) and the weight after.
    fn seen(&self, [b, h, i]: [usize; 3]) -> Vec<(Vec<f32>, Vec<f32>, f64, f64)> {
        let len = self.source.spec.key.layout.shape[2];
        let head = h / (HEADS[0] / HEADS[1]);
        let (key, value) = (self.key.to_f32(), self.value.to_f32());
        let mut seen = vec![];
        for j in 0..len {
            let spec = &self.source.spec;
            let row = b * Q_LEN + i;
            let hidden = (spec.kv_lens && j >= self.kv_lens[b] as usize)
                || (spec.mask.is_some() && !self.mask[row * len + j])
                || (spec.row_ranges && j as i32 >= self.row_end[row]);
            let before = if self.source.key_weights { f64::from(self.key_weights[b * len + j]) } else { 1.0 };
            if hidden || before == 0.0 {
                continue;
            }
            let after = if self.source.after_weights { f64::from(self.after_weights[b * len + j]) } else { 1.0 };
            let at = (b * HEADS[1] + head) * len + j;
            let mut value = value[at * WIDTH..(at + 1) * WIDTH].to_vec();
            if after == 0.0 {
                value.fill(0.0);
            }
            seen.push((key[at * DIM..(at + 1) * DIM].to_vec(), value, before.ln(), after));
        }
        seen
    }
}

fn of(query: &[f32], seen: &[(Vec<f32>, Vec<f32>, f64, f64)]) -> Row {
    let keys: Vec<_> =
        seen.iter().map(|(key, value, bias, after)| Seen { key, value, bias: *bias, after: *after }).collect();
    row(query, &keys, f64::from(1.0 / (DIM as f64).sqrt() as f32), WIDTH)
}

/// Runs what is asked and compares every row with the formula written out.
pub(crate) fn check(device: &Device, asked: &Asked) -> Result<(), String> {
    let held: Vec<_> = (0..asked.lens.len()).map(|n| Held::new(asked, n)).collect();
    let query = numbers(asked.seed * 100 + 99, BATCH * HEADS[0] * Q_LEN * DIM, 1.5);
    let gates = numbers(asked.seed * 100 + 98, HEADS[0], 2.0);
    let gates = match asked.gate {
        Gate::None => &[][..],
        Gate::Scalar => &gates[..1],
        Gate::Heads => &gates,
    };
    let gate = (!gates.is_empty()).then_some(gates);
    let inputs: Vec<_> = held.iter().map(Held::inputs).collect();
    let described = held.iter().map(|held| held.source.clone()).collect();
    let sources = Sources::new(described, asked.combine, asked.gate).map_err(|error| error.to_string())?;
    let prepared = sources.prepare_blocking(device).map_err(|error| error.to_string())?;
    let run = || prepared.run_blocking(&query, &inputs, gate.map(Into::into)).map_err(|error| error.to_string());
    let result = run()?;
    if result != run()? {
        return Err("another call gives other bits".to_owned());
    }
    compare(asked, &held, &query, gates, &result)
}

fn compare(asked: &Asked, held: &[Held], query: &[f32], gates: &[f32], got: &SourcesOutput) -> Result<(), String> {
    let rows = BATCH * HEADS[0] * Q_LEN;
    for n in 0..rows {
        let [b, h, i] = [n / (HEADS[0] * Q_LEN), n / Q_LEN % HEADS[0], n % Q_LEN];
        let query = &query[n * DIM..(n + 1) * DIM];
        let seen: Vec<_> = held.iter().map(|held| held.seen([b, h, i])).collect();
        let alone: Vec<_> = seen.iter().map(|seen| of(query, seen)).collect();
        for (s, alone) in alone.iter().enumerate() {
            alone
                .compare(&[], got.source_lse[s * rows + n])
                .map_err(|error| format!("source {s}, row {n}: {error}"))?;
        }
        let mut want = match asked.combine {
            Combine::Softmax => of(query, &seen.concat()),
            Combine::Sum => {
                let mut sum =
                    Row { output: vec![0.0; WIDTH], lse: 0.0, may: [f64::from(f32::MIN_POSITIVE), 0.0], may_mass: 0.0 };
                for (held, alone) in held.iter().zip(&alone) {
                    let by_row = if held.source.row_weights { held.row_weights[b * Q_LEN + i] } else { 1.0 };
                    let weight = f64::from(held.source.scale) * f64::from(by_row);
                    sum.output.iter_mut().zip(&alone.output).for_each(|(x, y)| *x += weight * y);
                    // each product and sum rounds once more, which the bound of a merge has room for
                    sum.may[0] += weight.abs() * alone.may[0];
                }
                sum
            }
        };
        let factor = match asked.gate {
            Gate::None => 1.0,
            Gate::Scalar => f64::from(gates[0]).tanh(),
            Gate::Heads => f64::from(gates[h]).tanh(),
        };
        let empty = seen.iter().all(Vec::is_empty);
        // tanh to a few ulp, and the product
        let size = want.output.iter().fold(0.0f64, |size, x| size.max(x.abs()));
        want.may[0] = want.may[0] * factor.abs() + 16.0 * f64::from(f32::EPSILON) * size * factor.abs() + 1e-37;
        want.output.iter_mut().for_each(|x| *x *= factor);
        let output = &got.output[n * WIDTH..(n + 1) * WIDTH];
        if empty && output.iter().any(|x| x.to_bits() != 0) {
            return Err(format!("row {n} sees no key, yet is {output:?}"));
        }
        let lse = match &got.lse {
            Some(lse) => lse[n],
            None => 0.0,
        };
        want.compare(output, lse).map_err(|error| format!("row {n}: {error}"))?;
    }
    Ok(())
}

/// Fixed descriptions that use every term.
pub(crate) fn fixed(combine: Combine, gate: Gate) -> Vec<Asked> {
    let term = |n: usize| -> [bool; 7] { std::array::from_fn(|bit| n >> bit & 1 == 1) };
    let asked = |lens: &[usize], terms: &[usize], seed| Asked {
        lens: lens.to_vec(),
        combine,
        gate,
        terms: terms.iter().map(|&n| term(n)).collect(),
        seed,
    };
    vec![
        asked(&[5], &[0], 1),
        asked(&[77, 4], &[0, 0x60], 2),
        asked(&[20, 0, 33], &[0x7f, 0x18, 0x7d], 3),
        asked(&[1, 1, 1, 1], &[0x01, 0x02, 0x04, 0x08], 4),
        // nothing is left to see for some rows
        asked(&[2, 3], &[0x07, 0x0f], 5),
    ]
}

/// A source whose weight is 0, of all rows or of some, adds nothing, whatever its values are.
pub(crate) fn left_out(device: &Device) -> Result<(), String> {
    let lens = [9usize, 7];
    let of = |shape| TensorSpec::f32(Layout::bhld(shape));
    let text = |error: Error| error.to_string();
    let query = numbers(931, BATCH * HEADS[0] * Q_LEN * DIM, 1.5);
    let keys = lens.map(|len| numbers(932 + len as u64, BATCH * HEADS[1] * len * DIM, 2.0));
    // row weights are of all heads: rows of even number leave the second source out
    let weights: Vec<f32> = (0..BATCH * Q_LEN).map(|row| [0.0, 1.0, -0.0, -2.0][row % 4]).collect();
    for (by_row, value) in [(false, f32::NAN), (false, f32::INFINITY), (true, f32::NAN), (true, f32::NEG_INFINITY)] {
        let mut values = lens.map(|len| numbers(934 + len as u64, BATCH * HEADS[1] * len * WIDTH, 2.0));
        values[1].fill(value);
        let source = |n: usize| {
            let tensor = |width| of([BATCH, HEADS[1], lens[n], width]);
            let query = of([BATCH, HEADS[0], Q_LEN, DIM]);
            let mut source = Source::new(format!("{n}"), query, tensor(DIM), tensor(WIDTH));
            (source.scale, source.row_weights) = match (n, by_row) {
                (1, true) => (1.0, true),
                (1, false) => (0.0, false),
                _ => (1.0, false),
            };
            source
        };
        let inputs = |n: usize| SourceInputs {
            row_weights: (n == 1 && by_row).then_some((&weights).into()),
            ..SourceInputs::new(&keys[n], &values[n])
        };
        let run = |count: usize| {
            let (sources, all): (Vec<_>, Vec<_>) = (0..count).map(|n| (source(n), inputs(n))).unzip();
            let sources = Sources::new(sources, Combine::Sum, Gate::None).map_err(|error| error.to_string())?;
            let prepared = sources.prepare_blocking(device).map_err(text)?;
            Ok::<_, String>(prepared.run_blocking(&query, &all, None).map_err(text)?.output)
        };
        for (n, (got, alone)) in run(2)?.into_iter().zip(run(1)?).enumerate() {
            let (b, i) = (n / (HEADS[0] * Q_LEN * WIDTH), n / WIDTH % Q_LEN);
            let out = !by_row || weights[b * Q_LEN + i] == 0.0;
            if out && got.to_bits() != alone.to_bits() {
                return Err(format!("output[{n}] is {got}, and {alone} without the source that holds {value}"));
            }
            if !out && got.is_finite() {
                return Err(format!("output[{n}] is {got}, beside a source that holds {value}"));
            }
        }
    }
    Ok(())
}
