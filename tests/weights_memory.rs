//! Selected weights take memory for what is selected, not for a matrix of scores.
#![expect(unsafe_code, reason = "an allocator is unsafe to write; this one counts and passes on")]
#![allow(missing_docs, reason = "a test")]

#[expect(dead_code, reason = "each test counts something else")]
#[path = "common/counting.rs"]
mod counting;

use cross_attention::weights::{HeadReduce, Keys, Select, WeightsProblem, WeightsSpec};
use cross_attention::{AttentionProblem, AttentionSpec, cpu, workload};

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
        let inputs = data.as_inputs();
        let mut weights = vec![];
        let most = counting::most_held(|| {
            let output = cpu::attention(&problem, &inputs).unwrap();
            let wanted = WeightsProblem::new(&problem, &wanted).unwrap();
            weights = cpu::weights(&wanted, &inputs, output.lse.as_deref().unwrap()).unwrap();
        });
        assert_eq!(weights.len(), 4096 * 2);
        // output, lse and weights are 5.4 MB, workspaces of up to 64 threads at most 16 MB
        let (results, scores) = (4 * (8 * 4096 * 41 + weights.len()), 4 * 8 * 4096 * kv_len);
        println!("{kv_len} keys: {most} bytes at most, {results} of them results; scores would take {scores}");
        assert!(most < results + (16 << 20), "{most}");
    }
}
