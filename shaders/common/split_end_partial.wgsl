// split_end_partial.wgsl: the state of a part of the keys, normalised, for combine.wgsl; needs row_end, part_state.

// A sink comes in when all parts are merged, and the log-sum-exp with it.
fn split_end(row: Row, row_max: f32, row_sum: f32, one: f32) -> RowEnd {
    if row_sum == 0.0 {
        return RowEnd(0.0, 0.0, params.negative_infinity, 0.0);
    }
    let whole = row_sum * select(params.headroom_inverse, 1.0, one == 1.0);
    return RowEnd(1.0 / row_sum, 0.0, row_max, whole);
}

fn store_split_lse(row: Row, part: u32, end: RowEnd) {
    let at = part_state_at(row, part);
    states[at] = end.row_max;
    states[at + 1u] = end.row_sum;
}

fn store_split_vec(row: Row, part: u32, d: u32, elements: vec4f) {
    let start = part_output_at(row, part);
    for (var n = 0u; n < 4u; n++) {
        if d * 4u + n < V_HEAD_DIM {
            states[start + d * 4u + n] = elements[n];
        }
    }
}
