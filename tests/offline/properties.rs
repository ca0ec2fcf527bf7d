//! What holds for any attention, whatever its numbers.

use cross_attention::cpu::{self, CpuKernel};
use cross_attention::dispatch::Slot;
use cross_attention::verify::verify;
use cross_attention::{
    AttentionData, AttentionOutput, AttentionProblem, DeviceCaps, Element, Kernel, Layout, Plan, TensorData,
};
use proptest::prelude::*;
use proptest::test_runner::Config;

use crate::common::case::{Case, arranged};
use crate::common::check::{bits, case_with};
use crate::common::recipe::{Ranges, Scores, places};
use crate::common::{cases, random};
use crate::table::implementations;

pub(crate) fn config() -> Config {
    random::config(256)
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn random_specs(case in random::case()) {
        for (name, run) in implementations() {
            case_with(&case, &run).map_err(|error| TestCaseError::fail(format!("{name}: {error}")))?;
        }
    }
}

proptest! {
    #![proptest_config(random::config(64))]

    #[test]
    fn random_specs_with_many_keys(case in random::long_case()) {
        for (name, run) in implementations() {
            case_with(&case, &run).map_err(|error| TestCaseError::fail(format!("{name}: {error}")))?;
        }
    }
}

fn run(kernel: CpuKernel, problem: &AttentionProblem, data: &AttentionData) -> AttentionOutput {
    cpu::attention_with(kernel, problem, &data.as_inputs()).expect("the data fits")
}

fn all_terms(name: &str) -> Case {
    Case::new(name, "a property", 2, [4, 2], [5, 70], [16, 12])
        .softcap(6.0)
        .bias(Element::F32, "bhqk")
        .mask("b1qk")
        .kv_lens(&[70, 50])
        .sinks(0.0)
}

/// Output, lse and scores by place, whatever the layout.
fn by_place(problem: &AttentionProblem, output: &AttentionOutput) -> Vec<u32> {
    let layout = &problem.spec().output.layout;
    let numbers = output.output.to_f32();
    let lse = output.lse.iter().flatten().chain(output.scores.iter().flatten());
    places(layout.shape).map(|at| numbers[layout.index(at)]).chain(lse.copied()).map(f32::to_bits).collect()
}

#[test]
fn layouts_do_not_change_a_bit() {
    type Lay = fn([usize; 4]) -> Layout;
    let layouts: [(&str, [Lay; 4]); 6] = [
        ("blhd", [Layout::blhd; 4]),
        (
            "packed",
            [
                |shape| Layout::packed(shape, 3, 0),
                |shape| Layout::packed(shape, 3, 1),
                |shape| Layout::packed(shape, 2, 1),
                Layout::bhld,
            ],
        ),
        ("gaps", [|shape| arranged(shape, [0, 1, 2, 3], [5, 3, 1, 0], 0); 4]),
        ("strided", [|shape| arranged(shape, [0, 2, 1, 3], [1, 2, 0, 2], 3); 4]),
        ("columns", [|shape| arranged(shape, [1, 0, 3, 2], [0, 0, 0, 0], 1); 4]),
        ("offset", [|shape| Layout::bhld(shape).with_offset(5); 4]),
    ];
    for element in [Element::F32, Element::F16] {
        let plain = all_terms("layouts").ranges(Ranges::Segments(16)).stored([element; 4]);
        for kernel in CpuKernel::ALL {
            let want = by_place(&plain.problem(), &run(kernel, &plain.problem(), &plain.data()));
            for (name, layouts) in layouts {
                let laid = plain.clone().laid(layouts);
                let got = by_place(&laid.problem(), &run(kernel, &laid.problem(), &laid.data()));
                assert_eq!(got, want, "{kernel}, {element}, {name}");
            }
        }
    }
}

#[test]
fn gaps_of_an_output_are_zero() {
    let case = all_terms("gaps").laid([|shape| arranged(shape, [0, 1, 2, 3], [5, 3, 1, 1], 3); 4]);
    let problem = case.problem();
    let layout = problem.spec().output.layout;
    let mut written = vec![false; layout.extent().unwrap()];
    places(layout.shape).for_each(|at| written[layout.index(at)] = true);
    for kernel in CpuKernel::ALL {
        let output = run(kernel, &problem, &case.data()).output.to_f32();
        assert_eq!(output.len(), written.len(), "{kernel}");
        assert!(output.iter().zip(&written).all(|(x, &written)| written || x.to_bits() == 0), "{kernel}");
    }
}

