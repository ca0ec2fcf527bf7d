// scale_f32.wgsl: the scales of TENSOR, stored as f32.

@group(0) @binding(TENSOR_SCALE_BINDING) var<storage, read> TENSOR_scale: array<f32>;

fn load_TENSOR_scale(index: u32) -> f32 {
    return TENSOR_scale[index];
}
