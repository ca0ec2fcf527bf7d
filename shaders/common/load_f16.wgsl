// load_f16.wgsl: TENSOR, stored as f16, two to a word; needs half.

@group(0) @binding(TENSOR_BINDING) var<storage, read> TENSOR: array<u32>;

fn load_TENSOR(index: u32) -> f32 {
    return half_of(TENSOR[index >> 1u], index);
}
