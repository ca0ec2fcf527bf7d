//! Named attentions of real models, with inputs made from a seed.

mod cost;
mod inputs;
mod rng;
mod shapes;

pub use cost::{bytes, flops, kv_bytes};
pub use inputs::{InputRecipe, inputs, inputs_with};
pub use shapes::all;

use crate::problem::AttentionSpec;

/// A shape with a name: the same in tests, benches and the program.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    /// What it is asked for by.
    pub name: &'static str,
    /// Which model computes it, and where the numbers are from.
    pub about: &'static str,
    /// The attention, f32, without masks.
    pub spec: AttentionSpec,
}

/// The workload of that name.
#[must_use]
pub fn find(name: &str) -> Option<Workload> {
    all().into_iter().find(|workload| workload.name == name)
}

#[cfg(test)]
mod tests {
    use super::rng::Rng;
    use super::*;
    use crate::AlibiSlopes;
    use crate::AttentionProblem;
    use crate::Diagonal;
    use crate::{Layout, TensorSpec};

    #[test]
    fn workloads_are_sound_and_named_once() {
        let all = all();
        for (n, workload) in all.iter().enumerate() {
            assert!(AttentionProblem::new(workload.spec.clone()).is_ok(), "{}", workload.name);
            assert!(all[..n].iter().all(|other| other.name != workload.name), "{}", workload.name);
        }
        for name in
            ["sd15_64", "sdxl_32", "whisper_decode", "whisper_prefill", "square_1k", "long_kv", "perceiver", "gqa"]
        {
            assert!(find(name).is_some(), "{name}");
        }
        assert_eq!(find("none"), None);
    }

    fn is(found: f64, wanted: u32) {
        assert!((found - f64::from(wanted)).abs() < 0.5, "{found}, not {wanted}");
    }

    #[test]
    fn flops_and_bytes_of_a_known_shape() {
        let problem = AttentionProblem::new(find("sd15_64").unwrap().spec).unwrap();
        let data = inputs(&problem, "sd15_64");
        is(flops(&problem, &data.as_inputs()), 4 * 8 * 4096 * 77 * 40);
        is(bytes(&problem), 4 * 2 * 8 * (4096 + 77) * 40);
        let beams = AttentionProblem::new(find("whisper_beam5").unwrap().spec).unwrap();
        is(bytes(&beams), 4 * 2 * 8 * (5 + 1500) * 64);
    }

    #[test]
    fn flops_count_what_the_masks_leave() {
        let mut spec = AttentionSpec::new([2, 2, 4, 8], [2, 1, 6, 8]);
        spec.causal = Some(Diagonal::TopLeft);
        spec.row_ranges = true;
        spec.kv_lens = true;
        spec.mask = Some(Layout::bhld([1, 2, 1, 6]));
        let problem = AttentionProblem::new(spec).unwrap();
        let mut data = inputs(&problem, "flops");
        data.terms.kv_lens = Some(vec![6, 2]);
        data.terms.row_start = Some(vec![1; 8]);
        data.terms.row_end = Some(vec![3; 8]);
        data.terms.mask = Some(vec![true, true, false, true, true, true, true, true, true, true, true, true]);
        // keys 1 and 2 below the diagonal: rows see 0 1 2 2, in batch entry 1 just key 1; head 0 does not see key 2
        let pairs = (3 + 5) + (3 + 3);
        is(flops(&problem, &data.as_inputs()), 2 * pairs * 16);
    }

    #[test]
    fn inputs_follow_the_seed_and_fit_the_problem() {
        let mut spec = AttentionSpec::new([5, 4, 9, 8], [5, 2, 70, 8]);
        spec.query = TensorSpec::f16(Layout::packed([5, 4, 9, 8], 3, 1).with_offset(5));
        spec.bias = Some(TensorSpec::f16(Layout::bhld([1, 4, 9, 70])));
        spec.mask = Some(Layout::bhld([5, 1, 9, 70]));
        (spec.q_lens, spec.kv_lens, spec.row_ranges, spec.sinks) = (true, true, true, true);
        spec.alibi_slopes = Some(AlibiSlopes::PerBatchAndHead);
        let problem = AttentionProblem::new(spec).unwrap();
        for recipe in InputRecipe::ALL {
            let data = inputs_with(&problem, "seed", recipe);
            data.as_inputs().check(&problem).unwrap();
            assert_eq!(data.query.as_ref().len(), problem.spec().query.layout.extent().unwrap());
            assert!(data.query.to_f32().iter().chain(&data.key.to_f32()).all(|x| x.is_finite()));
            assert_eq!(data, inputs_with(&problem, "seed", recipe));
            assert_ne!(data, inputs_with(&problem, "seeds", recipe));
            let lens = data.terms.kv_lens.unwrap();
            assert!(lens.contains(&70) && lens.contains(&0));
            let mask = data.terms.mask.unwrap();
            assert!(mask.chunks(70).any(|row| row.iter().all(|&x| !x)));
        }
    }

    #[test]
    fn normal_values_are_normal() {
        let mut rng = Rng::new("normal", "");
        let values: Vec<f64> = (0..100_000).map(|_| f64::from(rng.normal())).collect();
        let moment = |n: i32| values.iter().map(|x| x.powi(n)).sum::<f64>() / values.len() as f64;
        assert!(moment(1).abs() < 0.02 && (moment(2) - 1.0).abs() < 0.02 && moment(3).abs() < 0.03, "{}", moment(2));
    }
}
