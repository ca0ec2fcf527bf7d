// part_state.wgsl: where the states of the parts lie in the workspace: outputs [SPLITS, rows, V_HEAD_DIM], then
// log-sum-exps [SPLITS, rows].

@group(0) @binding(9) var<storage, read_write> workspace: array<f32>;

fn part_row(row: Row, part: u32) -> u32 {
    // scores_strides is of [batch, q_heads, q_len, 1] here, scores_offset the number of rows
    return part * params.scores_offset + row.b * params.scores_strides.x + row.h * params.scores_strides.y + row.i;
}

fn part_output_at(row: Row, part: u32) -> u32 {
    return part_row(row, part) * V_HEAD_DIM;
}

fn part_lse_at(row: Row, part: u32) -> u32 {
    return SPLITS * params.scores_offset * V_HEAD_DIM + part_row(row, part);
}
