//! Steps that between them have every variant of every shader.

use std::collections::HashSet;

use cross_attention::backward::{BackwardProblem, BackwardSpec};
use cross_attention::dispatch::{Shader, Step};
use cross_attention::plan::{BackwardPlan, WeightsPlan};
use cross_attention::weights::{HeadReduce, Keys, WeightsProblem, WeightsSpec};
use cross_attention::{
    AlibiSlopes, AttentionProblem, AttentionSpec, CooperativeMatrix, DeviceCaps, DeviceClass, Diagonal, Element,
    Kernel, Layout, Paged, Plan, ScoreStage, TensorSpec,
};

/// Query length, `head_dim`, `v_head_dim`: every tile that a plan can choose, and widths that fit no tile.
const SHAPES: [(usize, usize, usize); 9] = [
    (1, 1, 1),
    (3, 40, 24),
    (9, 64, 64),
    (9, 111, 59),
    (9, 128, 128),
    (5, 32, 160),
    (9, 192, 128),
    (9, 576, 512),
    (2, 2000, 2048),
];

/// Specs that between them need every combination of snippets and every set of override booleans.
fn specs() -> Vec<AttentionSpec> {
    let mut specs = vec![];
    let mut n = 0usize;
    for snippets in 0..16 * 3 * 2 * 2 {
        // more overrides than snippets: each combination of snippets meets several sets of overrides
        for _ in 0..4 {
            specs.push(spec(snippets, n));
            n += 1;
        }
    }
    // and one combination of snippets meets all of them
    specs.extend((0..64 * 9 * 5).map(|overrides| spec(95, overrides)));
    specs
}

fn spec(snippets: usize, overrides: usize) -> AttentionSpec {
    let (q_len, head_dim, v_head_dim) = SHAPES[overrides / 64 % SHAPES.len()];
    // enough keys to be split, now and then
    let kv_len = if overrides % 3 == 1 { 600 } else { 70 };
    // the shorter element is one or the other
    let short = if overrides % 7 == 3 { Element::Bf16 } else { Element::F16 };
    let element = |bit: usize| if snippets >> bit & 1 == 1 { short } else { Element::F32 };
    let tensor = |element, shape| TensorSpec { element, layout: Layout::bhld(shape) };
    let mut spec = AttentionSpec::from_tensors(
        tensor(element(0), [2, 4, q_len, head_dim]),
        tensor(element(1), [2, 2, kv_len, head_dim]),
        tensor(element(2), [2, 2, kv_len, v_head_dim]),
    );
    spec.output.element = element(3);
    let terms = snippets / 16;
    let scores = [2, 4, q_len, kv_len];
    spec.bias = match terms % 3 {
        0 => None,
        1 => Some(tensor(Element::F32, scores)),
        _ => Some(tensor(short, scores)),
    };
    let blocks = |width: usize| if width.is_multiple_of(32) { width / 32 } else { 1 };
    if overrides % 11 == 5 || overrides % 11 == 7 {
        (spec.key.element, spec.key_scale) = (Element::I8, Some(tensor(element(1), [2, 2, kv_len, blocks(head_dim)])));
    }
    if overrides % 11 == 5 || overrides % 11 == 8 {
        (spec.value.element, spec.value_scale) =
            (Element::I8, Some(tensor(element(2), [2, 2, kv_len, blocks(v_head_dim)])));
    }
    // scales are f32 or f16
    for scale in [&mut spec.key_scale, &mut spec.value_scale].into_iter().flatten() {
        scale.element = if scale.element == Element::F32 { Element::F32 } else { Element::F16 };
    }
    if overrides % 13 == 4 {
        let table_len = kv_len.div_ceil(16);
        let AttentionSpec { key, value, key_scale, value_scale, .. } = &mut spec;
        for of in [Some(key), Some(value), key_scale.as_mut(), value_scale.as_mut()].into_iter().flatten() {
            let [_, heads, _, width] = of.layout.shape;
            of.layout = Layout::bhld([2 * table_len, heads, 16, width]);
        }
        spec.paged = Some(Paged { table_len, kv_len });
    }
    spec.mask = (terms / 3 % 2 == 1).then(|| Layout::bhld(scores));
    spec.lse = terms / 6 % 2 == 1;
    spec.row_state = terms % 4 == 2;
    let on = |bit: usize| overrides >> bit & 1 == 1;
    spec.kv_lens = on(0);
    spec.row_ranges = on(1);
    spec.causal = Some(if on(2) { Diagonal::EndOfKeys } else { Diagonal::BottomRight });
    spec.softcap = on(3).then_some(5.0);
    spec.alibi_slopes = on(4).then_some(AlibiSlopes::PerHead);
    spec.q_lens = overrides % 5 == 1;
    spec.sinks = on(5);
    let stages =
        [None, Some(ScoreStage::Scaled), Some(ScoreStage::Capped), Some(ScoreStage::Masked), Some(ScoreStage::Probs)];
    spec.scores = stages[overrides / 576 % stages.len()];
    spec
}

