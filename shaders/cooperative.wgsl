// cooperative.wgsl: attention for many queries on matrix units, one workgroup per block of query rows; f16 inputs.
//
//   S = scale * Q K^T   P = softmax(S)   O = P V     online softmax over blocks of keys
//   FlashAttention-2, Dao 2023 (arXiv:2307.08691), Algorithm 1; m, l, O as there.
//
// Both products are made of cooperative matrices, f16 times f16 summed in f32, one subgroup a matrix; whatever the size of
// a subgroup and their number, they share the matrices among them. All else is ordinary code: invocation
// (row_lane, key_lane) owns query row row_lane, and of its keys and value columns each KEY_LANES-th vec4.
//
// A probability goes into the second product as two halves, the second of what the first has left, so that it keeps 22
// bits. Both are scaled, for f16 has few exponents: a probability is at most 1, taken against the largest score of its own
// block, and the 22 bits last down to 2^-29. Rescaling to the largest of all is left to the sums, in f32.
//
// An infinite or NaN value would leave NaN in every row. It is replaced by zero, and added by ordinary code to the rows
// that may see its key.
//
// grid       workgroup_id = (block of BLOCK_Q query rows, query head, batch)
// workgroup  BLOCK_Q * KEY_LANES invocations
// memory     query_tile: the query rows   kv_tile: one chunk of a block of keys or values   prob_tile: two halves of
//            BLOCK_Q * BLOCK_KV probabilities, all f16   sum_tile: BLOCK_Q * max(BLOCK_KV, 4 * VALUE_CHUNK) f32
//            row_parts (row_parts_workgroup): BLOCK_Q * KEY_LANES f32   each written before it is read
// needs      subgroups whose size divides the workgroup; BLOCK_Q, BLOCK_KV, 4 * KEY_CHUNK and 4 * VALUE_CHUNK multiples
//            of SIZE; BLOCK_KV a multiple of 4 * KEY_LANES; every barrier in uniform control flow
// constants  BLOCK_Q, BLOCK_KV, KEY_LANES; ROWS = 1 and ROW_LANES = BLOCK_Q for row_parts
//            KEY_CHUNK, KEY_CHUNKS, VALUE_CHUNK, VALUE_CHUNKS: vec4s of a chunk, chunks of a row
//            KEY_STEP_TURNS * KEY_STEPS, VALUE_STEP_TURNS * VALUE_STEPS: products that make up one matrix of a chunk of S
//            and of O, KEY_STEPS and VALUE_STEPS of them written out
//            KEY_TILES, VALUE_TILES: matrices side by side that a subgroup holds at once
//            KEY_VECS = BLOCK_KV / (4 * KEY_LANES), COLUMNS = ceil(VALUE_CHUNK / KEY_LANES)
//            KEY_TURNS * KEY_LOADS, VALUE_TURNS * VALUE_LOADS: vec4s of keys, and four vec4s of values, that an invocation
//            loads for a chunk, at least
//            QUERY_ROW, KEY_ROW, VALUE_ROW, PROB_ROW, SUM_ROW: vec4s of a row in memory   KV_VECS: vec4s of kv_tile
// bindings   0 params (uniform)  1 query  2 key  3 value  4 bias  5 mask  6 row_data (read)
//            7 output  8 lse (read_write)
// snippets   matrices_* query_vec_* key_vec_* value_vec_* output_vec_* row_parts_* bias_* mask_* row_data_* lse_* keys score
//            exponent row_end numerics

const WORKGROUP_SIZE: u32 = BLOCK_Q * KEY_LANES;
// vec4s of a matrix' row
const SIZE_VECS: u32 = SIZE / 4u;
const KEY_GROUPS: u32 = BLOCK_KV / (SIZE * KEY_TILES);
const KEY_UNITS: u32 = BLOCK_Q / SIZE * KEY_GROUPS;
const VALUE_GROUPS: u32 = VALUE_CHUNK / (SIZE_VECS * VALUE_TILES);
const VALUE_UNITS: u32 = BLOCK_Q / SIZE * VALUE_GROUPS;
const QUERY_VECS: u32 = KEY_CHUNK * KEY_CHUNKS;
// every invocation has something to load every time
const KEY_LOADS_EXACT: bool = KEY_TURNS * KEY_LOADS * WORKGROUP_SIZE == BLOCK_KV * KEY_CHUNK;
const VALUE_LOADS_EXACT: bool = VALUE_TURNS * VALUE_LOADS * WORKGROUP_SIZE == BLOCK_KV / 4u * VALUE_CHUNK;
const COLUMNS_EXACT: bool = COLUMNS * KEY_LANES == VALUE_CHUNK;
// of a probability's first half, and of its second beside that: as large as f16 allows, and powers of two
const PROB_SCALE: f32 = 32768.0;
const REST_SCALE: f32 = 4096.0;

