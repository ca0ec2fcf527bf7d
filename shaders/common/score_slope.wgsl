// score_slope.wgsl: a score, and what it changes by as its dot product does; needs score.

// The score, and its slope by the scaled dot product.
fn score_with_slope(row: Row, j: u32, dot: f32) -> vec2f {
    let scaled = params.scale * dot;
    if SOFTCAP {
        let t = hyperbolic_tangent(scaled / params.softcap);
        return vec2f(score_of_capped(row, j, params.softcap * t), (1.0 - t) * (1.0 + t));
    }
    return vec2f(score_of_capped(row, j, scaled), 1.0);
}
