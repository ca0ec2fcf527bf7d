// bfloat.wgsl: bf16 as storage only, in and out of 32-bit words: the upper half of an f32.

// The element with this index out of the word that holds it.
fn bfloat_of(word: u32, index: u32) -> f32 {
    return bitcast<f32>(select(word << 16u, word & 0xffff0000u, (index & 1u) == 1u));
}

// Four neighbours out of the two words that hold them.
fn bfloats_of(words: vec2u) -> vec4f {
    return bitcast<vec4f>(vec4u(words.x << 16u, words.x & 0xffff0000u, words.y << 16u, words.y & 0xffff0000u));
}

// The bits of a bf16, rounded to nearest even; what rounds beyond its range becomes infinity, and NaN stays NaN.
fn bfloat_bits(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    if (bits & 0x7fffffffu) > 0x7f800000u {
        return (bits >> 16u) | 0x40u;
    }
    return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}
