// load_i8.wgsl: TENSOR, stored as signed bytes, four to a word; needs place_scaled.

@group(0) @binding(TENSOR_BINDING) var<storage, read> TENSOR: array<u32>;

// Without its scale.
fn load_TENSOR(index: u32) -> f32 {
    // up to the sign, and down again
    return f32(bitcast<i32>(TENSOR[index >> 2u] << (24u - (index & 3u) * 8u)) >> 24u);
}
