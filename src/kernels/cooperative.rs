//! The cooperative kernel (shaders/cooperative.wgsl): tiles, limits, dispatch.

use super::{check_invocations, check_iterations, check_storage_buffers, storage_buffers};
use crate::caps::{CooperativeMatrix, DeviceCaps, DeviceClass};
use crate::dispatch::{
    Bindings, Kernel, Needs, Params, Part, PlanChoice, Shader, Step, TileShape, Unsupported, Variant, ceil_div,
};
use crate::problem::AttentionProblem;
use crate::tensor::Element;

/// Invocations of a workgroup: four subgroups of 32.
const INVOCATIONS: usize = 128;
/// Query rows and keys of a block, the best first; memory decides. Multiples of each size of matrix, and keys of four for
/// every invocation of a row.
const BLOCKS: [[usize; 2]; 4] = [[32, 64], [32, 32], [16, 64], [16, 32]];
/// vec4s of a chunk of a row, at most, the best first: more chunks are more barriers.
const MAX_CHUNKS: [usize; 4] = [32, 16, 8, 4];
/// The last of each.
const SMALLEST: ([usize; 2], usize) = ([16, 32], 4);
/// vec4s that an invocation loads at once, at most: a compiler keeps all of them in registers.
const MAX_LOADS: usize = 8;
/// Matrices side by side that a subgroup holds at once, and products of one that are written out, at most.
const MAX_MATRICES: usize = 4;
/// vec4s of the output that one invocation may hold in registers, at most.
const MAX_ACCUMULATORS: usize = 24;

/// Tile sizes for a problem on a device. Widths and chunks are in vec4s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiles {
    matrix: CooperativeMatrix,
    /// Query rows of a workgroup.
    pub(crate) block_q: usize,
    block_kv: usize,
    key_chunk: usize,
    key_chunks: usize,
    value_chunk: usize,
    value_chunks: usize,
    /// Whether a CPU plays matrix unit.
    software: bool,
    /// Whether the lanes of a row exchange what they have by shuffles.
    subgroups: bool,
    /// Workgroup memory, each variable rounded up to 16.
    workgroup_bytes: u64,
}

impl Tiles {
    pub(crate) fn shape(&self) -> TileShape {
        TileShape::new(self.block_q, self.block_kv, true)
    }

    /// Loop iterations of an invocation, at most: as if one subgroup made all matrices, and every block had an infinite
    /// value.
    fn iterations(&self, problem: &AttentionProblem) -> usize {
        let size = self.matrix.size();
        let (strips, keys) = (self.block_q / size, self.block_kv / size);
        let [widths, columns] = [self.key_chunk, self.value_chunk].map(|chunk| chunk * 4 / size);
        let key = 1 + (self.block_kv * self.key_chunk).div_ceil(INVOCATIONS) + strips * keys * (1 + widths);
        let staged = 5 * (self.block_kv / 4 * self.value_chunk).div_ceil(INVOCATIONS);
        let value = 1 + staged + strips * columns * (1 + keys) + self.columns() * self.block_kv;
        let once = (self.block_q * self.query_row()).div_ceil(INVOCATIONS) + self.block_q;
        let block = 1 + self.key_chunks * key + self.value_chunks * value;
        problem.kv_len().div_ceil(self.block_kv) * block + once
    }

    /// Subgroups fill the workgroup, and share a row's lanes where these exchange by shuffles.
    fn needs(&self, problem: &AttentionProblem) -> Needs {
        let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let smallest = if self.subgroups { narrow(self.key_lanes()) } else { 1 };
        let needs = Needs::new(narrow(INVOCATIONS), self.iterations(problem));
        let needs = needs.with_subgroups(smallest, narrow(INVOCATIONS));
        Needs { shader_f16: true, cooperative_matrix: Some(self.matrix), ..needs }
    }

    /// Invocations of a query row.
    const fn key_lanes(&self) -> usize {
        INVOCATIONS / self.block_q
    }

