// merge.wgsl: partial attentions over disjoint sets of keys, merged by maximum and sum of their rows, or by their
// log-sum-exp.
//
//   m = max of m_p    l = sum of exp(m_p - m) l_p    O = sum of exp(m_p - m) l_p / l O_p    lse_p: m_p, with a sum of 1
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

// rows come and go as maximum and sum
override ROW_STATES: bool;

@group(0) @binding(0) var<uniform> params: Params;
// [parts, rows, v_head_dim], and [parts, rows] or, as maxima and sums, [parts, rows, 2]
@group(0) @binding(1) var<storage, read> part_output: array<f32>;
@group(0) @binding(2) var<storage, read> part_lse: array<f32>;
@group(0) @binding(3) var<storage, read_write> output: array<f32>;
@group(0) @binding(4) var<storage, read_write> lse: array<f32>;

// Maximum and sum of a row of a part; a sum of 0 where it is empty.
fn part_state(part: u32, row: u32) -> vec2f {
    let at = part * params.rows + row;
    if ROW_STATES {
        return vec2f(part_lse[2u * at], part_lse[2u * at + 1u]);
    }
    let value = part_lse[at];
    return vec2f(value, select(1.0, 0.0, is_negative_infinity(value)));
}

@compute @workgroup_size(WIDTH)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let element = (group.y * params.blocks_per_row + group.x) * WIDTH + lane;
    let row = element / params.v_head_dim;
    if row >= params.rows {
        return;
    }
    // an empty part is neutral: nothing of it enters arithmetic
    var top = MASKED_SCORE;
    for (var part = 0u; part < params.parts; part++) {
        let state = part_state(part, row);
        if !is_empty_sum(state.y) {
            top = max(top, state.x);
        }
    }
    var total = 0.0;
    for (var part = 0u; part < params.parts; part++) {
        let state = part_state(part, row);
        if !is_empty_sum(state.y) {
            total += exp(state.x - top) * state.y;
        }
    }
    var acc = 0.0;
    for (var part = 0u; part < params.parts; part++) {
        let state = part_state(part, row);
        if !is_empty_sum(state.y) {
            // weights first: outputs may be near the end of f32
            let weight = exp(state.x - top) * state.y / total;
            acc += weight * part_output[part * params.rows * params.v_head_dim + element];
        }
    }
    output[element] = acc;
    if element % params.v_head_dim == 0u {
        if ROW_STATES {
            lse[2u * row] = select(top, params.negative_infinity, is_empty_sum(total));
            lse[2u * row + 1u] = total;
        } else {
            var merged_lse = params.negative_infinity;
            if !is_empty_sum(total) {
                merged_lse = top + natural_log(total);
            }
            lse[row] = merged_lse;
        }
    }
}
