// backward.wgsl: gradients of an attention from maximum, sum and delta of its rows, a tile of pairs after another.
//
//   P = exp(S - m) / l   dS = P * (dO V^T - delta)   dT = dS * (1 - tanh(T)^2)
//   of a tile of rows: dQ = scale * dT K   of a tile of keys: dK = scale * dT^T Q, dV = P^T dO   of pairs: dB = dS
//   FlashAttention-2, Dao 2023 (arXiv:2307.08691), Algorithm 2, as two passes without its atomic additions.
//
// A workgroup owns the tile of rows, of keys, or of both, whose gradient it makes, and goes over the tiles that are summed:
// keys, rows, heads, entries of the batch, in this order; where they are split, over its share of them. The rows of all heads of
// a group are one run of rows. Invocation (own_lane, other_lane) owns the rows or keys own_lane + n * LANES and the others
// other_lane + n * LANES of a tile, and columns other_lane + n * LANES of what is owned. What P weighs is added up before dO V^T is
// made: less has to be kept in registers at a time.
//
// Every dot product goes over chunks of CHUNK vec4s from the first element to the last, as in backward_delta.wgsl: where a row
// sees one key, both are the same number, and dS is exactly 0. A pair that is not allowed is left out by select, whatever
// its numbers are, and has a factor of 0 in the products, which is harmless unless what it weighs is infinite or NaN; only then
// it is asked again, pair by pair, whether it is allowed.
//
// grid       workgroup_id = (tile of rows, tile of keys, split + splits * (block of columns + blocks * (plane + planes * batch))),
//            1 along what is summed
// workgroup  LANES * LANES invocations
// memory     staged: chunks of the rows and of the keys of a tile; then STEP slices, each LANES of the others with their factors;
//            in the end numbers that lanes put together   it stands first: drivers see vec4s at multiples of 16 bytes
//            seen_tile   seen_block, seen_by_any, span, wild_slice   each written before it is read
// needs      every barrier in uniform control flow; CHUNK divides LANES * LANES
// constants  LANES, ROW_REG, KEY_REG <= 4: rows and keys of an invocation, of which OWN_REG are owned, STEP * GROUPS not
//            OWN_KEYS: keys are owned   PAIR_SUMS: pairs are   CHUNK: vec4s of a chunk   STAGE: vec4s of a lane of `staged`
//            STAGED_ROWS, STAGED_KEYS: vec4s of a chunk that an invocation stages
//            PART, PARTS: rows of an invocation whose vec4s are loaded at a time, and how often
//            VALUE_TURNS: 1 if values matter   DOT_PRODUCTS, WEIGHT_PRODUCTS: products of dT and of P with what is summed, 0 or 1
//            WITH_PRODUCTS: 1 if there is any   STEP, GROUPS: slices that are staged at a time, and how often for a product
//            COLUMNS: vec4 columns of an invocation
//            ALIBI_SUM, SCALE_SUM: whether the row's share of these gradients is kept
//            CHOSEN_SUM: in the place of the latter, what chosen weights add to delta, of chosen pairs alone
// bindings   0 params (uniform)  1 query  2 key  3 value  4 bias  5 mask  6 row_data  14 d_output (read)
//            9 gradients or 7 output (read_write)
// snippets   query_vec_* key_vec_* value_vec_* d_output_vec_* bias_* mask_* row_data_buffer q_lens keys score numerics
//            score_slope row_stats chosen_* tile_mask_bytes gradient_*

const TILE_ROWS: u32 = ROW_REG * LANES;
const TILE_KEYS: u32 = KEY_REG * LANES;
const WORKGROUP_SIZE: u32 = LANES * LANES;
// rows or keys whose chunks all invocations stage at a time
const STAGE_STEP: u32 = WORKGROUP_SIZE / CHUNK;
const WILD: u32 = 0x7f800000u;
// vec4s that LANES of the others take in a lane of `staged`, factors first, and such slices of a tile that follow each other
const SLICE: u32 = LANES * (1u + COLUMNS);
// where the keys of a chunk begin
const KEYS_AT: u32 = ROW_REG * CHUNK;

