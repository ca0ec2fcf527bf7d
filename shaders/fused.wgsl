// fused.wgsl: the whole attention in one pass over the keys, never holding more than a block of scores.
//
//   S = scale * Q K^T   P = softmax(S)   O = P V     online softmax over blocks of keys
//   FlashAttention-2, Dao 2023 (arXiv:2307.08691), Algorithm 1; m, l, O as there.
//
// grid       workgroup_id = (block of ROWS query rows, query head, batch)
// workgroup  BLOCK_KV invocations; for the scores each owns one key of the block, for the output each owns
//            every BLOCK_KV-th value dimension of all rows
// memory     query_tile: ROWS * HEAD_DIM f32   prob_tile: BLOCK_KV * ROWS f32   partial_max: BLOCK_KV f32
//            row_state: 2 * ROWS f32   block_span: 2 u32; each written before it is read
// needs      BLOCK_KV % ROWS == 0; every barrier in uniform control flow
// constants  ROWS, DIMS_PER_LANE = ceil(V_HEAD_DIM / BLOCK_KV)
// bindings   0 params (uniform)  1 query  2 key  3 value  4 bias  5 mask  6 row_data (read)
//            7 output  8 lse (read_write)
// snippets   query_* key_* value_* output_* bias_* mask_* row_data_* lse_* keys score row_end numerics

// elements of a row whose products are summed apart
const DIM_CHUNK: u32 = 32u;

override BLOCK_KV: u32;
override HEAD_DIM: u32;
override V_HEAD_DIM: u32;
override QUERY_TILE: u32;
override PROB_TILE: u32;

var<workgroup> query_tile: array<f32, QUERY_TILE>;
var<workgroup> prob_tile: array<f32, PROB_TILE>;
var<workgroup> partial_max: array<f32, BLOCK_KV>;
// running maximum of each row, and what its accumulators are to be multiplied by
var<workgroup> row_max: array<f32, ROWS>;
var<workgroup> row_rescale: array<f32, ROWS>;
var<workgroup> block_span: vec2u;

