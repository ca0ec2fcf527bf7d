// weighted_sum.wgsl: the output as the probabilities' weighted sum of values.
//
//   O = P V
//
// grid       workgroup_id = (tile of value dimensions, tile of query rows, batch * q_heads)
// workgroup  TILE x TILE invocations, one output element each
// memory     prob_tile, value_tile: TILE * TILE f32 each, written in full before they are read
// needs      every barrier in uniform control flow
// bindings   0 params (uniform)  3 value  4 bias  5 mask  6 row_data  9 scores (read)  7 output (read_write)
// snippets   value_* output_* bias_* mask_* row_data_* keys numerics

const TILE: u32 = 16u;

override V_HEAD_DIM: u32;
override HEADS: u32;

@group(0) @binding(9) var<storage, read> scores: array<f32>;

var<workgroup> prob_tile: array<array<f32, TILE>, TILE>;
var<workgroup> value_tile: array<array<f32, TILE>, TILE>;

@compute @workgroup_size(TILE, TILE)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_id) local: vec3u) {
    let row = row_at(group.z / HEADS, group.z % HEADS, group.y * TILE + local.y);
    let d = group.x * TILE + local.x;
    let prob_row = offset_4(params.scores_offset, params.scores_strides, row.b, row.h, row.i);
    var keys = vec2u(0u);
    if row.i < params.q_len {
        keys = row_keys(row);
    }

    var acc = 0.0;
    for (var first = 0u; first < params.kv_len; first += TILE) {
        // a probability of 0 does not tell a key that is not allowed, so that is asked again: what is not
        // allowed never enters the sum, whatever its value
        let j = first + local.x;
        var prob = MASKED_PROB;
        if j >= keys.x && j < keys.y {
            if key_allowed(row, j) {
                prob = scores[prob_row + j];
            }
        }
        let loaded_j = first + local.y;
        var element = 0.0;
        if loaded_j < params.kv_len && d < V_HEAD_DIM {
            let value_at = offset_4(params.value_offset, params.value_strides, row.b, row.kv_h, loaded_j);
            element = value_element(value_place(row.b, row.kv_h, loaded_j, value_at), d);
        }
        prob_tile[local.y][local.x] = prob;
        value_tile[local.y][local.x] = element;
        workgroupBarrier();
        // a sum of its own for each tile: two short sums round far less than one over all keys
        var tile_acc = 0.0;
        for (var n = 0u; n < TILE; n++) {
            let weight = prob_tile[local.y][n];
            if !is_masked(weight) {
                tile_acc += weight * value_tile[n][local.x];
            }
        }
        acc += tile_acc;
        workgroupBarrier();
    }

    if row.i < params.q_len && d < V_HEAD_DIM {
        let to = offset_4(params.output_offset, params.output_strides, row.b, row.h, row.i);
        store_output(to + d * params.output_strides.w, acc);
    }
}
