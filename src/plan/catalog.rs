//! Every shader that plans over a stated grid of problems and devices use, each once.
//!
//! The grid: `head_dim` 16 to 256, 192 with values of 128 and 576 with values of 512; all tensors f32, f16 or bf16, or keys and values in signed bytes and in pages; many
//! queries, few queries, few queries over many keys, and grouped heads; no term at all, or every term and the log-sum-exp
//! with rows that are read four elements at a time or one by one; every class of device, with 16 to 64 KiB of workgroup
//! memory, without subgroups and with subgroups of 32. Problems outside of it may need others: `head_dim`, and how often the keys are split, are part of a shader.

use std::collections::HashMap;

use super::Plan;
use crate::caps::{DeviceCaps, DeviceClass};
use crate::dispatch::{Kernel, Step, Variant};
use crate::problem::{AlibiSlopes, AttentionProblem, AttentionSpec, Diagonal, Paged};
use crate::tensor::{Element, Layout, TensorSpec};

/// `head_dim` and `v_head_dim`.
const DIMS: [[usize; 2]; 10] =
    [[16, 16], [40, 40], [64, 64], [80, 80], [96, 96], [128, 128], [160, 160], [256, 256], [192, 128], [576, 512]];
/// `q_heads`, `kv_heads`, `q_len`, `kv_len`.
const SHAPES: [[usize; 4]; 4] = [[8, 8, 4096, 77], [8, 8, 4, 77], [8, 8, 1, 1500], [32, 8, 1, 8192]];
/// Bytes of workgroup memory: WebGPU's own limit, and what GPUs have.
const WORKGROUP_MEMORY: [u32; 4] = [16384, 32768, 49152, 65536];
/// None, and those of most GPUs.
const SUBGROUPS: [Option<(u32, u32)>; 2] = [None, Some((32, 32))];

/// A kind of device, as far as the choice of a shader goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceKind {
    /// What kind of device it is.
    pub class: DeviceClass,
    /// Its limit of workgroup memory, in bytes.
    pub workgroup_memory: u32,
    /// Smallest and largest subgroup, where kernels may use subgroups.
    pub subgroups: Option<(u32, u32)>,
}

impl DeviceKind {
    /// Every kind of the grid.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let mut kinds = vec![];
        for class in DeviceClass::ALL {
            for workgroup_memory in WORKGROUP_MEMORY {
                kinds.extend(SUBGROUPS.map(|subgroups| Self { class, workgroup_memory, subgroups }));
            }
        }
        kinds
    }

    /// Such a device with WebGPU's default limits otherwise.
    #[must_use]
    pub fn caps(self) -> DeviceCaps {
        DeviceCaps {
            class: self.class,
            max_compute_workgroup_storage_size: self.workgroup_memory,
            subgroups: self.subgroups,
            ..DeviceCaps::webgpu_defaults()
        }
    }
}

/// A shader with a problem that needs it.
#[derive(Clone, Debug, PartialEq)]
pub struct CatalogEntry {
    /// The kernel that it is part of.
    pub kernel: Kernel,
    /// The first dispatch of the grid that it is used for.
    pub step: Step,
    /// The problem of that dispatch. Others of the grid may share the shader.
    pub problem: AttentionProblem,
    /// The kinds of device for which a plan chooses it by itself; none where the kernel must be asked for by name.
    pub chosen_for: Vec<DeviceKind>,
}

/// The shaders of the grid, with every kernel that can compute a problem, whether it would be chosen or not; without the
/// cooperative kernel, which no device of the grid can run and only naga can read.
#[must_use]
pub fn catalog() -> Vec<CatalogEntry> {
    catalog_of(&[])
}

/// Every `head_dim` of the grid, in order.
#[must_use]
pub fn catalog_widths() -> Vec<usize> {
    let mut widths: Vec<usize> = DIMS.iter().map(|[head_dim, _]| *head_dim).collect();
    widths.sort_unstable();
    widths
}

