// load_f32.wgsl: TENSOR, stored as f32.

@group(0) @binding(TENSOR_BINDING) var<storage, read> TENSOR: array<f32>;

fn load_TENSOR(index: u32) -> f32 {
    return TENSOR[index];
}
