// linear.wgsl: a product with a matrix of weights, and a bias.
//
//   Y = X W^T + b    X [rows, inputs], W [outputs, inputs], Y [rows, outputs]; each step of k has a sum of its own
//
// grid       workgroup_id = (block of 64 outputs, block of 64 rows)
// workgroup  256 invocations, 4 rows by 4 outputs each
// memory     x_tile, w_tile: STEP * 16 vec4 each, written in full before they are read
// needs      every barrier in uniform control flow
// bindings   0 params (uniform)  1 x  2 weight  3 bias (read)  4 y (read_write)
// snippets   weight_f32, or half and weight_f16

struct Params {
    rows: u32,
    inputs: u32,
    outputs: u32,
    has_bias: u32,
    // of linear_few.wgsl, whose workgroups stand in rows
    blocks_per_row: u32,
}

const STEP: u32 = 16u;
const SIDE: u32 = 64u;

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

// [k][four rows], [k][four outputs]
var<workgroup> x_tile: array<array<vec4f, 16>, STEP>;
var<workgroup> w_tile: array<array<vec4f, 16>, STEP>;

fn load_x(row: u32, k: u32) -> f32 {
    if row >= params.rows {
        return 0.0;
    }
    return x[row * params.inputs + k];
}

fn load_w(output: u32, k: u32) -> f32 {
    if output >= params.outputs {
        return 0.0;
    }
    return load_weight(output * params.inputs + k);
}

fn store(row: u32, first_output: u32, sums: vec4f) {
    for (var n = 0u; n < 4u; n++) {
        let output = first_output + n;
        if row < params.rows && output < params.outputs {
            var sum = sums[n];
            if params.has_bias != 0u {
                sum += bias[output];
            }
            y[row * params.outputs + output] = sum;
        }
    }
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let loaded_k = lane % STEP;
    let loaded_four = lane / STEP;
    let row = group.y * SIDE + 4u * loaded_four;
    let output = group.x * SIDE + 4u * loaded_four;
    let own_outputs = lane % 16u;
    let own_rows = lane / 16u;
    var acc0 = vec4f(0.0);
    var acc1 = vec4f(0.0);
    var acc2 = vec4f(0.0);
    var acc3 = vec4f(0.0);
    for (var first_k = 0u; first_k < params.inputs; first_k += STEP) {
        let k = first_k + loaded_k;
        var x_vec = vec4f(0.0);
        var w_vec = vec4f(0.0);
        if k < params.inputs {
            x_vec = vec4f(load_x(row, k), load_x(row + 1u, k), load_x(row + 2u, k), load_x(row + 3u, k));
            w_vec = vec4f(load_w(output, k), load_w(output + 1u, k), load_w(output + 2u, k), load_w(output + 3u, k));
        }
        workgroupBarrier();
        x_tile[loaded_k][loaded_four] = x_vec;
        w_tile[loaded_k][loaded_four] = w_vec;
        workgroupBarrier();
        var sum0 = vec4f(0.0);
        var sum1 = vec4f(0.0);
        var sum2 = vec4f(0.0);
        var sum3 = vec4f(0.0);
        for (var n = 0u; n < STEP; n++) {
            let rows = x_tile[n][own_rows];
            let outputs = w_tile[n][own_outputs];
            sum0 = fma(vec4f(rows.x), outputs, sum0);
            sum1 = fma(vec4f(rows.y), outputs, sum1);
            sum2 = fma(vec4f(rows.z), outputs, sum2);
            sum3 = fma(vec4f(rows.w), outputs, sum3);
        }
        acc0 += sum0;
        acc1 += sum1;
        acc2 += sum2;
        acc3 += sum3;
    }
    let first_row = group.y * SIDE + 4u * own_rows;
    let first_output = group.x * SIDE + 4u * own_outputs;
    store(first_row, first_output, acc0);
    store(first_row + 1u, first_output, acc1);
    store(first_row + 2u, first_output, acc2);
    store(first_row + 3u, first_output, acc3);
}