#[test]
fn a_shared_context_is_a_repeated_one() {
    let shared = all_terms("shared").spec(|spec| {
        for tensor in [&mut spec.key, &mut spec.value] {
            tensor.layout = Layout::bhld([1, 2, 70, tensor.layout.shape[3]]);
        }
    });
    let repeated = all_terms("shared");
    let mut data = shared.data();
    let twice = |tensor: &TensorData, width: usize| {
        let once = &tensor.to_f32()[..2 * 70 * width];
        TensorData::F32([once, once].concat())
    };
    let (key, value) = (twice(&data.key, 16), twice(&data.value, 12));
    for kernel in CpuKernel::ALL {
        let want = run(kernel, &shared.problem(), &shared.data());
        (data.key, data.value) = (key.clone(), value.clone());
        assert_eq!(bits(&run(kernel, &repeated.problem(), &data)), bits(&want), "{kernel}");
    }
}

#[test]
fn one_buffer_may_hold_all_three() {
    let case = Case::new("one_buffer", "packed query, key and value", 2, [3, 3], [7, 7], [16, 16]).laid([
        |shape| Layout::packed(shape, 3, 0),
        |shape| Layout::packed(shape, 3, 1),
        |shape| Layout::packed(shape, 3, 2),
        Layout::blhd,
    ]);
    let (problem, data) = (case.problem(), case.data());
    let mut packed = vec![f32::NAN; 2 * 7 * 3 * 3 * 16];
    for (of, tensor) in [(&case.spec.query, &data.query), (&case.spec.key, &data.key), (&case.spec.value, &data.value)]
    {
        for at in places(of.layout.shape) {
            packed[of.layout.index(at)] = tensor.as_ref().get(of.layout.index(at));
        }
    }
    let together = cross_attention::AttentionInputs::new(&packed, &packed, &packed);
    for kernel in CpuKernel::ALL {
        let got = cpu::attention_with(kernel, &problem, &together).unwrap();
        assert_eq!(bits(&got), bits(&run(kernel, &problem, &data)), "{kernel}");
    }
}

#[test]
fn the_order_of_keys_does_not_matter() {
    let case = all_terms("order").drawn(Scores::Rising(0.2)).spec(|spec| spec.kv_lens = false);
    let (problem, data) = (case.problem(), case.data());
    let spec = problem.spec();
    let mut mixed = data.clone();
    // 27 and 70 have no common factor
    let moved = |j: usize| (27 * j + 5) % 70;
    for (of, from, to) in [(&spec.key, &data.key, &mut mixed.key), (&spec.value, &data.value, &mut mixed.value)] {
        let mut numbers = from.to_f32();
        for [b, h, j, d] in places(of.layout.shape) {
            numbers[of.layout.index([b, h, moved(j), d])] = from.as_ref().get(of.layout.index([b, h, j, d]));
        }
        *to = TensorData::F32(numbers);
    }
    let (bias_of, mask_of) = (spec.bias.unwrap().layout, spec.mask.unwrap());
    let mut bias = data.terms.bias.as_ref().unwrap().to_f32();
    let mut mask = data.terms.mask.clone().unwrap();
    for [b, h, i, j] in places(problem.score_shape()) {
        let (from, to) = ([b, h, i, j], [b, h, i, moved(j)]);
        bias[bias_of.index(to)] = data.terms.bias.as_ref().unwrap().as_ref().get(bias_of.index(from));
        mask[mask_of.index(to)] = data.terms.mask.as_ref().unwrap()[mask_of.index(from)];
    }
    mixed.terms.bias = Some(TensorData::F32(bias));
    mixed.terms.mask = Some(mask);
    for kernel in CpuKernel::ALL {
        let output = run(kernel, &problem, &mixed);
        let report = verify(&problem, &data.as_inputs(), &output).unwrap();
        assert!(report.passed(), "{kernel}: {report}");
    }
}

