// tiled.wgsl: attention for many queries, one workgroup per block of query rows, register tiles.
//
//   S = scale * Q K^T   P = softmax(S)   O = P V     online softmax over blocks of keys
//   FlashAttention-2, Dao 2023 (arXiv:2307.08691), Algorithm 1; m, l, O as there.
//
// Invocation (row_lane, key_lane) owns query rows row_lane + r * ROW_LANES, keys key_lane + c * KEY_LANES of the block
// and value columns key_lane + n * KEY_LANES, so that every vec4 that is loaded feeds ROWS or KEYS products. A dot
// product goes over chunks of KEY_CHUNK vec4s; so does a value row. What is indexed by constants only stays in registers,
// and indexing a workgroup array's inner dimension by constants leaves no bounds check: so the inner loops are
// written out (`repeat`, src/shader.rs). A value of 0 probability is harmless unless it is infinite or NaN; only then is
// it asked again, pair by pair, whether the key is allowed.
//
// grid       workgroup_id = (block of ROWS * ROW_LANES query rows, query head, batch)
// workgroup  ROW_LANES * KEY_LANES invocations
// memory     kv_tile: one chunk of a block of keys or values   prob_tile: BLOCK_Q * BLOCK_KV f32
//            partial: BLOCK_Q * KEY_LANES f32   query_tile (tile_query_workgroup): the query rows
//            each written before it is read
// needs      KEYS <= 4; every barrier in uniform control flow
// constants  ROWS, KEYS, ROW_LANES, KEY_LANES: the register tile and how many share it
//            KEY_CHUNK, KEY_CHUNKS, VALUE_CHUNK, VALUE_CHUNKS: vec4s of a chunk, chunks of a row
//            LANES_AT_ONCE: key lanes whose values are written out
//            KEY_LOADS, VALUE_LOADS: vec4s of a tile that an invocation loads
//            COLUMNS = ceil(VALUE_CHUNK / KEY_LANES) = COLUMN_GROUPS * COLUMN_GROUP, TILE_WIDTH = larger chunk + 1
// bindings   0 params (uniform)  1 query  2 key  3 value  4 bias  5 mask  6 row_data (read)
//            7 output  8 lse (read_write)
// snippets   query_vec_* key_vec_* value_vec_* output_vec_* tile_query_* bias_* mask_* row_data_* lse_* keys score
//            row_end numerics

const BLOCK_Q: u32 = ROWS * ROW_LANES;
const BLOCK_KV: u32 = KEYS * KEY_LANES;
const WORKGROUP_SIZE: u32 = ROW_LANES * KEY_LANES;
const KEY_LOAD_ROWS: u32 = WORKGROUP_SIZE / KEY_CHUNK;
const VALUE_LOAD_ROWS: u32 = WORKGROUP_SIZE / VALUE_CHUNK;
// every invocation has something to load every time
const KEY_LOADS_EXACT: bool = WORKGROUP_SIZE % KEY_CHUNK == 0u && BLOCK_KV % KEY_LOAD_ROWS == 0u;
const VALUE_LOADS_EXACT: bool = WORKGROUP_SIZE % VALUE_CHUNK == 0u && BLOCK_KV % VALUE_LOAD_ROWS == 0u;

override HEAD_DIM: u32;
override V_HEAD_DIM: u32;
// the last chunk of a row is not full
override KEY_RAGGED: bool;
override VALUE_RAGGED: bool;
// rows of a block may see different keys
override ROW_MASKS: bool;

