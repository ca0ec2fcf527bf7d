// tile_query_workgroup.wgsl: the block's query rows in workgroup memory; needs query_*.

// [chunk][row_lane][r, d]
var<workgroup> query_tile: array<array<array<vec4f, QUERY_ROW>, ROW_LANES>, KEY_CHUNKS>;

fn stage_query(b: u32, h: u32, first_row: u32, lane: u32) {
    for (var at = lane; at < BLOCK_Q * KEY_CHUNKS * KEY_CHUNK; at += WORKGROUP_SIZE) {
        let d = at % (KEY_CHUNKS * KEY_CHUNK);
        let row_in_block = at / (KEY_CHUNKS * KEY_CHUNK);
        let i = min(first_row + row_in_block, params.q_len - 1u);
        let start = offset_4(params.query_offset, params.query_strides, b, h, i);
        let slot = row_in_block / ROW_LANES * KEY_CHUNK + d % KEY_CHUNK;
        query_tile[d / KEY_CHUNK][row_in_block % ROW_LANES][slot] = load_query_vec(start, d);
    }
}

fn query_at(start: u32, row_lane: u32, r: u32, chunk: u32, d: u32) -> vec4f {
    return query_tile[chunk][row_lane][r * KEY_CHUNK + d];
}
