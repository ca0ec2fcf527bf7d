// score.wgsl: from a dot product to a score: scale, softcap, bias, ALiBi, in this order.

override SOFTCAP: bool = false;
override ALIBI: bool = false;

fn capped_score(dot: f32) -> f32 {
    let score = params.scale * dot;
    if SOFTCAP {
        return params.softcap * hyperbolic_tangent(score / params.softcap);
    }
    return score;
}

// Where a row stands from a key, in keys.
fn alibi_distance(row: Row, j: u32) -> f32 {
    let position = row_position(row, batch_kv_len(row.b)) + params.diagonal_shift;
    return f32(abs(position - i32(params.key_base + j)));
}

fn score_of_capped(row: Row, j: u32, capped: f32) -> f32 {
    var score = add_bias(row, j, capped);
    if ALIBI {
        let slope = bitcast<f32>(row_data_word(params.alibi_at + (params.batch_base + row.b) * params.alibi_batch_stride + params.head_base + row.h));
        score -= slope * alibi_distance(row, j);
    }
    return score;
}

fn full_score(row: Row, j: u32, dot: f32) -> f32 {
    return score_of_capped(row, j, capped_score(dot));
}