/// The shaders of the grid that problems of these `head_dim` need; of all, if none is named.
#[must_use]
pub fn catalog_of(head_dims: &[usize]) -> Vec<CatalogEntry> {
    let mut entries: Vec<CatalogEntry> = vec![];
    let mut places: HashMap<Variant, usize> = HashMap::new();
    let wanted = |problem: &AttentionProblem| head_dims.is_empty() || head_dims.contains(&problem.head_dim());
    for problem in problems().into_iter().filter(wanted) {
        for kind in DeviceKind::all() {
            let caps = kind.caps();
            let chosen = Plan::new(&problem, &caps, None).ok().map(|plan| plan.kernel());
            for kernel in Kernel::ALL {
                let Ok(plan) = Plan::new(&problem, &caps, Some(kernel)) else { continue };
                for step in plan.steps() {
                    let place = *places.entry(step.variant.clone()).or_insert_with(|| {
                        let (step, problem) = (step.clone(), problem.clone());
                        entries.push(CatalogEntry { kernel, step, problem, chosen_for: vec![] });
                        entries.len() - 1
                    });
                    let chosen_for = &mut entries[place].chosen_for;
                    if chosen == Some(kernel) && !chosen_for.contains(&kind) {
                        chosen_for.push(kind);
                    }
                }
            }
        }
    }
    entries
}

fn problems() -> Vec<AttentionProblem> {
    let mut problems = vec![];
    for dims in DIMS {
        for shape in SHAPES {
            for element in [Element::F32, Element::F16] {
                for (aligned, terms) in [(true, false), (true, true), (false, true)] {
                    // all of them are sound, and a test counts them
                    problems.extend(AttentionProblem::new(spec(dims, shape, element, aligned, terms)));
                }
            }
            problems.extend(AttentionProblem::new(spec(dims, shape, Element::Bf16, true, false)));
            problems.extend(AttentionProblem::new(bytes_in_pages(spec(dims, shape, Element::F32, true, true))));
        }
    }
    problems
}

fn spec(
    [head_dim, v_head_dim]: [usize; 2],
    [q_heads, kv_heads, q_len, kv_len]: [usize; 4],
    element: Element,
    aligned: bool,
    terms: bool,
) -> AttentionSpec {
    // a tensor that starts at an odd place is read one element at a time
    let offset = usize::from(!aligned);
    let tensor = |shape| TensorSpec { element, layout: Layout::bhld(shape).with_offset(offset) };
    let mut spec = AttentionSpec::from_tensors(
        tensor([1, q_heads, q_len, head_dim]),
        tensor([1, kv_heads, kv_len, head_dim]),
        tensor([1, kv_heads, kv_len, v_head_dim]),
    );
    spec.output = tensor([1, q_heads, q_len, v_head_dim]);
    if terms {
        let scores = Layout::bhld([1, q_heads, q_len, kv_len]);
        spec.bias = Some(TensorSpec { element, layout: scores });
        spec.mask = Some(scores);
        spec.softcap = Some(30.0);
        spec.causal = Some(Diagonal::EndOfKeys);
        (spec.q_lens, spec.kv_lens) = (true, true);
        spec.row_ranges = true;
        spec.alibi_slopes = Some(AlibiSlopes::PerHead);
        spec.sinks = true;
        spec.lse = true;
    }
    spec
}

/// The same over signed bytes in pages, a scale for each row.
fn bytes_in_pages(mut spec: AttentionSpec) -> AttentionSpec {
    const PAGE_LEN: usize = 16;
    let [batch, kv_heads, kv_len, head_dim] = spec.key.layout.shape;
    let table_len = kv_len.div_ceil(PAGE_LEN);
    let pages = |width| Layout::bhld([batch * table_len, kv_heads, PAGE_LEN, width]);
    let width = spec.value.layout.shape[3];
    (spec.key, spec.value) = (TensorSpec::i8(pages(head_dim)), TensorSpec::i8(pages(width)));
    (spec.key_scale, spec.value_scale) = (Some(TensorSpec::f32(pages(1))), Some(TensorSpec::f32(pages(1))));
    spec.paged = Some(Paged { table_len, kv_len });
    // with both scales there are no more storage buffers than eight
    (spec.bias, spec.mask) = (None, None);
    spec
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_problem_is_sound_and_every_shader_is_there_once() {
        assert_eq!(problems().len(), DIMS.len() * SHAPES.len() * 8);
        let entries = catalog();
        let variants: HashSet<_> = entries.iter().map(|entry| &entry.step.variant).collect();
        assert_eq!(variants.len(), entries.len());
        for kernel in Kernel::ALL.into_iter().filter(|kernel| *kernel != Kernel::Cooperative) {
            assert!(entries.iter().any(|entry| entry.kernel == kernel), "no shader of {kernel}");
        }
        for kind in DeviceKind::all() {
            assert!(entries.iter().any(|entry| entry.chosen_for.contains(&kind)), "nothing is chosen for {kind:?}");
        }
    }
}
