//! Inputs of a case: numbers that show a fault, drawn from the case's name and from the place they stand in.

use cross_attention::{
    AlibiSlopes, AttentionData, AttentionInputs, AttentionProblem, AttentionSpec, Element, Layout, OwnedTerms,
    ScoreStage, TensorData, TensorSpec, bf16, f16,
};

/// How the scores of a row are spread over its keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Scores {
    /// Around zero, with this standard deviation.
    Spread(f32),
    /// Each key this much above the one before: a new maximum in every block. Negative: falling.
    Rising(f32),
    /// One key stands out by 12.
    Dominant(usize),
    /// All moved by this much.
    Shifted(f32),
    /// All zero.
    Equal,
    /// This, and a quarter or two: numbers of few bits, so that under a scale that is a power of 2 plain f32 rounds nothing.
    Exact(f32),
}

/// The range of keys each row may see, where ranges are given.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Ranges {
    /// Keys and rows fall into segments of this many keys; a row sees its own.
    Segments(i32),
    /// Anything: empty, the wrong way round, negative, past the end, whole.
    Wild,
    /// No key for any row.
    Empty,
}

/// A tensor to plant a number in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Tensor {
    Query,
    Key,
    Value,
    Bias,
    KeyScale,
    ValueScale,
}

/// How the data of a case is made. What the spec does not ask for is ignored.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Recipe {
    pub(crate) scores: Scores,
    /// Values are within 3 times this.
    pub(crate) value_size: f32,
    /// Added to every number of the bias: what all scores have in common.
    pub(crate) bias_common: f32,
    /// A share of the bias is this number, as padding is said in many models; so is all of it in blank rows.
    pub(crate) padding: Option<(f32, f32)>,
    /// Share of the bias that is negative infinity.
    pub(crate) bias_forbids: f32,
    /// Share of the mask that is true.
    pub(crate) mask_keeps: f32,
    /// Rows and keys of the mask fall into segments of this many; a row sees those of its own. 0: no segments.
    pub(crate) mask_segments: usize,
    /// Rows 1, 4, 7.. of mask and bias forbid every key.
    pub(crate) blank_rows: bool,
    pub(crate) q_lens: Vec<u32>,
    pub(crate) kv_lens: Vec<u32>,
    pub(crate) ranges: Ranges,
    /// Sinks lie within 2 of this.
    pub(crate) sinks_around: f32,
    /// Sinks that are no numbers, for the first heads.
    pub(crate) wild_sinks: bool,
    /// Numbers put in afterwards, `[batch, heads, len, dim]` or a place of the bias.
    pub(crate) planted: Vec<(Tensor, [usize; 4], f32)>,
    /// NaN, infinities and 1e30 wherever no row may look.
    pub(crate) poison: bool,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            scores: Scores::Spread(3.0),
            value_size: 1.0,
            bias_common: 0.0,
            padding: None,
            bias_forbids: 0.0,
            mask_keeps: 0.6,
            mask_segments: 0,
            blank_rows: false,
            q_lens: Vec::new(),
            kv_lens: Vec::new(),
            ranges: Ranges::Wild,
            sinks_around: 0.0,
            wild_sinks: false,
            planted: Vec::new(),
            poison: false,
        }
    }
}

