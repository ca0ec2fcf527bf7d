// gradient_output.wgsl: a gradient of each pair, stored where the caller wants it; needs output_* of one element.

// The first element of a row.
fn gradient_at(b: u32, h: u32, l: u32) -> u32 {
    return offset_4(params.output_offset, params.output_strides, b, h, l);
}

fn gradient_step() -> u32 {
    return params.output_strides.w;
}

fn store_gradient(at: u32, sum: f32) {
    store_output(at, sum);
}
