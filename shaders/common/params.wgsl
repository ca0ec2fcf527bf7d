// params.wgsl: what changes from call to call, shared by all attention kernels (src/dispatch/params.rs).
//
// One dispatch covers a part of the problem: `batch` entries from batch_base on, `q_heads` heads from
// head_base on, `q_len` rows from row_base on, `kv_len` keys from key_base on. Offsets and strides count
// elements of the bound range, so index arithmetic uses indices within the part; positions that masks and
// row data speak of are global, base added.

struct Params {
    query_strides: vec4u,
    key_strides: vec4u,
    value_strides: vec4u,
    output_strides: vec4u,
    bias_strides: vec4u,
    mask_strides: vec4u,
    scores_strides: vec4u,
    key_scale_strides: vec4u,
    value_scale_strides: vec4u,
    d_output_strides: vec4u,
    query_offset: u32,
    key_offset: u32,
    value_offset: u32,
    output_offset: u32,
    bias_offset: u32,
    mask_offset: u32,
    scores_offset: u32,
    lse_offset: u32,
    lse_strides: vec2u,
    // of what the backward pass knows of each row, behind the row data
    row_stats_strides: vec2u,
    batch_base: u32,
    head_base: u32,
    row_base: u32,
    key_base: u32,
    batch: u32,
    q_len: u32,
    kv_len: u32,
    q_len_whole: u32,
    kv_len_whole: u32,
    group_size: u32,
    begin_shift: i32,
    end_shift: i32,
    diagonal_shift: i32,
    kv_lens_at: u32,
    row_start_at: u32,
    row_end_at: u32,
    alibi_at: u32,
    sinks_at: u32,
    scale: f32,
    exponent_scale: f32,
    softcap: f32,
    negative_infinity: f32,
    // what a probability of 1 is taken for, a power of two: sums of values near f32's end stay below it
    headroom: f32,
    headroom_inverse: f32,
    // parts that the keys are split into, or states that are merged
    splits: u32,
    // of the slopes of one batch entry; 0 where all have the same
    alibi_batch_stride: u32,
    key_scale_offset: u32,
    value_scale_offset: u32,
    // pages of keys: where the table begins, its width, the logarithm of a page's length, the last page
    block_table_at: u32,
    table_len: u32,
    page_shift: u32,
    last_page: u32,
    d_output_offset: u32,
    d_lse_offset: u32,
    row_stats_at: u32,
    // where what is known of chosen weights begins
    chosen_at: u32,
    // whether sums are added to what is there
    accumulate: u32,
}

@group(0) @binding(0) var<uniform> params: Params;

// One query row: indices within the part, and the key/value head it reads.
struct Row {
    b: u32,
    h: u32,
    i: u32,
    kv_h: u32,
}

fn row_at(b: u32, h: u32, i: u32) -> Row {
    let kv_h = (params.head_base + h) / params.group_size - params.head_base / params.group_size;
    return Row(b, h, i, kv_h);
}

fn offset_4(offset: u32, strides: vec4u, b: u32, h: u32, i: u32) -> u32 {
    return offset + b * strides.x + h * strides.y + i * strides.z;
}

// Of what there is for each pair. Kernels ask for rows and keys behind the last too, and throw away what they get: there the
// last ones stand again, for a shader without bounds checks must not read behind its binding.
fn offset_pair(offset: u32, strides: vec4u, row: Row, j: u32) -> u32 {
    let i = min(row.i, params.q_len - 1u);
    return offset_4(offset, strides, row.b, row.h, i) + min(j, max(params.kv_len, 1u) - 1u) * strides.w;
}
