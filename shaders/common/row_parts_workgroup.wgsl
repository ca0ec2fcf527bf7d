// row_parts_workgroup.wgsl: what the key lanes of a row have, put together in workgroup memory.

var<workgroup> row_parts: array<array<array<f32, KEY_LANES>, ROW_LANES>, ROWS>;

fn share_row_part(r: u32, row_lane: u32, key_lane: u32, part: f32) {
    row_parts[r][row_lane][key_lane] = part;
}

// Between the above and the below; and before parts are shared again stands another barrier.
fn row_parts_are_shared() {
    workgroupBarrier();
}

fn largest_row_part(r: u32, row_lane: u32, own: f32) -> f32 {
    var largest = row_parts[r][row_lane][0];
    // repeat t < KEY_LANES
    largest = max(largest, row_parts[r][row_lane][t]);
    // end
    return largest;
}

fn sum_of_row_parts(r: u32, row_lane: u32, own: f32) -> f32 {
    var sum = 0.0;
    // repeat t < KEY_LANES
    sum += row_parts[r][row_lane][t];
    // end
    return sum;
}
