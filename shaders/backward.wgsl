// backward.wgsl: gradients of an attention from maximum, sum and delta of its rows, a tile of pairs after another.
//
//   P = exp(S - m) / l   dS = P * (dO V^T - delta)   dT = dS * (1 - tanh(T)^2)
//   of a tile of rows: dQ = scale * dT K   of a tile of keys: dK = scale * dT^T Q, dV = P^T dO   of pairs: dB = dS
//   FlashAttention-2, Dao 2023 (arXiv:2307.08691), Algorithm 2, as two passes without its atomic additions.
//
// A workgroup owns the tile of rows, of keys, or of both, whose gradient it makes, and goes over the tiles that are summed:
// keys, rows, heads, entries of the batch, in this order; where they are split, over its share of them. The rows of all heads of
// a group are one run of rows. Invocation (own_lane, other_lane) owns the rows or keys own_lane + n * LANES and the others
// other_lane + n * LANES of a tile, and columns other_lane + n * LANES of what is owned.
//
// Every dot product goes over chunks of CHUNK vec4s from the first element to the last, as in backward_delta.wgsl: where a row
// sees one key, both are the same number, and dS is exactly 0. A pair that is not allowed is left out by select, whatever
// its numbers are, and has a factor of 0 in the products, which is harmless unless what it weighs is infinite or NaN; only then
// it is asked again, pair by pair, whether it is allowed.
//
// grid       workgroup_id = (tile of rows, tile of keys, split + splits * (block of columns + blocks * (plane + planes * batch))),
//            1 along what is summed
// workgroup  LANES * LANES invocations
// memory     staged: chunks of the rows and of the keys of a tile; then a slice, LANES of the others with their factors; in the end
//            numbers that lanes put together   seen_tile   seen_block, seen_by_any, span, wild_slice
//            each written before it is read
// needs      every barrier in uniform control flow; CHUNK divides LANES * LANES
// constants  LANES, ROW_REG, KEY_REG <= 4: rows and keys of an invocation, of which OWN_REG are owned, OTHER_REG not
//            OWN_KEYS: keys are owned   PAIR_SUMS: pairs are   CHUNK: vec4s of a chunk   STAGE: vec4s of a lane of `staged`
//            STAGED_ROWS, STAGED_KEYS: vec4s of a chunk that an invocation stages
//            TURNS: 2 if values matter   PRODUCTS, DOT_PRODUCTS: products with what is owned, those of queries or keys first
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
// [own_lane][other], bit r: the r-th of what the lane owns sees the other, or is seen by it
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
    if SUM_KEYS {
        tile.key_block = rest % key_blocks();
        rest /= key_blocks();
    }
    if SUM_ROWS {
        tile.row_block = rest % row_blocks();
        rest /= row_blocks();
    }
    if SUM_HEADS {
        tile.plane = rest % PLANES;
        rest /= PLANES;
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

fn is_wild(elements: vec4f) -> bool {
    return any((bitcast<vec4u>(elements) & vec4u(0x7f800000u)) == vec4u(0x7f800000u));
}

// Of a tile's bits those of the n-th other, one for each that is owned.
fn seen_of(seen: u32, n: u32) -> u32 {
    if OWN_KEYS == 1u {
        return (seen >> (4u * n)) & 15u;
    }
    let bits = seen >> n;
    return (bits & 1u) | ((bits >> 3u) & 2u) | ((bits >> 6u) & 4u) | ((bits >> 9u) & 8u);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let own_lane = lane / LANES;
    let other_lane = lane % LANES;
    let row_lane = select(own_lane, other_lane, OWN_KEYS == 1u);
    let key_lane = select(other_lane, own_lane, OWN_KEYS == 1u);
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

    var sums: array<array<vec4f, SUMS>, OWN_REG>;
    var slice_sums: array<array<vec4f, SUMS>, OWN_REG>;
    var pair_sums: array<vec4f, 4>;
    var alibi_sums = vec4f(0.0);
    var scale_sums = vec4f(0.0);
    // [query and key, or output's gradient and value][x][y]
    var dots: array<array<vec4f, 4>, 2>;
    var chunk_dots: array<vec4f, 4>;
    var row_vecs: array<vec4f, 4>;
    var key_vecs: array<vec4f, 4>;
    // [dT or P][other][owned]
    var factors: array<array<vec4f, 4>, 2>;
    var row_starts: array<u32, STAGED_ROWS>;
    var token_starts: array<u32, STAGED_KEYS>;
    var slice = 0u;
    // what an invocation stages of a chunk: vec4 staged_d of staged_n, and of those STAGE_STEP behind it
    let staged_n = lane / CHUNK;
    let staged_d = lane % CHUNK;

    for (var number = first_tile; number < end_tile; number++) {
        let tile = tile_at(own, number);
        // bit x * 4 + y: the row sees the key
        var seen = 0u;
        // repeat x < ROW_REG
        {
            let n = tile.row_block * TILE_ROWS + row_lane + x * LANES;
            if n < row_count() {
                let row = row_of(tile, n);
                let keys = row_keys(row);
                // repeat y < KEY_REG
                {
                    let j = tile.key_block * TILE_KEYS + key_lane + y * LANES;
                    if j >= keys.x && j < keys.y {
                        var sees = key_allowed(row, j);
                        if CHOSEN_SUM == 1u {
                            sees = sees && is_chosen(row, j);
                        }
                        seen |= select(0u, 1u << (x * 4u + y), sees);
                    }
                }
                // end
            }
        }
        // end
        if !block_is_seen(seen, number, lane) {
            continue;
        }

        // repeat turn < TURNS
        // repeat x < ROW_REG
        dots[turn][x] = vec4f(0.0);
        // end
        // repeat s < STAGED_ROWS
        row_starts[s] = row_start(tile, tile.row_block * TILE_ROWS + staged_n + s * STAGE_STEP, turn == 1u);
        // end
        // repeat s < STAGED_KEYS
        token_starts[s] = token_start(tile, tile.key_block * TILE_KEYS + staged_n + s * STAGE_STEP, turn == 1u);
        // end
        for (var chunk = 0u; chunk < (select(HEAD_DIM, V_HEAD_DIM, turn == 1u) + 4u * CHUNK - 1u) / (4u * CHUNK); chunk++) {
            let d_at = chunk * CHUNK + staged_d;
            // repeat s < STAGED_ROWS
            {
                let n = staged_n + s * STAGE_STEP;
                if n < TILE_ROWS {
                    staged[n % LANES][n / LANES * CHUNK + staged_d] = row_vec(row_starts[s], d_at, turn == 1u);
                }
            }
            // end
            // repeat s < STAGED_KEYS
            {
                let n = staged_n + s * STAGE_STEP;
                if n < TILE_KEYS {
                    staged[n % LANES][KEYS_AT + n / LANES * CHUNK + staged_d] =
                        token_vec(tile, tile.key_block * TILE_KEYS + n, token_starts[s], d_at, turn == 1u);
                }
            }
            // end
            workgroupBarrier();
            // repeat x < ROW_REG
            chunk_dots[x] = vec4f(0.0);
            // end
            // repeat d < CHUNK
            {
                // repeat x < ROW_REG
                row_vecs[x] = staged[row_lane][x * CHUNK + d];
                // end
                // repeat y < KEY_REG
                key_vecs[y] = staged[key_lane][KEYS_AT + y * CHUNK + d];
                // end
                // repeat x < ROW_REG
                chunk_dots[x] = fma(
                    vec4f(row_vecs[x].x), vec4f(key_vecs[0].x, key_vecs[1].x, key_vecs[2].x, key_vecs[3].x), chunk_dots[x],
                );
                // end
                // repeat x < ROW_REG
                chunk_dots[x] = fma(
                    vec4f(row_vecs[x].y), vec4f(key_vecs[0].y, key_vecs[1].y, key_vecs[2].y, key_vecs[3].y), chunk_dots[x],
                );
                // end
                // repeat x < ROW_REG
                chunk_dots[x] = fma(
                    vec4f(row_vecs[x].z), vec4f(key_vecs[0].z, key_vecs[1].z, key_vecs[2].z, key_vecs[3].z), chunk_dots[x],
                );
                // end
                // repeat x < ROW_REG
                chunk_dots[x] = fma(
                    vec4f(row_vecs[x].w), vec4f(key_vecs[0].w, key_vecs[1].w, key_vecs[2].w, key_vecs[3].w), chunk_dots[x],
                );
                // end
            }
            // end
            // repeat x < ROW_REG
            dots[turn][x] += chunk_dots[x];
            // end
            // the last reads of the tiles were before this barrier
            workgroupBarrier();
        }
        // end

        // repeat x < ROW_REG
        {
            let row = row_of(tile, min(tile.row_block * TILE_ROWS + row_lane + x * LANES, row_count() - 1u));
            let stats = row_stats(row);
            seen &= select(~(15u << (x * 4u)), 0xffffffffu, has_mass(stats));
            // repeat y < KEY_REG
            {
                // straight-line: what comes out for a pair that is not allowed is thrown away
                let j = tile.key_block * TILE_KEYS + key_lane + y * LANES;
                let sees = (seen & (1u << (x * 4u + y))) != 0u;
                let scored = score_with_slope(row, j, dots[0][x][y]);
                let weight = select(0.0, exp(scored.x - stats.x) * stats.y, sees);
                var d_weight = dots[1][x][y] - stats.z;
                if CHOSEN {
                    d_weight += d_chosen(row, j);
                }
                let d_score = select(0.0, weight * d_weight, sees);
                let d_dot = select(0.0, d_score * scored.y, sees);
                if OWN_KEYS == 1u {
                    factors[0][x][y] = d_dot;
                    factors[1][x][y] = weight;
                } else {
                    factors[0][y][x] = d_dot;
                    factors[1][y][x] = weight;
                }
                if PAIR_SUMS == 1u {
                    pair_sums[x][y] += d_score;
                }
                if ALIBI_SUM == 1u {
                    alibi_sums[x] -= select(0.0, d_score * alibi_distance(row, j), sees);
                }
                if SCALE_SUM == 1u {
                    if CHOSEN_SUM == 1u {
                        scale_sums[x] += select(0.0, weight * d_chosen(row, j), sees);
                    } else {
                        scale_sums[x] += select(0.0, d_dot * dots[0][x][y], sees);
                    }
                }
            }
            // end
        }
        // end

        // repeat which < PRODUCTS
        // repeat r < OWN_REG
        // repeat n < COLUMNS
        slice_sums[r][which * COLUMNS + n] = vec4f(0.0);
        // end
        // end
        // repeat c < OTHER_REG
        {
            // of each product which, LANES of the others; this invocation stages columns of that of own_lane
            slice += 1u;
            let of_weights = which + 1u - DOT_PRODUCTS == 1u;
            staged[own_lane][other_lane] = factors[which + 1u - DOT_PRODUCTS][c];
            seen_tile[own_lane][other_lane] = seen_of(seen, c);
            let other = c * LANES + own_lane;
            let row_at_other = tile.row_block * TILE_ROWS + other;
            let key_at_other = tile.key_block * TILE_KEYS + other;
            var start: u32;
            if OWN_KEYS == 1u {
                start = row_start(tile, row_at_other, of_weights);
            } else {
                start = token_start(tile, key_at_other, false);
            }
            var wild = false;
            // repeat n < COLUMNS
            {
                let column = first_column + other_lane + n * LANES;
                var elements: vec4f;
                if OWN_KEYS == 1u {
                    elements = row_vec(start, column, of_weights);
                } else {
                    elements = token_vec(tile, key_at_other, start, column, false);
                }
                wild = wild || is_wild(elements);
                staged[other_lane][LANES + own_lane * COLUMNS + n] = elements;
            }
            // end
            if wild {
                atomicMax(&wild_slice, slice);
            }
            workgroupBarrier();
            if atomicLoad(&wild_slice) == slice {
                // those behind the last are the last again, and are not asked
                let first = select(tile.key_block * TILE_KEYS, tile.row_block * TILE_ROWS, OWN_KEYS == 1u) + c * LANES;
                let end = min(select(params.kv_len, row_count(), OWN_KEYS == 1u), first + LANES);
                for (var at = first; at < end; at++) {
                    let factor = staged[own_lane][at - first];
                    let sees = seen_tile[own_lane][at - first];
                    // repeat n < COLUMNS
                    {
                        let elements = staged[other_lane][LANES + (at - first) * COLUMNS + n];
                        // repeat r < OWN_REG
                        slice_sums[r][which * COLUMNS + n] = select(
                            slice_sums[r][which * COLUMNS + n],
                            fma(vec4f(factor[r]), elements, slice_sums[r][which * COLUMNS + n]),
                            ((sees >> r) & 1u) != 0u,
                        );
                        // end
                    }
                    // end
                }
            } else {
                // repeat k < LANES
                {
                    let factor = staged[own_lane][k];
                    // repeat n < COLUMNS
                    {
                        let elements = staged[other_lane][LANES + k * COLUMNS + n];
                        // repeat r < OWN_REG
                        slice_sums[r][which * COLUMNS + n] =
                            fma(vec4f(factor[r]), elements, slice_sums[r][which * COLUMNS + n]);
                        // end
                    }
                    // end
                }
                // end
            }
            // the last reads of the slice were before this barrier
            workgroupBarrier();
        }
        // end
        // a sum of its own for each tile: short sums round less than one over all of them
        // repeat r < OWN_REG
        // repeat n < COLUMNS
        sums[r][which * COLUMNS + n] += slice_sums[r][which * COLUMNS + n];
        // end
        // end
        // end
    }

    // repeat which < PRODUCTS
    // repeat r < OWN_REG
    {
        let l = select(own.row_block * TILE_ROWS, own.key_block * TILE_KEYS, OWN_KEYS == 1u) + own_lane + r * LANES;
        if l < select(row_count(), params.kv_len, OWN_KEYS == 1u) {
            let of_weights = which + 1u - DOT_PRODUCTS == 1u;
            var at = split * WIDTH + which * HEAD_DIM;
            if OWN_KEYS == 1u {
                at += gradient_at(own.b, own.plane, l);
            } else {
                let row = row_of(own, l);
                at += gradient_at(row.b, row.h, row.i);
            }
            // repeat n < COLUMNS
            for (var part = 0u; part < 4u; part++) {
                let column = (first_column + other_lane + n * LANES) * 4u + part;
                if column < select(HEAD_DIM, V_HEAD_DIM, of_weights) {
                    let sum = sums[r][which * COLUMNS + n][part];
                    store_gradient(at + column, select(params.scale * sum, sum, of_weights));
                }
            }
            // end
        }
    }
    // end
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