#[test]
fn a_constant_in_a_row_of_the_bias_moves_its_lse_alone() {
    let mut case = all_terms("constant");
    case.spec.sinks = false;
    let (problem, data) = (case.problem(), case.data());
    let layout = problem.spec().bias.unwrap().layout;
    let constant = |i: usize| i as f32 - 2.5;
    let mut moved = data.clone();
    let mut bias = data.terms.bias.as_ref().unwrap().to_f32();
    for at in places(problem.score_shape()) {
        bias[layout.index(at)] += constant(at[2]);
    }
    moved.terms.bias = Some(TensorData::F32(bias));
    for kernel in CpuKernel::ALL {
        let mut output = run(kernel, &problem, &moved);
        let q_len = problem.q_len();
        output.lse.iter_mut().flatten().enumerate().for_each(|(row, lse)| *lse -= constant(row % q_len));
        let report = verify(&problem, &data.as_inputs(), &output).unwrap();
        assert!(report.passed(), "{kernel}: {report}");
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let (one, three) = (pool(1), pool(3));
    for case in cases::all() {
        let (problem, data) = (case.problem(), case.data());
        for kernel in CpuKernel::ALL {
            let [a, b] = [&one, &three].map(|pool| pool.install(|| run(kernel, &problem, &data)));
            assert_eq!(bits(&a), bits(&b), "{kernel}: {case}");
        }
    }
}

/// A plan for a device keeps to each of its limits, whichever of them is the low one; and says the same of itself.
#[test]
fn plans_keep_to_every_limit() {
    type Lower = fn(&DeviceCaps) -> DeviceCaps;
    let lowered: [(&str, Lower); 7] = [
        ("bindings", |caps| DeviceCaps { max_storage_buffer_binding_size: 2048, ..caps.clone() }),
        ("buffers", |caps| DeviceCaps { max_buffer_size: 4096, ..caps.clone() }),
        ("storage buffers", |caps| DeviceCaps { max_storage_buffers_per_shader_stage: 4, ..caps.clone() }),
        ("alignment", |caps| DeviceCaps { min_storage_buffer_offset_alignment: 4096, ..caps.clone() }),
        ("workgroup memory", |caps| DeviceCaps { max_compute_workgroup_storage_size: 2048, ..caps.clone() }),
        ("invocations", |caps| DeviceCaps { max_compute_invocations_per_workgroup: 32, ..caps.clone() }),
        ("workgroups", |caps| DeviceCaps { max_compute_workgroups_per_dimension: 3, ..caps.clone() }),
    ];
    let with_subgroups = DeviceCaps { subgroups: Some((8, 8)), ..DeviceCaps::webgpu_defaults() };
    let mut planned = 0;
    for case in cases::all() {
        for kernel in Kernel::ALL {
            for (name, lower) in lowered {
                let caps = lower(&with_subgroups);
                let Ok(plan) = Plan::new(&case.problem(), &caps, Some(kernel)) else { continue };
                planned += 1;
                assert_eq!(plan.check(&caps), Ok(()), "{name}, {kernel}: {case}");
                for step in plan.steps() {
                    let within = step.bindings.len() <= caps.max_storage_buffers_per_shader_stage as usize
                        && step.workgroup_bytes <= u64::from(caps.max_compute_workgroup_storage_size)
                        && step.workgroups().iter().all(|n| *n <= caps.max_compute_workgroups_per_dimension)
                        && step.bindings.iter().all(|binding| {
                            let alignment = u64::from(caps.min_storage_buffer_offset_alignment);
                            let aligned = binding.start_bytes.is_multiple_of(alignment);
                            // the plan's own buffers are to be made
                            let own = [Slot::Workspace, Slot::States, Slot::PartOutput, Slot::PartRowState];
                            let end = binding.start_bytes + binding.size_bytes;
                            let made = !own.contains(&binding.slot) || end <= caps.max_buffer_size;
                            binding.size_bytes <= caps.max_storage_buffer_binding_size && aligned && made
                        });
                    assert!(within, "{name}, {kernel}: {case}\n{step:?}");
                }
            }
        }
    }
    assert!(planned > 1000, "{planned} plans");
}