override HEAD_DIM: u32;
override V_HEAD_DIM: u32;
// rows are no whole tiles of columns
override KEY_RAGGED: bool;
override VALUE_RAGGED: bool;
// query heads whose rows are one run
override HEADS: u32;
// such runs
override PLANES: u32;
override COLUMN_BLOCKS: u32;
// numbers that a row of one split has
override WIDTH: u32;
// what the gradient is summed over
override SUM_BATCH: bool;
override SUM_HEADS: bool;
override SUM_ROWS: bool;
override SUM_KEYS: bool;

// chunks: [lane][n, d], rows and behind them keys; a slice: [own_lane][other], factors of what the lane owns, and behind them
// [other_lane][other, column]
var<workgroup> staged: array<array<vec4f, STAGE>, LANES>;
// [own_lane][other_lane], bit x * 4 + y: of what these lanes have, the row x sees the key y
var<workgroup> seen_tile: array<array<u32, LANES>, LANES>;
var<workgroup> span_begin: atomic<u32>;
var<workgroup> span_end: atomic<u32>;
var<workgroup> span: vec2u;
// the last slice in which something is infinite or NaN; it only rises, so it is not reset
var<workgroup> wild_slice: atomic<u32>;

struct Tile {
    b: u32,
    plane: u32,
    kv_h: u32,
    row_block: u32,
    key_block: u32,
}

// Rows of a plane.
fn row_count() -> u32 {
    return HEADS * params.q_len;
}

fn row_of(tile: Tile, n: u32) -> Row {
    if HEADS == 1u {
        return row_at(tile.b, tile.plane, n);
    }
    return row_at(tile.b, tile.plane * HEADS + n / params.q_len, n % params.q_len);
}

fn row_blocks() -> u32 {
    return (row_count() + TILE_ROWS - 1u) / TILE_ROWS;
}

fn key_blocks() -> u32 {
    return (params.kv_len + TILE_KEYS - 1u) / TILE_KEYS;
}

// Tiles that are summed.
fn tile_count() -> u32 {
    var count = 1u;
    if SUM_KEYS {
        count *= key_blocks();
    }
    if SUM_ROWS {
        count *= row_blocks();
    }
    if SUM_HEADS {
        count *= PLANES;
    }
    if SUM_BATCH {
        count *= params.batch;
    }
    return count;
}

// The n-th of them.
fn tile_at(own: Tile, n: u32) -> Tile {
    var tile = own;
    var rest = n;
    // what is summed last takes the rest
    if SUM_KEYS {
        let last = !(SUM_ROWS || SUM_HEADS || SUM_BATCH);
        tile.key_block = select(rest % key_blocks(), rest, last);
        rest = select(rest / key_blocks(), 0u, last);
    }
    if SUM_ROWS {
        let last = !(SUM_HEADS || SUM_BATCH);
        tile.row_block = select(rest % row_blocks(), rest, last);
        rest = select(rest / row_blocks(), 0u, last);
    }
    if SUM_HEADS {
        tile.plane = select(rest % PLANES, rest, !SUM_BATCH);
        rest = select(rest / PLANES, 0u, !SUM_BATCH);
    }
    if SUM_BATCH {
        tile.b = rest;
    }
    tile.kv_h = row_at(tile.b, tile.plane * HEADS, 0u).kv_h;
    return tile;
}

// Rows and keys behind the last are staged as the last: no pair has them.
fn row_start(tile: Tile, n: u32, of_output: bool) -> u32 {
    let row = row_of(tile, min(n, row_count() - 1u));
    if of_output {
        return offset_4(params.d_output_offset, params.d_output_strides, row.b, row.h, row.i);
    }
    return offset_4(params.query_offset, params.query_strides, row.b, row.h, row.i);
}

fn row_vec(start: u32, d: u32, of_output: bool) -> vec4f {
    if of_output {
        return load_d_output_vec(start, d);
    }
    return load_query_vec(start, d);
}

// Where a key or its value lies if keys lie side by side.
fn token_start(tile: Tile, n: u32, of_value: bool) -> u32 {
    let j = min(n, params.kv_len - 1u);
    if of_value {
        return offset_4(params.value_offset, params.value_strides, tile.b, tile.kv_h, j);
    }
    return offset_4(params.key_offset, params.key_strides, tile.b, tile.kv_h, j);
}

