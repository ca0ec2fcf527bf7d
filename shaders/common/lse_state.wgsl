// lse_state.wgsl: maximum and sum of each row, two f32 side by side, in the place of its log-sum-exp.

@group(0) @binding(8) var<storage, read_write> lse: array<f32>;

fn store_lse(row: Row, end: RowEnd) {
    let at = params.lse_offset + row.b * params.lse_strides.x + row.h * params.lse_strides.y + 2u * row.i;
    lse[at] = end.row_max;
    lse[at + 1u] = end.row_sum;
}
