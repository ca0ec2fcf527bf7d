// element_scaled.wgsl: one element of a row of TENSOR, times the scale of its block; needs load_i8, place_scaled.

fn TENSOR_element(place: vec2u, d: u32) -> f32 {
    return load_TENSOR(place.x + d * params.TENSOR_strides.w) * TENSOR_block_scale(place, d);
}
