// combine.wgsl: the states of the parts of the keys, merged into the attention over all of them.
//
//   m = max of m_p    l = sum of exp(m_p - m) l_p  [+ exp(sink - m)]    O = sum of exp(m_p - m) l_p / l O_p
//
// grid       workgroup_id = (query row, query head, batch)
// workgroup  LANES invocations, each owns every LANES-th value dimension
// memory     none
// needs      nothing
// bindings   0 params (uniform)  6 row_data  9 states (read)  7 output  8 lse (read_write)
// snippets   output_* row_data_* lse_* row_end numerics part_state

const LANES: u32 = 64u;

override V_HEAD_DIM: u32;

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let row = row_at(group.z, group.y, group.x);
    // an empty part is neutral: nothing of it enters arithmetic
    var top = MASKED_SCORE;
    for (var part = 0u; part < params.splits; part++) {
        let at = part_state_at(row, part);
        if !is_empty_sum(states[at + 1u]) {
            top = max(top, states[at]);
        }
    }
    var total = 0.0;
    for (var part = 0u; part < params.splits; part++) {
        let at = part_state_at(row, part);
        if !is_empty_sum(states[at + 1u]) {
            total += exp(states[at] - top) * states[at + 1u];
        }
    }
    let end = row_end(row, top, total, 1.0);
    if lane == 0u {
        store_lse(row, end);
    }
    let to = offset_4(params.output_offset, params.output_strides, row.b, row.h, row.i);
    for (var d = lane; d < V_HEAD_DIM; d += LANES) {
        var sum = 0.0;
        for (var part = 0u; part < params.splits; part++) {
            let at = part_state_at(row, part);
            if !is_empty_sum(states[at + 1u]) {
                // weights first: outputs may be near the end of f32
                let weight = exp(states[at] - top) * states[at + 1u] * end.factor;
                sum += weight * states[part_output_at(row, part) + d];
            }
        }
        store_output(to + d * params.output_strides.w, sum);
    }
}
