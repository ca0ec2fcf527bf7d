// backward_sums.wgsl: shares of rows summed over rows, and over heads and batch entries where these have one number.
//
// Each invocation adds every WIDTH-th share, then the sums of two are added: the order depends on nothing but the shape.
//
// grid       workgroup_id = (element, 1, 1)
// workgroup  WIDTH invocations for one element
// memory     partial: WIDTH f32, written in full before it is read
// bindings   0 params (uniform)  9 gradients (read)  7 output (read_write)
// snippets   none

const WIDTH: u32 = 256u;

// heads of the part
override HEADS: u32;
override SUM_BATCH: bool;
override SUM_HEADS: bool;
// numbers that a row of one split has
override SPLIT_WIDTH: u32;

@group(0) @binding(9) var<storage, read> gradients: array<f32>;
@group(0) @binding(7) var<storage, read_write> output: array<f32>;

var<workgroup> partial: array<f32, WIDTH>;

@compute @workgroup_size(WIDTH)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let heads = select(HEADS, 1u, SUM_HEADS);
    let b = group.x / heads;
    let h = group.x % heads;
    let summed_heads = select(1u, HEADS, SUM_HEADS);
    let summed_entries = select(1u, params.batch, SUM_BATCH);
    let count = summed_entries * summed_heads * params.q_len * params.splits;
    var sum = 0.0;
    for (var n = lane; n < count; n += WIDTH) {
        let split = n % params.splits;
        let row = n / params.splits;
        let plane = row / params.q_len;
        let at = offset_4(
            params.scores_offset, params.scores_strides, b + plane / summed_heads, h + plane % summed_heads, row % params.q_len,
        );
        sum += gradients[at + split * SPLIT_WIDTH];
    }
    partial[lane] = sum;
    workgroupBarrier();
    for (var step = WIDTH / 2u; step > 0u; step /= 2u) {
        if lane < step {
            partial[lane] += partial[lane + step];
        }
        workgroupBarrier();
    }
    if lane == 0u {
        let to = params.output_offset + b * params.output_strides.x + h * params.output_strides.y;
        if params.accumulate != 0u {
            output[to] += partial[0];
        } else {
            output[to] = partial[0];
        }
    }
}
