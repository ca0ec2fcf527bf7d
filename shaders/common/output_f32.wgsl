// output_f32.wgsl: the output, stored as f32.

@group(0) @binding(7) var<storage, read_write> output: array<f32>;

fn store_output(index: u32, value: f32) {
    output[index] = value;
}
