// bias_f32.wgsl: an additive bias, stored as f32; negative infinity forbids the key.

@group(0) @binding(4) var<storage, read> bias: array<u32>;

fn bias_bits(row: Row, j: u32) -> u32 {
    return bias[offset_pair(params.bias_offset, params.bias_strides, row, j)];
}

fn add_bias(row: Row, j: u32, score: f32) -> f32 {
    return score + bitcast<f32>(bias_bits(row, j));
}

// By its bits: a comparison with infinity may be optimised away.
fn bias_allows(row: Row, j: u32) -> bool {
    return bias_bits(row, j) != 0xff800000u;
}