fn token_vec(tile: Tile, n: u32, start: u32, d: u32, of_value: bool) -> vec4f {
    let j = min(n, params.kv_len - 1u);
    if of_value {
        return load_value_vec(value_place(tile.b, tile.kv_h, j, start), d);
    }
    return load_key_vec(key_place(tile.b, tile.kv_h, j, start), d);
}

// The largest magnitude, as bits: from WILD on an element is infinite or NaN.
fn magnitude(elements: vec4f) -> u32 {
    let bits = bitcast<vec4u>(elements) & vec4u(0x7fffffffu);
    return max(max(bits.x, bits.y), max(bits.z, bits.w));
}

// Of a tile's bits those of the n-th other, one for each that is owned.
fn seen_of(seen: u32, n: u32) -> u32 {
    if OWN_KEYS == 1u {
        return (seen >> (4u * n)) & 15u;
    }
    let bits = seen >> n;
    return (bits & 1u) | ((bits >> 3u) & 2u) | ((bits >> 6u) & 4u) | ((bits >> 9u) & 8u);
}

// What an invocation has of a tile: its lanes, and what it stages of a chunk, vec4 staged_d of staged_n and of those STAGE_STEP
// behind.
struct Lanes {
    own: u32,
    other: u32,
    row: u32,
    key: u32,
    staged_n: u32,
    staged_d: u32,
}

// Dot products of the tile's rows with its keys, or of output gradients with values.
fn dot_tile(tile: Tile, lanes: Lanes, of_output: bool, dots: ptr<function, array<vec4f, 4>>) {
    let first_row = tile.row_block * TILE_ROWS + lanes.staged_n;
    let first_key = tile.key_block * TILE_KEYS + lanes.staged_n;
    var row_starts: array<u32, STAGED_ROWS>;
    var token_starts: array<u32, STAGED_KEYS>;
    var chunk_dots: array<vec4f, 4>;
    var row_vecs: array<vec4f, 4>;
    var key_vecs: array<vec4f, 4>;
    // repeat x < ROW_REG
    (*dots)[x] = vec4f(0.0);
    // end
    // repeat s < STAGED_ROWS
    row_starts[s] = row_start(tile, first_row + s * STAGE_STEP, of_output);
    // end
    // repeat s < STAGED_KEYS
    token_starts[s] = token_start(tile, first_key + s * STAGE_STEP, of_output);
    // end
    let width = select(HEAD_DIM, V_HEAD_DIM, of_output);
    for (var chunk = 0u; chunk < (width + 4u * CHUNK - 1u) / (4u * CHUNK); chunk++) {
        let d_at = chunk * CHUNK + lanes.staged_d;
        // repeat s < STAGED_ROWS
        {
            let n = lanes.staged_n + s * STAGE_STEP;
            if n < TILE_ROWS {
                staged[n % LANES][n / LANES * CHUNK + lanes.staged_d] = row_vec(row_starts[s], d_at, of_output);
            }
        }
        // end
        // repeat s < STAGED_KEYS
        {
            let n = lanes.staged_n + s * STAGE_STEP;
            if n < TILE_KEYS {
                staged[n % LANES][KEYS_AT + n / LANES * CHUNK + lanes.staged_d] =
                    token_vec(tile, first_key + s * STAGE_STEP, token_starts[s], d_at, of_output);
            }
        }
        // end
        workgroupBarrier();
        // repeat x < ROW_REG
        chunk_dots[x] = vec4f(0.0);
        // end
        // repeat d < CHUNK
        {
            // repeat y < KEY_REG
            key_vecs[y] = staged[lanes.key][KEYS_AT + y * CHUNK + d];
            // end
            // repeat part < PARTS
            // repeat r < PART
            row_vecs[r] = staged[lanes.row][(part * PART + r) * CHUNK + d];
            // end
            // repeat r < PART
            chunk_dots[part * PART + r] = fma(
                vec4f(row_vecs[r].x), vec4f(key_vecs[0].x, key_vecs[1].x, key_vecs[2].x, key_vecs[3].x),
                chunk_dots[part * PART + r],
            );
            // end
            // repeat r < PART
            chunk_dots[part * PART + r] = fma(
                vec4f(row_vecs[r].y), vec4f(key_vecs[0].y, key_vecs[1].y, key_vecs[2].y, key_vecs[3].y),
                chunk_dots[part * PART + r],
            );
            // end
            // repeat r < PART
            chunk_dots[part * PART + r] = fma(
                vec4f(row_vecs[r].z), vec4f(key_vecs[0].z, key_vecs[1].z, key_vecs[2].z, key_vecs[3].z),
                chunk_dots[part * PART + r],
            );
            // end
            // repeat r < PART
            chunk_dots[part * PART + r] = fma(
                vec4f(row_vecs[r].w), vec4f(key_vecs[0].w, key_vecs[1].w, key_vecs[2].w, key_vecs[3].w),
                chunk_dots[part * PART + r],
            );
            // end
            // end
        }
        // end
        // repeat x < ROW_REG
        (*dots)[x] += chunk_dots[x];
        // end
        // the last reads of the tiles were before this barrier
        workgroupBarrier();
    }
}

