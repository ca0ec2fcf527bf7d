// mask_bytes.wgsl: a boolean mask, one byte an element, 0 forbids the key.

@group(0) @binding(5) var<storage, read> mask: array<u32>;

fn mask_allows(row: Row, j: u32) -> bool {
    let index = offset_pair(params.mask_offset, params.mask_strides, row, j);
    return ((mask[index >> 2u] >> ((index & 3u) * 8u)) & 0xffu) != 0u;
}
