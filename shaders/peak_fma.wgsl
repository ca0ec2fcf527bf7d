// peak_fma.wgsl: as many fused multiply-adds as the device can do, for the compute side of the roofline.
//
//   x = a * x + b     12 chains an invocation, independent of each other; nothing is read or written in the loop
//
// grid       workgroup_id = any number of workgroups
// workgroup  256 invocations
// memory     none
// needs      nothing
// bindings   0 params (uniform)  1 sink (read_write)

struct Params {
    a: f32,
    b: f32,
    rounds: u32,
    never: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> sink: array<f32>;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3u) {
    let a = vec4f(params.a);
    let b = vec4f(params.b);
    let start = f32(id.x & 255u);
    var x = vec4f(start, start + 1.0, start + 2.0, start + 3.0);
    var y = x + 4.0;
    var z = x + 8.0;
    for (var round = 0u; round < params.rounds; round++) {
        // repeat step < STEPS
        x = fma(a, x, b);
        y = fma(a, y, b);
        z = fma(a, z, b);
        // end
    }
    let sum = dot(x + y + z, vec4f(1.0));
    // the host chooses a value that no sum has; the compiler cannot know
    if sum == params.never {
        sink[0] = sum;
    }
}
