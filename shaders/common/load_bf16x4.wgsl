// load_bf16x4.wgsl: TENSOR, stored as bf16, rows of whole vec4s at multiples of 4; needs bfloat.

@group(0) @binding(TENSOR_BINDING) var<storage, read> TENSOR: array<vec2u>;

// Elements 4 d to 4 d + 3 of the row at a place; zeros behind its end.
fn load_TENSOR_vec(start: u32, d: u32) -> vec4f {
    if TENSOR_RAGGED && d * 4u >= TENSOR_DIM {
        return vec4f(0.0);
    }
    return bfloats_of(TENSOR[start / 4u + d]);
}
