// linear.wgsl: a linear map of many rows, one workgroup per block of rows and columns.
//
//   y[m, n] = sum over k of x[m, k] W[n, k]  + b[n]      W as [out, in]
//
// grid       workgroup_id = (block, row of blocks), flattened; neighbours share rows of x
// workgroup  256 invocations, each owns 4 rows and 4 columns of a block of 64 by 64
// memory     x_tile, w_tile: 16 by 64 elements each (8 KiB), written in full before they are read
// needs      nothing; every barrier in uniform control flow
// bindings   0 params (uniform)  1 query = x  2 key = W  3 bias (read)  7 output = y (read_write)
// snippets   query_*, key_*, output_* of one element each, half

struct Params {
    rows: u32,
    in_features: u32,
    out_features: u32,
    output_stride: u32,
    output_offset: u32,
    blocks_per_row: u32,
    column_blocks: u32,
    has_bias: u32,
    // from row to row and from element to element, of x and of W: either may lie transposed
    input_row_stride: u32,
    input_stride: u32,
    weight_row_stride: u32,
    weight_stride: u32,
}

const BLOCK: u32 = 64u;
const DEPTH: u32 = 16u;
// invocations along each side of the block
const SIDE: u32 = 16u;

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(3) var<storage, read> bias: array<f32>;

// [DEPTH, SIDE], each four neighbouring rows of x, or of W
var<workgroup> x_tile: array<vec4f, DEPTH * SIDE>;
var<workgroup> w_tile: array<vec4f, DEPTH * SIDE>;

fn load_x(row: u32, k: u32) -> f32 {
    if row >= params.rows || k >= params.in_features {
        return 0.0;
    }
    return load_query(row * params.input_row_stride + k * params.input_stride);
}

fn load_w(column: u32, k: u32) -> f32 {
    if column >= params.out_features || k >= params.in_features {
        return 0.0;
    }
    return load_key(column * params.weight_row_stride + k * params.weight_stride);
}

fn store(row: u32, column: u32, value: f32) {
    if row >= params.rows || column >= params.out_features {
        return;
    }
    var sum = value;
    if params.has_bias != 0u {
        sum += bias[column];
    }
    store_output(params.output_offset + row * params.output_stride + column, sum);
}

fn store_row(row: u32, column: u32, values: vec4f) {
    store(row, column, values.x);
    store(row, column + 1u, values.y);
    store(row, column + 2u, values.z);
    store(row, column + 3u, values.w);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let block = group.y * params.blocks_per_row + group.x;
    let first_row = block / params.column_blocks * BLOCK;
    let first_column = block % params.column_blocks * BLOCK;
    // the last row of blocks may be longer than what is left
    if first_row >= params.rows {
        return;
    }
    let own_row = lane / SIDE;
    let own_column = lane % SIDE;
    // neighbouring lanes read neighbouring elements, also where those are of neighbouring rows
    let along = vec2u(lane % DEPTH, lane / DEPTH);
    let across = vec2u(lane / SIDE, lane % SIDE);
    let x_from = select(across, along, params.input_stride == 1u);
    let w_from = select(across, along, params.weight_stride == 1u);
    var acc_0 = vec4f(0.0);
    var acc_1 = vec4f(0.0);
    var acc_2 = vec4f(0.0);
    var acc_3 = vec4f(0.0);
    for (var start = 0u; start < params.in_features; start += DEPTH) {
        // the tiles of the round before are read to the end
        workgroupBarrier();
        let row = first_row + x_from.y * 4u;
        let x_k = start + x_from.x;
        x_tile[x_from.x * SIDE + x_from.y] =
            vec4f(load_x(row, x_k), load_x(row + 1u, x_k), load_x(row + 2u, x_k), load_x(row + 3u, x_k));
        let column = first_column + w_from.y * 4u;
        let w_k = start + w_from.x;
        w_tile[w_from.x * SIDE + w_from.y] = vec4f(
            load_w(column, w_k), load_w(column + 1u, w_k), load_w(column + 2u, w_k), load_w(column + 3u, w_k));
        workgroupBarrier();
        // each block of k is summed on its own: roundings grow with DEPTH + k / DEPTH, not with k
        var part_0 = vec4f(0.0);
        var part_1 = vec4f(0.0);
        var part_2 = vec4f(0.0);
        var part_3 = vec4f(0.0);
        for (var d = 0u; d < DEPTH; d++) {
            let x = x_tile[d * SIDE + own_row];
            let w = w_tile[d * SIDE + own_column];
            part_0 += x.x * w;
            part_1 += x.y * w;
            part_2 += x.z * w;
            part_3 += x.w * w;
        }
        acc_0 += part_0;
        acc_1 += part_1;
        acc_2 += part_2;
        acc_3 += part_3;
    }
    let row = first_row + own_row * 4u;
    let column = first_column + own_column * 4u;
    store_row(row, column, acc_0);
    store_row(row + 1u, column, acc_1);
    store_row(row + 2u, column, acc_2);
    store_row(row + 3u, column, acc_3);
}
