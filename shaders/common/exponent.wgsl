// exponent.wgsl: from scores to powers, in base 2 where a score is nothing but a scaled dot product; needs score.wgsl.
//
// Then a power costs one fma: 2^(c s - m) with c = scale / ln 2, and m the largest c s. c is at most 1 there
// (`exponent_scale` in src/problem.rs), so that no product overflows that the score would not. With other terms a score may be as low
// as the lowest f32, and the difference has to come first.

override RAW_SCORES: bool = false;

fn exponent_score(row: Row, j: u32, dot: f32) -> f32 {
    if RAW_SCORES {
        return dot;
    }
    return full_score(row, j, dot);
}

// The exponent that a score stands for; maxima are kept of these.
fn exponent_of(score: f32) -> f32 {
    if RAW_SCORES {
        return params.exponent_scale * score;
    }
    return score;
}

fn power(exponent: f32) -> f32 {
    if RAW_SCORES {
        return exp2(exponent);
    }
    return exp(exponent);
}

fn power_of_score(score: f32, top: f32) -> f32 {
    if RAW_SCORES {
        return exp2(fma(score, params.exponent_scale, -top));
    }
    return exp(score - top);
}

fn natural_exponent(exponent: f32) -> f32 {
    if RAW_SCORES {
        return 0.69314718 * exponent;
    }
    return exponent;
}
