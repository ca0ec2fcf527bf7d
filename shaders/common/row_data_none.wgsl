// row_data_none.wgsl: no lengths, row ranges, ALiBi slopes, sinks or tables.

fn row_data_word(at: u32) -> u32 {
    return 0u;
}
