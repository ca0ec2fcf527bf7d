// mask_none.wgsl: no boolean mask.

fn mask_allows(row: Row, j: u32) -> bool {
    return true;
}
