// load_f16x8.wgsl: TENSOR, stored as f16, rows of whole 128 bits at multiples of these.

@group(0) @binding(TENSOR_BINDING) var<storage, read> TENSOR: array<vec4u>;

alias TENSOR_WIDE = vec4u;

// Elements 4 d to 4 d + 7 of the row at a place, d an even number.
fn load_TENSOR_wide(start: u32, d: u32) -> TENSOR_WIDE {
    return TENSOR[start / 8u + d / 2u];
}

// The s-th vec4 of them.
fn TENSOR_part(wide: TENSOR_WIDE, s: u32) -> vec4f {
    let words = select(wide.xy, wide.zw, s == 1u);
    return vec4f(unpack2x16float(words.x), unpack2x16float(words.y));
}
