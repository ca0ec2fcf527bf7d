// bias_none.wgsl: no additive bias.

fn add_bias(row: Row, j: u32, score: f32) -> f32 {
    return score;
}

fn bias_allows(row: Row, j: u32) -> bool {
    return true;
}
