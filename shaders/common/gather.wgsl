// gather.wgsl: four elements of TENSOR one by one, for any stride and width; needs load_* of one element.

// Elements 4 d to 4 d + 3 of the row at a place; zeros behind its end.
fn load_TENSOR_vec(place: TENSOR_PLACE, d: u32) -> vec4f {
    var elements = vec4f(0.0);
    for (var n = 0u; n < 4u; n++) {
        if d * 4u + n < TENSOR_DIM {
            elements[n] = TENSOR_element(place, d * 4u + n);
        }
    }
    return elements;
}