// one vec4 more than a chunk: neighbouring rows start in different banks
var<workgroup> kv_tile: array<array<vec4f, TILE_WIDTH>, BLOCK_KV>;
// slot t of a row holds the probabilities of keys t + c * KEY_LANES in its components c
var<workgroup> prob_tile: array<array<vec4f, KEY_LANES + 1u>, BLOCK_Q>;
var<workgroup> partial: array<array<f32, KEY_LANES>, BLOCK_Q>;
var<workgroup> block_span: vec2u;
// whether a value of the block is infinite or NaN: then a probability of 0 is not enough to keep it out
var<workgroup> wild_value: atomic<u32>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let h = group.y;
    let b = group.z;
    let key_lane = lane % KEY_LANES;
    let row_lane = lane / KEY_LANES;
    let first_row = group.x * BLOCK_Q;
    let kv_h = row_at(b, h, 0u).kv_h;
    let key_start = params.key_offset + b * params.key_strides.x + kv_h * params.key_strides.y;
    let value_start = params.value_offset + b * params.value_strides.x + kv_h * params.value_strides.y;

    // what this invocation loads of a tile: one column, every .._LOAD_ROWS-th row
    let load_key_column = lane % KEY_CHUNK;
    let load_key_row = lane / KEY_CHUNK;
    let load_value_column = lane % VALUE_CHUNK;
    let load_value_row = lane / VALUE_CHUNK;

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

    var row_max: array<f32, ROWS>;
    // this invocation's share of each row's sum of probabilities
    var row_sum: array<f32, ROWS>;
    var acc: array<array<vec4f, VALUE_CHUNKS * COLUMNS>, ROWS>;
    var block_acc: array<array<vec4f, COLUMN_GROUP>, ROWS>;
    var rescale: array<f32, ROWS>;
    var score: array<array<f32, KEYS>, ROWS>;
    var allowed: array<array<bool, KEYS>, ROWS>;
    var query_vec: array<vec4f, ROWS>;
    var key_vec: array<vec4f, KEYS>;
    var prob: array<vec4f, ROWS>;
    // repeat r < ROWS
    row_max[r] = MASKED_SCORE;
    // end

    for (var first_key = uniform_span.x; first_key < uniform_span.y; first_key += BLOCK_KV) {
        // repeat r < ROWS
        // repeat c < KEYS
        score[r][c] = 0.0;
        // end
        // end
        for (var chunk = 0u; chunk < KEY_CHUNKS; chunk++) {
            // repeat n < KEY_LOADS
            if KEY_LOADS_EXACT || (load_key_row + n * KEY_LOAD_ROWS < BLOCK_KV && load_key_row < KEY_LOAD_ROWS) {
                // behind the last key stands the last one again: its scores are masked
                let j = min(first_key + load_key_row + n * KEY_LOAD_ROWS, uniform_span.y - 1u);
                let start = key_start + j * params.key_strides.z;
                kv_tile[load_key_row + n * KEY_LOAD_ROWS][load_key_column] =
                    load_key_vec(start, chunk * KEY_CHUNK + load_key_column);
            }
            // end
            workgroupBarrier();
            // repeat d < KEY_CHUNK
            {
                // repeat r < ROWS
                query_vec[r] = query_at(query_start[r], row_lane + r * ROW_LANES, chunk, d);
                // end
                // repeat c < KEYS
                key_vec[c] = kv_tile[key_lane + c * KEY_LANES][d];
                // end
                // repeat r < ROWS
                // repeat c < KEYS
                score[r][c] = fma(query_vec[r].x, key_vec[c].x, score[r][c]);
                score[r][c] = fma(query_vec[r].y, key_vec[c].y, score[r][c]);
                score[r][c] = fma(query_vec[r].z, key_vec[c].z, score[r][c]);
                score[r][c] = fma(query_vec[r].w, key_vec[c].w, score[r][c]);
                // end
                // end
            }
            // end
            // the last reads of kv_tile were before this barrier
            workgroupBarrier();
        }

        // masks, and the largest score of this invocation's keys
        // repeat r < ROWS
        {
            let row = Row(b, h, first_row + row_lane + r * ROW_LANES, kv_h);
            var top = MASKED_SCORE;
            // repeat c < KEYS
            {
                // straight-line: what is read for a key that is not allowed is thrown away
                let j = first_key + key_lane + c * KEY_LANES;
                if ROW_MASKS {
                    allowed[r][c] = j >= keys[r].x && j < keys[r].y && key_allowed(row, j);
                } else {
                    allowed[r][c] = j < uniform_span.y;
                }
                let masked_score = select(MASKED_SCORE, full_score(row, j, score[r][c]), allowed[r][c]);
                score[r][c] = masked_score;
                top = max(top, masked_score);
            }
            // end
            partial[row_lane + r * ROW_LANES][key_lane] = top;
        }
        // end
        if lane == 0u {
            atomicStore(&wild_value, 0u);
        }
        workgroupBarrier();

        // repeat r < ROWS
        {
            let row_in_block = row_lane + r * ROW_LANES;
            var new_max = row_max[r];
            // repeat t < KEY_LANES
            new_max = max(new_max, partial[row_in_block][t]);
            // end
            rescale[r] = exp(row_max[r] - new_max);
            row_max[r] = new_max;
            row_sum[r] *= rescale[r];
            prob[r] = vec4f(0.0);
            // repeat c < KEYS
            prob[r][c] = select(0.0, exp(score[r][c] - new_max), allowed[r][c]);
            row_sum[r] += prob[r][c];
            // end
            prob_tile[row_in_block][key_lane] = prob[r];
        }
        // end

        // repeat chunk < VALUE_CHUNKS
        {
            var wild = false;
            // repeat n < VALUE_LOADS
            if VALUE_LOADS_EXACT || (load_value_row + n * VALUE_LOAD_ROWS < BLOCK_KV && load_value_row < VALUE_LOAD_ROWS) {
                let j = first_key + load_value_row + n * VALUE_LOAD_ROWS;
                let start = value_start + min(j, uniform_span.y - 1u) * params.value_strides.z;
                let loaded = load_value_vec(start, chunk * VALUE_CHUNK + load_value_column);
                // zeros behind the last key: a probability of 0 does not keep infinity out
                let element = select(vec4f(0.0), loaded, j < uniform_span.y);
                if ROW_MASKS {
                    wild = wild || any((bitcast<vec4u>(element) & vec4u(0x7f800000u)) == vec4u(0x7f800000u));
                }
                kv_tile[load_value_row + n * VALUE_LOAD_ROWS][load_value_column] = element;
            }
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
                    for (var at = 0u; at < BLOCK_KV; at++) {
                        let key = at / KEYS + at % KEYS * KEY_LANES;
                        let j = first_key + key;
                        // repeat r < ROWS
                        if j >= keys[r].x && j < keys[r].y {
                            if key_allowed(Row(b, h, first_row + row_lane + r * ROW_LANES, kv_h), j) {
                                let weight = prob_tile[row_lane + r * ROW_LANES][at / KEYS][at % KEYS];
                                // repeat n < COLUMN_GROUP
                                {
                                    let value_vec = kv_tile[key][key_lane + (g * COLUMN_GROUP + n) * KEY_LANES];
                                    block_acc[r][n] = fma(vec4f(weight), value_vec, block_acc[r][n]);
                                }
                                // end
                            }
                        }
                        // end
                    }
                } else {
                    for (var first = 0u; first < KEY_LANES; first += LANES_AT_ONCE) {
                        // repeat u < LANES_AT_ONCE
                        {
                            let t = first + u;
                            // repeat r < ROWS
                            prob[r] = prob_tile[row_lane + r * ROW_LANES][t];
                            // end
                            // repeat c < KEYS
                            // repeat n < COLUMN_GROUP
                            {
                                let value_vec =
                                    kv_tile[t + c * KEY_LANES][key_lane + (g * COLUMN_GROUP + n) * KEY_LANES];
                                // repeat r < ROWS
                                block_acc[r][n] = fma(vec4f(prob[r][c]), value_vec, block_acc[r][n]);
                                // end
                            }
                            // end
                            // end
                        }
                        // end
                    }
                }
                // repeat r < ROWS
                // repeat n < COLUMN_GROUP
                acc[r][chunk * COLUMNS + g * COLUMN_GROUP + n] =
                    fma(vec4f(rescale[r]), acc[r][chunk * COLUMNS + g * COLUMN_GROUP + n], block_acc[r][n]);
                // end
                // end
            }
            // end
            // the last reads of kv_tile, and after the last chunk of prob_tile and partial, were before this barrier
            workgroupBarrier();
        }
        // end
    }

    // repeat r < ROWS
    partial[row_lane + r * ROW_LANES][key_lane] = row_sum[r];
    // end
    workgroupBarrier();
    // repeat r < ROWS
    {
        let row = Row(b, h, first_row + row_lane + r * ROW_LANES, kv_h);
        var total = 0.0;
        // repeat t < KEY_LANES
        total += partial[row_lane + r * ROW_LANES][t];
        // end
        if row.i < params.q_len {
            let end = row_end(row, row_max[r], total);
            if key_lane == 0u {
                store_lse(row, end.lse);
            }
            let to = offset_4(params.output_offset, params.output_strides, b, h, row.i);
            // repeat chunk < VALUE_CHUNKS
            // repeat n < COLUMNS
            if key_lane + n * KEY_LANES < VALUE_CHUNK {
                let d = chunk * VALUE_CHUNK + key_lane + n * KEY_LANES;
                store_output_vec(to, d, acc[r][chunk * COLUMNS + n] * end.factor);
            }
            // end
            // end
        }
    }
    // end
}
