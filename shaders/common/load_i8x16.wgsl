// load_i8x16.wgsl: TENSOR, stored as signed bytes, rows of whole 128 bits at multiples of these, and blocks of as many columns;
// needs place_scaled.

@group(0) @binding(TENSOR_BINDING) var<storage, read> TENSOR: array<vec4u>;

struct TENSOR_WIDE {
    words: vec4u,
    scale: f32,
}

// Elements 4 d to 4 d + 15 of the row at a place, d a multiple of 4.
fn load_TENSOR_wide(place: vec2u, d: u32) -> TENSOR_WIDE {
    return TENSOR_WIDE(TENSOR[place.x / 16u + d / 4u], TENSOR_block_scale(place, d * 4u));
}

// The s-th vec4 of them.
fn TENSOR_part(wide: TENSOR_WIDE, s: u32) -> vec4f {
    let word = bitcast<i32>(wide.words[s]);
    let bytes = vec4i(word << 24u, word << 16u, word << 8u, word) >> vec4u(24u);
    return vec4f(bytes) * wide.scale;
}
