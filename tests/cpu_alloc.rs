//! A prepared attention on the CPU allocates nothing when it is called again.
#![cfg(feature = "native")]
#![expect(unsafe_code, reason = "an allocator is unsafe to write; this one counts and passes on")]
#![allow(missing_docs, reason = "a test")]

#[expect(dead_code, reason = "each test counts something else")]
#[path = "common/counting.rs"]
mod counting;

use cross_attention::{AttentionProblem, AttentionSpec, Diagonal, Element, Layout, cpu, workload};

#[test]
fn a_repeated_call_allocates_nothing() {
    let mut masked = AttentionSpec::new([2, 4, 70, 40], [2, 2, 300, 40]);
    masked.mask = Some(Layout::bhld([2, 1, 70, 300]));
    (masked.causal, masked.lse) = (Some(Diagonal::BottomRight), true);
    masked.key.element = Element::F16;
    masked.output.layout = Layout::blhd([2, 4, 70, 40]).with_strides([70 * 640, 40 * 4, 640, 3]);
    let specs = [
        AttentionSpec::new([1, 8, 300, 64], [1, 8, 77, 64]),
        AttentionSpec::new([1, 8, 200, 64], [1, 8, 600, 64]),
        AttentionSpec::new([1, 8, 1, 64], [1, 8, 1500, 64]),
        AttentionSpec::new([1, 8, 4, 16], [1, 8, 2000, 16]),
        AttentionSpec::new([1, 8, 3000, 40], [1, 8, 7, 40]),
        masked,
    ];
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    for spec in specs {
        let problem = AttentionProblem::new(spec).unwrap();
        let data = workload::inputs(&problem, "allocations");
        let inputs = data.as_inputs();
        let counted = pool.install(|| {
            let prepared = cpu::prepare(&problem);
            let mut output = prepared.run(&inputs).unwrap();
            prepared.run_into(&inputs, (&mut output).into()).unwrap();
            // rayon registers a thread when it first steals, which on a busy machine may be late
            let rounds = (0..10).map(|_| {
                let before = counting::allocations();
                for _ in 0..20 {
                    prepared.run_into(&inputs, (&mut output).into()).unwrap();
                }
                counting::allocations() - before
            });
            rounds.collect::<Vec<_>>()
        });
        assert!(counted.ends_with(&[0, 0, 0]), "{counted:?} {problem:?}");
    }
}
