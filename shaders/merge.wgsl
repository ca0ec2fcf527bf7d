// merge.wgsl: partial attentions over disjoint sets of keys, merged by their log-sum-exp.
//
//   lse = ln(sum of exp(lse_p))    O = sum of exp(lse_p - lse) O_p
//
// grid       workgroup_id = (block of elements, row of blocks), flattened
// workgroup  WIDTH invocations, one output element each
// memory     none
// needs      nothing
// bindings   0 params (uniform)  1 part_output  2 part_lse (read)  3 output  4 lse (read_write)
// snippets   numerics

struct Params {
    parts: u32,
    rows: u32,
    v_head_dim: u32,
    blocks_per_row: u32,
    negative_infinity: f32,
}

const WIDTH: u32 = 64u;

@group(0) @binding(0) var<uniform> params: Params;
// [parts, rows, v_head_dim] and [parts, rows]
@group(0) @binding(1) var<storage, read> part_output: array<f32>;
@group(0) @binding(2) var<storage, read> part_lse: array<f32>;
@group(0) @binding(3) var<storage, read_write> output: array<f32>;
@group(0) @binding(4) var<storage, read_write> lse: array<f32>;

@compute @workgroup_size(WIDTH)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let element = (group.y * params.blocks_per_row + group.x) * WIDTH + lane;
    let row = element / params.v_head_dim;
    if row >= params.rows {
        return;
    }
    // an empty part (negative infinity) is neutral: nothing of it enters arithmetic
    var top = MASKED_SCORE;
    for (var part = 0u; part < params.parts; part++) {
        let value = part_lse[part * params.rows + row];
        if !is_negative_infinity(value) {
            top = max(top, value);
        }
    }
    var total = 0.0;
    var acc = 0.0;
    for (var part = 0u; part < params.parts; part++) {
        let value = part_lse[part * params.rows + row];
        if !is_negative_infinity(value) {
            let weight = exp(value - top);
            total += weight;
            acc += weight * part_output[part * params.rows * params.v_head_dim + element];
        }
    }
    var merged_lse = params.negative_infinity;
    if total != 0.0 {
        acc /= total;
        merged_lse = top + natural_log(total);
    }
    output[element] = acc;
    if element % params.v_head_dim == 0u {
        lse[row] = merged_lse;
    }
}