@compute @workgroup_size(BLOCK_KV)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let first_row = group.x * ROWS;
    let h = group.y;
    let b = group.z;

    // the query rows, zeros behind the last one
    for (var at = lane; at < ROWS * HEAD_DIM; at += BLOCK_KV) {
        let i = first_row + at / HEAD_DIM;
        var element = 0.0;
        if i < params.q_len {
            let start = offset_4(params.query_offset, params.query_strides, b, h, i);
            element = query_element(start, at % HEAD_DIM);
        }
        query_tile[at] = element;
    }

    // the keys each row may see, and the span that holds them all
    var rows: array<Row, ROWS>;
    var row_begin: array<u32, ROWS>;
    var row_end_key: array<u32, ROWS>;
    var span = vec2u(0xffffffffu, 0u);
    for (var r = 0u; r < ROWS; r++) {
        rows[r] = row_at(b, h, first_row + r);
        var keys = vec2u(0u);
        if first_row + r < params.q_len {
            keys = row_keys(rows[r]);
        }
        row_begin[r] = keys.x;
        row_end_key[r] = keys.y;
        if keys.x < keys.y {
            span = vec2u(min(span.x, keys.x), max(span.y, keys.y));
        }
    }
    if lane == 0u {
        block_span = span;
    }
    if lane < ROWS {
        row_max[lane] = MASKED_SCORE;
    }
    // row data is not uniform for the compiler; this makes the loop's bounds so (and is a barrier)
    let uniform_span = workgroupUniformLoad(&block_span);

    let key_from = params.key_offset + b * params.key_strides.x + rows[0].kv_h * params.key_strides.y;
    let value_from = params.value_offset + b * params.value_strides.x + rows[0].kv_h * params.value_strides.y;

    var score: array<f32, ROWS>;
    var chunk_score: array<f32, ROWS>;
    var allowed: array<bool, ROWS>;
    // this invocation's share of each row's sum of probabilities
    var sum: array<f32, ROWS>;
    var acc: array<array<f32, DIMS_PER_LANE>, ROWS>;
    // a block's share of it: two short sums round far less than one over all keys
    var block_acc: array<array<f32, DIMS_PER_LANE>, ROWS>;

    for (var first_key = uniform_span.x; first_key < uniform_span.y; first_key += BLOCK_KV) {
        // scores of this invocation's key with all rows
        let j = first_key + lane;
        for (var r = 0u; r < ROWS; r++) {
            score[r] = 0.0;
        }
        if j < uniform_span.y {
            let key_row = key_place(b, rows[0].kv_h, j, key_from + j * params.key_strides.z);
            // a sum of its own for each chunk of a row: short sums round less than one over all of it
            for (var first = 0u; first < HEAD_DIM; first += DIM_CHUNK) {
                for (var r = 0u; r < ROWS; r++) {
                    chunk_score[r] = 0.0;
                }
                for (var d = first; d < min(first + DIM_CHUNK, HEAD_DIM); d++) {
                    let element = key_element(key_row, d);
                    for (var r = 0u; r < ROWS; r++) {
                        chunk_score[r] += query_tile[r * HEAD_DIM + d] * element;
                    }
                }
                for (var r = 0u; r < ROWS; r++) {
                    score[r] += chunk_score[r];
                }
            }
        }
        for (var r = 0u; r < ROWS; r++) {
            allowed[r] = false;
            if j >= row_begin[r] && j < row_end_key[r] {
                allowed[r] = key_allowed(rows[r], j);
            }
            var masked_score = MASKED_SCORE;
            if allowed[r] {
                score[r] = full_score(rows[r], j, score[r]);
                masked_score = score[r];
            }
            prob_tile[lane * ROWS + r] = masked_score;
        }
        workgroupBarrier();

        // maximum of each row: BLOCK_KV / ROWS invocations look at ROWS keys each, then one at theirs
        let parts = BLOCK_KV / ROWS;
        let row_of_lane = lane / parts;
        var top = MASKED_SCORE;
        for (var n = 0u; n < ROWS; n++) {
            top = max(top, prob_tile[((lane % parts) * ROWS + n) * ROWS + row_of_lane]);
        }
        partial_max[lane] = top;
        workgroupBarrier();
        if lane < ROWS {
            let old_max = row_max[lane];
            var new_max = old_max;
            for (var n = 0u; n < parts; n++) {
                new_max = max(new_max, partial_max[lane * parts + n]);
            }
            row_max[lane] = new_max;
            row_rescale[lane] = exp(old_max - new_max);
        }
        // also: the last read of the scores in prob_tile was before this barrier
        workgroupBarrier();

        for (var r = 0u; r < ROWS; r++) {
            let rescale = row_rescale[r];
            var prob = MASKED_PROB;
            sum[r] *= rescale;
            if allowed[r] {
                prob = exp(score[r] - row_max[r]) * params.headroom;
                sum[r] += prob;
            }
            prob_tile[lane * ROWS + r] = prob;
            for (var n = 0u; n < DIMS_PER_LANE; n++) {
                block_acc[r][n] = 0.0;
            }
        }
        workgroupBarrier();

        // output += probabilities times values; what is not allowed never enters
        let keys_here = min(BLOCK_KV, uniform_span.y - first_key);
        for (var key = 0u; key < keys_here; key++) {
            let value_row =
                value_place(b, rows[0].kv_h, first_key + key, value_from + (first_key + key) * params.value_strides.z);
            var elements: array<f32, DIMS_PER_LANE>;
            for (var n = 0u; n < DIMS_PER_LANE; n++) {
                let d = lane + n * BLOCK_KV;
                if d < V_HEAD_DIM {
                    elements[n] = value_element(value_row, d);
                }
            }
            for (var r = 0u; r < ROWS; r++) {
                let prob = prob_tile[key * ROWS + r];
                if !is_masked(prob) {
                    for (var n = 0u; n < DIMS_PER_LANE; n++) {
                        block_acc[r][n] = fma(prob, elements[n], block_acc[r][n]);
                    }
                }
            }
        }
        for (var r = 0u; r < ROWS; r++) {
            for (var n = 0u; n < DIMS_PER_LANE; n++) {
                acc[r][n] = acc[r][n] * row_rescale[r] + block_acc[r][n];
            }
        }
        // the last reads of prob_tile, row_max and row_rescale were before this barrier
        workgroupBarrier();
    }

    for (var r = 0u; r < ROWS; r++) {
        prob_tile[lane * ROWS + r] = sum[r];
    }
    workgroupBarrier();
    if lane < ROWS {
        var total = 0.0;
        for (var n = 0u; n < BLOCK_KV; n++) {
            total += prob_tile[n * ROWS + lane];
        }
        // a private array is not indexed by an invocation's number
        let row = row_at(b, h, first_row + lane);
        let end = row_end(row, row_max[lane], total, params.headroom);
        row_rescale[lane] = end.factor;
        if row.i < params.q_len {
            store_lse(row, end);
        }
    }
    workgroupBarrier();
    for (var r = 0u; r < ROWS; r++) {
        if first_row + r < params.q_len {
            let to = offset_4(params.output_offset, params.output_strides, b, h, first_row + r);
            for (var n = 0u; n < DIMS_PER_LANE; n++) {
                let d = lane + n * BLOCK_KV;
                if d < V_HEAD_DIM {
                    store_output(to + d * params.output_strides.w, acc[r][n] * row_rescale[r]);
                }
            }
        }
    }
}
