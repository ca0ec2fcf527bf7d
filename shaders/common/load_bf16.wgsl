// load_bf16.wgsl: TENSOR, stored as bf16, two to a word; needs bfloat.

@group(0) @binding(TENSOR_BINDING) var<storage, read> TENSOR: array<u32>;

fn load_TENSOR(index: u32) -> f32 {
    return bfloat_of(TENSOR[index >> 1u], index);
}
