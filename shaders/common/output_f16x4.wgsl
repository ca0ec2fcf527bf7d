// output_f16x4.wgsl: the output, stored as f16, rows of whole vec4s at multiples of 4; needs half.wgsl.

@group(0) @binding(7) var<storage, read_write> output: array<vec2u>;

// Elements 4 d to 4 d + 3 of the row that starts at element `start`.
fn store_output_vec(start: u32, d: u32, elements: vec4f) {
    if !VALUE_RAGGED || d * 4u < V_HEAD_DIM {
        output[start / 4u + d] = vec2u(
            half_bits(elements.x) | (half_bits(elements.y) << 16u),
            half_bits(elements.z) | (half_bits(elements.w) << 16u),
        );
    }
}
