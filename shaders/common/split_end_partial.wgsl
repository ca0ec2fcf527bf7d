// split_end_partial.wgsl: the state of a part of the keys, normalised, for combine.wgsl; needs numerics, part_state.

fn split_end(row: Row, row_max: f32, row_sum: f32) -> RowEnd {
    if row_sum == 0.0 {
        return RowEnd(0.0, params.negative_infinity);
    }
    return RowEnd(1.0 / row_sum, row_max + natural_log(row_sum));
}

fn store_split_lse(row: Row, part: u32, value: f32) {
    states[part_lse_at(row, part)] = value;
}

fn store_split_vec(row: Row, part: u32, d: u32, elements: vec4f) {
    let start = part_output_at(row, part);
    for (var n = 0u; n < 4u; n++) {
        if d * 4u + n < V_HEAD_DIM {
            states[start + d * 4u + n] = elements[n];
        }
    }
}