override HEAD_DIM: u32;
override V_HEAD_DIM: u32;
// the last chunk of a row is not full
override KEY_RAGGED: bool;
override VALUE_RAGGED: bool;
// rows of a block may see different keys
override ROW_MASKS: bool;

var<workgroup> query_tile: array<vec4<f16>, BLOCK_Q * QUERY_ROW>;
// rows are keys, or columns of values
var<workgroup> kv_tile: array<vec4<f16>, KV_VECS>;
// the first halves, then the second
var<workgroup> prob_tile: array<vec4<f16>, 2u * BLOCK_Q * PROB_ROW>;
// scores, then the block's share of the output
var<workgroup> sum_tile: array<vec4f, BLOCK_Q * SUM_ROW>;
var<workgroup> block_span: vec2u;
// whether a value of the block is infinite or NaN
var<workgroup> wild_value: atomic<u32>;

// Infinity and NaN are told by their bits: comparisons may be optimised away.
const WILD_EXPONENT: u32 = 0x7f800000u;

fn exponent_bits(elements: vec4f) -> vec4u {
    return bitcast<vec4u>(elements) & vec4u(WILD_EXPONENT);
}

fn is_wild(elements: vec4f) -> vec4<bool> {
    return exponent_bits(elements) == vec4u(WILD_EXPONENT);
}

// What a normal f16 holds of numbers up to PROB_SCALE, rounded to nearest; of less than that nothing. Done in integers: a
// compiler may take a conversion to f16 and back for nothing at all.
fn leading_bits(x: vec4f) -> vec4f {
    let rounded = bitcast<vec4f>((bitcast<vec4u>(x) + 0x1000u) & vec4u(0xffffe000u));
    return select(rounded, vec4f(0.0), x < vec4f(6.103515625e-5));
}

fn stage_query(b: u32, h: u32, first_row: u32, lane: u32) {
    for (var at = lane; at < BLOCK_Q * QUERY_VECS; at += WORKGROUP_SIZE) {
        let row_in_block = at / QUERY_VECS;
        let d = at % QUERY_VECS;
        // a row behind the last one is the last one again, and is not stored
        let i = min(first_row + row_in_block, params.q_len - 1u);
        let start = offset_4(params.query_offset, params.query_strides, b, h, i);
        query_tile[row_in_block * QUERY_ROW + d] = vec4<f16>(load_query_vec(start, d));
    }
}

fn stage_keys(b: u32, kv_h: u32, start: u32, first_key: u32, end: u32, chunk: u32, lane: u32) {
    // loop turn < KEY_TURNS
        // repeat n < KEY_LOADS
        {
            let at = lane + (turn * KEY_LOADS + n) * WORKGROUP_SIZE;
            if KEY_LOADS_EXACT || at < BLOCK_KV * KEY_CHUNK {
                let key_in_block = at / KEY_CHUNK;
                let d = at % KEY_CHUNK;
                // behind the last key stands the last one again
                let j = min(first_key + key_in_block, end - 1u);
                let key_row = key_place(b, kv_h, j, start + j * params.key_strides.z);
                kv_tile[key_in_block * KEY_ROW + d] = vec4<f16>(load_key_vec(key_row, chunk * KEY_CHUNK + d));
            }
        }
        // end
    // end
}

