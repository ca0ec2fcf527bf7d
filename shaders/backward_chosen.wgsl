// backward_chosen.wgsl: what chosen weights add to delta of each row, out of the sums of splits.
//
// grid       workgroup_id = (block, row of blocks), flattened over batch, heads and rows
// workgroup  64 invocations, a row each
// bindings   0 params (uniform)  9 gradients (read)  6 row_data (read_write)
// snippets   none

const WIDTH: u32 = 64u;

override HEADS: u32;
override BLOCKS_PER_ROW: u32;

@group(0) @binding(6) var<storage, read_write> row_data: array<u32>;
@group(0) @binding(9) var<storage, read> gradients: array<f32>;

@compute @workgroup_size(WIDTH)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let n = (group.y * BLOCKS_PER_ROW + group.x) * WIDTH + lane;
    let plane = n / params.q_len;
    let row = Row(plane / HEADS, plane % HEADS, n % params.q_len, 0u);
    // the last row of blocks may reach past the last row
    if row.b >= params.batch {
        return;
    }
    let place = offset_4(params.scores_offset, params.scores_strides, row.b, row.h, row.i);
    var sum = 0.0;
    for (var split = 0u; split < params.splits; split++) {
        sum += gradients[place + split];
    }
    let to = params.row_stats_at + row.b * params.row_stats_strides.x + row.h * params.row_stats_strides.y + 4u * row.i;
    row_data[to + 2u] = bitcast<u32>(bitcast<f32>(row_data[to + 2u]) + sum);
}
