// scale_f16.wgsl: the scales of TENSOR, stored as f16, two to a word; needs half.

@group(0) @binding(TENSOR_SCALE_BINDING) var<storage, read> TENSOR_scale: array<u32>;

fn load_TENSOR_scale(index: u32) -> f32 {
    return exact_half_of(TENSOR_scale[index >> 1u], index);
}
