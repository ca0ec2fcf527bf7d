// bias_bf16.wgsl: an additive bias, stored as bf16; negative infinity forbids the key. Needs bfloat.

@group(0) @binding(4) var<storage, read> bias: array<u32>;

fn bias_index(row: Row, j: u32) -> u32 {
    return offset_pair(params.bias_offset, params.bias_strides, row, j);
}

fn add_bias(row: Row, j: u32, score: f32) -> f32 {
    let index = bias_index(row, j);
    return score + bfloat_of(bias[index >> 1u], index);
}

// By its bits: a comparison with infinity may be optimised away.
fn bias_allows(row: Row, j: u32) -> bool {
    let index = bias_index(row, j);
    return ((bias[index >> 1u] >> ((index & 1u) * 16u)) & 0xffffu) != 0xff80u;
}