impl Recipe {
    /// The data of a problem. Elements depend on the seed and their place in the tensor, not on the layout;
    /// gaps of a layout, and three elements behind its end, are NaN.
    pub(crate) fn data(&self, seed: &str, spec: &AttentionSpec, problem: &AttentionProblem) -> AttentionData {
        let draw = |tensor: &str| Draw::new(seed, tensor);
        let (batch, q_len) = (problem.batch(), problem.q_len());
        let head_dim = problem.head_dim();
        let scale = problem.scale();
        // what one unit of key[0] adds to a score, where the first component of every query row is 1
        let lift = if head_dim > 1 && scale != 0.0 { 1.0 / scale } else { 0.0 };
        let spread = if let Scores::Spread(spread) = self.scores { spread } else { 1.0 };
        let size = if scale == 0.0 { 1.0 } else { spread / (scale.abs() * (head_dim as f32).sqrt()) };
        let raised = |j: usize| match self.scores {
            Scores::Rising(step) => step * j as f32,
            Scores::Dominant(key) => 12.0 * f32::from(u8::from(key == j)),
            Scores::Shifted(by) | Scores::Exact(by) => by,
            Scores::Spread(_) | Scores::Equal => 0.0,
        };

        let (query, key, value) = (draw("query"), draw("key"), draw("value"));
        // scores before the masks are those of all keys
        let raw = matches!(spec.scores, Some(ScoreStage::Scaled | ScoreStage::Capped));
        let kv_lens = (spec.kv_lens && !raw).then_some(self.kv_lens.as_slice());
        let block_table = spec.paged.map(|_| table(&draw("block_table"), problem, kv_lens));
        let place = |at: [usize; 4]| in_memory(problem, block_table.as_deref(), at);
        // of each tensor all that is stored by a key, wherever it lies
        let by_key = |tensor: &TensorSpec, number: &dyn Fn([usize; 4]) -> f32| {
            let [of_batch, heads, len, width] = tensor.layout.shape;
            let logical = match spec.paged {
                Some(paged) => [batch, heads, paged.kv_len, width],
                None => [of_batch, heads, len, width],
            };
            let stored =
                |at: &[usize; 4]| spec.paged.is_none() || kv_lens.is_none_or(|lens| at[2] < lens[at[0]] as usize);
            let mut values = vec![f32::NAN; tensor.layout.extent().unwrap_or(0) + 3];
            for at in places(logical).filter(stored) {
                values[tensor.layout.index(place(at))] = number(at);
            }
            values
        };
        let (key, key_scale) = as_stored(
            &spec.key,
            spec.key_scale.as_ref(),
            by_key(&spec.key, &|at| {
                let number = match self.scores {
                    Scores::Exact(_) => (key.normal(at) * 2.0).round() / 4.0,
                    _ => size * key.normal(at),
                };
                number + if at[3] == 0 { lift * raised(at[2]) } else { 0.0 }
            }),
        );
        let (value, value_scale) = as_stored(
            &spec.value,
            spec.value_scale.as_ref(),
            by_key(&spec.value, &|at| {
                let [b, h, j, _] = at;
                let number = ((7 * j + 3 * h + 5 * b) % 16) as f32 / 4.0 - 2.0;
                self.value_size * (number + 0.3 * value.normal(at))
            }),
        );
        let mut data = AttentionData {
            query: fill(&spec.query, |at| match self.scores {
                Scores::Equal => 0.0,
                Scores::Exact(_) => 1.0,
                _ if at[3] == 0 && head_dim > 1 => 1.0,
                _ => query.normal(at),
            }),
            key,
            value,
            terms: OwnedTerms {
                bias: spec.bias.as_ref().map(|of| {
                    let (numbers, forbids, pads) = (draw("bias"), draw("bias_forbids"), draw("padding"));
                    fill(of, |at| match self.padding {
                        Some((padding, share)) if pads.unit(at) < share || self.is_blank(at) => padding,
                        None if self.is_blank(at) => f32::NEG_INFINITY,
                        _ if forbids.unit(at) < self.bias_forbids => f32::NEG_INFINITY,
                        _ => self.bias_common + 2.0 * numbers.normal(at),
                    })
                }),
                mask: spec.mask.as_ref().map(|layout| {
                    let keeps = draw("mask");
                    let mut mask = vec![true; layout.extent().unwrap_or(0)];
                    for at in places(layout.shape) {
                        let own = self.mask_segments == 0 || at[2] / self.mask_segments == at[3] / self.mask_segments;
                        mask[layout.index(at)] = own && keeps.unit(at) < self.mask_keeps && !self.is_blank(at);
                    }
                    mask
                }),
                key_scale,
                value_scale,
                q_lens: spec.q_lens.then(|| self.q_lens.clone()),
                kv_lens: spec.kv_lens.then(|| self.kv_lens.clone()),
                row_start: spec.row_ranges.then(|| Vec::with_capacity(batch * q_len)),
                row_end: spec.row_ranges.then(|| Vec::with_capacity(batch * q_len)),
                alibi_slopes: spec.alibi_slopes.map(|slopes| {
                    let heads = problem.q_heads();
                    let entries = if slopes == AlibiSlopes::PerBatchAndHead { batch } else { 1 };
                    // those of each further entry half as steep, head 1 without
                    let of = |n: usize| match (n / heads, n % heads) {
                        (_, 1) => 0.0,
                        (b, h) => (-8.0 * (h + 1) as f32 / heads as f32 - b as f32).exp2(),
                    };
                    (0..entries * heads).map(of).collect()
                }),
                sinks: spec.sinks.then(|| {
                    let sinks = draw("sinks");
                    let drawn = |h| self.sinks_around + 4.0 * sinks.unit([h, 0, 0, 0]) - 2.0;
                    let wild = [f32::INFINITY, f32::NAN, f32::NEG_INFINITY];
                    (0..problem.q_heads())
                        .map(
                            |h| {
                                if self.wild_sinks {
                                    wild.get(h).copied().unwrap_or_else(|| drawn(h))
                                } else {
                                    drawn(h)
                                }
                            },
                        )
                        .collect()
                }),
                block_table,
            },
        };
        if let (Some(starts), Some(ends)) = (&mut data.terms.row_start, &mut data.terms.row_end) {
            let ranges = draw("ranges");
            for [b, i, ..] in places([batch, q_len, 1, 1]) {
                let (start, end) = self.range(&ranges, [b, i, 0, 0], problem);
                starts.push(start);
                ends.push(end);
            }
        }
        for &(tensor, at, number) in &self.planted {
            let (of, into) = match tensor {
                Tensor::Query => (&spec.query, Some(&mut data.query)),
                Tensor::Key => (&spec.key, Some(&mut data.key)),
                Tensor::Value => (&spec.value, Some(&mut data.value)),
                Tensor::Bias => (spec.bias.as_ref().unwrap_or(&spec.query), data.terms.bias.as_mut()),
                Tensor::KeyScale => (spec.key_scale.as_ref().unwrap_or(&spec.key), data.terms.key_scale.as_mut()),
                Tensor::ValueScale => {
                    (spec.value_scale.as_ref().unwrap_or(&spec.value), data.terms.value_scale.as_mut())
                }
            };
            let at = match tensor {
                Tensor::Query | Tensor::Bias => at,
                _ => in_memory(problem, data.terms.block_table.as_deref(), at),
            };
            set(into.expect("a number is planted in a tensor that is there"), of.layout.index(at), number);
        }
        if self.poison {
            poison(problem, &mut data);
        }
        data
    }

