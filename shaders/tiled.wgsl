// tiled.wgsl: attention for many queries, one workgroup per block of query rows, register tiles.
//
//   S = scale * Q K^T   P = softmax(S)   O = P V     online softmax over blocks of keys
//   FlashAttention-2, Dao 2023 (arXiv:2307.08691), Algorithm 1; m, l, O as there.
//
// Invocation (row_lane, key_lane) owns query rows row_lane + r * ROW_LANES, keys key_lane * KEYS + c of the block and
// value columns key_lane + n * KEY_LANES, so that every vec4 that is loaded feeds ROWS or KEYS products. A dot product
// goes over chunks of KEY_CHUNK vec4s; so does a value row.
//
// What is indexed by constants only stays in registers, and needs no bounds check: so the inner loops are written out
// (`repeat`, src/dispatch/repeat.rs), and each workgroup array has the lane on one axis and constants on the others, so
// that one check serves a whole block. Rows of these arrays have an odd number of vec4s: lanes start in different banks.
//
// A value of 0 probability is harmless unless it is infinite or NaN; only then is it asked again, pair by pair, whether
// the key is allowed. With a boolean mask that is asked before a block's keys are loaded (tile_mask_bytes), and a block
// that no row sees is left out: its probabilities would be 0, the maxima stay.
//
// grid       workgroup_id = (block of ROWS * ROW_LANES query rows, query head, batch)
// workgroup  ROW_LANES * KEY_LANES invocations
// memory     kv_tile: one chunk of a block of keys or values   prob_tile: BLOCK_Q * BLOCK_KV f32
//            row_parts (row_parts_workgroup): BLOCK_Q * KEY_LANES f32   query_tile (tile_query_workgroup): the query rows
//            seen_block, seen_by_any (tile_mask_bytes)   each written before it is read
// needs      KEYS <= 4; LANE_PASSES divides KEYS and KEY_LANES; every barrier in uniform control flow
// constants  ROWS, KEYS, ROW_LANES, KEY_LANES: the register tile and how many share it
//            KEY_CHUNK, KEY_CHUNKS, VALUE_CHUNK, VALUE_CHUNKS: vec4s of a chunk, chunks of a row
//            LANE_PASSES, LANES_AT_ONCE = KEY_LANES / LANE_PASSES: key lanes whose values are written out
//            PASS_KEYS = KEYS / LANE_PASSES
//            KEY_LOADS = ceil(KEY_CHUNK / ROW_LANES), VALUE_TURNS * VALUE_LOADS >= ceil(BLOCK_KV / ROW_LANES)
//            COLUMNS = ceil(VALUE_CHUNK / KEY_LANES) = COLUMN_GROUPS * COLUMN_GROUP
//            TILE_ROW, QUERY_ROW: vec4s of a row of kv_tile and query_tile
// bindings   0 params (uniform)  1 query  2 key  3 value  4 bias  5 mask  6 row_data (read)
//            7 output  8 lse (read_write)
// snippets   query_vec_* key_vec_* value_vec_* output_vec_* tile_query_* tile_mask_* row_parts_* bias_* mask_* row_data_*
//            lse_* keys score exponent row_end numerics

const BLOCK_Q: u32 = ROWS * ROW_LANES;
const BLOCK_KV: u32 = KEYS * KEY_LANES;
const WORKGROUP_SIZE: u32 = ROW_LANES * KEY_LANES;
// keys of a pass over the values
const KEYS_AT_ONCE: u32 = LANES_AT_ONCE * KEYS;
// every invocation has something to load every time
const KEY_LOADS_EXACT: bool = KEY_LOADS * ROW_LANES == KEY_CHUNK;
const VALUE_LOADS_EXACT: bool = VALUE_TURNS * VALUE_LOADS * ROW_LANES == BLOCK_KV;
const COLUMNS_EXACT: bool = COLUMNS * KEY_LANES == VALUE_CHUNK;

override HEAD_DIM: u32;
override V_HEAD_DIM: u32;
// the last chunk of a row is not full
override KEY_RAGGED: bool;
override VALUE_RAGGED: bool;
// rows of a block may see different keys
override ROW_MASKS: bool;
// values of two keys are weighted in turn, for GPUs that start two products at once
override TURNED: bool;

