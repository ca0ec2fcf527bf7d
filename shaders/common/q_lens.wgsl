// q_lens.wgsl: which query rows there are, where batch entries have different numbers of them; needs row_data_*.

override Q_LENS: bool = false;

// Of the whole problem, not of the part. Query lengths stand at the start of the row data.
fn batch_q_len(b: u32) -> u32 {
    if Q_LENS {
        return min(row_data_word(params.batch_base + b), params.q_len_whole);
    }
    return params.q_len_whole;
}

// Whether a row is behind those of its batch entry: it sees no key, and has no sink either.
fn row_is_behind(row: Row) -> bool {
    if Q_LENS {
        return params.row_base + row.i >= batch_q_len(row.b);
    }
    return false;
}
