// half.wgsl: f16 as storage only, in and out of 32-bit words; core WGSL, no f16 feature.

// The element with this index out of the word that holds it.
fn half_of(word: u32, index: u32) -> f32 {
    let pair = unpack2x16float(word);
    return select(pair.x, pair.y, (index & 1u) == 1u);
}

// The same in integers: a device may read subnormal halves, multiples of 2^-24, as 0.
fn exact_half_of(word: u32, index: u32) -> f32 {
    let half = (word >> ((index & 1u) * 16u)) & 0xffffu;
    let magnitude = half & 0x7fffu;
    let sign = (half & 0x8000u) << 16u;
    // beside the normal ones infinity and NaN, whose exponents are the largest in either type
    let base = select(0x38000000u, 0x70000000u, magnitude >= 0x7c00u);
    let normal = bitcast<f32>(sign | ((magnitude << 13u) + base));
    let subnormal = f32(magnitude) * select(5.9604644775390625e-8, -5.9604644775390625e-8, sign != 0u);
    return select(normal, subnormal, magnitude < 0x400u);
}

// The bits of a half, rounded to nearest even; beyond its range infinity, as IEEE 754 says. Done in
// integers because pack2x16float leaves rounding and overflow to the device.
fn half_bits(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    let sign = (bits >> 16u) & 0x8000u;
    let magnitude = bits & 0x7fffffffu;
    if magnitude > 0x7f800000u {
        return sign | 0x7e00u;
    }
    // 65520 and above rounds to infinity
    if magnitude >= 0x477ff000u {
        return sign | 0x7c00u;
    }
    // normal halves, from 2^-14 on: drop 13 bits, exponent bias 127 -> 15
    if magnitude >= 0x38800000u {
        let odd = (magnitude >> 13u) & 1u;
        return sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13u);
    }
    // subnormal halves are multiples of 2^-24; below 2^-25 nothing is left
    if magnitude < 0x33000000u {
        return sign;
    }
    let shift = 126u - (magnitude >> 23u);
    let mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    let kept = mantissa >> shift;
    let rest = mantissa & ((1u << shift) - 1u);
    let middle = 1u << (shift - 1u);
    let up = rest > middle || (rest == middle && (kept & 1u) == 1u);
    return sign | (kept + select(0u, 1u, up));
}
