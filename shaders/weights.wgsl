// weights.wgsl: chosen attention weights from query, key, and maximum and sum of the rows, or their sums over segments of
// keys.
//
//   P = exp(S - m) / l, 0 where not allowed    summed over heads, over the keys of a segment
//
// grid       workgroup_id = (block, row of blocks), flattened over batch, heads, rows and keys, WIDTH to a block, or segments
// workgroup  WIDTH invocations: a weight each, or every WIDTH-th key of one segment
// memory     partial: WIDTH f32, written in full before it is read
// needs      WIDTH a power of two; every barrier in uniform control flow
// bindings   0 params (uniform)  1 query  2 key  4 bias  5 mask  6 row_data  8 lse  10 selection (read)
//            11 weights (read_write)
// snippets   query_* key_* bias_* mask_* row_data_* keys score numerics

const WIDTH: u32 = 64u;
// vec4s of a row whose products are summed apart
const DIM_CHUNK: u32 = 16u;
// rows are whole vectors where they are read as such
const KEY_RAGGED: bool = false;

override HEAD_DIM: u32;
// columns are sums over ranges of keys
override SEGMENTS: bool;
// all chosen heads go into one
override ONE_HEAD: bool;

// maximum and sum of each row, in the place of its log-sum-exp
@group(0) @binding(8) var<storage, read> lse: array<f32>;
// HEADER words, then the chosen heads, rows, and keys or [first key, one past the last]
@group(0) @binding(10) var<storage, read> selection: array<u32>;
@group(0) @binding(11) var<storage, read_write> weights: array<f32>;

// Places in the header: counts, workgroups along x, and the factor on a sum over heads.
const HEADS: u32 = 0u;
const ROWS: u32 = 1u;
const COLUMNS: u32 = 2u;
const BLOCKS_PER_ROW: u32 = 3u;
const FACTOR: u32 = 4u;
const HEADER: u32 = 5u;

var<workgroup> partial: array<f32, WIDTH>;

// The weight that a row gives to a key of its interval.
fn weight(row: Row, j: u32, row_max: f32, row_sum: f32) -> f32 {
    if row_sum == 0.0 {
        return 0.0;
    }
    if !key_allowed(row, j) {
        return 0.0;
    }
    let query_row = offset_4(params.query_offset, params.query_strides, row.b, row.h, row.i);
    let key_at = offset_4(params.key_offset, params.key_strides, row.b, row.kv_h, j);
    let key_row = key_place(row.b, row.kv_h, j, key_at);
    var sums = vec4f(0.0);
    // a sum of its own for each chunk of a row: short sums round less than one over all of it
    for (var first = 0u; first < (HEAD_DIM + 3u) / 4u; first += DIM_CHUNK) {
        var chunk_sums = vec4f(0.0);
        for (var d = first; d < min(first + DIM_CHUNK, (HEAD_DIM + 3u) / 4u); d++) {
            chunk_sums += load_query_vec(query_row, d) * load_key_vec(key_row, d);
        }
        sums += chunk_sums;
    }
    let score = full_score(row, j, (sums.x + sums.y) + (sums.z + sums.w));
    return exp(score - row_max) / row_sum;
}

@compute @workgroup_size(WIDTH)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let columns = selection[COLUMNS];
    let rows = selection[ROWS];
    let chosen_heads = selection[HEADS];
    let shown_heads = select(chosen_heads, 1u, ONE_HEAD);
    let summed_heads = select(1u, chosen_heads, ONE_HEAD);

    let block = group.y * selection[BLOCKS_PER_ROW] + group.x;
    // a segment for each workgroup, or a weight for each invocation
    let element = select(block * WIDTH + lane, block, SEGMENTS);
    let result_row = element / columns;
    let column = element % columns;
    let plane = result_row / rows;
    let shown = plane % shown_heads;
    let b = plane / shown_heads;
    // the last row of blocks may reach past the last element
    let live = b < params.batch;

    var sum = 0.0;
    if live {
        let i = selection[HEADER + chosen_heads + result_row % rows];
        let keys_at = HEADER + chosen_heads + rows;
        var first = 0u;
        var end = 0u;
        if SEGMENTS {
            first = selection[keys_at + 2u * column];
            end = selection[keys_at + 2u * column + 1u];
        } else {
            first = selection[keys_at + column];
            end = first + 1u;
        }
        for (var n = 0u; n < summed_heads; n++) {
            let row = row_at(b, selection[HEADER + shown + n], i);
            let keys = row_keys(row);
            let at = params.lse_offset + row.b * params.lse_strides.x + row.h * params.lse_strides.y + 2u * row.i;
            let row_max = lse[at];
            let row_sum = lse[at + 1u];
            let begin = max(first, keys.x) + select(0u, lane, SEGMENTS);
            let stop = min(end, keys.y);
            for (var j = begin; j < stop; j += WIDTH) {
                sum += weight(row, j, row_max, row_sum);
            }
        }
    }
    if SEGMENTS {
        partial[lane] = sum;
        workgroupBarrier();
        for (var step = WIDTH / 2u; step > 0u; step /= 2u) {
            if lane < step {
                partial[lane] += partial[lane + step];
            }
            workgroupBarrier();
        }
        sum = partial[0];
    }
    if live && (!SEGMENTS || lane == 0u) {
        let to = offset_4(params.output_offset, params.output_strides, b, shown, result_row % rows) + column;
        weights[to] = sum * bitcast<f32>(selection[FACTOR]);
    }
}