/// Steps with different variants, of every kernel, for the smallest device and for a larger one.
pub(super) fn steps() -> Vec<Step> {
    // both scales, and all terms
    let smallest = DeviceCaps { max_storage_buffers_per_shader_stage: 10, ..DeviceCaps::webgpu_defaults() };
    // the rows kernel runs nowhere else
    let with_subgroups = DeviceCaps { subgroups: Some((8, 8)), ..smallest.clone() };
    let mut larger = smallest.clone();
    larger.class = DeviceClass::Discrete;
    larger.max_compute_workgroup_storage_size = 32768;
    larger.subgroups = Some((32, 32));
    let mut seen = HashSet::new();
    let mut steps = vec![];
    for (n, spec) in specs().into_iter().enumerate() {
        let problem = AttentionProblem::new(spec).expect("a sound spec");
        // the cooperative kernel has a test of its own
        for kernel in Kernel::ALL.into_iter().filter(|kernel| *kernel != Kernel::Cooperative) {
            let caps = match kernel {
                _ if n % 4 == 3 => &larger,
                Kernel::Rows => &with_subgroups,
                _ => &smallest,
            };
            // their loops are written out, so they take long to read; a spread of what they share with the others will do
            let spread = match kernel {
                Kernel::Tiled => 17,
                Kernel::Rows => 37,
                Kernel::Split => 5,
                _ => 1,
            };
            if n % spread > 0 {
                continue;
            }
            let Ok(plan) = Plan::new(&problem, caps, Some(kernel)) else {
                let max = if kernel == Kernel::Rows { 512 } else { 576 };
                assert!(problem.head_dim() > max, "{kernel} refuses {problem:?}");
                continue;
            };
            // now and then with bindings that one head's keys do not fit
            let widest = problem.head_dim().max(problem.v_head_dim());
            let binding = (problem.kv_len() * widest * 2).max(2048) as u64;
            let tight = DeviceCaps { max_storage_buffer_binding_size: binding, ..caps.clone() };
            let cut = (n % 16 == 5).then(|| Plan::new(&problem, &tight, Some(kernel)));
            let cut = cut.iter().flatten().flat_map(Plan::steps);
            for step in plan.steps().iter().chain(cut) {
                assert!(step.workgroup_bytes <= u64::from(caps.max_compute_workgroup_storage_size), "{plan}");
                if seen.insert(step.variant.clone()) {
                    steps.push(step.clone());
                }
            }
        }
    }
    steps
}

/// Steps of the cooperative kernel, for each size of matrix and several sizes of memory.
pub(super) fn cooperative_steps() -> Vec<Step> {
    let mut caps = DeviceCaps { shader_f16: true, subgroups: Some((32, 64)), ..DeviceCaps::webgpu_defaults() };
    let mut seen = HashSet::new();
    let mut steps = vec![];
    for (n, mut spec) in specs().into_iter().enumerate().filter(|(n, _)| n % 5 == 0) {
        for tensor in [&mut spec.query, &mut spec.key, &mut spec.value] {
            tensor.element = Element::F16;
        }
        (spec.key_scale, spec.value_scale) = (None, None);
        caps.class = [DeviceClass::Discrete, DeviceClass::Software][n / 5 % 2];
        caps.cooperative_matrix = Some([CooperativeMatrix::Size8, CooperativeMatrix::Size16][n / 10 % 2]);
        caps.max_compute_workgroup_storage_size = [32768, 49152, 65536][n / 20 % 3];
        caps.subgroups = Some([(4, 4), (8, 8), (32, 64)][n / 60 % 3]);
        let problem = AttentionProblem::new(spec).expect("a sound spec");
        let Ok(plan) = Plan::new(&problem, &caps, Some(Kernel::Cooperative)) else {
            assert_eq!(problem.head_dim(), 2000, "{problem:?}");
            continue;
        };
        let own = plan.steps().iter().filter(|step| step.variant.shader == Shader::Cooperative);
        for step in own.filter(|step| seen.insert(step.variant.clone())) {
            assert!(step.workgroup_bytes <= u64::from(caps.max_compute_workgroup_storage_size), "{plan}");
            steps.push(step.clone());
        }
    }
    steps
}

