// probe_subgroups.wgsl: how a driver lays invocations over subgroups. No attention; asked once of each device.
//
// WGSL does not say which invocations of a workgroup form a subgroup, nor in which order. Kernels that shuffle take
// neighbours by local_invocation_index (row_parts_subgroup, rows, cooperative); where they are none, kernels use no subgroups.
//
// grid       workgroup_id = (workgroup), a few
// workgroup  WIDTH invocations, as kernels have
// constants  WIDTH
// bindings   0 lanes (read_write): for each invocation the size of its subgroup, its number there, the first invocation of
//            the subgroup, and the invocation that a shuffle by an exclusive or of 1 brings

@group(0) @binding(0) var<storage, read_write> lanes: array<vec4u>;

@compute @workgroup_size(WIDTH)
fn main(
    @builtin(workgroup_id) group: vec3u,
    @builtin(local_invocation_index) index: u32,
    @builtin(subgroup_size) size: u32,
    @builtin(subgroup_invocation_id) number: u32,
) {
    let first = subgroupBroadcastFirst(index);
    let neighbour = subgroupShuffleXor(index, 1u);
    lanes[group.x * WIDTH + index] = vec4u(size, number, first, neighbour);
}
