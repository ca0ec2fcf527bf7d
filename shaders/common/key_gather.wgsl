// key_gather.wgsl: four elements of the key one by one, for any stride and width; needs key_f32 or key_f16.

// Elements 4 d to 4 d + 3 of the row that starts at element `start`; zeros behind its end.
fn load_key_vec(start: u32, d: u32) -> vec4f {
    var elements = vec4f(0.0);
    for (var n = 0u; n < 4u; n++) {
        if d * 4u + n < HEAD_DIM {
            elements[n] = load_key(start + (d * 4u + n) * params.key_strides.w);
        }
    }
    return elements;
}
