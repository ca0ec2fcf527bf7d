// rows.wgsl: attention for software drivers, a subgroup a workgroup, whole query rows in each lane.
//
//   S = scale * Q K^T   P = softmax(S)   O = P V     online softmax over the keys
//   FlashAttention-2, Dao 2023 (arXiv:2307.08691), Algorithm 1; m, l, O as there.
//
// To a software driver a load is dear, from workgroup memory too, and a shuffle is cheap. So a lane keeps ROWS query rows
// and their outputs, and of each key and value the lanes load different vec4s and hand them round.
//
// Lane key_lane * ROW_LANES + row_lane owns the rows row_lane + r * ROW_LANES and every KEY_LANES-th key. The ROW_LANES
// lanes with the same keys load vec4 row_lane + n * ROW_LANES of a key each. With few rows there are more KEY_LANES: each
// has a softmax of its own, and they are merged at the end. The rows of all query heads of a group are taken together.
// Blocks of keys begin at multiples of BLOCK_KV whatever the rows see, and what is not allowed adds exact zeros: a row's
// bits do not depend on the rows beside it.
//
// grid       workgroup_id = (block of ROWS * ROW_LANES rows, kv head * splits + part of the keys, batch)
// workgroup  SUBGROUP invocations, one subgroup
// memory     block_span: 2 u32, written before it is read
// needs      subgroups of SUBGROUP lanes; subgroup operations and the one barrier in uniform control flow
// constants  SUBGROUP = ROW_LANES * KEY_LANES, KEY_LEVELS = log2(KEY_LANES), ROWS, BLOCK_KV: a multiple of KEY_LANES
//            KEY_VECS, VALUE_VECS: vec4s of a row   KEY_LOADS, VALUE_LOADS: how many of them a lane loads
//            GROUP: query heads taken together
// bindings   0 params (uniform)  1 query  2 key  3 value  4 bias  5 mask  6 row_data (read)
//            7 output  8 lse (read_write), or 9 states (read_write) where the keys are split
// snippets   query_vec_* key_vec_* value_vec_* bias_* mask_* row_data_* keys score row_end numerics, and
//            split_end_partial, or split_end_whole with output_vec_* lse_*

// the last load reaches behind the row's end
const KEY_RAGGED: bool = KEY_LOADS * ROW_LANES > KEY_VECS;
const VALUE_RAGGED: bool = VALUE_LOADS * ROW_LANES > VALUE_VECS;

// vec4s of a key whose products are summed apart
const KEY_CHUNK: u32 = 16u;

override HEAD_DIM: u32;
override V_HEAD_DIM: u32;
// rows may see different keys
override ROW_MASKS: bool;

var<workgroup> block_span: vec2u;

// Row n of the batch entry and kv head: heads of the group one after another.
fn folded_row(b: u32, first_head: u32, n: u32, kv_h: u32) -> Row {
    return Row(b, first_head + n / params.q_len, n % params.q_len, kv_h);
}

// What a lane loaded, for all that share its keys.
fn handed_round(loaded: vec4f, from_lane: u32) -> vec4f {
    if ROW_LANES == 1u {
        return loaded;
    }
    return subgroupShuffle(loaded, from_lane);
}

