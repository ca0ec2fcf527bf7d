// tile_mask_bytes.wgsl: a block of keys of which the boolean mask leaves nothing to any row of the workgroup is left out.

const MASK_TILES: bool = true;

// one past the first key of the last block that some row sees; it only rises, so it is not reset for each block
var<workgroup> seen_block: atomic<u32>;
var<workgroup> seen_by_any: u32;

// For one invocation, before a barrier.
fn begin_mask_tiles() {
    atomicStore(&seen_block, 0u);
}

// Whether any invocation has a pair that is allowed; in uniform control flow, and uniform.
fn block_is_seen(seen: u32, first_key: u32, lane: u32) -> bool {
    if seen != 0u {
        atomicMax(&seen_block, first_key + 1u);
    }
    workgroupBarrier();
    if lane == 0u {
        seen_by_any = select(0u, 1u, atomicLoad(&seen_block) == first_key + 1u);
    }
    // a barrier before and after: the next block's atomicMax is behind the load above
    return workgroupUniformLoad(&seen_by_any) != 0u;
}
