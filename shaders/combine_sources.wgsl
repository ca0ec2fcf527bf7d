// combine_sources.wgsl: attentions over several sources, each normalised by itself, weighted, added and gated.
//
//   O = tanh(gate_h) * sum over sources of scale_s * row_weight_s,b,i * O_s
//   Ye et al. 2023 (arXiv:2308.06721), equation 5; the gate is that of Alayrac et al. 2022 (arXiv:2204.14198)
//
// grid       workgroup_id = (block of elements, row of blocks), flattened
// workgroup  WIDTH invocations, one output element each
// memory     none
// needs      nothing
// bindings   0 params (uniform)  1 part_output  2 scales  3 row_weights  4 gates (read)  5 output (read_write)
// snippets   numerics

struct Params {
    parts: u32,
    rows: u32,
    v_head_dim: u32,
    blocks_per_row: u32,
    q_heads: u32,
    q_len: u32,
    // whether row_weights is bound, else all are 1
    weighted: u32,
    // 0 none, 1 one for all heads, 2 one for each head
    gating: u32,
}

const WIDTH: u32 = 64u;

@group(0) @binding(0) var<uniform> params: Params;
// [parts, rows, v_head_dim]; rows are [batch, q_heads, q_len]
@group(0) @binding(1) var<storage, read> part_output: array<f32>;
// [parts]
@group(0) @binding(2) var<storage, read> scales: array<f32>;
// [parts, batch, q_len]
@group(0) @binding(3) var<storage, read> row_weights: array<f32>;
// [1] or [q_heads]
@group(0) @binding(4) var<storage, read> gates: array<f32>;
@group(0) @binding(5) var<storage, read_write> output: array<f32>;

@compute @workgroup_size(WIDTH)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let element = (group.y * params.blocks_per_row + group.x) * WIDTH + lane;
    let row = element / params.v_head_dim;
    if row >= params.rows {
        return;
    }
    let head = row / params.q_len % params.q_heads;
    // the row without its head: weights are the same for all heads
    let place = row / (params.q_len * params.q_heads) * params.q_len + row % params.q_len;
    let places = params.rows / params.q_heads;
    var acc = 0.0;
    for (var part = 0u; part < params.parts; part++) {
        var weight = scales[part];
        if params.weighted != 0u {
            weight *= row_weights[part * places + place];
        }
        // a weight of 0 leaves the source out, whatever it holds; by its bits, for a comparison may call NaN what it likes
        if (bitcast<u32>(weight) & 0x7fffffffu) != 0u {
            acc += weight * part_output[part * params.rows * params.v_head_dim + element];
        }
    }
    if params.gating != 0u {
        acc *= hyperbolic_tangent(gates[select(0u, head, params.gating == 2u)]);
    }
    // zero without a sign: a row without a key stays what it was
    output[element] = select(acc, 0.0, acc == 0.0);
}