    fn is_blank(&self, at: [usize; 4]) -> bool {
        self.blank_rows && at[2] % 3 == 1
    }

    fn range(&self, draw: &Draw, at: [usize; 4], problem: &AttentionProblem) -> (i32, i32) {
        let int = |n: usize| i32::try_from(n).expect("cases are small");
        let kv_len = int(problem.kv_len());
        match self.ranges {
            Ranges::Segments(len) => {
                let segment = int(at[1]) % (kv_len / len + 1);
                (segment * len, (segment + 1) * len)
            }
            Ranges::Empty => (kv_len / 2, kv_len / 2),
            Ranges::Wild => {
                let from = draw.below(at, kv_len.unsigned_abs() + 1);
                match draw.below([at[0], at[1], 1, 0], 8) {
                    0 => (i32::MIN, i32::MAX),
                    1 => (from + 2, from),
                    2 => (-7, from),
                    3 => (from, kv_len + 1000),
                    4 => (kv_len, kv_len + 5),
                    _ => (from / 2, from / 2 + kv_len / 2 + 1),
                }
            }
        }
    }
}

/// Every place of a shape, the last axis fastest.
pub(crate) fn places(shape: [usize; 4]) -> impl Iterator<Item = [usize; 4]> {
    let count = Layout::bhld(shape).elements().expect("cases are small");
    let [_, b, c, d] = shape;
    (0..count).map(move |n| [n / (b * c * d), n / (c * d) % b, n / d % c, n % d])
}

/// Whether a key may be seen by a row, by the formula in the docs of [`AttentionSpec`]: by all terms but the
/// bias, and by the bias.
pub(crate) fn allowed(problem: &AttentionProblem, inputs: &AttentionInputs<'_>, at: [usize; 4]) -> (bool, bool) {
    let spec = problem.spec();
    let [b, _, i, j] = at;
    let row = b * problem.q_len() + i;
    let (signed_i, signed_j) = (i as i64, j as i64);
    let q_len = inputs.terms.q_lens.map_or(problem.q_len(), |lens| lens[b] as usize);
    let kv_len = inputs.terms.kv_lens.map_or(problem.kv_len(), |lens| lens[b] as usize);
    let diagonal = signed_i + problem.offset(q_len, kv_len);
    let rest = i < q_len
        && j < kv_len
        && inputs.terms.mask.is_none_or(|mask| mask[spec.mask.expect("the mask has a layout").index(at)])
        && inputs.terms.row_start.is_none_or(|start| i64::from(start[row]) <= signed_j)
        && inputs.terms.row_end.is_none_or(|end| signed_j < i64::from(end[row]))
        && (spec.causal.is_none() || signed_j <= diagonal)
        && spec.window_left.is_none_or(|left| diagonal - i64::from(left) <= signed_j)
        && spec.window_right.is_none_or(|right| signed_j <= diagonal + i64::from(right));
    let bias = match (inputs.terms.bias, spec.bias) {
        (Some(bias), Some(of)) => bias.get(of.layout.index(at)) != f32::NEG_INFINITY,
        _ => true,
    };
    (rest, bias)
}

