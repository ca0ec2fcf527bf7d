// row_parts_subgroup.wgsl: what the key lanes of a row have, put together by shuffles, without memory or barrier.
//
// needs      KEY_LANES = 2^LANE_BITS, and no more than the smallest subgroup; neighbouring local invocation indices are
//            neighbours in a subgroup

fn share_row_part(r: u32, row_lane: u32, key_lane: u32, part: f32) {
}

fn row_parts_are_shared() {
}

fn largest_row_part(r: u32, row_lane: u32, own: f32) -> f32 {
    var largest = own;
    // repeat bit < LANE_BITS
    largest = max(largest, subgroupShuffleXor(largest, 1u << bit));
    // end
    return largest;
}

fn sum_of_row_parts(r: u32, row_lane: u32, own: f32) -> f32 {
    var sum = own;
    // repeat bit < LANE_BITS
    sum += subgroupShuffleXor(sum, 1u << bit);
    // end
    return sum;
}
