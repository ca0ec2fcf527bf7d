// output_bf16.wgsl: the output, stored as bf16, two to a word; needs bfloat.
//
// Two invocations may own the two halves of one word, in any layout. Each clears and sets its own
// half only, and those operations commute, so the word ends up the same in any order.

@group(0) @binding(7) var<storage, read_write> output: array<atomic<u32>>;

fn store_output(index: u32, value: f32) {
    let shift = (index & 1u) * 16u;
    atomicAnd(&output[index >> 1u], 0xffff0000u >> shift);
    atomicOr(&output[index >> 1u], bfloat_bits(value) << shift);
}
