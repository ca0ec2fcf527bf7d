// value_gather.wgsl: four elements of the value one by one, for any stride and width; needs value_f32 or value_f16.

// Elements 4 d to 4 d + 3 of the row that starts at element `start`; zeros behind its end.
fn load_value_vec(start: u32, d: u32) -> vec4f {
    var elements = vec4f(0.0);
    for (var n = 0u; n < 4u; n++) {
        if d * 4u + n < V_HEAD_DIM {
            elements[n] = load_value(start + (d * 4u + n) * params.value_strides.w);
        }
    }
    return elements;
}
