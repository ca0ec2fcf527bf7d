// key_f32.wgsl: the key, stored as f32.

@group(0) @binding(2) var<storage, read> key: array<f32>;

fn load_key(index: u32) -> f32 {
    return key[index];
}
