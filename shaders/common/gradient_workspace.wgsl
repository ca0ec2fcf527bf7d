// gradient_workspace.wgsl: sums of gradients in the workspace, before they are stored.

@group(0) @binding(9) var<storage, read_write> gradients: array<f32>;

// The first number of a row or key.
fn gradient_at(b: u32, h: u32, l: u32) -> u32 {
    return offset_4(params.scores_offset, params.scores_strides, b, h, l);
}

fn gradient_step() -> u32 {
    return 1u;
}

// A later part of the problem adds to what an earlier one left.
fn store_gradient(at: u32, sum: f32) {
    if params.accumulate != 0u {
        gradients[at] += sum;
    } else {
        gradients[at] = sum;
    }
}