/// Draws numbers that depend on two names and a place, and on nothing else.
pub(crate) struct Draw {
    seed: u64,
}

impl Draw {
    pub(crate) fn new(seed: &str, tensor: &str) -> Self {
        // FNV-1a
        let seed =
            seed.bytes().chain([0]).chain(tensor.bytes()).fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
            });
        Self { seed }
    }

    fn bits(&self, at: [usize; 4]) -> u64 {
        // splitmix64 over the place
        at.iter().fold(self.seed, |state, &n| {
            let mut z = state.wrapping_add(n as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        })
    }

    fn below(&self, at: [usize; 4], n: u32) -> i32 {
        i32::try_from(self.bits(at) % u64::from(n)).expect("cases are small")
    }

    /// Evenly from 0 to 1.
    fn unit(&self, at: [usize; 4]) -> f32 {
        (self.bits(at) >> 40) as f32 / (1u32 << 24) as f32
    }

    /// Around 0, standard deviation 1, within 3.5: the sum of four even draws.
    pub(crate) fn normal(&self, at: [usize; 4]) -> f32 {
        let bits = self.bits(at);
        let sum: u64 = (0..4).map(|part| (bits >> (16 * part)) & 0xffff).sum();
        (sum as f32 / 65536.0 - 2.0) * 3f32.sqrt()
    }
}

fn fill(tensor: &TensorSpec, number: impl Fn([usize; 4]) -> f32) -> TensorData {
    let mut values = vec![f32::NAN; tensor.layout.extent().unwrap_or(0) + 3];
    for at in places(tensor.layout.shape) {
        values[tensor.layout.index(at)] = number(at);
    }
    TensorData::from_f32(tensor.element, values)
}

/// Numbers as a tensor stores them: rounded, or as signed bytes beside scales. Where a block has a number that is none, as all have
/// that nobody may look at, so is its scale.
#[expect(clippy::cast_possible_truncation, reason = "between -127 and 127")]
fn as_stored(of: &TensorSpec, scale: Option<&TensorSpec>, numbers: Vec<f32>) -> (TensorData, Option<TensorData>) {
    let Some(scale) = scale else { return (TensorData::from_f32(of.element, numbers), None) };
    assert_eq!(of.element, Element::I8);
    let block = of.layout.shape[3] / scale.layout.shape[3];
    let mut scales = vec![f32::NAN; scale.layout.extent().unwrap_or(0) + 3];
    let mut bytes = vec![77i8; numbers.len()];
    for at in places(scale.layout.shape) {
        let [b, h, j, n] = at;
        let columns = || (n * block..(n + 1) * block).map(|d| of.layout.index([b, h, j, d]));
        let largest = columns().fold(0.0f32, |largest, index| {
            if largest.is_nan() || numbers[index].is_nan() { f32::NAN } else { largest.max(numbers[index].abs()) }
        });
        let step = TensorData::from_f32(scale.element, vec![largest / 127.0]).to_f32()[0];
        scales[scale.layout.index(at)] = step;
        if step > 0.0 {
            columns().for_each(|index| bytes[index] = (numbers[index] / step).round().clamp(-128.0, 127.0) as i8);
        }
    }
    (TensorData::I8(bytes), Some(TensorData::from_f32(scale.element, scales)))
}

/// Pages in no order, of which entries of the batch share some where there are too few; behind the last one that is looked at
/// stands what is none.
fn table(draw: &Draw, problem: &AttentionProblem, kv_lens: Option<&[u32]>) -> Vec<i32> {
    let [pages, _, page_len, _] = problem.spec().key.layout.shape;
    let table_len = problem.spec().paged.expect("keys lie in pages").table_len;
    let mut order: Vec<usize> = (0..pages).collect();
    order.sort_by_key(|page| draw.bits([*page, 0, 0, 0]));
    let behind = [-1, i32::MAX, i32::MIN, 1 << 20];
    let mut taken = 0;
    let mut table = vec![];
    for b in 0..problem.batch() {
        let keys = kv_lens.map_or(problem.kv_len(), |lens| lens[b] as usize);
        for n in 0..table_len {
            if n < keys.div_ceil(page_len) {
                table.push(i32::try_from(order[taken % pages]).expect("cases are small"));
                taken += 1;
            } else {
                table.push(behind[n % behind.len()]);
            }
        }
    }
    table
}

