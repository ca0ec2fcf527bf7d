// scores.wgsl: the scores of every query row with every key, at one of four stages.
//
//   S = scale * Q K^T, then softcap, then bias, ALiBi and masks
//
// grid       workgroup_id = (tile of keys, tile of query rows, batch * q_heads)
// workgroup  TILE x TILE invocations, one score each
// memory     query_tile, key_tile: TILE * TILE f32 each, written in full before they are read
// needs      every barrier in uniform control flow
// bindings   0 params (uniform)  1 query  2 key  4 bias  5 mask  6 row_data (read)  9 scores (read_write)
// snippets   query_* key_* bias_* mask_* row_data_* keys score numerics

const TILE: u32 = 16u;

override HEAD_DIM: u32;
override HEADS: u32;
// 0 scaled  1 capped  2 masked: negative infinity where not allowed
override STAGE: u32;

@group(0) @binding(9) var<storage, read_write> scores: array<f32>;

var<workgroup> query_tile: array<array<f32, TILE>, TILE>;
var<workgroup> key_tile: array<array<f32, TILE>, TILE>;

@compute @workgroup_size(TILE, TILE)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_id) local: vec3u) {
    let row = row_at(group.z / HEADS, group.z % HEADS, group.y * TILE + local.y);
    let j = group.x * TILE + local.x;
    let query_row = offset_4(params.query_offset, params.query_strides, row.b, row.h, row.i);
    // this invocation loads a key that another one multiplies
    let loaded_j = group.x * TILE + local.y;
    // behind the last key none is read, and where it would lie is not asked
    let key_j = min(loaded_j, max(params.kv_len, 1u) - 1u);
    let key_at = offset_4(params.key_offset, params.key_strides, row.b, row.kv_h, key_j);
    let key_row = key_place(row.b, row.kv_h, key_j, key_at);

    var dot = 0.0;
    for (var first = 0u; first < HEAD_DIM; first += TILE) {
        let d = first + local.x;
        var own_query = 0.0;
        var own_key = 0.0;
        if d < HEAD_DIM {
            if row.i < params.q_len {
                own_query = query_element(query_row, d);
            }
            if loaded_j < params.kv_len {
                own_key = key_element(key_row, d);
            }
        }
        query_tile[local.y][local.x] = own_query;
        key_tile[local.y][local.x] = own_key;
        workgroupBarrier();
        // a sum of its own for each tile: short sums round less than one over the whole row
        var tile_dot = 0.0;
        for (var n = 0u; n < TILE; n++) {
            tile_dot += query_tile[local.y][n] * key_tile[local.x][n];
        }
        dot += tile_dot;
        workgroupBarrier();
    }

    if row.i < params.q_len && j < params.kv_len {
        var score = 0.0;
        if STAGE == 0u {
            score = params.scale * dot;
        } else if STAGE == 1u {
            score = capped_score(dot);
        } else {
            score = params.negative_infinity;
            let keys = row_keys(row);
            if j >= keys.x && j < keys.y {
                if key_allowed(row, j) {
                    score = full_score(row, j, dot);
                }
            }
        }
        let to = offset_4(params.scores_offset, params.scores_strides, row.b, row.h, row.i);
        scores[to + j] = score;
    }
}
