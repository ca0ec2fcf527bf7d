//! Selected weights take memory for what is selected, not for a matrix of scores.
#![expect(unsafe_code, reason = "an allocator is unsafe to write; this one counts and passes on")]
#![allow(missing_docs, reason = "a test")]

use std::alloc::{GlobalAlloc, Layout as Block, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use cross_attention::weights::{HeadReduce, Keys, Select, WeightsProblem, WeightsSpec};
use cross_attention::{AttentionProblem, AttentionSpec, cpu, workload};

struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on as it came
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, block: Block) -> *mut u8 {
        let held = HELD.fetch_add(block.size(), Ordering::Relaxed) + block.size();
        MOST.fetch_max(held, Ordering::Relaxed);
        // SAFETY: as the caller promised
        unsafe { System.alloc(block) }
    }

    unsafe fn dealloc(&self, at: *mut u8, block: Block) {
        HELD.fetch_sub(block.size(), Ordering::Relaxed);
        // SAFETY: as the caller promised
        unsafe { System.dealloc(at, block) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Stable Diffusion 1.5 at 512 x 512: the map of two words, and the self-attention of the same layer, where scores would
/// take half a gigabyte.
#[test]
fn no_scores_are_held() {
    for (kv_len, keys) in [(77, vec![2, 5]), (4096, vec![0, 2000])] {
        let mut spec = AttentionSpec::new([1, 8, 4096, 40], [1, 8, kv_len, 40]);
        spec.lse = true;
        let problem = AttentionProblem::new(spec).unwrap();
        let data = workload::inputs(&problem, "memory");
        let wanted =
            WeightsSpec { reduce: HeadReduce::Mean, keys: Keys::Each(Select::List(keys)), ..WeightsSpec::default() };
        let before = HELD.load(Ordering::Relaxed);
        MOST.store(before, Ordering::Relaxed);
        let inputs = data.as_inputs();
        let output = cpu::attention(&problem, &inputs).unwrap();
        let wanted = WeightsProblem::new(&problem, &wanted).unwrap();
        let weights = cpu::weights(&wanted, &inputs, output.lse.as_deref().unwrap()).unwrap();
        let most = MOST.load(Ordering::Relaxed) - before;
        assert_eq!(weights.len(), 4096 * 2);
        // output, lse and weights are 5.4 MB, workspaces of up to 64 threads at most 16 MB
        let (results, scores) = (4 * (8 * 4096 * 41 + weights.len()), 4 * 8 * 4096 * kv_len);
        println!("{kv_len} keys: {most} bytes at most, {results} of them results; scores would take {scores}");
        assert!(most < results + (16 << 20), "{most}");
    }
}
