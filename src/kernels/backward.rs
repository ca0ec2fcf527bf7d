//! Gradients (shaders/backward.wgsl and those beside it): the passes over tiles of pairs, their splits, what is bound, dispatches.

mod chosen;
mod rows;
mod tiles;

use std::ops::Range;

pub(crate) use self::chosen::chosen_words;
pub(crate) use self::rows::{delta, sink_bytes, sinks};

use self::chosen::chosen_len;
use self::rows::{blocks_per_row, row_grid, row_sums};
use self::tiles::{Tiles, tiles};
use super::check_invocations;
use crate::backward::BackwardProblem;
use crate::caps::{DeviceCaps, DeviceClass};
use crate::dispatch::{
    Bindings, D_OUTPUT, MAX_ITERATIONS, Needs, Params, Part, RowStatsMap, Shader, Slot, Step, Unsupported, Variant,
    flat_grid, params,
};
use crate::problem::{AlibiSlopes, AttentionProblem};
use crate::tensor::{Layout, TensorSpec};
use crate::weights::WeightsProblem;

/// vec4s of a row that are staged at a time.
const CHUNK: usize = 4;
/// Invocations of a workgroup of the shaders beside the tiles.
const WIDTH: usize = 64;
/// The most splits: the store adds them one after another.
const MAX_SPLITS: usize = 256;

/// Whether the kernels can compute the gradients on such a device, whatever its limits of bindings and grids.
pub(crate) fn supports(problem: &BackwardProblem, caps: &DeviceCaps) -> Result<(), Unsupported> {
    params::supports(problem.forward())?;
    check_invocations(64, caps)
}

/// Where what the kernels know of rows and chosen weights lies behind the row data.
pub(crate) fn row_stats(problem: &BackwardProblem) -> RowStatsMap {
    let gradient = problem.weights().map_or(0, WeightsProblem::elements);
    RowStatsMap::new(problem.forward(), chosen_len(problem).saturating_add(gradient))
}

/// Where the gradient of chosen weights lies there.
pub(crate) fn d_weights_at(problem: &BackwardProblem) -> usize {
    row_stats(problem).chosen_at.saturating_add(chosen_len(problem))
}

/// What a pass over tiles of pairs makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Made {
    /// What chosen weights add to delta of each row.
    Chosen,
    /// The gradient of the query, and each row's share of those of the slopes and of the scale.
    Rows { query: bool, alibi: bool, scale: bool },
    /// The gradients of keys and values.
    Keys { key: bool, value: bool },
    /// The gradient of the bias.
    Bias,
}

/// One pass over tiles of pairs: it makes one gradient, or two that are sums of the same tiles.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Pass {
    pub(crate) made: Made,
    /// What is summed: batch, heads, rows, keys.
    pub(crate) sums: [bool; 4],
    /// Whether pairs are stored where the caller wants them, and not in the workspace.
    pub(crate) direct: bool,
    pub(crate) tiles: Tiles,
    /// Parts that the summed tiles are split into, each with a sum of its own.
    pub(crate) splits: usize,
    /// Heads whose rows are one run.
    heads: usize,
    /// Numbers that a row or key of one split has.
    width: usize,
    /// Rows or keys of the sums: batch, heads, rows or keys.
    shape: [usize; 3],
}

impl Pass {
    /// The passes that a problem needs.
    pub(crate) fn all(problem: &BackwardProblem, caps: &DeviceCaps) -> Result<Vec<Self>, Unsupported> {
        let spec = problem.spec();
        let mut made = vec![];
        made.extend(problem.weights().map(|_| Made::Chosen));
        if spec.d_query.is_some() || spec.d_alibi_slopes || spec.d_scale {
            made.push(Made::Rows { query: spec.d_query.is_some(), alibi: spec.d_alibi_slopes, scale: spec.d_scale });
        }
        let shared = |gradient: Option<TensorSpec>| {
            gradient.map(|gradient| is_summed(&gradient, 0, problem.forward().score_shape()[0]))
        };
        let (key, value) = (shared(spec.d_key), shared(spec.d_value));
        if key.is_some() && key == value && both_fit(problem.forward(), caps) {
            made.push(Made::Keys { key: true, value: true });
        } else {
            made.extend(key.map(|_| Made::Keys { key: true, value: false }));
            made.extend(value.map(|_| Made::Keys { key: false, value: true }));
        }
        made.extend(spec.d_bias.map(|_| Made::Bias));
        made.into_iter().map(|made| Self::new(problem, caps, made)).collect()
    }

