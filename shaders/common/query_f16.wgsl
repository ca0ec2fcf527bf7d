// query_f16.wgsl: the query, stored as f16, two to a word; needs half.wgsl.

@group(0) @binding(1) var<storage, read> query: array<u32>;

fn load_query(index: u32) -> f32 {
    return half_of(query[index >> 1u], index);
}
