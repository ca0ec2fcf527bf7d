// d_lse_buffer.wgsl: the gradient of the log-sum-exp of each row.

@group(0) @binding(15) var<storage, read> d_lse: array<f32>;

fn d_lse_of(row: Row) -> f32 {
    // one number where maximum and sum are two
    return d_lse[params.d_lse_offset + (row.b * params.lse_strides.x + row.h * params.lse_strides.y) / 2u + row.i];
}
