// split.wgsl: attention for few queries; the keys are split over workgroups, and combine.wgsl merges the parts.
//
//   S = scale * Q K^T   P = softmax(S)   O = P V     online softmax over blocks of keys
//   Flash-Decoding, Dao, Haziza, Massa, Sizov 2023; m, l, O as in FlashAttention-2 (arXiv:2307.08691).
//
// The rows of all query heads of a group are taken together, and those of all batch entries where these share keys and
// values (SHARED_BATCH), so that keys and values are read once for all of them.
// For the scores an invocation owns KEYS keys of a block; for the output it owns value columns of every KEY_GROUPS-th
// key, and the groups are added up at the end.
//
// grid       workgroup_id = (part of the keys, group of heads * ROW_BLOCKS + block of rows, batch entry, or all of them)
// workgroup  LANES invocations
// memory     query_tile: ROWS * QUERY_VECS vec4   prob_tile: ROWS * BLOCK_KV f32   partial: ROWS * LANES_PER_ROW f32
//            reduce_tile: LANES vec4   row_total: ROWS f32   block_span: 2 u32; each written before it is read
// needs      ROWS <= LANES; every barrier in uniform control flow
// constants  ROWS, ROW_BLOCKS, GROUP: query heads taken together, KEYS, QUERY_VECS, COLUMN_LANES, COLUMNS
//            QUERY_CHUNK, QUERY_CHUNKS: vec4s of a row whose products are summed apart, and how often
//            KEY_STEP: vec4s of a key that are loaded at once, 128 bits where rows allow it; divides QUERY_CHUNK
// bindings   0 params (uniform)  1 query  2 key  3 value  4 bias  5 mask  6 row_data (read)
//            7 output  8 lse (read_write), or 9 states (read_write) where the keys are split
// snippets   query_vec_* key_wide_* value_vec_* bias_* mask_* row_data_* keys score row_end numerics, and
//            split_end_partial, or split_end_whole with output_vec_* lse_*

const LANES: u32 = 64u;
const BLOCK_KV: u32 = KEYS * LANES;
const LANES_PER_ROW: u32 = LANES / ROWS;
const KEY_GROUPS: u32 = LANES / COLUMN_LANES;

override HEAD_DIM: u32;
override V_HEAD_DIM: u32;
// rows may see different keys
override ROW_MASKS: bool;
// all batch entries read the same keys and values
override SHARED_BATCH: bool;

// every vec4 of a row is within the row
const KEY_RAGGED: bool = false;
const VALUE_RAGGED: bool = false;

var<workgroup> query_tile: array<array<vec4f, QUERY_VECS>, ROWS>;
var<workgroup> prob_tile: array<array<f32, BLOCK_KV>, ROWS>;
var<workgroup> partial: array<array<f32, LANES_PER_ROW>, ROWS>;
var<workgroup> reduce_tile: array<vec4f, LANES>;
var<workgroup> row_total: array<f32, ROWS>;
var<workgroup> block_span: vec2u;

