// load_i8.wgsl: TENSOR, stored as signed bytes, four to a word; needs place_scaled.

@group(0) @binding(TENSOR_BINDING) var<storage, read> TENSOR: array<u32>;

// Without its scale.
fn load_TENSOR(index: u32) -> f32 {
    return f32(extractBits(bitcast<i32>(TENSOR[index >> 2u]), (index & 3u) * 8u, 8u));
}