    fn new(problem: &BackwardProblem, caps: &DeviceCaps, made: Made) -> Result<Self, Unsupported> {
        let (spec, forward) = (problem.spec(), problem.forward());
        let [batch, q_heads, q_len, kv_len] = forward.score_shape();
        let (head_dim, v_head_dim) = (forward.head_dim(), forward.v_head_dim());
        let group = forward.group_size();
        let (sums, width, shape, heads) = match made {
            Made::Chosen => ([false, false, false, true], 1, [batch, q_heads, q_len], group),
            Made::Rows { query, alibi, scale } => {
                let width = if query { head_dim } else { 0 } + usize::from(alibi) + usize::from(scale);
                ([false, false, false, true], width, [batch, q_heads, q_len], group)
            }
            Made::Keys { key, value } => {
                let shared = spec.d_key.filter(|_| key).or(spec.d_value).is_some_and(|of| is_summed(&of, 0, batch));
                let width = if key { head_dim } else { 0 } + if value { v_head_dim } else { 0 };
                let entries = if shared { 1 } else { batch };
                ([shared, false, true, false], width, [entries, forward.kv_heads(), kv_len], group)
            }
            Made::Bias => {
                let scores = forward.score_shape();
                let bias = spec.d_bias.unwrap_or(spec.d_output);
                let sums = [0, 1, 2, 3].map(|axis| is_summed(&bias, axis, scores[axis]));
                let one = |axis: usize| if sums[axis] { 1 } else { scores[axis] };
                (sums, one(3), [one(0), one(1), one(2)], 1)
            }
        };
        let direct = made == Made::Bias && !sums[2] && !sums[3];
        let tiles = tiles(forward, caps, made, heads * q_len)?;
        let mut pass = Self { made, sums, direct, tiles, splits: 1, heads, width, shape };
        if !direct {
            pass.splits = pass.wanted_splits(forward, caps);
        }
        Ok(pass)
    }

    /// As many as give the device enough workgroups, and no invocation more iterations than it may take.
    fn wanted_splits(&self, forward: &AttentionProblem, caps: &DeviceCaps) -> usize {
        let tiles = self.summed_tiles(&Part::whole(forward));
        let [x, y, z] = self.grid(&Part::whole(forward));
        let workgroups = usize::try_from(x.saturating_mul(y).saturating_mul(z)).unwrap_or(usize::MAX);
        // as many as the split kernel wants
        let wanted: usize = match caps.class {
            DeviceClass::Discrete => 256,
            DeviceClass::Software => 4,
            _ => 64,
        };
        let least = if caps.class == DeviceClass::Software {
            // some are left for what comes after the tiles
            let safe = usize::try_from(MAX_ITERATIONS).unwrap_or(usize::MAX) / 2;
            let most_tiles = safe / self.tile_iterations(forward);
            tiles.div_ceil(most_tiles.max(1))
        } else {
            1
        };
        wanted.div_ceil(workgroups.max(1)).max(least).min(tiles.min(MAX_SPLITS)).max(1)
    }

    const fn owns_keys(&self) -> bool {
        matches!(self.made, Made::Keys { .. })
    }

    /// Query rows, keys: of a part, in tiles; planes of it.
    fn blocks(&self, part: &Part) -> [usize; 3] {
        let rows = self.heads * part.rows.len();
        [rows.div_ceil(self.tiles.rows()), part.keys.len().div_ceil(self.tiles.keys()), part.heads.len() / self.heads]
    }

