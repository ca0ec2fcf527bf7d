// split_end_whole.wgsl: the keys were not split, so the result is stored; needs row_end, output_vec_*, lse_*.

fn split_end(row: Row, row_max: f32, row_sum: f32, one: f32) -> RowEnd {
    return row_end(row, row_max, row_sum, one);
}

fn store_split_lse(row: Row, part: u32, end: RowEnd) {
    store_lse(row, end);
}

fn store_split_vec(row: Row, part: u32, d: u32, elements: vec4f) {
    store_output_vec(offset_4(params.output_offset, params.output_strides, row.b, row.h, row.i), d, elements);
}