// keys: [c / PASS_KEYS][key_lane][c % PASS_KEYS, d]; values: [key / KEYS_AT_ONCE][key_lane][key % KEYS_AT_ONCE, n]
var<workgroup> kv_tile: array<array<array<vec4f, TILE_ROW>, KEY_LANES>, LANE_PASSES>;
// [r][row_lane][t]: the probabilities of keys t * KEYS + c in components c
var<workgroup> prob_tile: array<array<array<vec4f, KEY_LANES + 1u>, ROW_LANES>, ROWS>;
var<workgroup> block_span: vec2u;
// whether a value of the block is infinite or NaN: then a probability of 0 is not enough to keep it out
var<workgroup> wild_value: atomic<u32>;

// Weighted values of two keys in turn: half the components of one, half of the other. Neighbouring products then differ in
// both factors' components and in their sums, and GPUs that start two products at once can pair them.
fn turned_values(first: vec4f, second: vec4f) -> vec4f {
    if TURNED {
        return vec4f(first.x, second.y, first.z, second.w);
    }
    return first;
}

fn turned_probs(first: f32, second: f32) -> vec4f {
    if TURNED {
        return vec4f(first, second, first, second);
    }
    return vec4f(first);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let h = group.y;
    let b = group.z;
    let key_lane = lane % KEY_LANES;
    let row_lane = lane / KEY_LANES;
    let first_row = group.x * BLOCK_Q;
    let kv_h = row_at(b, h, 0u).kv_h;

    // the keys each row may see, and the span that holds them all
    var keys: array<vec2u, ROWS>;
    var span = vec2u(0xffffffffu, 0u);
    // repeat r < ROWS
    {
        let i = first_row + row_lane + r * ROW_LANES;
        keys[r] = vec2u(0u);
        if i < params.q_len {
            keys[r] = row_keys(row_at(b, h, i));
        }
    }
    // end
    for (var i = first_row; i < min(first_row + BLOCK_Q, params.q_len); i++) {
        let row_span = row_keys(row_at(b, h, i));
        if row_span.x < row_span.y {
            span = vec2u(min(span.x, row_span.x), max(span.y, row_span.y));
        }
    }
    if lane == 0u {
        block_span = span;
        begin_mask_tiles();
    }
    // row data is not uniform for the compiler; this makes the loop's bounds so (and is a barrier)
    let uniform_span = workgroupUniformLoad(&block_span);
    stage_query(b, h, first_row, lane);
    var query_start: array<u32, ROWS>;
    // repeat r < ROWS
    // a row behind the last one reads the last one, and is not stored
    query_start[r] = offset_4(
        params.query_offset, params.query_strides, b, h, min(first_row + row_lane + r * ROW_LANES, params.q_len - 1u),
    );
    // end

    // where the rows lie that this invocation stages, and the last ones: behind the last key stands the last one again
    let key_start = offset_4(params.key_offset, params.key_strides, b, kv_h, 0u);
    let value_start = offset_4(params.value_offset, params.value_strides, b, kv_h, 0u);
    let last_key_at = key_start + (uniform_span.y - 1u) * params.key_strides.z;
    let last_value_at = value_start + (uniform_span.y - 1u) * params.value_strides.z;
    var key_at = key_start + (uniform_span.x + key_lane * KEYS) * params.key_strides.z;
    var value_at = value_start + (uniform_span.x + row_lane) * params.value_strides.z;

    var row_max: array<f32, ROWS>;
    // this invocation's share of each row's sum of probabilities
    var row_sum: array<f32, ROWS>;
    var acc: array<array<vec4f, VALUE_CHUNKS * COLUMNS>, ROWS>;
    var block_acc: array<array<vec4f, COLUMN_GROUP>, ROWS>;
    var rescale: array<f32, ROWS>;
    var row_top: array<f32, ROWS>;
    var score: array<vec4f, ROWS>;
    var chunk_score: array<vec4f, ROWS>;
    var allowed: array<array<bool, KEYS>, ROWS>;
    var query_vec: array<vec4f, ROWS>;
    var key_vec: array<vec4f, KEYS>;
    var prob: array<vec4f, ROWS>;
    var tame_value: array<vec4f, KEYS>;
    // repeat r < ROWS
    row_max[r] = MASKED_SCORE;
    // end

    for (var first_key = uniform_span.x; first_key < uniform_span.y; first_key += BLOCK_KV) {
        // bit r * KEYS + c: the row sees the key
        var seen = 0u;
        if MASK_TILES {
            // repeat r < ROWS
            {
                let row = Row(b, h, first_row + row_lane + r * ROW_LANES, kv_h);
                // repeat c < KEYS
                {
                    let j = first_key + key_lane * KEYS + c;
                    let sees = (j >= keys[r].x) & (j < keys[r].y) & key_allowed(row, j);
                    seen |= select(0u, 1u << (r * KEYS + c), sees);
                }
                // end
            }
            // end
            if !block_is_seen(seen, first_key, lane) {
                key_at += BLOCK_KV * params.key_strides.z;
                value_at += BLOCK_KV * params.value_strides.z;
                continue;
            }
        }
        // every row may see every key of the block
        let whole = !ROW_MASKS && first_key + BLOCK_KV <= uniform_span.y;
        // repeat r < ROWS
        score[r] = vec4f(0.0);
        // end
        if lane == 0u {
            atomicStore(&wild_value, 0u);
        }
        // loop chunk < KEY_CHUNKS
            // repeat n < KEY_LOADS
            if KEY_LOADS_EXACT || row_lane + n * ROW_LANES < KEY_CHUNK {
                let d = row_lane + n * ROW_LANES;
                // repeat p < LANE_PASSES
                // repeat c < PASS_KEYS
                kv_tile[p][key_lane][c * KEY_CHUNK + d] = load_key_vec(
                    key_place(
                        b, kv_h, min(first_key + key_lane * KEYS + p * PASS_KEYS + c, uniform_span.y - 1u),
                        min(key_at + (p * PASS_KEYS + c) * params.key_strides.z, last_key_at),
                    ),
                    chunk * KEY_CHUNK + d,
                );
                // end
                // end
            }
            // end
            workgroupBarrier();
            // a sum of its own for each chunk of a row: short sums round less than one over all of it
            // repeat r < ROWS
            chunk_score[r] = vec4f(0.0);
            // end
            // repeat d < KEY_CHUNK
            {
                // repeat r < ROWS
                query_vec[r] = query_at(query_start[r], row_lane, r, chunk, d);
                // end
                // repeat p < LANE_PASSES
                // repeat c < PASS_KEYS
                key_vec[p * PASS_KEYS + c] = kv_tile[p][key_lane][c * KEY_CHUNK + d];
                // end
                // end
                // each key at another component, for the reason that turned_values gives
                // repeat r < ROWS
                chunk_score[r] = fma(
                    query_vec[r], vec4f(key_vec[0].x, key_vec[1].y, key_vec[2].z, key_vec[3].w), chunk_score[r],
                );
                // end
                // repeat r < ROWS
                chunk_score[r] = fma(
                    query_vec[r].yzwx, vec4f(key_vec[0].y, key_vec[1].z, key_vec[2].w, key_vec[3].x), chunk_score[r],
                );
                // end
                // repeat r < ROWS
                chunk_score[r] = fma(
                    query_vec[r].zwxy, vec4f(key_vec[0].z, key_vec[1].w, key_vec[2].x, key_vec[3].y), chunk_score[r],
                );
                // end
                // repeat r < ROWS
                chunk_score[r] = fma(
                    query_vec[r].wxyz, vec4f(key_vec[0].w, key_vec[1].x, key_vec[2].y, key_vec[3].z), chunk_score[r],
                );
                // end
            }
            // end
            // repeat r < ROWS
            if KEY_CHUNKS == 1u {
                score[r] = chunk_score[r];
            } else {
                score[r] += chunk_score[r];
            }
            // end
            // the last reads of kv_tile were before this barrier
            workgroupBarrier();
        // end
        key_at += BLOCK_KV * params.key_strides.z;

        // masks, and the largest score of this invocation's keys
        // repeat r < ROWS
        {
            let row = Row(b, h, first_row + row_lane + r * ROW_LANES, kv_h);
            // repeat c < KEYS
            {
                // straight-line: what is read for a key that is not allowed is thrown away
                let j = first_key + key_lane * KEYS + c;
                score[r][c] = exponent_score(row, j, score[r][c]);
                if ROW_MASKS {
                    if MASK_TILES {
                        allowed[r][c] = (seen & (1u << (r * KEYS + c))) != 0u;
                    } else {
                        allowed[r][c] = (j >= keys[r].x) & (j < keys[r].y) & key_allowed(row, j);
                    }
                    score[r][c] = select(MASKED_SCORE, score[r][c], allowed[r][c]);
                }
            }
            // end
        }
        // end
        if !ROW_MASKS && !whole {
            // repeat r < ROWS
            // repeat c < KEYS
            score[r][c] = select(MASKED_SCORE, score[r][c], first_key + key_lane * KEYS + c < uniform_span.y);
            // end
            // end
        }
        // repeat r < ROWS
        {
            var top = score[r][0];
            // repeat c < KEYS
            top = max(top, score[r][c]);
            // end
            share_row_part(r, row_lane, key_lane, top);
            row_top[r] = top;
        }
        // end
        row_parts_are_shared();

        // repeat r < ROWS
        {
            let new_max = max(row_max[r], largest_row_part(r, row_lane, row_top[r]));
            rescale[r] = power(row_max[r] - new_max);
            row_max[r] = new_max;
            row_sum[r] *= rescale[r];
            // repeat c < KEYS
            prob[r][c] = power(score[r][c] - new_max) * params.headroom;
            if ROW_MASKS {
                prob[r][c] = select(0.0, prob[r][c], allowed[r][c]);
            }
            // end
        }
        // end
        if !ROW_MASKS && !whole {
            // repeat r < ROWS
            // repeat c < KEYS
            prob[r][c] = select(0.0, prob[r][c], first_key + key_lane * KEYS + c < uniform_span.y);
            // end
            // end
        }
        // repeat r < ROWS
        // repeat c < KEYS
        row_sum[r] += prob[r][c];
        // end
        prob_tile[r][row_lane][key_lane] = prob[r];
        // end

        // repeat chunk < VALUE_CHUNKS
        {
            var wild = false;
            // loop turn < VALUE_TURNS
                // repeat m < VALUE_LOADS
                {
                    let key_in_block = row_lane + (turn * VALUE_LOADS + m) * ROW_LANES;
                    if VALUE_LOADS_EXACT || key_in_block < BLOCK_KV {
                        let part = select(key_in_block / KEYS_AT_ONCE, 0u, LANE_PASSES == 1u);
                        let slot = (key_in_block - part * KEYS_AT_ONCE) * COLUMNS;
                        let at = value_at + (turn * VALUE_LOADS + m) * ROW_LANES * params.value_strides.z;
                        let value_row = value_place(
                            b, kv_h, min(first_key + key_in_block, uniform_span.y - 1u), min(at, last_value_at),
                        );
                        // repeat n < COLUMNS
                        {
                            let column = select(
                                min(key_lane + n * KEY_LANES, VALUE_CHUNK - 1u), key_lane + n * KEY_LANES,
                                COLUMNS_EXACT,
                            );
                            var element = load_value_vec(value_row, chunk * VALUE_CHUNK + column);
                            if !whole {
                                // zeros behind the last key: a probability of 0 does not keep infinity out
                                element = select(vec4f(0.0), element, first_key + key_in_block < uniform_span.y);
                            }
                            if ROW_MASKS {
                                wild = wild | any((bitcast<vec4u>(element) & vec4u(0x7f800000u)) == vec4u(0x7f800000u));
                            }
                            kv_tile[part][key_lane][slot + n] = element;
                        }
                        // end
                    }
                }
                // end
            // end
            if ROW_MASKS {
                if wild {
                    atomicStore(&wild_value, 1u);
                }
            }
            workgroupBarrier();
            var careful = false;
            if ROW_MASKS {
                careful = atomicLoad(&wild_value) != 0u;
            }
            // repeat g < COLUMN_GROUPS
            {
                // the block's share of the output, a sum of its own: two short sums round far less than one over all keys
                // repeat r < ROWS
                // repeat n < COLUMN_GROUP
                block_acc[r][n] = vec4f(0.0);
                // end
                // end
                if careful {
                    // the same sums in the same order as below, so that what is skipped changes no bit
                    for (var t = 0u; t < KEY_LANES; t++) {
                        let slot = t % LANES_AT_ONCE * KEYS * COLUMNS + g * COLUMN_GROUP;
                        // repeat r < ROWS
                        {
                            prob[r] = prob_tile[r][row_lane][t];
                            // repeat c < KEYS
                            {
                                let j = first_key + t * KEYS + c;
                                let row = Row(b, h, first_row + row_lane + r * ROW_LANES, kv_h);
                                allowed[r][c] = (j >= keys[r].x) & (j < keys[r].y) & key_allowed(row, j);
                            }
                            // end
                            // repeat n < COLUMN_GROUP
                            // repeat c < KEYS
                            tame_value[c] = select(
                                vec4f(0.0), kv_tile[t / LANES_AT_ONCE][key_lane][slot + c * COLUMNS + n], allowed[r][c],
                            );
                            // end
                            // repeat two < 2
                            block_acc[r][n] = fma(
                                turned_probs(prob[r][two * 2u], prob[r][two * 2u + 1u]),
                                turned_values(tame_value[two * 2u], tame_value[two * 2u + 1u]), block_acc[r][n],
                            );
                            block_acc[r][n] = fma(
                                turned_probs(prob[r][two * 2u + 1u], prob[r][two * 2u]),
                                turned_values(tame_value[two * 2u + 1u], tame_value[two * 2u]), block_acc[r][n],
                            );
                            // end
                            // end
                        }
                        // end
                    }
                } else {
                    // loop part < LANE_PASSES
                        // repeat u < LANES_AT_ONCE
                        {
                            // repeat r < ROWS
                            prob[r] = prob_tile[r][row_lane][part * LANES_AT_ONCE + u];
                            // end
                            // repeat two < 2
                            // repeat n < COLUMN_GROUP
                            {
                                let slot = (u * KEYS + two * 2u) * COLUMNS + g * COLUMN_GROUP + n;
                                let first = kv_tile[part][key_lane][slot];
                                var second = vec4f(0.0);
                                if TURNED {
                                    second = kv_tile[part][key_lane][slot + COLUMNS];
                                }
                                // repeat r < ROWS
                                block_acc[r][n] = fma(
                                    turned_probs(prob[r][two * 2u], prob[r][two * 2u + 1u]),
                                    turned_values(first, second), block_acc[r][n],
                                );
                                // end
                                if !TURNED {
                                    // not earlier: it takes registers
                                    second = kv_tile[part][key_lane][slot + COLUMNS];
                                }
                                // repeat r < ROWS
                                block_acc[r][n] = fma(
                                    turned_probs(prob[r][two * 2u + 1u], prob[r][two * 2u]),
                                    turned_values(second, first), block_acc[r][n],
                                );
                                // end
                            }
                            // end
                            // end
                        }
                        // end
                    // end
                }
                // repeat r < ROWS
                // repeat n < COLUMN_GROUP
                acc[r][chunk * COLUMNS + g * COLUMN_GROUP + n] =
                    fma(vec4f(rescale[r]), acc[r][chunk * COLUMNS + g * COLUMN_GROUP + n], block_acc[r][n]);
                // end
                // end
            }
            // end
            // the last reads of kv_tile, and after the last chunk of prob_tile, were before this barrier
            workgroupBarrier();
        }
        // end
        value_at += BLOCK_KV * params.value_strides.z;
    }

    // repeat r < ROWS
    share_row_part(r, row_lane, key_lane, row_sum[r]);
    // end
    row_parts_are_shared();
    // repeat r < ROWS
    {
        let row = Row(b, h, first_row + row_lane + r * ROW_LANES, kv_h);
        let total = sum_of_row_parts(r, row_lane, row_sum[r]);
        if row.i < params.q_len {
            let end = row_end(row, natural_score(row_max[r]), total, params.headroom);
            if key_lane == 0u {
                store_lse(row, end);
            }
            let to = offset_4(params.output_offset, params.output_strides, b, h, row.i);
            // repeat chunk < VALUE_CHUNKS
            // repeat n < COLUMNS
            if COLUMNS_EXACT || key_lane + n * KEY_LANES < VALUE_CHUNK {
                let d = chunk * VALUE_CHUNK + key_lane + n * KEY_LANES;
                store_output_vec(to, d, acc[r][chunk * COLUMNS + n] * end.factor);
            }
            // end
            // end
        }
    }
    // end
}
