// output_scatter.wgsl: four elements of the output one by one, for any stride and width; needs output_f32 or output_f16.

// Elements 4 d to 4 d + 3 of the row that starts at element `start`; none behind its end.
fn store_output_vec(start: u32, d: u32, elements: vec4f) {
    for (var n = 0u; n < 4u; n++) {
        if d * 4u + n < V_HEAD_DIM {
            store_output(start + (d * 4u + n) * params.output_strides.w, elements[n]);
        }
    }
}
