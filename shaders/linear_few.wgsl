// linear_few.wgsl: a product with a matrix of weights for a few rows, so that each weight is read once.
//
//   Y = X W^T + b    X [rows, inputs] with at most 4 rows, W [outputs, inputs], Y [rows, outputs]
//
// grid       workgroup_id = (block of 4 outputs, row of blocks), flattened
// workgroup  WIDTH invocations, every WIDTH-th k each
// memory     partial: WIDTH * 4 vec4, written in full before it is read
// needs      every barrier in uniform control flow
// bindings   0 params (uniform)  1 x  2 weight  3 bias (read)  4 y (read_write)
// snippets   weight_f32, or half and weight_f16

struct Params {
    rows: u32,
    inputs: u32,
    outputs: u32,
    has_bias: u32,
    blocks_per_row: u32,
}

const WIDTH: u32 = 64u;

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

// four outputs of each row
var<workgroup> partial: array<array<vec4f, 4>, WIDTH>;

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

@compute @workgroup_size(WIDTH)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let first = (group.y * params.blocks_per_row + group.x) * 4u;
    var acc0 = vec4f(0.0);
    var acc1 = vec4f(0.0);
    var acc2 = vec4f(0.0);
    var acc3 = vec4f(0.0);
    for (var k = lane; k < params.inputs; k += WIDTH) {
        let w = vec4f(load_w(first, k), load_w(first + 1u, k), load_w(first + 2u, k), load_w(first + 3u, k));
        acc0 = fma(vec4f(load_x(0u, k)), w, acc0);
        acc1 = fma(vec4f(load_x(1u, k)), w, acc1);
        acc2 = fma(vec4f(load_x(2u, k)), w, acc2);
        acc3 = fma(vec4f(load_x(3u, k)), w, acc3);
    }
    partial[lane] = array<vec4f, 4>(acc0, acc1, acc2, acc3);
    workgroupBarrier();
    for (var step = WIDTH / 2u; step > 0u; step /= 2u) {
        if lane < step {
            for (var row = 0u; row < 4u; row++) {
                partial[lane][row] += partial[lane + step][row];
            }
        }
        workgroupBarrier();
    }
    let row = lane / 4u;
    let output = first + lane % 4u;
    if lane < 16u && row < params.rows && output < params.outputs {
        var sum = partial[0][row][lane % 4u];
        if params.has_bias != 0u {
            sum += bias[output];
        }
        y[row * params.outputs + output] = sum;
    }
}
