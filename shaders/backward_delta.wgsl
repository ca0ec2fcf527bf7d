// backward_delta.wgsl: what the gradients of a row's pairs have in common: maximum, sum, and delta.
//
//   delta = dot(dO, O) - d_lse
//
// The dot product goes over chunks of CHUNK vec4s from the first element to the last, as those of values in backward.wgsl do:
// where the output is a value, both are the same number.
//
// grid       workgroup_id = (block, row of blocks), flattened over batch, heads and rows
// workgroup  64 invocations, a row each
// bindings   0 params (uniform)  7 output  8 lse  14 d_output  15 d_lse (read)  6 row_data (read_write)
// snippets   output_vec_* d_output_vec_* d_lse_*

const WIDTH: u32 = 64u;
const CHUNK: u32 = 4u;

override V_HEAD_DIM: u32;
override VALUE_RAGGED: bool;
override HEADS: u32;
override BLOCKS_PER_ROW: u32;

// maximum and sum of each row, in the place of its log-sum-exp
@group(0) @binding(8) var<storage, read> lse: array<f32>;
// what is known of each row comes behind the row data
@group(0) @binding(6) var<storage, read_write> row_data: array<u32>;

@compute @workgroup_size(WIDTH)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let n = (group.y * BLOCKS_PER_ROW + group.x) * WIDTH + lane;
    let plane = n / params.q_len;
    let row = Row(plane / HEADS, plane % HEADS, n % params.q_len, 0u);
    // the last row of blocks may reach past the last row
    if row.b >= params.batch {
        return;
    }
    let output_row = offset_4(params.output_offset, params.output_strides, row.b, row.h, row.i);
    let d_output_row = offset_4(params.d_output_offset, params.d_output_strides, row.b, row.h, row.i);
    var dot = 0.0;
    for (var chunk = 0u; chunk < (V_HEAD_DIM + 4u * CHUNK - 1u) / (4u * CHUNK); chunk++) {
        var chunk_dot = 0.0;
        for (var d = chunk * CHUNK; d < (chunk + 1u) * CHUNK; d++) {
            let left = load_d_output_vec(d_output_row, d);
            let right = load_output_vec(output_row, d);
            chunk_dot = fma(left.x, right.x, chunk_dot);
            chunk_dot = fma(left.y, right.y, chunk_dot);
            chunk_dot = fma(left.z, right.z, chunk_dot);
            chunk_dot = fma(left.w, right.w, chunk_dot);
        }
        dot += chunk_dot;
    }
    let at = params.lse_offset + row.b * params.lse_strides.x + row.h * params.lse_strides.y + 2u * row.i;
    let row_max = lse[at];
    let row_sum = lse[at + 1u];
    // by their bits: NaN is no mass of 0, but a comparison may say so
    let has_mass = bitcast<u32>(row_sum) != 0u && bitcast<u32>(row_max) != 0xff800000u;
    let d_lse = d_lse_of(row);
    let to = params.row_stats_at + row.b * params.row_stats_strides.x + row.h * params.row_stats_strides.y + 4u * row.i;
    row_data[to] = bitcast<u32>(row_max);
    row_data[to + 1u] = bitcast<u32>(select(0.0, 1.0 / row_sum, has_mass));
    row_data[to + 2u] = bitcast<u32>(dot - d_lse);
    row_data[to + 3u] = bitcast<u32>(d_lse);
}
