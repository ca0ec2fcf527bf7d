// backward_store.wgsl: sums of splits added in their order, and stored as the gradient is.
//
// grid       workgroup_id = (block, row of blocks), flattened over batch, heads, rows or keys, and vec4 columns
// workgroup  64 invocations, four columns each
// bindings   0 params (uniform)  9 gradients (read)  7 output (read_write)
// snippets   output_vec_*

const WORKGROUP_SIZE: u32 = 64u;
// rows are whole vectors where they are written as such
const VALUE_RAGGED: bool = false;

override V_HEAD_DIM: u32;
override HEADS: u32;
override ROWS: u32;
// numbers that a row of one split has
override SPLIT_WIDTH: u32;
override BLOCKS_PER_ROW: u32;

@group(0) @binding(9) var<storage, read> gradients: array<f32>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let vecs = (V_HEAD_DIM + 3u) / 4u;
    let n = (group.y * BLOCKS_PER_ROW + group.x) * WORKGROUP_SIZE + lane;
    let row = n / vecs;
    let d = n % vecs;
    let plane = row / ROWS;
    // the last row of blocks may reach past the last element
    if plane / HEADS >= params.batch {
        return;
    }
    let place = offset_4(params.scores_offset, params.scores_strides, plane / HEADS, plane % HEADS, row % ROWS);
    var sum = vec4f(0.0);
    for (var split = 0u; split < params.splits; split++) {
        for (var part = 0u; part < 4u; part++) {
            if d * 4u + part < V_HEAD_DIM {
                sum[part] += gradients[place + split * SPLIT_WIDTH + d * 4u + part];
            }
        }
    }
    store_output_vec(offset_4(params.output_offset, params.output_strides, plane / HEADS, plane % HEADS, row % ROWS), d, sum);
}
