// row_data_buffer.wgsl: query and key lengths, row ranges, ALiBi slopes, sinks and the table of pages, side by side in one buffer.

@group(0) @binding(6) var<storage, read> row_data: array<u32>;

fn row_data_word(at: u32) -> u32 {
    return row_data[at];
}