/// Where an element of a key or value lies: that of a page where there is a table.
pub(crate) fn in_memory(problem: &AttentionProblem, table: Option<&[i32]>, [b, h, j, d]: [usize; 4]) -> [usize; 4] {
    let (Some(table), Some(paged)) = (table, problem.spec().paged) else { return [b, h, j, d] };
    let page_len = problem.spec().key.layout.shape[2];
    let page = table[b * paged.table_len + j / page_len];
    [usize::try_from(page).expect("a page that is looked at is there"), h, j % page_len, d]
}

/// An element of a key, however it is stored.
pub(crate) fn stored_key(problem: &AttentionProblem, inputs: &AttentionInputs<'_>, at: [usize; 4]) -> f32 {
    let spec = problem.spec();
    let [b, h, j, d] = in_memory(problem, inputs.terms.block_table, at);
    let element = inputs.key.get(spec.key.layout.index([b, h, j, d]));
    match inputs.terms.key_scale.zip(spec.key_scale) {
        Some((scales, of)) => {
            let block = problem.head_dim() / of.layout.shape[3];
            element * scales.get(of.layout.index([b, h, j, d / block]))
        }
        None => element,
    }
}

fn set(tensor: &mut TensorData, index: usize, number: f32) {
    match tensor {
        TensorData::F32(data) => data[index] = number,
        TensorData::F16(data) => data[index] = f16::from_f32(number),
        TensorData::Bf16(data) => data[index] = bf16::from_f32(number),
        // no byte is bad by itself
        TensorData::I8(data) => data[index] = if number > 0.0 { i8::MAX } else { i8::MIN },
        other => panic!("nothing is planted in {other:?}"),
    }
}

/// Overwrites all of key, value and bias that no row may see, and the query of rows that see nothing.
fn poison(problem: &AttentionProblem, data: &mut AttentionData) {
    let spec = problem.spec();
    let table = data.terms.block_table.clone();
    let place = |at: [usize; 4]| in_memory(problem, table.as_deref(), at);
    let untouched = |tensor: &TensorData| vec![false; tensor.as_ref().len()];
    let mut scales_seen = [&data.terms.key_scale, &data.terms.value_scale]
        .map(|scales| scales.as_ref().map(untouched).unwrap_or_default());
    let mut seen = [&data.query, &data.key, &data.value].map(untouched);
    let mut bias_seen = data.terms.bias.as_ref().map(untouched).unwrap_or_default();
    let inputs = data.as_inputs();
    for at in places(problem.score_shape()) {
        let [b, h, i, j] = at;
        let head = h / problem.group_size();
        let (rest, bias) = allowed(problem, &inputs, at);
        if rest && bias {
            let key = place([b, head, j, 0]);
            let mark = |of: &TensorSpec, [b, h, i, _]: [usize; 4], seen: &mut Vec<bool>| {
                (0..of.layout.shape[3]).for_each(|d| seen[of.layout.index([b, h, i, d])] = true);
            };
            let [of_query, of_key, of_value] = &mut seen;
            mark(&spec.query, [b, h, i, 0], of_query);
            mark(&spec.key, key, of_key);
            mark(&spec.value, key, of_value);
            for (scale, seen) in [spec.key_scale, spec.value_scale].into_iter().zip(&mut scales_seen) {
                if let Some(scale) = scale {
                    mark(&scale, key, seen);
                }
            }
        }
        if let Some(of) = spec.bias.as_ref().filter(|_| rest) {
            // a bias of -inf is itself what forbids the key: it stays
            bias_seen[of.layout.index(at)] = true;
        }
    }
    let AttentionData { query, key, value, terms } = data;
    let tensors = [Some(query), Some(key), Some(value), terms.bias.as_mut()];
    let tensors = tensors.into_iter().chain([terms.key_scale.as_mut(), terms.value_scale.as_mut()]);
    let all_seen = seen.iter().chain([&bias_seen]).chain(&scales_seen);
    for (tensor, seen) in tensors.zip(all_seen).filter_map(|(tensor, seen)| Some((tensor?, seen))) {
        let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -1e30];
        for (n, _) in seen.iter().enumerate().filter(|(_, seen)| !**seen) {
            set(tensor, n, bad[n % bad.len()]);
        }
    }
}