// Values of four keys at a time, so that columns become rows. Whether an infinite or NaN one was among them: zero stands in
// its place.
fn stage_values(b: u32, kv_h: u32, start: u32, first_key: u32, end: u32, chunk: u32, lane: u32) -> bool {
    var wild = false;
    var element: array<vec4f, 4>;
    // loop turn < VALUE_TURNS
        // repeat n < VALUE_LOADS
        {
            let at = lane + (turn * VALUE_LOADS + n) * WORKGROUP_SIZE;
            if VALUE_LOADS_EXACT || at < BLOCK_KV / 4u * VALUE_CHUNK {
                let four_keys = at / VALUE_CHUNK;
                let d = at % VALUE_CHUNK;
                // repeat c < 4
                {
                    // behind the last key stands the last one again, with a probability of 0
                    let j = min(first_key + four_keys * 4u + c, end - 1u);
                    let value_row = value_place(b, kv_h, j, start + j * params.value_strides.z);
                    element[c] = load_value_vec(value_row, chunk * VALUE_CHUNK + d);
                }
                // end
                let largest = max(
                    max(exponent_bits(element[0]), exponent_bits(element[1])),
                    max(exponent_bits(element[2]), exponent_bits(element[3])),
                );
                if max(max(largest.x, largest.y), max(largest.z, largest.w)) == WILD_EXPONENT {
                    wild = true;
                    for (var c = 0u; c < 4u; c++) {
                        element[c] = select(element[c], vec4f(0.0), is_wild(element[c]));
                    }
                }
                // repeat c < 4
                kv_tile[(d * 4u + c) * VALUE_ROW + four_keys] =
                    vec4<f16>(vec4f(element[0][c], element[1][c], element[2][c], element[3][c]));
                // end
            }
        }
        // end
    // end
    return wild;
}

// S of a block, one chunk of the rows of keys after the other; what earlier chunks gave waits in memory, at first zeros.
// Subgroups take a unit each in turns of the whole workgroup, so that the barrier is in uniform control flow; the last turn
// has none for some. (Loops of one turn: naga takes the condition of an `if` for one that may differ within a subgroup.)
fn multiply_keys(chunk: u32, subgroup: u32, subgroups: u32) {
    for (var first_unit = 0u; first_unit < KEY_UNITS; first_unit += subgroups) {
        var sums: array<SumMatrix, KEY_TILES>;
        for (var unit = first_unit + subgroup; unit < KEY_UNITS; unit += KEY_UNITS) {
            let strip = unit / KEY_GROUPS * SIZE;
            let first_tile = unit % KEY_GROUPS * KEY_TILES;
            // repeat t < KEY_TILES
            sums[t] = SumMatrix();
            if KEY_CHUNKS > 1u {
                sums[t] = coopLoadT<SumMatrix>(&sum_tile[strip * SUM_ROW + (first_tile + t) * SIZE_VECS], SUM_ROW);
            }
            // end
            // loop turn < KEY_STEP_TURNS
                // repeat k < KEY_STEPS
                {
                    let d = (turn * KEY_STEPS + k) * SIZE_VECS;
                    let rows = coopLoadT<LeftMatrix>(&query_tile[strip * QUERY_ROW + chunk * KEY_CHUNK + d], QUERY_ROW);
                    // repeat t < KEY_TILES
                    {
                        let keys = coopLoad<RightMatrix>(&kv_tile[(first_tile + t) * SIZE * KEY_ROW + d], KEY_ROW);
                        sums[t] = coopMultiplyAdd(rows, keys, sums[t]);
                    }
                    // end
                }
                // end
            // end
        }
        if KEY_CHUNKS > 1u {
            // an invocation may store what another one of its subgroup has loaded
            workgroupBarrier();
        }
        for (var unit = first_unit + subgroup; unit < KEY_UNITS; unit += KEY_UNITS) {
            let strip = unit / KEY_GROUPS * SIZE;
            let first_tile = unit % KEY_GROUPS * KEY_TILES;
            // repeat t < KEY_TILES
            coopStoreT(sums[t], &sum_tile[strip * SUM_ROW + (first_tile + t) * SIZE_VECS], SUM_ROW);
            // end
        }
    }
}

