// chosen_none.wgsl: no gradient of chosen weights.

const CHOSEN: bool = false;

fn is_chosen(row: Row, j: u32) -> bool {
    return false;
}

fn d_chosen(row: Row, j: u32) -> f32 {
    return 0.0;
}
