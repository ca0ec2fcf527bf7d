// element.wgsl: one element of a row of TENSOR; needs load_* of one element.

fn TENSOR_element(start: u32, d: u32) -> f32 {
    return load_TENSOR(start + d * params.TENSOR_strides.w);
}
