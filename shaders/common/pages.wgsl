// pages.wgsl: which page holds a key; needs row_data_*.

// keys and values lie in pages that a table puts in order
override PAGED: bool = false;

// The page of key j of the part, and the key's place in it. The table is the caller's: a number that is no page's reads the last
// one, and nothing outside.
fn page_of(b: u32, j: u32) -> vec2u {
    let key = params.key_base + j;
    let at = params.block_table_at + (params.batch_base + b) * params.table_len + (key >> params.page_shift);
    let page = min(row_data_word(at), params.last_page);
    return vec2u(page, key & ((1u << params.page_shift) - 1u));
}
