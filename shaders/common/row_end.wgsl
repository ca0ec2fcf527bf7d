// row_end.wgsl: the end of a row's softmax: sink, normalisation, log-sum-exp; needs numerics.wgsl, row_data_*.

override SINKS: bool = false;

// What the unnormalised row is to be multiplied by, and the row's log-sum-exp.
struct RowEnd {
    factor: f32,
    lse: f32,
}

// row_sum is 0 only where no key had any mass: the largest one adds exp(0).
fn row_end(row: Row, row_max: f32, row_sum: f32) -> RowEnd {
    var top = row_max;
    var total = row_sum;
    var rescale = 1.0;
    if SINKS {
        let sink = bitcast<f32>(row_data_word(params.sinks_at + params.head_base + row.h));
        if row_sum == 0.0 {
            return RowEnd(0.0, sink);
        }
        top = max(row_max, sink);
        rescale = exp(row_max - top);
        total = row_sum * rescale + exp(sink - top);
    }
    if total == 0.0 {
        return RowEnd(0.0, params.negative_infinity);
    }
    return RowEnd(rescale / total, top + natural_log(total));
}
