// weight_f16.wgsl: a matrix of weights, stored as f16, two to a word; needs half.wgsl.

@group(0) @binding(2) var<storage, read> weight: array<u32>;

fn load_weight(index: u32) -> f32 {
    return half_of(weight[index >> 1u], index);
}