// repeat with < WITH_PRODUCTS
// Adds to the sums of what is owned the others of the tile, each by its factor: of keys and values rows, or gradients of rows.
fn add_products(
    tile: Tile,
    lanes: Lanes,
    first_column: u32,
    of_weights: bool,
    factors: ptr<function, array<vec4f, 4>>,
    slice: ptr<function, u32>,
    sums: ptr<function, array<array<vec4f, COLUMNS>, OWN_REG>>,
) {
    var tile_sums: array<array<vec4f, COLUMNS>, OWN_REG>;
    // repeat r < OWN_REG
    // repeat n < COLUMNS
    tile_sums[r][n] = vec4f(0.0);
    // end
    // end
    // repeat g < GROUPS
    {
        // STEP slices of LANES of the others; this invocation stages columns of those of lanes.own
        *slice += 1u;
        let first = select(tile.key_block * TILE_KEYS, tile.row_block * TILE_ROWS, OWN_KEYS == 1u) + g * STEP * LANES;
        var largest = 0u;
        // repeat s < STEP
        {
            staged[lanes.own][s * SLICE + lanes.other] = (*factors)[g * STEP + s];
            let other = first + s * LANES + lanes.own;
            var start: u32;
            if OWN_KEYS == 1u {
                start = row_start(tile, other, of_weights);
            } else {
                start = token_start(tile, other, false);
            }
            // repeat n < COLUMNS
            {
                let column = first_column + lanes.other + n * LANES;
                var elements: vec4f;
                if OWN_KEYS == 1u {
                    elements = row_vec(start, column, of_weights);
                } else {
                    elements = token_vec(tile, other, start, column, false);
                }
                largest = max(largest, magnitude(elements));
                staged[lanes.other][s * SLICE + LANES + lanes.own * COLUMNS + n] = elements;
            }
            // end
        }
        // end
        if largest >= WILD {
            atomicMax(&wild_slice, *slice);
        }
        workgroupBarrier();
        if atomicLoad(&wild_slice) == *slice {
            // those behind the last are the last again, and are not asked
            let end = select(params.kv_len, row_count(), OWN_KEYS == 1u);
            let count = min(max(end, first) - first, STEP * LANES);
            for (var at = 0u; at < count; at++) {
                let base = at / LANES * SLICE;
                let factor = staged[lanes.own][base + at % LANES];
                let sees = seen_of(seen_tile[lanes.own][at % LANES], g * STEP + at / LANES);
                // repeat n < COLUMNS
                {
                    let elements = staged[lanes.other][base + LANES + at % LANES * COLUMNS + n];
                    // repeat r < OWN_REG
                    tile_sums[r][n] = select(
                        tile_sums[r][n],
                        fma(vec4f(factor[r]), elements, tile_sums[r][n]),
                        ((sees >> r) & 1u) != 0u,
                    );
                    // end
                }
                // end
            }
        } else {
            // repeat s < STEP
            // repeat k < LANES
            {
                let factor = staged[lanes.own][s * SLICE + k];
                // repeat n < COLUMNS
                {
                    let elements = staged[lanes.other][s * SLICE + LANES + k * COLUMNS + n];
                    // repeat r < OWN_REG
                    tile_sums[r][n] = fma(vec4f(factor[r]), elements, tile_sums[r][n]);
                    // end
                }
                // end
            }
            // end
            // end
        }
        // the last reads of the slice were before this barrier
        workgroupBarrier();
    }
    // end
    // a sum of its own for each tile: short sums round less than one over all of them
    // repeat r < OWN_REG
    // repeat n < COLUMNS
    (*sums)[r][n] += tile_sums[r][n];
    // end
    // end
}

