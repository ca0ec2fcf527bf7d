// weight_f32.wgsl: a matrix of weights, stored as f32.

@group(0) @binding(2) var<storage, read> weight: array<f32>;

fn load_weight(index: u32) -> f32 {
    return weight[index];
}
