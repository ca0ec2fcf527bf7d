// value_f16.wgsl: the value, stored as f16, two to a word; needs half.wgsl.

@group(0) @binding(3) var<storage, read> value: array<u32>;

fn load_value(index: u32) -> f32 {
    return half_of(value[index >> 1u], index);
}
