// expand_q8.wgsl: blocks of 32 signed bytes with one f16 scale each, as f32.
//
//   x = d q     exact: 11 and 8 bits of mantissa make 19
//
// grid       workgroup_id = (block of words, row of blocks), flattened
// workgroup  WIDTH invocations, one word of four elements each
// memory     none
// needs      rows of whole blocks
// bindings   0 params (uniform)  1 quants  2 scales (read)  3 output (read_write)
// snippets   none

struct Params {
    words: u32,
    blocks_per_row: u32,
}

const WIDTH: u32 = 64u;
// of a block of 32
const WORDS: u32 = 8u;

@group(0) @binding(0) var<uniform> params: Params;
// four signed bytes a word, the lowest first
@group(0) @binding(1) var<storage, read> quants: array<u32>;
// two f16 a word, the lower first
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read_write> output: array<f32>;

@compute @workgroup_size(WIDTH)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * params.blocks_per_row + group.x) * WIDTH + lane;
    if at >= params.words {
        return;
    }
    let block = at / WORDS;
    let half = (scales[block / 2u] >> (block % 2u * 16u)) & 0xffffu;
    // never negative, never infinite; in integers, for a device may read subnormal halves, multiples of 2^-24, as 0
    let scale = select(bitcast<f32>((half << 13u) + 0x38000000u), f32(half) * 5.9604644775390625e-8, half < 0x400u);
    let word = quants[at];
    for (var n = 0u; n < 4u; n++) {
        // the byte to the top, and back with its sign
        let quant = bitcast<i32>(word << (24u - 8u * n)) >> 24u;
        output[at * 4u + n] = scale * f32(quant);
    }
}
