// query_gather.wgsl: four elements of the query one by one, for any stride and width; needs query_f32 or query_f16.

// Elements 4 d to 4 d + 3 of the row that starts at element `start`; zeros behind its end.
fn load_query_vec(start: u32, d: u32) -> vec4f {
    var elements = vec4f(0.0);
    for (var n = 0u; n < 4u; n++) {
        if d * 4u + n < HEAD_DIM {
            elements[n] = load_query(start + (d * 4u + n) * params.query_strides.w);
        }
    }
    return elements;
}