    fn summed_tiles(&self, part: &Part) -> usize {
        let [row_blocks, key_blocks, planes] = self.blocks(part);
        let counts = [part.batch.len(), planes, row_blocks, key_blocks];
        counts.iter().zip(self.sums).filter(|(_, summed)| *summed).fold(1, |all, (n, _)| all.saturating_mul(*n))
    }

    fn grid(&self, part: &Part) -> [u64; 3] {
        let [row_blocks, key_blocks, planes] = self.blocks(part);
        let [batch, planes, rows, keys] = [part.batch.len(), planes, row_blocks, key_blocks];
        let along = |axis: usize, n: usize| if self.sums[axis] { 1 } else { n as u64 };
        let of_plane = (self.splits * self.tiles.column_blocks) as u64;
        [along(2, rows), along(3, keys), of_plane.saturating_mul(along(0, batch)).saturating_mul(along(1, planes))]
    }

    const fn products(&self) -> [usize; 2] {
        let (dots, weights) = match self.made {
            Made::Rows { query, .. } => (query, false),
            Made::Keys { key, value } => (key, value),
            Made::Bias | Made::Chosen => (false, false),
        };
        [dots as usize, weights as usize]
    }

    /// Whether the product of output gradients and values matters.
    const fn needs_values(&self) -> bool {
        !matches!(self.made, Made::Keys { key: false, .. } | Made::Chosen)
    }

    /// Iterations of all loops of an invocation in one tile, at most.
    fn tile_iterations(&self, forward: &AttentionProblem) -> usize {
        let Tiles { lanes, row_reg, key_reg, columns, .. } = self.tiles;
        // the elements of a vec4 one by one where they are gathered
        let gather = 5;
        let chunk = 1 + gather * (self.tiles.staged(row_reg) + self.tiles.staged(key_reg));
        let chunks = |width: usize| width.div_ceil(4 * CHUNK) * chunk + 1;
        let values = if self.needs_values() { chunks(forward.v_head_dim()) } else { 0 };
        let other_reg = if self.owns_keys() { row_reg } else { key_reg };
        let slices = self.products().iter().sum::<usize>() * other_reg;
        1 + chunks(forward.head_dim()) + values + slices * (1 + lanes + gather * columns)
    }

    /// Where the sums of a part lie in the workspace.
    fn region(&self, part: &Part, forward: &AttentionProblem) -> Layout {
        let [batch, heads, len] = self.shape;
        let whole = Layout::bhld([batch, heads, len, self.width.saturating_mul(self.splits)]);
        let [b, h, l] = self.slice(part, forward);
        let at = [b.start, h.start, l.start, 0];
        let shape = [b.len(), h.len(), l.len(), whole.shape[3]];
        Layout { shape, offset: whole.index(at), ..whole }
    }

    /// The part's share of what is made.
    fn slice(&self, part: &Part, forward: &AttentionProblem) -> [Range<usize>; 3] {
        let group = forward.group_size();
        let kept = |axis: usize, range: &Range<usize>| if self.sums[axis] { 0..1 } else { range.clone() };
        match self.made {
            Made::Rows { .. } | Made::Bias | Made::Chosen => {
                [kept(0, &part.batch), kept(1, &part.heads), kept(2, &part.rows)]
            }
            Made::Keys { .. } => {
                let heads = part.heads.start / group..part.heads.end.div_ceil(group);
                [kept(0, &part.batch), heads, part.keys.clone()]
            }
        }
    }

    /// Bytes of the workspace.
    pub(crate) fn workspace_bytes(&self) -> u64 {
        if self.direct {
            return 0;
        }
        let factors = [self.width, self.splits, 4].into_iter().chain(self.shape);
        factors.fold(1u64, |product, n| product.saturating_mul(n as u64))
    }

