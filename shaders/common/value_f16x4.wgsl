// value_f16x4.wgsl: the value, stored as f16, rows of whole vec4s at multiples of 4.

@group(0) @binding(3) var<storage, read> value: array<vec2u>;

// Elements 4 d to 4 d + 3 of the row that starts at element `start`; zeros behind its end.
fn load_value_vec(start: u32, d: u32) -> vec4f {
    if VALUE_RAGGED && d * 4u >= V_HEAD_DIM {
        return vec4f(0.0);
    }
    let words = value[start / 4u + d];
    return vec4f(unpack2x16float(words.x), unpack2x16float(words.y));
}
