// tile_query_workgroup.wgsl: the block's query rows in workgroup memory; needs query_*.

// one vec4 more than a chunk: neighbouring rows start in different banks
var<workgroup> query_tile: array<array<array<vec4f, KEY_CHUNK + 1u>, KEY_CHUNKS>, BLOCK_Q>;

fn stage_query(b: u32, h: u32, first_row: u32, lane: u32) {
    for (var at = lane; at < BLOCK_Q * KEY_CHUNKS * KEY_CHUNK; at += WORKGROUP_SIZE) {
        let d = at % (KEY_CHUNKS * KEY_CHUNK);
        let row_in_block = at / (KEY_CHUNKS * KEY_CHUNK);
        let i = min(first_row + row_in_block, params.q_len - 1u);
        let start = offset_4(params.query_offset, params.query_strides, b, h, i);
        query_tile[row_in_block][d / KEY_CHUNK][d % KEY_CHUNK] = load_query_vec(start, d);
    }
}

fn query_at(start: u32, row_in_block: u32, chunk: u32, d: u32) -> vec4f {
    return query_tile[row_in_block][chunk][d];
}