    /// Whether an earlier part of the problem has begun these sums.
    fn is_begun(&self, part: &Part) -> bool {
        let starts = [part.batch.start, part.heads.start, part.rows.start, part.keys.start];
        starts.iter().zip(self.sums).any(|(start, summed)| summed && *start > 0)
    }

    /// The axes of batch, heads, rows and keys along which a pass may be cut: pairs that are stored in a short element cannot
    /// be added to.
    pub(crate) fn may_be_cut(&self) -> [bool; 4] {
        self.sums.map(|summed| !(self.direct && summed))
    }

    /// The dispatch over a part.
    pub(crate) fn step(&self, problem: &BackwardProblem, caps: &DeviceCaps, part: &Part) -> Step {
        let (spec, forward) = (problem.spec(), problem.forward());
        let attention = forward.spec();
        let Tiles { lanes, row_reg, key_reg, columns, column_blocks, .. } = self.tiles;
        let mut bindings = Bindings::new(forward, part, caps);
        bindings.read(&[Slot::Query, Slot::Key, Slot::Value]).read_pairs();
        bindings.row_stats(&row_stats(problem), false);
        bindings.read_rows(Slot::DOutput, &spec.d_output);
        let mut variant = Variant::new(Shader::Backward);
        variant.query_vec(attention).key_vec(attention).value_vec(attention).row_vec(&D_OUTPUT, &spec.d_output);
        variant.terms(attention).row_data(true);
        variant.snippets(&["q_lens", "keys", "score", "score_slope", "numerics", "row_stats", "tile_mask_bytes"]);
        variant.snippets(&[if problem.weights().is_some() { "chosen_buffer" } else { "chosen_none" }]);
        variant.snippets.retain(|name| *name != "row_data_none");
        if let (true, Some(bias)) = (self.direct, &spec.d_bias) {
            bindings.write_tensor(Slot::DBias, bias, self.gradient_slice(bias, part, forward));
            variant.store(bias.element).snippets(&["gradient_output"]);
        } else {
            bindings.push(Slot::Gradients, true, self.region(part, forward));
            variant.snippets(&["gradient_workspace"]);
        }
        let [dots, weights] = self.products();
        let (own_reg, other_reg) = if self.owns_keys() { (key_reg, row_reg) } else { (row_reg, key_reg) };
        // rows that are loaded at a time: two keep registers free for more waves, one where there are few
        let at_a_time = if caps.class != DeviceClass::Integrated && row_reg.is_multiple_of(2) { 2 } else { 1 };
        let (alibi, scale) = match self.made {
            Made::Rows { alibi, scale, .. } => (alibi, scale),
            Made::Chosen => (false, true),
            Made::Keys { .. } | Made::Bias => (false, false),
        };
        for (name, value) in [
            ("LANES", lanes),
            ("ROW_REG", row_reg),
            ("KEY_REG", key_reg),
            ("OWN_REG", own_reg),
            ("OWN_KEYS", usize::from(self.owns_keys())),
            ("PAIR_SUMS", usize::from(self.made == Made::Bias)),
            ("CHUNK", CHUNK),
            ("STAGE", self.tiles.stage(dots + weights > 0)),
            ("STAGED_ROWS", self.tiles.staged(row_reg)),
            ("STAGED_KEYS", self.tiles.staged(key_reg)),
            ("VALUE_TURNS", usize::from(self.needs_values())),
            ("STEP", self.tiles.step),
            ("GROUPS", other_reg / self.tiles.step),
            ("PART", at_a_time),
            ("PARTS", row_reg / at_a_time),
            ("WITH_PRODUCTS", usize::from(dots + weights > 0)),
            ("DOT_PRODUCTS", dots),
            ("WEIGHT_PRODUCTS", weights),
            ("COLUMNS", columns),
            ("ALIBI_SUM", usize::from(alibi)),
            ("SCALE_SUM", usize::from(scale)),
            ("CHOSEN_SUM", usize::from(self.made == Made::Chosen)),
        ] {
            variant.constant(name, value);
        }
        variant.key_overrides(forward).score_overrides(attention);
        let (head_dim, v_head_dim) = (forward.head_dim(), forward.v_head_dim());
        // vec4s behind a row's end are asked for where it is no whole number of chunks and of columns
        let ragged = |width: usize| !width.is_multiple_of(4 * CHUNK) || width != 4 * lanes * columns * column_blocks;
        variant.size("HEAD_DIM", head_dim).size("V_HEAD_DIM", v_head_dim);
        variant.switch("KEY_RAGGED", ragged(head_dim)).switch("VALUE_RAGGED", ragged(v_head_dim));
        variant.size("HEADS", self.heads).size("PLANES", part.heads.len() / self.heads);
        variant.size("COLUMN_BLOCKS", column_blocks).size("WIDTH", self.width);
        for (name, summed) in ["SUM_BATCH", "SUM_HEADS", "SUM_ROWS", "SUM_KEYS"].into_iter().zip(self.sums) {
            variant.switch(name, summed);
        }
        let params = Params::new(forward, part, &bindings).with_splits(self.splits).for_gradients(
            &row_stats(problem),
            part,
            self.is_begun(part),
        );
        let tiles = self.summed_tiles(part).div_ceil(self.splits);
        let iterations =
            tiles.saturating_mul(self.tile_iterations(forward)).saturating_add(2 * lanes + 4 * own_reg * 8);
        let invocations = u32::try_from(lanes * lanes).unwrap_or(u32::MAX);
        let needs = Needs::new(invocations, iterations);
        Step::new(variant, bindings, params, self.grid(part), self.tiles.workgroup_bytes(dots + weights > 0), needs)
    }