@compute @workgroup_size(SUBGROUP)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(subgroup_invocation_id) lane: u32) {
    let b = group.z;
    let first_head = group.y / params.splits * GROUP;
    let part = group.y % params.splits;
    let row_count = GROUP * params.q_len;
    let kv_h = row_at(b, first_head, 0u).kv_h;
    let row_lane = lane % ROW_LANES;
    let key_lane = lane / ROW_LANES;
    // the first lane with the same keys; a constant where all have them
    let first_lane = select(0u, lane - row_lane, KEY_LANES > 1u);
    let first_row = group.x * ROWS * ROW_LANES + row_lane;
    let key_start = params.key_offset + b * params.key_strides.x + kv_h * params.key_strides.y;
    let value_start = params.value_offset + b * params.value_strides.x + kv_h * params.value_strides.y;

    // the rows, the keys each may see, and the span that holds them all; behind the last row it stands again, sees
    // nothing and is not stored
    var rows: array<Row, ROWS>;
    var keys: array<vec2u, ROWS>;
    var span = vec2u(0xffffffffu, 0u);
    // repeat r < ROWS
    rows[r] = folded_row(b, first_head, min(first_row + r * ROW_LANES, row_count - 1u), kv_h);
    keys[r] = vec2u(0u);
    if first_row + r * ROW_LANES < row_count {
        keys[r] = row_keys(rows[r]);
    }
    if keys[r].x < keys[r].y {
        span = vec2u(min(span.x, keys[r].x), max(span.y, keys[r].y));
    }
    // end
    span = vec2u(subgroupMin(span.x), subgroupMax(span.y));
    if lane == 0u {
        let blocks = (params.kv_len + BLOCK_KV - 1u) / BLOCK_KV;
        let length = (blocks + params.splits - 1u) / params.splits * BLOCK_KV;
        span = vec2u(max(span.x, part * length), min(span.y, (part + 1u) * length));
        block_span = select(vec2u(0u), span, span.x < span.y);
    }
    // row data is not uniform for the compiler; this makes the loop's bounds so (and is a barrier)
    let uniform_span = workgroupUniformLoad(&block_span);
    let last_key = max(uniform_span.y, 1u) - 1u;
    // of this part only: the next one begins where it ends
    // repeat r < ROWS
    keys[r] = vec2u(max(keys[r].x, uniform_span.x), min(keys[r].y, uniform_span.y));
    // end

    var query_vec: array<array<vec4f, KEY_VECS>, ROWS>;
    // repeat r < ROWS
    {
        let start = offset_4(params.query_offset, params.query_strides, b, rows[r].h, rows[r].i);
        // repeat d < KEY_VECS
        query_vec[r][d] = load_query_vec(start, d);
        // end
    }
    // end

    var row_max: array<f32, ROWS>;
    var row_sum: array<f32, ROWS>;
    var acc: array<array<vec4f, VALUE_VECS>, ROWS>;
    // a block's share of them: two short sums round far less than one over all keys
    var block_max: array<f32, ROWS>;
    var block_sum: array<f32, ROWS>;
    var block_acc: array<array<vec4f, VALUE_VECS>, ROWS>;
    var score: array<f32, ROWS>;
    var chunk_score: array<f32, ROWS>;
    var allowed: array<bool, ROWS>;
    // repeat r < ROWS
    row_max[r] = MASKED_SCORE;
    // end

    // a part without keys reads none
    if uniform_span.x < uniform_span.y {
        // these loops ask at their end: asked at the start, a software driver runs the body once more with all lanes off
        var first_block = uniform_span.x / BLOCK_KV * BLOCK_KV;
        loop {
            // repeat r < ROWS
            block_max[r] = row_max[r];
            block_sum[r] = 0.0;
            // repeat d < VALUE_VECS
            block_acc[r][d] = vec4f(0.0);
            // end
            // end
            let block_end = min(first_block + BLOCK_KV, uniform_span.y);
            var first_key = max(first_block, uniform_span.x / KEY_LANES * KEY_LANES);
            loop {
                // this lane's key; behind the last one it stands again, and is masked
                let j = first_key + key_lane;
                let some_key = min(j, last_key);
                let key_row = key_place(b, kv_h, some_key, key_start + some_key * params.key_strides.z);
                let value_row = value_place(b, kv_h, some_key, value_start + some_key * params.value_strides.z);

                // repeat r < ROWS
                score[r] = 0.0;
                chunk_score[r] = 0.0;
                // end
                // repeat n < KEY_LOADS
                {
                    let loaded = load_key_vec(key_row, row_lane + n * ROW_LANES);
                    // repeat l < ROW_LANES
                    if l + n * ROW_LANES < KEY_VECS {
                        let key_vec = handed_round(loaded, first_lane + l);
                        // repeat r < ROWS
                        chunk_score[r] += dot(query_vec[r][(l + n * ROW_LANES) % KEY_VECS], key_vec);
                        if (l + n * ROW_LANES) % KEY_CHUNK == KEY_CHUNK - 1u || l + n * ROW_LANES == KEY_VECS - 1u {
                            // a sum of its own for each chunk of a row: short sums round less than one over all of it
                            score[r] += chunk_score[r];
                            chunk_score[r] = 0.0;
                        }
                        // end
                    }
                    // end
                }
                // end

                // repeat r < ROWS
                {
                    // straight-line: what is read for a key that is not allowed is thrown away
                    if ROW_MASKS {
                        allowed[r] = j >= keys[r].x && j < keys[r].y && key_allowed(rows[r], j);
                    } else {
                        allowed[r] = j < uniform_span.y;
                    }
                    score[r] = select(MASKED_SCORE, full_score(rows[r], j, score[r]), allowed[r]);
                    let new_max = max(row_max[r], score[r]);
                    let rescale = exp(row_max[r] - new_max);
                    row_max[r] = new_max;
                    // the score becomes a probability
                    score[r] = select(0.0, exp(score[r] - new_max) * params.headroom, allowed[r]);
                    block_sum[r] = block_sum[r] * rescale + score[r];
                    // repeat d < VALUE_VECS
                    block_acc[r][d] *= rescale;
                    // end
                }
                // end

                // repeat n < VALUE_LOADS
                {
                    // zeros behind the last key: a probability of 0 does not keep infinity out
                    let loaded =
                        select(vec4f(0.0), load_value_vec(value_row, row_lane + n * ROW_LANES), j < uniform_span.y);
                    // repeat l < ROW_LANES
                    if l + n * ROW_LANES < VALUE_VECS {
                        let value_vec = handed_round(loaded, first_lane + l);
                        // repeat r < ROWS
                        // what is not allowed never enters, whatever its value
                        block_acc[r][(l + n * ROW_LANES) % VALUE_VECS] = fma(
                            vec4f(score[r]), select(vec4f(0.0), value_vec, !ROW_MASKS || allowed[r]),
                            block_acc[r][(l + n * ROW_LANES) % VALUE_VECS],
                        );
                        // end
                    }
                    // end
                }
                // end
                first_key += KEY_LANES;
                continuing {
                    break if first_key >= block_end;
                }
            }
            // repeat r < ROWS
            {
                let rescale = exp(block_max[r] - row_max[r]);
                row_sum[r] = row_sum[r] * rescale + block_sum[r];
                // repeat d < VALUE_VECS
                acc[r][d] = acc[r][d] * rescale + block_acc[r][d];
                // end
            }
            // end
            first_block += BLOCK_KV;
            continuing {
                break if first_block >= uniform_span.y;
            }
        }
    }

    // repeat r < ROWS
    {
        // the softmaxes of the key lanes, merged pair by pair
        // repeat level < KEY_LEVELS
        {
            let top = max(row_max[r], subgroupShuffleXor(row_max[r], ROW_LANES << level));
            let rescale = exp(row_max[r] - top);
            row_max[r] = top;
            row_sum[r] *= rescale;
            row_sum[r] += subgroupShuffleXor(row_sum[r], ROW_LANES << level);
            // repeat d < VALUE_VECS
            acc[r][d] *= rescale;
            acc[r][d] += subgroupShuffleXor(acc[r][d], ROW_LANES << level);
            // end
        }
        // end
        if key_lane == 0u && first_row + r * ROW_LANES < row_count {
            let end = split_end(rows[r], row_max[r], row_sum[r], params.headroom);
            store_split_lse(rows[r], part, end);
            // repeat d < VALUE_VECS
            store_split_vec(rows[r], part, d, acc[r][d] * end.factor);
            // end
        }
    }
    // end
}