// Row n of those taken together: heads of the group one after another, and so for each batch entry.
fn folded_row(b: u32, first_head: u32, n: u32, kv_h: u32) -> Row {
    let head = n / params.q_len;
    if SHARED_BATCH {
        return Row(head / GROUP, first_head + head % GROUP, n % params.q_len, kv_h);
    }
    return Row(b, first_head + head, n % params.q_len, kv_h);
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let b = group.z;
    let first_head = group.y / ROW_BLOCKS * GROUP;
    let first_row = group.y % ROW_BLOCKS * ROWS;
    let row_count = select(1u, params.batch, SHARED_BATCH) * GROUP * params.q_len;
    let kv_h = row_at(b, first_head, 0u).kv_h;
    let key_start = params.key_offset + b * params.key_strides.x + kv_h * params.key_strides.y;
    let value_start = params.value_offset + b * params.value_strides.x + kv_h * params.value_strides.y;

    // the query rows; behind the last one it stands again, and is not stored
    for (var at = lane; at < ROWS * QUERY_VECS; at += LANES) {
        let row = folded_row(b, first_head, min(first_row + at / QUERY_VECS, row_count - 1u), kv_h);
        let start = offset_4(params.query_offset, params.query_strides, row.b, row.h, row.i);
        query_tile[at / QUERY_VECS][at % QUERY_VECS] = load_query_vec(start, at % QUERY_VECS);
    }

    // the keys each row may see, the span that holds them all, and this workgroup's part of it
    var keys: array<vec2u, ROWS>;
    var span = vec2u(0xffffffffu, 0u);
    // repeat r < ROWS
    keys[r] = vec2u(0u);
    if first_row + r < row_count {
        keys[r] = row_keys(folded_row(b, first_head, first_row + r, kv_h));
    }
    if keys[r].x < keys[r].y {
        span = vec2u(min(span.x, keys[r].x), max(span.y, keys[r].y));
    }
    // end
    if lane == 0u {
        var part = vec2u(0u);
        if span.x < span.y {
            let length = (span.y - span.x + params.splits - 1u) / params.splits;
            part.x = min(span.x + group.x * length, span.y);
            part.y = min(part.x + length, span.y);
        }
        block_span = part;
    }
    // row data is not uniform for the compiler; this makes the loop's bounds so (and is a barrier)
    let uniform_span = workgroupUniformLoad(&block_span);

    let key_group = lane / COLUMN_LANES;
    let column_lane = lane % COLUMN_LANES;
    let row_of_lane = lane / LANES_PER_ROW;
    let part_of_row = lane % LANES_PER_ROW;
    var row_max: array<f32, ROWS>;
    var row_sum: array<f32, ROWS>;
    var rescale: array<f32, ROWS>;
    var acc: array<array<vec4f, COLUMNS>, ROWS>;
    var block_acc: array<array<vec4f, COLUMNS>, ROWS>;
    var score: array<array<f32, KEYS>, ROWS>;
    var chunk_score: array<array<f32, KEYS>, ROWS>;
    var allowed: array<array<bool, KEYS>, ROWS>;
    // repeat r < ROWS
    row_max[r] = MASKED_SCORE;
    // end

    for (var first_key = uniform_span.x; first_key < uniform_span.y; first_key += BLOCK_KV) {
        // scores of this invocation's keys with all rows
        // repeat r < ROWS
        // repeat c < KEYS
        score[r][c] = 0.0;
        // end
        // end
        // loop chunk < QUERY_CHUNKS
            // a sum of its own for each chunk of a row: short sums round less than one over all of it
            // repeat r < ROWS
            // repeat c < KEYS
            chunk_score[r][c] = 0.0;
            // end
            // end
            for (var d = chunk * QUERY_CHUNK; d < min((chunk + 1u) * QUERY_CHUNK, QUERY_VECS); d += KEY_STEP) {
                // repeat c < KEYS
                {
                    // behind the last key stands the last one again: its scores are masked
                    let j = min(first_key + lane + c * LANES, uniform_span.y - 1u);
                    let wide = load_key_wide(key_place(b, kv_h, j, key_start + j * params.key_strides.z), d);
                    // repeat s < KEY_STEP
                    {
                        let key_vec = key_part(wide, s);
                        // repeat r < ROWS
                        chunk_score[r][c] += dot(query_tile[r][d + s], key_vec);
                        // end
                    }
                    // end
                }
                // end
            }
            // repeat r < ROWS
            // repeat c < KEYS
            score[r][c] += chunk_score[r][c];
            // end
            // end
        // end
        // repeat r < ROWS
        {
            let row = folded_row(b, first_head, min(first_row + r, row_count - 1u), kv_h);
            // repeat c < KEYS
            {
                let j = first_key + lane + c * LANES;
                allowed[r][c] = j < uniform_span.y;
                if ROW_MASKS {
                    allowed[r][c] = allowed[r][c] & (j >= keys[r].x) & (j < keys[r].y) & key_allowed(row, j);
                }
                score[r][c] = select(MASKED_SCORE, full_score(row, j, score[r][c]), allowed[r][c]);
                prob_tile[r][lane + c * LANES] = score[r][c];
            }
            // end
        }
        // end
        workgroupBarrier();

        // maximum of each row: LANES_PER_ROW invocations look at a part each, then everyone at the parts
        if row_of_lane < ROWS {
            var top = MASKED_SCORE;
            for (var at = part_of_row; at < BLOCK_KV; at += LANES_PER_ROW) {
                top = max(top, prob_tile[row_of_lane][at]);
            }
            partial[row_of_lane][part_of_row] = top;
        }
        // also: the last read of the scores in prob_tile was before this barrier
        workgroupBarrier();
        // repeat r < ROWS
        {
            var new_max = row_max[r];
            for (var n = 0u; n < LANES_PER_ROW; n++) {
                new_max = max(new_max, partial[r][n]);
            }
            rescale[r] = exp(row_max[r] - new_max);
            row_max[r] = new_max;
            row_sum[r] *= rescale[r];
            // repeat c < KEYS
            {
                var prob = select(0.0, MASKED_PROB, ROW_MASKS);
                if allowed[r][c] {
                    prob = exp(score[r][c] - new_max) * params.headroom;
                    row_sum[r] += prob;
                }
                prob_tile[r][lane + c * LANES] = prob;
            }
            // end
        }
        // end
        workgroupBarrier();

        // the block's share of the output, a sum of its own: two short sums round far less than one over all keys
        // repeat r < ROWS
        // repeat n < COLUMNS
        block_acc[r][n] = vec4f(0.0);
        // end
        // end
        if key_group < KEY_GROUPS {
            let keys_here = min(BLOCK_KV, uniform_span.y - first_key);
            for (var at = key_group; at < keys_here; at += KEY_GROUPS) {
                let j = first_key + at;
                let value_row = value_place(b, kv_h, j, value_start + j * params.value_strides.z);
                // repeat n < COLUMNS
                if COLUMNS == 1u || column_lane + n * COLUMN_LANES < (V_HEAD_DIM + 3u) / 4u {
                    let value_vec = load_value_vec(value_row, column_lane + n * COLUMN_LANES);
                    // repeat r < ROWS
                    {
                        let prob = prob_tile[r][at];
                        if ROW_MASKS {
                            // what is not allowed never enters, whatever its value
                            let sum = fma(vec4f(prob), value_vec, block_acc[r][n]);
                            block_acc[r][n] = select(sum, block_acc[r][n], is_masked(prob));
                        } else {
                            block_acc[r][n] = fma(vec4f(prob), value_vec, block_acc[r][n]);
                        }
                    }
                    // end
                }
                // end
            }
        }
        // repeat r < ROWS
        // repeat n < COLUMNS
        acc[r][n] = acc[r][n] * rescale[r] + block_acc[r][n];
        // end
        // end
        // the last reads of prob_tile and partial were before this barrier
        workgroupBarrier();
    }

    // sums over invocations. A group whose first key lies behind the last one of all has nothing to add; the bound also keeps
    // compilers from writing the loop out for every row, which takes llvmpipe minutes
    let busy_groups = min(KEY_GROUPS, uniform_span.y - uniform_span.x);
    // repeat r < ROWS
    prob_tile[r][lane] = row_sum[r];
    // end
    workgroupBarrier();
    if lane < ROWS {
        var total = 0.0;
        for (var n = 0u; n < LANES; n++) {
            total += prob_tile[lane][n];
        }
        row_total[lane] = total;
    }
    workgroupBarrier();
    // repeat r < ROWS
    {
        let row = folded_row(b, first_head, min(first_row + r, row_count - 1u), kv_h);
        let stored = first_row + r < row_count;
        let end = split_end(row, row_max[r], row_total[r], params.headroom);
        if lane == 0u && stored {
            store_split_lse(row, group.x, end);
        }
        // repeat n < COLUMNS
        reduce_tile[lane] = acc[r][n];
        workgroupBarrier();
        if key_group == 0u && stored && column_lane + n * COLUMN_LANES < (V_HEAD_DIM + 3u) / 4u {
            var total = vec4f(0.0);
            for (var k = 0u; k < busy_groups; k++) {
                total += reduce_tile[k * COLUMN_LANES + column_lane];
            }
            store_split_vec(row, group.x, column_lane + n * COLUMN_LANES, total * end.factor);
        }
        workgroupBarrier();
        // end
    }
    // end
}
