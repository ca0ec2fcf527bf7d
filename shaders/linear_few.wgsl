// linear_few.wgsl: a linear map of at most 4 rows; each weight is read once.
//
//   y[m, n] = sum over k of x[m, k] W[n, k]  + b[n]      W as [out, in]
//
// grid       workgroup_id = (block of 4 columns, row of blocks), flattened
// workgroup  256 invocations, 64 for each column; each sums every 64th product, for all rows
// memory     sums: 256 vec4f (4 KiB), written in full before they are read
// needs      rows <= 4; every barrier in uniform control flow
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

const LANES: u32 = 64u;
const COLUMNS: u32 = 4u;

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(3) var<storage, read> bias: array<f32>;

// [COLUMNS, LANES], one component for each row
var<workgroup> sums: array<vec4f, COLUMNS * LANES>;

fn load_x(row: u32, k: u32) -> f32 {
    if row >= params.rows {
        return 0.0;
    }
    return load_query(row * params.input_row_stride + k * params.input_stride);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) index: u32) {
    let block = group.y * params.blocks_per_row + group.x;
    let column = block * COLUMNS + index / LANES;
    let lane = index % LANES;
    var sum = vec4f(0.0);
    if column < params.out_features {
        for (var k = lane; k < params.in_features; k += LANES) {
            sum += load_key(column * params.weight_row_stride + k * params.weight_stride)
                * vec4f(load_x(0u, k), load_x(1u, k), load_x(2u, k), load_x(3u, k));
        }
    }
    sums[index] = sum;
    workgroupBarrier();
    // the same order every time
    for (var reach = LANES / 2u; reach > 0u; reach /= 2u) {
        if lane < reach {
            sums[index] += sums[index + reach];
        }
        workgroupBarrier();
    }
    if column < params.out_features && lane < params.rows {
        var value = sums[index - lane][lane];
        if params.has_bias != 0u {
            value += bias[column];
        }
        store_output(params.output_offset + lane * params.output_stride + column, value);
    }
}
