// row_end.wgsl: the end of a row's softmax: sink, normalisation, log-sum-exp; needs numerics.wgsl, row_data_*, q_lens.

override SINKS: bool = false;

// What the unnormalised row is to be multiplied by, the row's log-sum-exp, and the maximum and sum that it stands for.
struct RowEnd {
    factor: f32,
    lse: f32,
    row_max: f32,
    row_sum: f32,
}

// `one` is what the largest probability was taken for: 1, or params.headroom where values may be near f32's end. row_sum is
// 0 only where no key had any mass: the largest one adds `one`.
fn row_end(row: Row, row_max: f32, row_sum: f32, one: f32) -> RowEnd {
    if row_is_behind(row) {
        return RowEnd(0.0, params.negative_infinity, params.negative_infinity, 0.0);
    }
    var top = row_max;
    var total = row_sum;
    var rescale = 1.0;
    if SINKS {
        let sink = bitcast<f32>(row_data_word(params.sinks_at + params.head_base + row.h));
        if row_sum == 0.0 {
            return RowEnd(0.0, sink, sink, 1.0);
        }
        top = max(row_max, sink);
        rescale = exp(row_max - top);
        total = row_sum * rescale + exp(sink - top) * one;
    }
    if total == 0.0 {
        return RowEnd(0.0, params.negative_infinity, params.negative_infinity, 0.0);
    }
    // a power of two: exact, and a quotient would not be
    let whole = total * select(params.headroom_inverse, 1.0, one == 1.0);
    return RowEnd(rescale / total, top + natural_log(whole), top, whole);
}
