// part_state.wgsl: where the states of parts of the keys lie: outputs [state, rows, V_HEAD_DIM], then maxima and sums
// [state, rows, 2].
//
// scores_strides is of batch entry, head and state here, and then the place of the maxima and sums; scores_offset is the
// first row of this dispatch's first state.

@group(0) @binding(9) var<storage, read_write> states: array<f32>;

fn part_row(row: Row, part: u32) -> u32 {
    let of_state = row.b * params.scores_strides.x + row.h * params.scores_strides.y + row.i;
    return params.scores_offset + part * params.scores_strides.z + of_state;
}

fn part_output_at(row: Row, part: u32) -> u32 {
    return part_row(row, part) * V_HEAD_DIM;
}

fn part_state_at(row: Row, part: u32) -> u32 {
    return params.scores_strides.w + 2u * part_row(row, part);
}
