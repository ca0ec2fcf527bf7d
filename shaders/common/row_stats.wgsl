// row_stats.wgsl: what backward_delta.wgsl found of a row; needs row_data_buffer.

// Maximum, inverse of the sum or 0 where no key has mass, delta, and the gradient of the log-sum-exp.
fn row_stats(row: Row) -> vec4f {
    let at = params.row_stats_at + row.b * params.row_stats_strides.x + row.h * params.row_stats_strides.y + 4u * row.i;
    return bitcast<vec4f>(
        vec4u(row_data_word(at), row_data_word(at + 1u), row_data_word(at + 2u), row_data_word(at + 3u)),
    );
}

// Whether any key or sink of the row has mass. By the bits: NaN has.
fn has_mass(stats: vec4f) -> bool {
    return bitcast<u32>(stats.y) != 0u;
}
