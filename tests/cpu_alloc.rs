//! A prepared attention on the CPU allocates nothing when it is called again.
#![cfg(feature = "native")]
#![expect(unsafe_code, reason = "an allocator is unsafe to write; this one counts and passes on")]
#![allow(missing_docs, reason = "a test")]

#[path = "common/counting.rs"]
mod counting;

use std::sync::Mutex;

use cross_attention::backward::{BackwardInputs, BackwardProblem, BackwardSpec};
use cross_attention::cpu::{CpuBackward, SimdLevel};
use cross_attention::pool::{GroupQuery, PassagePool, PoolAttention, PoolSpec};
use cross_attention::{
    AttentionProblem, AttentionSpec, Device, Diagonal, Element, Layout, Paged, TensorData, TensorSpec, cpu, workload,
};

/// Keys and values in bytes, in pages.
fn stored() -> AttentionSpec {
    let bytes = TensorSpec::i8(Layout::bhld([40, 8, 16, 64]));
    let query = TensorSpec::f32(Layout::bhld([2, 8, 1, 64]));
    let mut spec = AttentionSpec::from_pages(query, bytes, bytes, 20);
    spec.paged = Some(Paged { table_len: 20, kv_len: 313 });
    let scale = TensorSpec::f16(Layout::bhld([40, 8, 16, 2]));
    (spec.key_scale, spec.value_scale) = (Some(scale), Some(scale));
    spec
}

/// One test at a time: all allocations are counted.
static COUNTED: Mutex<()> = Mutex::new(());

#[test]
fn a_pool_takes_no_memory_that_grows_with_its_keys() {
    let _alone = COUNTED.lock();
    let of = |passage_len: usize, element: Element| {
        let spec = PoolSpec { element, slab_bytes: 64 << 20, ..PoolSpec::new(2, 32) };
        let mut pool = PassagePool::new(&Device::Cpu, spec).unwrap();
        let data = vec![0.5f32; 2 * passage_len * 32];
        let data = TensorData::from_f32(if element == Element::I8 { Element::F32 } else { element }, data);
        let append = |pool: &mut PassagePool| pool.append_blocking(data.as_ref(), data.as_ref(), passage_len).unwrap();
        let ids: Vec<_> = (0..40).map(|_| append(&mut pool)).collect();
        let query = vec![0.25f32; 4 * 2 * 32];
        let attend = || {
            let group = GroupQuery { query: (&query).into(), q_len: 2, passages: &ids };
            pool.attend_blocking(&[group], &PoolAttention::new(4)).unwrap();
        };
        // what is prepared is kept
        attend();
        counting::most_held(attend)
    };
    for element in Element::ALL {
        let [short, long] = [100, 1000].map(|len| of(len, element));
        // the table names ten times as many pages of 16 tokens, which are 63 of each passage
        let tables = 40 * 64 * 4 * 4;
        assert!(long <= short + tables, "{element}: {short} bytes over 100 tokens, {long} over 1000");
    }
}

#[test]
fn a_repeated_call_allocates_nothing() {
    let _alone = COUNTED.lock();
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
        stored(),
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

#[test]
fn a_repeated_backward_allocates_nothing() {
    let _alone = COUNTED.lock();
    let mut masked = AttentionSpec::new([2, 4, 70, 40], [2, 2, 300, 40]);
    masked.mask = Some(Layout::bhld([2, 1, 70, 300]));
    masked.bias = Some(TensorSpec::f32(Layout::bhld([2, 4, 1, 300])));
    (masked.softcap, masked.key.element) = (Some(9.0), Element::F16);
    let specs = [
        AttentionSpec::new([1, 8, 1, 64], [1, 8, 1500, 64]),
        AttentionSpec::new([1, 8, 300, 40], [1, 8, 77, 40]),
        AttentionSpec::new([1, 2, 600, 64], [1, 2, 900, 64]),
        masked,
    ];
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    for spec in specs {
        let mut spec = BackwardSpec::all(spec);
        // what is gathered and then rounded
        spec.d_value = spec.d_value.map(|of| TensorSpec { element: Element::F16, ..of });
        let problem = BackwardProblem::new(spec).unwrap();
        let data = workload::inputs(problem.forward(), "allocations");
        let inputs = data.as_inputs();
        let counted = pool.install(|| {
            let forward = cpu::attention(problem.forward(), &inputs).unwrap();
            let d_output = vec![0.5; problem.spec().d_output.layout.extent().unwrap()];
            let inputs = BackwardInputs::new(inputs, &forward, &d_output).unwrap();
            let prepared = CpuBackward::new(&problem, SimdLevel::best());
            let mut gradients = prepared.run(&inputs).unwrap();
            let rounds = (0..10).map(|_| {
                let before = counting::allocations();
                for _ in 0..20 {
                    prepared.run_into(&inputs, (&mut gradients).into()).unwrap();
                }
                counting::allocations() - before
            });
            rounds.collect::<Vec<_>>()
        });
        assert!(counted.ends_with(&[0, 0, 0]), "{counted:?} {problem:?}");
    }
}

/// At the shapes of Stable Diffusion a call takes less than the weights of a single head would, its results included.
#[test]
fn a_backward_takes_no_memory_that_grows_with_its_scores() {
    let _alone = COUNTED.lock();
    let of = |kv_len: usize| {
        let attention = AttentionSpec::new([1, 8, 4096, 40], [1, 8, kv_len, 40]);
        let problem = BackwardProblem::new(BackwardSpec::new(attention)).unwrap();
        let data = workload::inputs(problem.forward(), "memory");
        let inputs = data.as_inputs();
        let forward = cpu::attention(problem.forward(), &inputs).unwrap();
        let d_output = vec![0.5; 8 * 4096 * 40];
        let inputs = BackwardInputs::new(inputs, &forward, &d_output).unwrap();
        counting::most_held(|| drop(cpu::backward(&problem, &inputs).unwrap()))
    };
    let [short, long] = [of(1024), of(4096)];
    let gradients = 4 * 8 * 40 * (4096 + 2 * 4096);
    assert!(long < 3 * gradients && long < 4096 * 4096 * 4, "{long} bytes, of which gradients are {gradients}");
    assert!(long < 4 * short, "{short} bytes for 1024 keys, {long} for 4096");
}
