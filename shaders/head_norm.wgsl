// head_norm.wgsl: normalises each head of each row, in place.
//
//   x = (x - m) / sqrt(mean((x - m)^2) + epsilon) * gain + shift    m the mean, or 0 where CENTERED is not set
//   Zhang and Sennrich 2019 (arXiv:1910.07467); Ba, Kiros, Hinton 2016 (arXiv:1607.06450)
//
// grid       workgroup_id = (head of a row, row of them), flattened
// workgroup  WIDTH invocations, every WIDTH-th element each
// memory     partial: WIDTH f32, written in full before it is read
// needs      every barrier in uniform control flow
// bindings   0 params (uniform)  1 gain  2 shift (read)  3 x (read_write)
// snippets   none

struct Params {
    vectors: u32,
    width: u32,
    blocks_per_row: u32,
    has_shift: u32,
    epsilon: f32,
}

const WIDTH: u32 = 64u;

override CENTERED: bool = false;

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> gain: array<f32>;
@group(0) @binding(2) var<storage, read> shift: array<f32>;
// [vectors, width]
@group(0) @binding(3) var<storage, read_write> x: array<f32>;

var<workgroup> partial: array<f32, WIDTH>;

// The sum over the workgroup, for all its invocations.
fn total(lane: u32, value: f32) -> f32 {
    workgroupBarrier();
    partial[lane] = value;
    workgroupBarrier();
    for (var step = WIDTH / 2u; step > 0u; step /= 2u) {
        if lane < step {
            partial[lane] += partial[lane + step];
        }
        workgroupBarrier();
    }
    return partial[0];
}

@compute @workgroup_size(WIDTH)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let vector = group.y * params.blocks_per_row + group.x;
    // the last row of blocks may reach past the last vector
    let width = select(0u, params.width, vector < params.vectors);
    let start = vector * params.width;
    var mean = 0.0;
    if CENTERED {
        var sum = 0.0;
        for (var d = lane; d < width; d += WIDTH) {
            sum += x[start + d];
        }
        mean = total(lane, sum) / f32(params.width);
    }
    var squares = 0.0;
    for (var d = lane; d < width; d += WIDTH) {
        let off = x[start + d] - mean;
        squares += off * off;
    }
    let by = 1.0 / sqrt(total(lane, squares) / f32(params.width) + params.epsilon);
    for (var d = lane; d < width; d += WIDTH) {
        var value = (x[start + d] - mean) * by * gain[d];
        if params.has_shift != 0u {
            value += shift[d];
        }
        x[start + d] = value;
    }
}
