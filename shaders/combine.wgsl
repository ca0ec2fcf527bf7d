// combine.wgsl: the states of the parts of the keys, merged into the attention over all of them.
//
//   lse = ln(sum of exp(lse_p)  [+ exp(sink)])    O = sum of exp(lse_p - lse) O_p
//
// grid       workgroup_id = (query row, query head, batch)
// workgroup  LANES invocations, each owns every LANES-th value dimension
// memory     none
// needs      nothing
// constants  SPLITS
// bindings   0 params (uniform)  6 row_data  9 states (read)  7 output  8 lse (read_write)
// snippets   output_* row_data_* lse_* row_end numerics part_state

const LANES: u32 = 64u;

override V_HEAD_DIM: u32;

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let row = row_at(group.z, group.y, group.x);
    // an empty part (negative infinity) is neutral: nothing of it enters arithmetic
    var top = MASKED_SCORE;
    for (var part = 0u; part < SPLITS; part++) {
        let value = states[part_lse_at(row, part)];
        if !is_negative_infinity(value) {
            top = max(top, value);
        }
    }
    var total = 0.0;
    for (var part = 0u; part < SPLITS; part++) {
        let value = states[part_lse_at(row, part)];
        if !is_negative_infinity(value) {
            total += exp(value - top);
        }
    }
    let end = row_end(row, top, total);
    if lane == 0u {
        store_lse(row, end.lse);
    }
    let to = offset_4(params.output_offset, params.output_strides, row.b, row.h, row.i);
    for (var d = lane; d < V_HEAD_DIM; d += LANES) {
        var sum = 0.0;
        for (var part = 0u; part < SPLITS; part++) {
            let value = states[part_lse_at(row, part)];
            if !is_negative_infinity(value) {
                sum += exp(value - top) * states[part_output_at(row, part) + d];
            }
        }
        store_output(to + d * params.output_strides.w, sum * end.factor);
    }
}
