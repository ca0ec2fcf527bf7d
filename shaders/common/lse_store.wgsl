// lse_store.wgsl: the log-sum-exp of each row, f32.

@group(0) @binding(8) var<storage, read_write> lse: array<f32>;

fn store_lse(row: Row, end: RowEnd) {
    lse[params.lse_offset + row.b * params.lse_strides.x + row.h * params.lse_strides.y + row.i] = end.lse;
}
