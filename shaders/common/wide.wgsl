// wide.wgsl: what is loaded of TENSOR at once is one vec4; needs load_*x4 or gather.

alias TENSOR_WIDE = vec4f;

// Elements 4 d and on of the row at a place.
fn load_TENSOR_wide(place: TENSOR_PLACE, d: u32) -> TENSOR_WIDE {
    return load_TENSOR_vec(place, d);
}

// The s-th vec4 of them.
fn TENSOR_part(wide: TENSOR_WIDE, s: u32) -> vec4f {
    return wide;
}
