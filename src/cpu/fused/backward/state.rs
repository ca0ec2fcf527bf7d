//! What the tasks of one call share: sums that are added in order, and who has which.

use std::sync::atomic::AtomicBool;

use super::plan::{BackwardPlan, is_plain};
use crate::backward::BackwardProblem;
use crate::cpu::fused::scratch::Buffer;
use crate::inputs::InputError;
use crate::tensor::TensorSpec;

/// What the tasks of one call share.
#[derive(Debug)]
pub(super) struct State {
    /// Rows of each chunk by each part of the keys, if there are several.
    pub(super) query_parts: Buffer,
    /// Sums of each part of the rows, if there are several or they are not what is asked for.
    pub(super) key_parts: Buffer,
    pub(super) value_parts: Buffer,
    /// Gradients without gaps, of those that do not go where they are computed.
    pub(super) gathered: [Vec<f32>; 4],
    /// Of each task.
    pub(super) bias_slabs: Buffer,
    /// Of each head of a group, by each part of its rows and keys.
    pub(super) slopes: Vec<f64>,
    pub(super) sinks: Vec<f64>,
    /// Of each task.
    pub(super) scale: Vec<f64>,
    pub(super) flags: [Vec<AtomicBool>; 9],
}

/// Elements that one thread adds up at a time.
pub(super) const PIECE: usize = 1 << 14;

impl State {
    /// f32 of the parts of queries, keys and values, of the four gathered gradients, and of the slabs of the bias; `None` if they
    /// cannot be counted.
    fn sizes(problem: &BackwardProblem, plan: &BackwardPlan) -> Option<[usize; 8]> {
        let (spec, forward, map) = (problem.spec(), problem.forward(), plan.scores.map);
        let tensors = [&spec.d_query, &spec.d_key, &spec.d_value, &spec.d_bias];
        let product = |of: &[usize]| of.iter().try_fold(1usize, |n, &more| n.checked_mul(more));
        let query = match plan.key_parts > 1 && spec.d_query.is_some() {
            true => product(&[map.chunks(), plan.key_parts, plan.scores.chunk_rows(), forward.head_dim()])?,
            false => 0,
        };
        let parts = |gradient: &Option<TensorSpec>| match gradient.filter(|gradient| !plan.keys_are_final(gradient)) {
            Some(gradient) => {
                let [_, _, len, width] = gradient.layout.shape;
                product(&[plan.row_parts, map.groups(), len, width])
            }
            None => Some(0),
        };
        let (key, value) = (parts(&spec.d_key)?, parts(&spec.d_value)?);
        let gathered = tensors.map(|gradient| match gradient.filter(|gradient| !is_plain(gradient)) {
            Some(gradient) => gradient.layout.elements(),
            None => Some(0),
        });
        let [of_query, of_key, of_value, of_bias] = gathered;
        let slabs = product(&[plan.tasks(), plan.bias.map_or(0, |slab| slab.len())])?;
        Some([query, key, value, of_query?, of_key?, of_value?, of_bias?, slabs])
    }

    pub(super) fn bytes(problem: &BackwardProblem, plan: &BackwardPlan) -> Option<usize> {
        let units = plan.row_parts.checked_mul(plan.scores.map.groups())?.checked_mul(plan.key_parts)?;
        // slopes and sinks, and what tells who has what
        let of_heads = units.checked_mul(plan.heads_of_group(problem.forward()))?.checked_mul(16)?;
        let rest = of_heads.checked_add(units.checked_mul(8)?)?;
        Self::sizes(problem, plan)?.into_iter().try_fold(rest, |sum, n| sum.checked_add(n.checked_mul(4)?))
    }

    pub(super) fn new(problem: &BackwardProblem, plan: &BackwardPlan) -> Result<Self, InputError> {
        crate::cpu::check_bytes(Self::bytes(problem, plan))?;
        let [query, key, value, of_query, of_key, of_value, of_bias, slabs] =
            Self::sizes(problem, plan).unwrap_or_default();
        let (spec, forward, map) = (problem.spec(), problem.forward(), plan.scores.map);
        let flags = |n: usize| (0..n).map(|_| AtomicBool::new(false)).collect::<Vec<_>>();
        let (chunks, tasks) = (map.chunks(), plan.tasks());
        let of_keys = plan.row_parts * map.groups() * plan.key_parts;
        let of_heads = of_keys * plan.heads_of_group(forward);
        let elements = |gradient: &Option<TensorSpec>| gradient.and_then(|gradient| gradient.layout.elements());
        let most = elements(&spec.d_key).unwrap_or(0).max(elements(&spec.d_value).unwrap_or(0));
        Ok(Self {
            query_parts: Buffer::new(query),
            key_parts: Buffer::new(key),
            value_parts: Buffer::new(value),
            gathered: [of_query, of_key, of_value, of_bias].map(|n| vec![0.0; n]),
            bias_slabs: Buffer::new(slabs),
            slopes: vec![0.0; if spec.d_alibi_slopes { of_heads } else { 0 }],
            sinks: vec![0.0; if spec.d_sinks { of_heads } else { 0 }],
            scale: vec![0.0; if spec.d_scale { tasks } else { 0 }],
            flags: [
                flags(chunks),
                flags(chunks * plan.key_parts),
                flags(of_keys),
                flags(of_keys),
                flags(tasks),
                flags(of_keys),
                flags(of_keys),
                flags(tasks),
                flags(most.div_ceil(PIECE)),
            ],
        })
    }
}
