// head_norm.wgsl: normalisation of each row of a head, as models with query and key norms have it.
//
//   y = (x - mean) / sqrt(mean of (x - mean)^2 + epsilon) * w + b      mean left out for RMSNorm
//   Root Mean Square Layer Normalization, Zhang and Sennrich 2019 (arXiv:1910.07467), equation 4
//
// grid       workgroup_id = (row, row of rows), flattened
// workgroup  64 invocations for one row
// memory     sums: 64 f32, written in full before they are read
// needs      every barrier in uniform control flow
// bindings   0 params (uniform)  1 query = x  2 key = w  3 bias (read)  7 output = y (read_write)
// snippets   query_f32, key_f32, output_* of one element, half

struct Params {
    rows: u32,
    width: u32,
    blocks_per_row: u32,
    centred: u32,
    has_bias: u32,
    epsilon: f32,
}

const LANES: u32 = 64u;

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(3) var<storage, read> bias: array<f32>;

var<workgroup> sums: array<f32, LANES>;

// The sum over the workgroup, in the same order every time.
fn total(lane: u32, value: f32) -> f32 {
    // what was there is read to the end
    workgroupBarrier();
    sums[lane] = value;
    workgroupBarrier();
    for (var reach = LANES / 2u; reach > 0u; reach /= 2u) {
        if lane < reach {
            sums[lane] += sums[lane + reach];
        }
        workgroupBarrier();
    }
    return sums[0];
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let row = group.y * params.blocks_per_row + group.x;
    if row >= params.rows {
        return;
    }
    let start = row * params.width;
    var mean = 0.0;
    if params.centred != 0u {
        var sum = 0.0;
        for (var d = lane; d < params.width; d += LANES) {
            sum += load_query(start + d);
        }
        mean = total(lane, sum) / f32(params.width);
    }
    var squares = 0.0;
    for (var d = lane; d < params.width; d += LANES) {
        let x = load_query(start + d) - mean;
        squares += x * x;
    }
    let deviation = sqrt(total(lane, squares) / f32(params.width) + params.epsilon);
    for (var d = lane; d < params.width; d += LANES) {
        var y = (load_query(start + d) - mean) / deviation * load_key(d);
        if params.has_bias != 0u {
            y += bias[d];
        }
        store_output(start + d, y);
    }
}
