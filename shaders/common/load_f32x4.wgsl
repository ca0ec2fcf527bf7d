// load_f32x4.wgsl: TENSOR, stored as f32, rows of whole vec4s at multiples of 4.

@group(0) @binding(TENSOR_BINDING) var<storage, read> TENSOR: array<vec4f>;

// Elements 4 d to 4 d + 3 of the row at a place; zeros behind its end.
fn load_TENSOR_vec(start: u32, d: u32) -> vec4f {
    if TENSOR_RAGGED && d * 4u >= TENSOR_DIM {
        return vec4f(0.0);
    }
    return TENSOR[start / 4u + d];
}
