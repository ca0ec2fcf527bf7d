// exponent.wgsl: from scores to powers, in base 2 where a score is nothing but a scaled dot product; needs score.wgsl.
//
// There maxima are kept of dot products as they are, and the scale is multiplied into differences: what is rounded is small
// where it counts. Scaled first and subtracted by an fma, scores of 10^4 would lose 3e-4 wherever an fma rounds twice.
// With other terms a score may be as low as the lowest f32, and is what it is.

override RAW_SCORES: bool = false;

fn exponent_score(row: Row, j: u32, dot: f32) -> f32 {
    if RAW_SCORES {
        return dot;
    }
    return full_score(row, j, dot);
}

// e to the power of a difference of scores.
fn power(difference: f32) -> f32 {
    if RAW_SCORES {
        return exp2(difference * params.exponent_scale);
    }
    return exp(difference);
}

// A maximum of scores in natural units.
fn natural_score(score: f32) -> f32 {
    if RAW_SCORES {
        return params.scale * score;
    }
    return score;
}
