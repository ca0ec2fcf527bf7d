// load_i8x4.wgsl: TENSOR, stored as signed bytes, rows of whole words, and of blocks of whole words; needs place_scaled.

@group(0) @binding(TENSOR_BINDING) var<storage, read> TENSOR: array<u32>;

// Elements 4 d to 4 d + 3 of the row at a place; zeros behind its end.
fn load_TENSOR_vec(place: vec2u, d: u32) -> vec4f {
    if TENSOR_RAGGED && d * 4u >= TENSOR_DIM {
        return vec4f(0.0);
    }
    let word = bitcast<i32>(TENSOR[place.x / 4u + d]);
    let bytes = vec4i(word << 24u, word << 16u, word << 8u, word) >> vec4u(24u);
    return vec4f(bytes) * TENSOR_block_scale(place, d * 4u);
}
