// key_f16x4.wgsl: the key, stored as f16, rows of whole vec4s at multiples of 4.

@group(0) @binding(2) var<storage, read> key: array<vec2u>;

// Elements 4 d to 4 d + 3 of the row that starts at element `start`; zeros behind its end.
fn load_key_vec(start: u32, d: u32) -> vec4f {
    if KEY_RAGGED && d * 4u >= HEAD_DIM {
        return vec4f(0.0);
    }
    let words = key[start / 4u + d];
    return vec4f(unpack2x16float(words.x), unpack2x16float(words.y));
}