    /// Value columns of one invocation in a chunk.
    const fn columns(&self) -> usize {
        self.value_chunk.div_ceil(self.key_lanes())
    }

    const fn accumulators(&self) -> usize {
        self.columns() * self.value_chunks
    }

    // Rows in memory are 16 bytes longer than what they hold, so that neighbouring rows start in different banks, and a
    // matrix' row at a multiple of 16 bytes.

    const fn query_row(&self) -> usize {
        self.key_chunk * self.key_chunks + 2
    }

    const fn key_row(&self) -> usize {
        self.key_chunk + 2
    }

    /// Of probabilities, and of a column of values.
    const fn prob_row(&self) -> usize {
        self.block_kv / 4 + 2
    }

    fn kv_vecs(&self) -> usize {
        (self.block_kv * self.key_row()).max(self.value_chunk * 4 * self.prob_row())
    }

    /// A vec4 of each lane longer: what the lanes of neighbouring rows read at once lies side by side.
    fn sum_row(&self) -> usize {
        (self.block_kv / 4).max(self.value_chunk) + self.key_lanes()
    }

    fn bytes(&self) -> u64 {
        let halves = |vecs: usize| vecs as u64 * 8;
        let query_tile = halves(self.block_q * self.query_row());
        let kv_tile = halves(self.kv_vecs());
        let prob_tile = halves(2 * self.block_q * self.prob_row());
        let sum_tile = (self.block_q * self.sum_row()) as u64 * 16;
        let row_parts = if self.subgroups { 0 } else { INVOCATIONS as u64 * 4 };
        query_tile + kv_tile + prob_tile + sum_tile + row_parts + 32
    }

    /// Matrices side by side that a subgroup takes at once, of `across` in a row: as many as leave something to each of
    /// four subgroups.
    fn side_by_side(&self, across: usize) -> usize {
        let strips = self.block_q / self.matrix.size();
        let shared = |held: &usize| across.is_multiple_of(*held) && strips * (across / held) >= 4;
        (1..=self.most()).rev().find(shared).unwrap_or(1)
    }

    /// How many of the products that make up a matrix are written out: turns, and products of a turn.
    fn steps(&self, all: usize) -> [usize; 2] {
        let written_out = (1..=self.most()).rev().find(|steps| all.is_multiple_of(*steps)).unwrap_or(1);
        [all / written_out, written_out]
    }

    /// Where each product is spelled out in scalars, more than one at a time is a minute of compilation.
    const fn most(&self) -> usize {
        if self.software { 1 } else { MAX_MATRICES }
    }
}

/// Tiles of a block with chunks of at most so many vec4s.
fn sized(
    problem: &AttentionProblem,
    caps: &DeviceCaps,
    matrix: CooperativeMatrix,
    [block_q, block_kv]: [usize; 2],
    max_chunk: usize,
) -> Tiles {
    let (key_chunk, key_chunks) = chunks(problem.head_dim(), max_chunk, matrix);
    let (value_chunk, value_chunks) = chunks(problem.v_head_dim(), max_chunk, matrix);
    let key_lanes = (INVOCATIONS / block_q) as u64;
    let mut tiles = Tiles {
        matrix,
        block_q,
        block_kv,
        key_chunk,
        key_chunks,
        value_chunk,
        value_chunks,
        software: caps.class == DeviceClass::Software,
        subgroups: caps.subgroups.is_some_and(|(smallest, _)| key_lanes <= u64::from(smallest)),
        workgroup_bytes: 0,
    };
    tiles.workgroup_bytes = tiles.bytes();
    tiles
}

/// All tiles that fit, the best first.
fn fitting<'a>(
    problem: &'a AttentionProblem,
    caps: &'a DeviceCaps,
    matrix: CooperativeMatrix,
) -> impl Iterator<Item = Tiles> + 'a {
    let budget = u64::from(caps.max_compute_workgroup_storage_size);
    let shapes = MAX_CHUNKS.into_iter().flat_map(|chunk| BLOCKS.map(|block| (block, chunk)));
    shapes
        .map(move |(block, chunk)| sized(problem, caps, matrix, block, chunk))
        .filter(move |tiles| tiles.workgroup_bytes <= budget && tiles.accumulators() <= MAX_ACCUMULATORS)
}