    /// The part's share of the gradient of a bias, with no step along what is summed.
    fn gradient_slice(&self, bias: &TensorSpec, part: &Part, forward: &AttentionProblem) -> Layout {
        let [b, h, i] = self.slice(part, forward);
        let j = if self.sums[3] { 0..1 } else { part.keys.clone() };
        let at = [b.start, h.start, i.start, j.start];
        Layout { shape: [b.len(), h.len(), i.len(), j.len()], offset: bias.layout.index(at), ..bias.layout }
    }

    /// The gradients that are stored from the workspace: where each goes, and the first of its numbers in a row of one split.
    pub(crate) fn stored(&self, problem: &BackwardProblem) -> Vec<(Slot, TensorSpec, usize)> {
        let (spec, head_dim) = (problem.spec(), problem.forward().head_dim());
        let gradient = |slot, of: Option<TensorSpec>, at| of.map(|of| (slot, of, at));
        let of = match self.made {
            Made::Rows { .. } => [gradient(Slot::DQuery, spec.d_query, 0), None],
            Made::Keys { key, value } => [
                gradient(Slot::DKey, spec.d_key.filter(|_| key), 0),
                gradient(Slot::DValue, spec.d_value.filter(|_| value), if key { head_dim } else { 0 }),
            ],
            Made::Chosen => [None, None],
            Made::Bias if self.direct => [None, None],
            Made::Bias => [gradient(Slot::DBias, spec.d_bias, 0), None],
        };
        of.into_iter().flatten().collect()
    }

