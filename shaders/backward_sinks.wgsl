// backward_sinks.wgsl: each row's share of the gradient of its head's sink.
//
//   -exp(sink - m) / l * delta, with delta = -d_lse where the row sees no key
//
// grid       workgroup_id = (block, row of blocks), flattened over batch, heads and rows
// workgroup  64 invocations, a row each
// bindings   0 params (uniform)  4 bias  5 mask  6 row_data (read)  9 gradients (read_write)
// snippets   bias_* mask_* row_data_buffer q_lens keys row_stats gradient_workspace

const WORKGROUP_SIZE: u32 = 64u;

override HEADS: u32;
override BLOCKS_PER_ROW: u32;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let n = (group.y * BLOCKS_PER_ROW + group.x) * WORKGROUP_SIZE + lane;
    let plane = n / params.q_len;
    // the last row of blocks may reach past the last row
    if plane / HEADS >= params.batch {
        return;
    }
    let row = row_at(plane / HEADS, plane % HEADS, n % params.q_len);
    let keys = row_keys(row);
    // most rows see the first key of their interval
    var sees = false;
    for (var j = keys.x; j < keys.y; j++) {
        if key_allowed(row, j) {
            sees = true;
            break;
        }
    }
    let stats = row_stats(row);
    let sink = bitcast<f32>(row_data_word(params.sinks_at + params.head_base + row.h));
    let share = select(stats.w, -(exp(sink - stats.x) * stats.y) * stats.z, sees);
    // a sink of negative infinity is none
    let counts = has_mass(stats) && bitcast<u32>(sink) != 0xff800000u && !row_is_behind(row);
    store_gradient(gradient_at(row.b, row.h, row.i), select(0.0, share, counts));
}
