// place_scaled.wgsl: where the rows of TENSOR and their scales lie; needs pages, scale_*.

// columns that have one scale
override TENSOR_BLOCK: u32;

// The first element of the row of key j of the part, and its first scale. `at` is where the element lies if the keys lie side by
// side: kernels count that as they go.
fn TENSOR_place(b: u32, kv_h: u32, j: u32, at: u32) -> vec2u {
    if PAGED {
        let page = page_of(b, j);
        return vec2u(
            offset_4(params.TENSOR_offset, params.TENSOR_strides, page.x, kv_h, page.y),
            offset_4(params.TENSOR_scale_offset, params.TENSOR_scale_strides, page.x, kv_h, page.y),
        );
    }
    return vec2u(at, offset_4(params.TENSOR_scale_offset, params.TENSOR_scale_strides, b, kv_h, j));
}

// What column d of the row at a place is to be multiplied by.
fn TENSOR_block_scale(place: vec2u, d: u32) -> f32 {
    return load_TENSOR_scale(place.y + d / TENSOR_BLOCK * params.TENSOR_scale_strides.w);
}