/// A row of `width` elements in as few equal chunks of at most `max` vec4s, whole matrices each; chunk and count.
fn chunks(width: usize, max: usize, matrix: CooperativeMatrix) -> (usize, usize) {
    let matrices = width.div_ceil(matrix.size());
    let count = matrices.div_ceil((max * 4 / matrix.size()).max(1)).max(1);
    (matrices.div_ceil(count).max(1) * matrix.size() / 4, count)
}

/// Each block that fits, with the longest chunks.
pub(crate) fn candidates(problem: &AttentionProblem, caps: &DeviceCaps) -> Vec<PlanChoice> {
    let mut choices = vec![];
    for tiles in caps.cooperative_matrix.into_iter().flat_map(|matrix| fitting(problem, caps, matrix)) {
        let choice = PlanChoice { tile: Some(tiles.shape()), ..PlanChoice::of(Kernel::Cooperative) };
        if !choices.contains(&choice) {
            choices.push(choice);
        }
    }
    choices
}

/// The tiles that were asked for, or the preferred ones, if they fit.
pub(crate) fn tiling(
    problem: &AttentionProblem,
    caps: &DeviceCaps,
    shape: Option<TileShape>,
) -> Result<Tiles, Unsupported> {
    let matrix = caps.cooperative_matrix.ok_or(Unsupported::CooperativeMatrix)?;
    if !caps.shader_f16 {
        return Err(Unsupported::ShaderF16);
    }
    let workgroup = 128;
    let divides = |(smallest, largest): &(u32, u32)| {
        smallest.is_power_of_two() && largest.is_power_of_two() && *largest <= workgroup
    };
    if !caps.subgroups.as_ref().is_some_and(divides) {
        return Err(Unsupported::SubgroupsOfWorkgroup { workgroup, found: caps.subgroups });
    }
    let spec = problem.spec();
    for (name, tensor) in [("query", spec.query), ("key", spec.key), ("value", spec.value)] {
        if tensor.element != Element::F16 {
            return Err(Unsupported::Element { name, found: tensor.element, needed: Element::F16 });
        }
    }
    check_invocations(workgroup, caps)?;
    check_storage_buffers(storage_buffers(problem), caps)?;
    let mut all = fitting(problem, caps, matrix);
    let tiles = match shape {
        None => all.next().ok_or_else(|| too_large(problem, caps, matrix)),
        Some(found) => all.find(|tiles| tiles.shape() == found).ok_or_else(|| {
            let possible: Vec<_> = candidates(problem, caps).into_iter().filter_map(|choice| choice.tile).collect();
            let possible = possible.iter().map(TileShape::to_string).collect::<Vec<_>>().join("; ");
            Unsupported::Tile { found, possible }
        }),
    }?;
    check_iterations(tiles.iterations(problem), caps)?;
    Ok(tiles)
}

/// What keeps the smallest tiles from fitting.
fn too_large(problem: &AttentionProblem, caps: &DeviceCaps, matrix: CooperativeMatrix) -> Unsupported {
    let tiles = sized(problem, caps, matrix, SMALLEST.0, SMALLEST.1);
    if tiles.accumulators() > MAX_ACCUMULATORS {
        let max = MAX_ACCUMULATORS * tiles.key_lanes() * 4;
        return Unsupported::Dim { name: "v_head_dim", found: problem.v_head_dim(), max };
    }
    let found = u64::from(caps.max_compute_workgroup_storage_size);
    Unsupported::WorkgroupMemory { needed: tiles.workgroup_bytes, found, head_dim: problem.head_dim() }
}

