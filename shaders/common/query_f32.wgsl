// query_f32.wgsl: the query, stored as f32.

@group(0) @binding(1) var<storage, read> query: array<f32>;

fn load_query(index: u32) -> f32 {
    return query[index];
}
