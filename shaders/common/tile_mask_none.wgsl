// tile_mask_none.wgsl: no boolean mask, so every block of keys within the rows' intervals is taken.

const MASK_TILES: bool = false;

fn begin_mask_tiles() {
}

fn block_is_seen(seen: u32, first_key: u32, lane: u32) -> bool {
    return true;
}