// A chunk of the block's share of O, PROB_SCALE times as large.
fn multiply_values(subgroup: u32, subgroups: u32) {
    for (var unit = subgroup; unit < VALUE_UNITS; unit += subgroups) {
        let strip = unit / VALUE_GROUPS * SIZE;
        let first_tile = unit % VALUE_GROUPS * VALUE_TILES;
        var sums: array<SumMatrix, VALUE_TILES>;
        var rest_sums: array<SumMatrix, VALUE_TILES>;
        // repeat t < VALUE_TILES
        sums[t] = SumMatrix();
        rest_sums[t] = SumMatrix();
        // end
        // loop turn < VALUE_STEP_TURNS
            // repeat k < VALUE_STEPS
            {
                let j = (turn * VALUE_STEPS + k) * SIZE;
                let probs = coopLoadT<LeftMatrix>(&prob_tile[strip * PROB_ROW + j / 4u], PROB_ROW);
                let rests = coopLoadT<LeftMatrix>(&prob_tile[(BLOCK_Q + strip) * PROB_ROW + j / 4u], PROB_ROW);
                // repeat t < VALUE_TILES
                {
                    let values = coopLoad<RightMatrix>(
                        &kv_tile[(first_tile + t) * SIZE * VALUE_ROW + j / 4u], VALUE_ROW,
                    );
                    sums[t] = coopMultiplyAdd(probs, values, sums[t]);
                    rest_sums[t] = coopMultiplyAdd(rests, values, rest_sums[t]);
                }
                // end
            }
            // end
        // end
        // repeat t < VALUE_TILES
        coopStoreT(
            sums[t] + rest_sums[t] * (1.0 / REST_SCALE), &sum_tile[strip * SUM_ROW + (first_tile + t) * SIZE_VECS],
            SUM_ROW,
        );
        // end
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(
    @builtin(workgroup_id) group: vec3u,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
) {
    let h = group.y;
    let b = group.z;
    let key_lane = lane % KEY_LANES;
    let row_lane = lane / KEY_LANES;
    let first_row = group.x * BLOCK_Q;
    let row = row_at(b, h, first_row + row_lane);

    // the keys this row may see, and the span that holds those of all rows
    var keys = vec2u(0u);
    if row.i < params.q_len {
        keys = row_keys(row);
    }
    var span = vec2u(0xffffffffu, 0u);
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
    let key_start = offset_4(params.key_offset, params.key_strides, b, row.kv_h, 0u);
    let value_start = offset_4(params.value_offset, params.value_strides, b, row.kv_h, 0u);

    var row_max = MASKED_SCORE;
    // this invocation's share of the row's sum of probabilities
    var row_sum = 0.0;
    var acc: array<vec4f, VALUE_CHUNKS * COLUMNS>;
    var score: array<vec4f, KEY_VECS>;
    var allowed: array<vec4<bool>, KEY_VECS>;

    for (var first_key = uniform_span.x; first_key < uniform_span.y; first_key += BLOCK_KV) {
        if KEY_CHUNKS > 1u {
            // what this invocation itself has read before
            // repeat t < KEY_VECS
            sum_tile[row_lane * SUM_ROW + t * KEY_LANES + key_lane] = vec4f(0.0);
            // end
        }
        // loop chunk < KEY_CHUNKS
            stage_keys(b, row.kv_h, key_start, first_key, uniform_span.y, chunk, lane);
            workgroupBarrier();
            if lane == 0u {
                // read for the last time before this barrier
                atomicStore(&wild_value, 0u);
            }
            multiply_keys(chunk, subgroup, subgroups);
            // the last reads of kv_tile were before this barrier
            workgroupBarrier();
        // end

        // every row may see every key of the block
        let whole = !ROW_MASKS && first_key + BLOCK_KV <= uniform_span.y;
        // masks, and the largest score of this invocation's keys
        // repeat t < KEY_VECS
        {
            score[t] = sum_tile[row_lane * SUM_ROW + t * KEY_LANES + key_lane];
            // repeat c < 4
            score[t][c] = exponent_score(row, first_key + (t * KEY_LANES + key_lane) * 4u + c, score[t][c]);
            // end
        }
        // end
        if !whole {
            // straight-line: what is read for a key that is not allowed is thrown away
            // repeat t < KEY_VECS
            // repeat c < 4
            allowed[t][c] = row_sees(row, keys, first_key + (t * KEY_LANES + key_lane) * 4u + c);
            // end
            score[t] = select(vec4f(MASKED_SCORE), score[t], allowed[t]);
            // end
        }
        var top = score[0][0];
        // repeat t < KEY_VECS
        top = max(max(max(top, score[t].x), score[t].y), max(score[t].z, score[t].w));
        // end
        share_row_part(0u, row_lane, key_lane, top);
        row_parts_are_shared();
        // no probability is above 1
        let block_max = largest_row_part(0u, row_lane, top);
        let new_max = max(row_max, block_max);
        let rescale = power(row_max - new_max);
        let block_scale = power(block_max - new_max);
        row_max = new_max;

        var block_sum = 0.0;
        // repeat t < KEY_VECS
        {
            var prob: vec4f;
            // repeat c < 4
            prob[c] = power(score[t][c] - block_max);
            // end
            if !whole {
                prob = select(vec4f(0.0), prob, allowed[t]);
            }
            block_sum += (prob.x + prob.y) + (prob.z + prob.w);
            let scaled = prob * PROB_SCALE;
            let first = leading_bits(scaled);
            let at = row_lane * PROB_ROW + t * KEY_LANES + key_lane;
            prob_tile[at] = vec4<f16>(first);
            prob_tile[BLOCK_Q * PROB_ROW + at] = vec4<f16>((scaled - first) * REST_SCALE);
        }
        // end
        row_sum = fma(row_sum, rescale, block_sum * block_scale);

        // repeat chunk < VALUE_CHUNKS
        {
            if stage_values(b, row.kv_h, value_start, first_key, uniform_span.y, chunk, lane) {
                atomicStore(&wild_value, 1u);
            }
            workgroupBarrier();
            multiply_values(subgroup, subgroups);
            // the last reads of kv_tile, and after the last chunk of prob_tile, were before this barrier
            workgroupBarrier();
            let wild = atomicLoad(&wild_value) != 0u;
            // repeat n < COLUMNS
            if COLUMNS_EXACT || key_lane + n * KEY_LANES < VALUE_CHUNK {
                let d = key_lane + n * KEY_LANES;
                let block_acc = sum_tile[row_lane * SUM_ROW + d] * (block_scale / PROB_SCALE);
                acc[chunk * COLUMNS + n] = fma(acc[chunk * COLUMNS + n], vec4f(rescale), block_acc);
                if wild {
                    acc[chunk * COLUMNS + n] += wild_values(row, keys, value_start, first_key, chunk * VALUE_CHUNK + d);
                }
            }
            // end
        }
        // end
    }

    share_row_part(0u, row_lane, key_lane, row_sum);
    row_parts_are_shared();
    let total = sum_of_row_parts(0u, row_lane, row_sum);
    if row.i < params.q_len {
        let end = row_end(row, natural_score(row_max), total, 1.0);
        if key_lane == 0u {
            store_lse(row, end);
        }
        let to = offset_4(params.output_offset, params.output_strides, b, h, row.i);
        // repeat chunk < VALUE_CHUNKS
        // repeat n < COLUMNS
        if COLUMNS_EXACT || key_lane + n * KEY_LANES < VALUE_CHUNK {
            let d = chunk * VALUE_CHUNK + key_lane + n * KEY_LANES;
            store_output_vec(to, d, acc[chunk * COLUMNS + n] * end.factor);
        }
        // end
        // end
    }
}

fn row_sees(row: Row, keys: vec2u, j: u32) -> bool {
    let between = (j >= keys.x) & (j < keys.y);
    if ROW_MASKS {
        return between & key_allowed(row, j);
    }
    return between;
}

// The infinite and NaN values of the block that the row may see, added up: no finite weight changes what that gives.
fn wild_values(row: Row, keys: vec2u, start: u32, first_key: u32, d: u32) -> vec4f {
    var sum = vec4f(0.0);
    for (var j = max(first_key, keys.x); j < min(first_key + BLOCK_KV, keys.y); j++) {
        if row_sees(row, keys, j) {
            let value_row = value_place(row.b, row.kv_h, j, start + j * params.value_strides.z);
            let element = load_value_vec(value_row, d);
            sum += select(vec4f(0.0), element, is_wild(element));
        }
    }
    return sum;
}