/// Steps of selected weights, each variant once.
pub(super) fn weights_steps() -> Vec<Step> {
    // the scales of the keys, and all terms
    let caps = DeviceCaps { max_storage_buffers_per_shader_stage: 9, ..DeviceCaps::webgpu_defaults() };
    let mut seen = HashSet::new();
    let mut steps = vec![];
    for (n, spec) in specs().into_iter().enumerate() {
        let problem = AttentionProblem::new(spec).expect("a sound spec");
        let spec = WeightsSpec {
            reduce: [HeadReduce::Each, HeadReduce::Mean][n % 2],
            keys: if n / 2 % 2 == 0 { Keys::default() } else { Keys::Segments(vec![0..7, 7..70]) },
            ..WeightsSpec::default()
        };
        let wanted = WeightsProblem::new(&problem, &spec).expect("a sound selection");
        let plan = WeightsPlan::new(&wanted, &caps).expect("it fits");
        steps.extend(plan.steps().iter().filter(|step| seen.insert(step.variant.clone())).cloned());
    }
    steps
}

/// Steps of gradients, each variant once: every gradient that there is, or some of them, biases of every shape, chosen weights, for the
/// smallest device and for others.
pub(super) fn backward_steps() -> Vec<Step> {
    // both scales, and all terms
    let smallest = DeviceCaps { max_storage_buffers_per_shader_stage: 10, ..DeviceCaps::webgpu_defaults() };
    let classes = [DeviceClass::Discrete, DeviceClass::Integrated, DeviceClass::Software];
    let mut seen = HashSet::new();
    let mut steps = vec![];
    for (n, mut spec) in specs().into_iter().enumerate().filter(|(n, _)| n % 7 == 0) {
        spec.scores = None;
        if let Some(bias) = &mut spec.bias {
            let mut shape = bias.layout.shape;
            (0..4).filter(|axis| (n / 7) >> axis & 1 == 1).for_each(|axis| shape[axis] = 1);
            bias.layout = Layout::bhld(shape);
        }
        let mut backward = BackwardSpec::all(spec);
        backward.d_output.element = [Element::F32, Element::F16, Element::Bf16][n % 3];
        let gradients = [&mut backward.d_query, &mut backward.d_key, &mut backward.d_value, &mut backward.d_bias];
        for (axis, gradient) in gradients.into_iter().enumerate() {
            *gradient = gradient
                .filter(|_| n / 3 % 5 != axis)
                .map(|of| TensorSpec { element: [Element::F32, Element::F16, Element::Bf16][n / 9 % 3], ..of });
        }
        (backward.d_lse, backward.d_scale) = (n % 2 == 0, n % 4 == 1);
        backward.d_weights = (n % 6 == 0).then(WeightsSpec::default);
        let problem = BackwardProblem::new(backward).expect("a sound spec");
        // as much workgroup memory as every device has, and as most have
        let max_compute_workgroup_storage_size = [16384, 32768][n / 7 % 2];
        let caps = DeviceCaps { class: classes[n / 7 % 3], max_compute_workgroup_storage_size, ..smallest.clone() };
        let plan = BackwardPlan::new(&problem, &caps).expect("it fits");
        plan.check(&caps).expect("it runs on what it was made for");
        assert!(!plan.to_string().is_empty());
        steps.extend(plan.steps().iter().filter(|step| seen.insert(step.variant.clone())).cloned());
    }
    steps
}
