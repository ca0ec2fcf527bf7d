// key_f16.wgsl: the key, stored as f16, two to a word; needs half.wgsl.

@group(0) @binding(2) var<storage, read> key: array<u32>;

fn load_key(index: u32) -> f32 {
    return half_of(key[index >> 1u], index);
}
