// value_f32.wgsl: the value, stored as f32.

@group(0) @binding(3) var<storage, read> value: array<f32>;

fn load_value(index: u32) -> f32 {
    return value[index];
}