pub(crate) fn steps(problem: &AttentionProblem, caps: &DeviceCaps, part: &Part, tiles: &Tiles) -> Vec<Step> {
    let spec = problem.spec();
    let mut bindings = Bindings::new(problem, part, caps);
    bindings.read_inputs().write_outputs();
    let mut variant = Variant::new(Shader::Cooperative);
    variant.snippets(&[match tiles.matrix {
        CooperativeMatrix::Size8 => "matrices_8",
        CooperativeMatrix::Size16 => "matrices_16",
    }]);
    variant.query_vec(spec).key_vec(spec).value_vec(spec).output_vec(spec).terms(spec).lse(spec);
    variant.snippets(&["q_lens", "keys", "score", "exponent", "row_end", "numerics"]);
    variant.key_overrides(problem).score_overrides(spec).sink_override(spec);
    variant.row_masks_override(spec, false).raw_scores_override(problem);
    variant.constant("BLOCK_Q", tiles.block_q).constant("BLOCK_KV", tiles.block_kv);
    variant.constant("ROWS", 1).constant("ROW_LANES", tiles.block_q).constant("KEY_LANES", tiles.key_lanes());
    variant.snippets(&[if tiles.subgroups { "row_parts_subgroup" } else { "row_parts_workgroup" }]);
    if tiles.subgroups {
        variant.constant("LANE_BITS", tiles.key_lanes().ilog2() as usize);
    }
    variant.constant("KEY_CHUNK", tiles.key_chunk).constant("KEY_CHUNKS", tiles.key_chunks);
    variant.constant("VALUE_CHUNK", tiles.value_chunk).constant("VALUE_CHUNKS", tiles.value_chunks);
    let matrices = |elements: usize| elements / tiles.matrix.size();
    let [turns, steps] = tiles.steps(matrices(tiles.key_chunk * 4));
    variant.constant("KEY_STEP_TURNS", turns).constant("KEY_STEPS", steps);
    let [turns, steps] = tiles.steps(matrices(tiles.block_kv));
    variant.constant("VALUE_STEP_TURNS", turns).constant("VALUE_STEPS", steps);
    variant.constant("KEY_TILES", tiles.side_by_side(matrices(tiles.block_kv)));
    variant.constant("VALUE_TILES", tiles.side_by_side(matrices(tiles.value_chunk * 4)));
    variant.constant("KEY_VECS", tiles.block_kv / (4 * tiles.key_lanes())).constant("COLUMNS", tiles.columns());
    let [turns, loads] = loads_of(tiles.block_kv * tiles.key_chunk, MAX_LOADS);
    variant.constant("KEY_TURNS", turns).constant("KEY_LOADS", loads);
    let [turns, loads] = loads_of(tiles.block_kv / 4 * tiles.value_chunk, MAX_LOADS / 4);
    variant.constant("VALUE_TURNS", turns).constant("VALUE_LOADS", loads);
    variant.constant("QUERY_ROW", tiles.query_row()).constant("KEY_ROW", tiles.key_row());
    variant.constant("VALUE_ROW", tiles.prob_row()).constant("KV_VECS", tiles.kv_vecs());
    variant.constant("PROB_ROW", tiles.prob_row()).constant("SUM_ROW", tiles.sum_row());
    variant.switch("KEY_RAGGED", tiles.key_chunk * tiles.key_chunks * 4 > problem.head_dim().next_multiple_of(4));
    variant
        .switch("VALUE_RAGGED", tiles.value_chunk * tiles.value_chunks * 4 > problem.v_head_dim().next_multiple_of(4));
    variant.size("HEAD_DIM", problem.head_dim()).size("V_HEAD_DIM", problem.v_head_dim());
    let params = Params::new(problem, part, &bindings);
    let grid = [ceil_div(part.rows.len(), tiles.block_q), part.heads.len() as u64, part.batch.len() as u64];
    vec![Step::new(variant, bindings, params, grid, tiles.workgroup_bytes, tiles.needs(problem))]
}

/// How an invocation takes its share of so many loads, at most `most` at once: turns, and loads of a turn.
fn loads_of(all: usize, most: usize) -> [usize; 2] {
    let own = all.div_ceil(INVOCATIONS);
    let turns = own.div_ceil(most);
    [turns, own.div_ceil(turns.max(1))]
}
