// softmax.wgsl: the softmax of each row of scores, in place, and its log-sum-exp.
//
//   P = exp(S - m) / l    m = max of the row, l = sum of exp(S - m)
//
// grid       workgroup_id = (query row, query head, batch)
// workgroup  WIDTH invocations share one row, each takes every WIDTH-th key
// memory     partial: WIDTH f32, written in full before it is read
// needs      WIDTH a power of two; every barrier in uniform control flow
// bindings   0 params (uniform)  6 row_data (read)  8 lse  9 scores (read_write)
// snippets   row_data_* lse_* row_end numerics

const WIDTH: u32 = 64u;

@group(0) @binding(9) var<storage, read_write> scores: array<f32>;

var<workgroup> partial: array<f32, WIDTH>;

@compute @workgroup_size(WIDTH)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let row = row_at(group.z, group.y, group.x);
    let start = offset_4(params.scores_offset, params.scores_strides, row.b, row.h, row.i);

    var top = MASKED_SCORE;
    for (var j = lane; j < params.kv_len; j += WIDTH) {
        let score = scores[start + j];
        if !is_negative_infinity(score) {
            top = max(top, score);
        }
    }
    partial[lane] = top;
    workgroupBarrier();
    for (var step = WIDTH / 2u; step > 0u; step /= 2u) {
        if lane < step {
            partial[lane] = max(partial[lane], partial[lane + step]);
        }
        workgroupBarrier();
    }
    let row_max = partial[0];
    // everyone has read the maximum before partial is used again
    workgroupBarrier();

    var sum = 0.0;
    for (var j = lane; j < params.kv_len; j += WIDTH) {
        let score = scores[start + j];
        if !is_negative_infinity(score) {
            sum += exp(score - row_max);
        }
    }
    partial[lane] = sum;
    workgroupBarrier();
    for (var step = WIDTH / 2u; step > 0u; step /= 2u) {
        if lane < step {
            partial[lane] += partial[lane + step];
        }
        workgroupBarrier();
    }

    let end = row_end(row, row_max, partial[0], 1.0);
    if lane == 0u {
        store_lse(row, end);
    }
    for (var j = lane; j < params.kv_len; j += WIDTH) {
        let score = scores[start + j];
        var prob = 0.0;
        if !is_negative_infinity(score) {
            prob = exp(score - row_max) * end.factor;
        }
        scores[start + j] = prob;
    }
}