// Stores what is owned, its numbers from `to` on.
fn store_sums(
    own: Tile,
    lanes: Lanes,
    first_column: u32,
    to: u32,
    of_weights: bool,
    sums: ptr<function, array<array<vec4f, COLUMNS>, OWN_REG>>,
) {
    // repeat r < OWN_REG
    {
        let n = select(own.row_block * TILE_ROWS, own.key_block * TILE_KEYS, OWN_KEYS == 1u) + lanes.own + r * LANES;
        if n < select(row_count(), params.kv_len, OWN_KEYS == 1u) {
            var at = to;
            if OWN_KEYS == 1u {
                at += gradient_at(own.b, own.plane, n);
            } else {
                let row = row_of(own, n);
                at += gradient_at(row.b, row.h, row.i);
            }
            // repeat c < COLUMNS
            for (var part = 0u; part < 4u; part++) {
                let column = (first_column + lanes.other + c * LANES) * 4u + part;
                if column < select(HEAD_DIM, V_HEAD_DIM, of_weights) {
                    let sum = (*sums)[r][c][part];
                    store_gradient(at + column, select(params.scale * sum, sum, of_weights));
                }
            }
            // end
        }
    }
    // end
}
// end

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let own_lane = lane / LANES;
    let other_lane = lane % LANES;
    let row_lane = select(own_lane, other_lane, OWN_KEYS == 1u);
    let key_lane = select(other_lane, own_lane, OWN_KEYS == 1u);
    let lanes = Lanes(own_lane, other_lane, row_lane, key_lane, lane / CHUNK, lane % CHUNK);
    let split = group.z % params.splits;
    let behind_split = group.z / params.splits;
    let column_block = behind_split % COLUMN_BLOCKS;
    let of_plane = behind_split / COLUMN_BLOCKS;
    let planes = select(PLANES, 1u, SUM_HEADS);
    let own = Tile(of_plane / planes, of_plane % planes, 0u, group.x, group.y);
    let first_column = column_block * COLUMNS * LANES;

    if lane == 0u {
        begin_mask_tiles();
        atomicStore(&wild_slice, 0u);
        atomicStore(&span_begin, 0xffffffffu);
        atomicStore(&span_end, 0u);
    }
    workgroupBarrier();
    let count = tile_count();
    let share = (count + params.splits - 1u) / params.splits;
    var first_tile = min(split * share, count);
    var end_tile = min(first_tile + share, count);
    if SUM_KEYS && !SUM_ROWS && !SUM_HEADS && !SUM_BATCH {
        // the tiles that some row may see
        // repeat x < ROW_REG
        {
            let n = own.row_block * TILE_ROWS + row_lane + x * LANES;
            if n < row_count() {
                let keys = row_keys(row_of(own, n));
                if keys.x < keys.y {
                    atomicMin(&span_begin, keys.x / TILE_KEYS);
                    atomicMax(&span_end, (keys.y + TILE_KEYS - 1u) / TILE_KEYS);
                }
            }
        }
        // end
        workgroupBarrier();
        if lane == 0u {
            span = vec2u(atomicLoad(&span_begin), atomicLoad(&span_end));
        }
        let seen_tiles = workgroupUniformLoad(&span);
        first_tile = max(first_tile, seen_tiles.x);
        end_tile = min(end_tile, seen_tiles.y);
    }

    // weighed by dT, and by P
    var sums: array<array<vec4f, COLUMNS>, OWN_REG>;
    var weight_sums: array<array<vec4f, COLUMNS>, OWN_REG>;
    var pair_sums: array<vec4f, 4>;
    var alibi_sums = vec4f(0.0);
    var scale_sums = vec4f(0.0);
    // [x][y]
    var dots: array<vec4f, 4>;
    var d_dots: array<vec4f, 4>;
    var weights: array<vec4f, 4>;
    var slopes: array<vec4f, 4>;
    // [other][owned]
    var factors: array<vec4f, 4>;
    var slice = 0u;

    for (var number = first_tile; number < end_tile; number++) {
        let tile = tile_at(own, number);
        // bit x * 4 + y: the row sees the key
        var seen = 0u;
        // repeat x < ROW_REG
        {
            // a row behind the last is the last, and sees nothing
            let n = tile.row_block * TILE_ROWS + row_lane + x * LANES;
            let row = row_of(tile, min(n, row_count() - 1u));
            let keys = row_keys(row);
            let count = select(0u, keys.y - keys.x, n < row_count());
            // repeat y < KEY_REG
            {
                let j = tile.key_block * TILE_KEYS + key_lane + y * LANES;
                var sees = (j - keys.x < count) & key_allowed(row, min(j, params.kv_len - 1u));
                if CHOSEN_SUM == 1u {
                    sees = sees & is_chosen(row, min(j, params.kv_len - 1u));
                }
                seen |= select(0u, 1u << (x * 4u + y), sees);
            }
            // end
        }
        // end
        if !block_is_seen(seen, number, lane) {
            continue;
        }

        dot_tile(tile, lanes, false, &dots);
        // repeat x < ROW_REG
        {
            let row = row_of(tile, min(tile.row_block * TILE_ROWS + lanes.row + x * LANES, row_count() - 1u));
            let stats = row_stats(row);
            seen &= select(~(15u << (x * 4u)), 0xffffffffu, has_mass(stats));
            // repeat y < KEY_REG
            {
                // straight-line: what comes out for a pair that is not allowed is thrown away
                let j = tile.key_block * TILE_KEYS + lanes.key + y * LANES;
                let sees = (seen & (1u << (x * 4u + y))) != 0u;
                let scored = score_with_slope(row, j, dots[x][y]);
                let weight = select(0.0, exp(scored.x - stats.x) * stats.y, sees);
                weights[x][y] = weight;
                slopes[x][y] = scored.y;
                if OWN_KEYS == 1u {
                    factors[x][y] = weight;
                } else {
                    factors[y][x] = weight;
                }
            }
            // end
        }
        // end
        // repeat with < WITH_PRODUCTS
        // read behind the barriers of a product
        seen_tile[lanes.own][lanes.other] = seen;
        // end
        // repeat p < WEIGHT_PRODUCTS
        add_products(tile, lanes, first_column, true, &factors, &slice, &weight_sums);
        // end
        // repeat p < VALUE_TURNS
        dot_tile(tile, lanes, true, &d_dots);
        // end
        // repeat x < ROW_REG
        {
            let row = row_of(tile, min(tile.row_block * TILE_ROWS + lanes.row + x * LANES, row_count() - 1u));
            let delta = row_stats(row).z;
            // repeat y < KEY_REG
            {
                let j = tile.key_block * TILE_KEYS + lanes.key + y * LANES;
                let sees = (seen & (1u << (x * 4u + y))) != 0u;
                var d_weight = d_dots[x][y] - delta;
                if CHOSEN {
                    d_weight += d_chosen(row, j);
                }
                let d_score = select(0.0, weights[x][y] * d_weight, sees);
                let d_dot = select(0.0, d_score * slopes[x][y], sees);
                if OWN_KEYS == 1u {
                    factors[x][y] = d_dot;
                } else {
                    factors[y][x] = d_dot;
                }
                if PAIR_SUMS == 1u {
                    pair_sums[x][y] += d_score;
                }
                if ALIBI_SUM == 1u {
                    alibi_sums[x] -= select(0.0, d_score * alibi_distance(row, j), sees);
                }
                if SCALE_SUM == 1u {
                    if CHOSEN_SUM == 1u {
                        scale_sums[x] += select(0.0, weights[x][y] * d_chosen(row, j), sees);
                    } else {
                        scale_sums[x] += select(0.0, d_dot * dots[x][y], sees);
                    }
                }
            }
            // end
        }
        // end
        // repeat p < DOT_PRODUCTS
        add_products(tile, lanes, first_column, false, &factors, &slice, &sums);
        // end
    }

    // repeat p < DOT_PRODUCTS
    store_sums(own, lanes, first_column, split * WIDTH, false, &sums);
    // end
    // repeat p < WEIGHT_PRODUCTS
    store_sums(own, lanes, first_column, split * WIDTH + DOT_PRODUCTS * HEAD_DIM, true, &weight_sums);
    // end
    if ALIBI_SUM == 1u || SCALE_SUM == 1u {
        // what the lanes of a row have, put together
        staged[own_lane][other_lane] = alibi_sums;
        staged[own_lane][LANES + other_lane] = scale_sums;
        workgroupBarrier();
        let n = own.row_block * TILE_ROWS + own_lane + other_lane * LANES;
        if other_lane < ROW_REG && n < row_count() && column_block == 0u {
            var of_alibi = 0.0;
            var of_scale = 0.0;
            for (var other = 0u; other < LANES; other++) {
                of_alibi += staged[own_lane][other][other_lane];
                of_scale += staged[own_lane][LANES + other][other_lane];
            }
            let row = row_of(own, n);
            let at = gradient_at(row.b, row.h, row.i) + (split + 1u) * WIDTH;
            if SCALE_SUM == 1u {
                store_gradient(at - 1u, of_scale);
            }
            if ALIBI_SUM == 1u {
                store_gradient(at - 1u - SCALE_SUM, of_alibi);
            }
        }
    }
    if PAIR_SUMS == 1u {
        let first_row = own.row_block * TILE_ROWS;
        let first_key = own.key_block * TILE_KEYS;
        if SUM_ROWS || SUM_KEYS {
            // [row_lane][key_lane]: a component for each y, for each x, or one for all
            var own_sums = vec4f(0.0);
            // repeat x < ROW_REG
            if SUM_ROWS {
                own_sums += pair_sums[x];
            } else {
                own_sums[x] = (pair_sums[x].x + pair_sums[x].y) + (pair_sums[x].z + pair_sums[x].w);
            }
            // end
            if SUM_ROWS && SUM_KEYS {
                own_sums.x = (own_sums.x + own_sums.y) + (own_sums.z + own_sums.w);
            }
            staged[row_lane][key_lane] = own_sums;
            workgroupBarrier();
            if SUM_ROWS && SUM_KEYS {
                if lane == 0u {
                    var sum = 0.0;
                    for (var r = 0u; r < LANES; r++) {
                        var row_sum = 0.0;
                        for (var k = 0u; k < LANES; k++) {
                            row_sum += staged[r][k].x;
                        }
                        sum += row_sum;
                    }
                    store_gradient(gradient_at(own.b, own.plane, 0u) + split * WIDTH, sum);
                }
            } else if SUM_ROWS {
                let j = first_key + key_lane + row_lane * LANES;
                if row_lane < KEY_REG && j < params.kv_len {
                    var sum = 0.0;
                    for (var r = 0u; r < LANES; r++) {
                        sum += staged[r][key_lane][row_lane];
                    }
                    store_gradient(gradient_at(own.b, own.plane, 0u) + split * WIDTH + j, sum);
                }
            } else {
                let i = first_row + row_lane + key_lane * LANES;
                if key_lane < ROW_REG && i < params.q_len {
                    var sum = 0.0;
                    for (var k = 0u; k < LANES; k++) {
                        sum += staged[row_lane][k][key_lane];
                    }
                    store_gradient(gradient_at(own.b, own.plane, i) + split * WIDTH, sum);
                }
            }
        } else {
            // repeat x < ROW_REG
            {
                let i = first_row + row_lane + x * LANES;
                // repeat y < KEY_REG
                {
                    let j = first_key + key_lane + y * LANES;
                    if i < params.q_len && j < params.kv_len {
                        store_gradient(gradient_at(own.b, own.plane, i) + j * gradient_step(), pair_sums[x][y]);
                    }
                }
                // end
            }
            // end
        }
    }
}