    /// The extents of what is stored.
    pub(crate) const fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// The dispatch that adds the splits of some rows or keys, and stores them.
    pub(crate) fn store(
        &self,
        problem: &BackwardProblem,
        caps: &DeviceCaps,
        (slot, tensor, column): (Slot, TensorSpec, usize),
        [b, h, l]: [Range<usize>; 3],
    ) -> Step {
        let forward = problem.forward();
        let part = Part::whole(forward);
        let [batch, heads, len] = self.shape;
        let whole = Layout::bhld([batch, heads, len, self.width.saturating_mul(self.splits)]);
        let shape = |width: usize| [b.len(), h.len(), l.len(), width];
        // where the caller's gradient lies; a bias that is summed over keys has one column
        let layout = tensor.layout;
        let width = layout.shape[3];
        let at = |layout: &Layout| layout.index([b.start, h.start, l.start, 0]);
        let mut bindings = Bindings::new(forward, &part, caps);
        let sums = Layout { shape: shape(whole.shape[3] - column), offset: at(&whole) + column, ..whole };
        bindings.push(Slot::Gradients, false, sums);
        bindings.write_tensor(slot, &tensor, Layout { shape: shape(width), offset: at(&layout), ..layout });
        let mut variant = Variant::new(Shader::BackwardStore);
        variant.store_vec(&tensor);
        let invocations = [b.len(), h.len(), l.len(), width.div_ceil(4)];
        let invocations = invocations.into_iter().fold(1u64, |product, n| product.saturating_mul(n as u64));
        let grid = flat_grid(invocations.div_ceil(WIDTH as u64), caps);
        variant.size("V_HEAD_DIM", width).size("HEADS", h.len()).size("ROWS", l.len());
        variant.size("SPLIT_WIDTH", self.width).size("BLOCKS_PER_ROW", usize::try_from(grid[0]).unwrap_or(usize::MAX));
        let params = Params::new(forward, &part, &bindings).with_splits(self.splits).with_batch(b.len());
        // the columns of each split, and four stores
        Step::new(variant, bindings, params, grid, 0, Needs::new(64, self.splits * 5 + 4))
    }

    /// The dispatch that adds what chosen weights have to delta of a part's rows.
    pub(crate) fn chosen(&self, problem: &BackwardProblem, caps: &DeviceCaps, part: &Part) -> Vec<Step> {
        if self.made != Made::Chosen {
            return vec![];
        }
        let forward = problem.forward();
        let mut bindings = Bindings::new(forward, part, caps);
        bindings.row_stats(&row_stats(problem), true).push(Slot::Gradients, false, self.region(part, forward));
        let mut variant = Variant::new(Shader::BackwardChosen);
        let grid = row_grid(part, caps);
        variant.size("HEADS", part.heads.len()).size("BLOCKS_PER_ROW", blocks_per_row(grid));
        let params = Params::new(forward, part, &bindings).with_splits(self.splits);
        let params = params.for_gradients(&row_stats(problem), part, false);
        vec![Step::new(variant, bindings, params, grid, 0, Needs::new(64, self.splits))]
    }

    /// The dispatches that add the shares of a part's rows in the gradients of slopes and scale.
    pub(crate) fn row_sums(&self, problem: &BackwardProblem, caps: &DeviceCaps, part: &Part) -> Vec<Step> {
        let Made::Rows { alibi, scale, .. } = self.made else { return vec![] };
        let forward = problem.forward();
        let last = self.width - 1;
        let sums = |slot, column, of| {
            row_sums(problem, caps, part, slot, of, (self.region(part, forward), column, self.width, self.splits))
        };
        let by_batch = forward.spec().alibi_slopes == Some(AlibiSlopes::PerBatchAndHead);
        let mut steps = vec![];
        if alibi {
            steps.push(sums(Slot::DAlibiSlopes, last - usize::from(scale), [!by_batch, false]));
        }
        if scale {
            steps.push(sums(Slot::DScale, last, [true, true]));
        }
        steps
    }
}

/// Whether a gradient is summed over an axis of so many.
fn is_summed(gradient: &TensorSpec, axis: usize, of: usize) -> bool {
    gradient.layout.shape[axis] == 1 && of != 1
}

/// Whether one pass makes the gradients of keys and values: its sums are in registers.
fn both_fit(forward: &AttentionProblem, caps: &DeviceCaps) -> bool {
    let most = if caps.class == DeviceClass::Discrete { 128 } else { 64 };
    forward.head_dim().max(forward.v_head_dim()) <= most
}
