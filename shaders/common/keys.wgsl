// keys.wgsl: which keys a row may see, by length, range, causal mask and window; needs row_data_*, q_lens.
//
// All of these leave one interval of keys. The host folds causal mask and window into two shifts:
// row i sees keys from i + begin_shift up to, not including, i + end_shift (src/dispatch/params.rs).

override KV_LENS: bool = false;
override ROW_RANGES: bool = false;
// the diagonal ends where each batch entry's rows and keys do
override END_OF_KEYS: bool = false;

// Of the whole problem, not of the part.
fn batch_kv_len(b: u32) -> u32 {
    if KV_LENS {
        // a length beyond the keys would reach into the next head
        return min(row_data_word(params.kv_lens_at + params.batch_base + b), params.kv_len_whole);
    }
    return params.kv_len_whole;
}

// Row i of the part, counted from the point that begin_shift, end_shift and diagonal_shift refer to.
fn row_position(row: Row, kv_len: u32) -> i32 {
    var position = i32(params.row_base + row.i);
    if END_OF_KEYS {
        position += i32(kv_len) - i32(batch_q_len(row.b));
    }
    return position;
}

// First key of the part and one past the last, counted from key_base; equal where there is none.
fn row_keys(row: Row) -> vec2u {
    let kv_len = batch_kv_len(row.b);
    let position = row_position(row, kv_len);
    let first = i32(params.key_base);
    var begin = max(position + params.begin_shift, first);
    var end = min(position + params.end_shift, min(i32(kv_len), first + i32(params.kv_len)));
    if ROW_RANGES {
        let at = (params.batch_base + row.b) * params.q_len_whole + params.row_base + row.i;
        begin = max(begin, bitcast<i32>(row_data_word(params.row_start_at + at)));
        end = min(end, bitcast<i32>(row_data_word(params.row_end_at + at)));
    }
    if row_is_behind(row) {
        end = first;
    }
    end = max(end, first);
    return vec2u(u32(min(begin, end) - first), u32(end - first));
}

// Whether a key within the row's interval is left by mask and bias too; needs mask_*, bias_*.
// Without a short circuit: kernels write this out many times, and each would be a branch.
fn key_allowed(row: Row, j: u32) -> bool {
    return mask_allows(row, j) & bias_allows(row, j);
}
