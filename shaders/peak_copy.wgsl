// peak_copy.wgsl: a copy of a large buffer, for the memory side of the roofline.
//
//   to[i] = from[i]     VECTORS of 16 bytes an invocation, neighbours by neighbouring invocations
//
// grid       workgroup_id = (block of 256 * VECTORS vectors, 1, 1); the buffers are whole blocks
// workgroup  256 invocations
// memory     none
// needs      nothing
// bindings   0 params (uniform, unused)  1 source (read)  2 copy (read_write)

struct Params {
    unused: vec4u,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> source: array<vec4f>;
@group(0) @binding(2) var<storage, read_write> copy: array<vec4f>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) local: u32) {
    let first = group.x * 256u * VECTORS + local;
    // repeat n < VECTORS
    copy[first + n * 256u] = source[first + n * 256u];
    // end
}
