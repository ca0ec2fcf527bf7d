// output_bf16x4.wgsl: the output, stored as bf16, rows of whole vec4s at multiples of 4; needs bfloat.

@group(0) @binding(7) var<storage, read_write> output: array<vec2u>;

// Elements 4 d to 4 d + 3 of the row that starts at element `start`.
fn store_output_vec(start: u32, d: u32, elements: vec4f) {
    if !VALUE_RAGGED || d * 4u < V_HEAD_DIM {
        output[start / 4u + d] = vec2u(
            bfloat_bits(elements.x) | (bfloat_bits(elements.y) << 16u),
            bfloat_bits(elements.z) | (bfloat_bits(elements.w) << 16u),
        );
    }
}
