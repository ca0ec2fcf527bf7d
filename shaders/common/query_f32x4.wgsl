// query_f32x4.wgsl: the query, stored as f32, rows of whole vec4s at multiples of 4.

@group(0) @binding(1) var<storage, read> query: array<vec4f>;

// Elements 4 d to 4 d + 3 of the row that starts at element `start`; zeros behind its end.
fn load_query_vec(start: u32, d: u32) -> vec4f {
    if KEY_RAGGED && d * 4u >= HEAD_DIM {
        return vec4f(0.0);
    }
    return query[start / 4u + d];
}
