// place.wgsl: where the rows of TENSOR lie; needs pages.

// The first element of the row of key j of the part. `at` is where it lies if the keys lie side by side: kernels count that as
// they go.
fn TENSOR_place(b: u32, kv_h: u32, j: u32, at: u32) -> u32 {
    if PAGED {
        let page = page_of(b, j);
        return offset_4(params.TENSOR_offset, params.TENSOR_strides, page.x, kv_h, page.y);
    }
    return at;
}
