// tile_query_storage.wgsl: the block's query rows read where they lie, again for each block of keys; needs query_*.

fn stage_query(b: u32, h: u32, first_row: u32, lane: u32) {
}

fn query_at(start: u32, row_lane: u32, r: u32, chunk: u32, d: u32) -> vec4f {
    return load_query_vec(start, chunk * KEY_CHUNK + d);
}
