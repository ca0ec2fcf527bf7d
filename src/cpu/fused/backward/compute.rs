//! One call: its tasks, and their sums, added in order.

use super::plan::is_plain;
use super::state::{PIECE, State};
use super::task::{Backward, KeySums, OtherSums, Share};
use super::workspace::Workspace;
use super::{CpuBackward, GradientsMut, narrow};
use crate::backward::BackwardInputs;
use crate::cpu::fused::TensorMut;
use crate::cpu::fused::pool::Pool;
use crate::cpu::fused::store::scatter;
use crate::cpu::simd::shared::{Consecutive, Parts, Shared, TensorRows};
use crate::problem::AlibiSlopes;
use crate::tensor::{Layout, TensorSpec};

impl CpuBackward {
    pub(super) fn compute(&self, inputs: &BackwardInputs<'_>, results: GradientsMut<'_>, state: &mut State) {
        let Self { problem, plan, chosen, pool, .. } = self;
        let (spec, forward, map) = (problem.spec(), problem.forward(), plan.scores.map);
        let (dim, v_dim, kv_len) = (forward.head_dim(), forward.v_head_dim(), forward.kv_len());
        let GradientsMut { mut d_query, mut d_key, mut d_value, mut d_bias, d_alibi_slopes, d_sinks, d_scale } =
            results;
        let State { query_parts, key_parts, value_parts, gathered, bias_slabs, slopes, sinks, scale, flags } = state;
        let [f_query, f_parts, f_key, f_value, f_bias, f_slopes, f_sinks, f_scale, f_pieces] = flags;
        let [of_query, of_key, of_value, of_bias] = gathered;
        let task = Backward { plan, problem, inputs, chosen: chosen.as_ref() };
        // where gradients are computed: in place, if they are to be f32 without gaps
        let query_out: &mut [f32] = in_place(&mut d_query, &spec.d_query).unwrap_or(of_query);
        let key_out: &mut [f32] = in_place(&mut d_key, &spec.d_key).unwrap_or(of_key);
        let value_out: &mut [f32] = in_place(&mut d_value, &spec.d_value).unwrap_or(of_value);
        let bias_out: &mut [f32] = in_place(&mut d_bias, &spec.d_bias).unwrap_or(of_bias);
        slopes.fill(0.0);
        sinks.fill(0.0);
        scale.fill(0.0);
        {
            let final_keys =
                |gradient: &Option<TensorSpec>| gradient.is_none_or(|gradient| plan.keys_are_final(&gradient));
            let parts = |width: usize| Parts {
                slab_len: kv_len * width,
                part_len: plan.part_kv * width,
                parts: plan.key_parts,
            };
            let query_rows = Shared::new(&mut *query_out, TensorRows::new_dense(map, dim), f_query);
            let chunk_len = plan.scores.chunk_rows() * dim;
            let of_parts = Shared::new(query_parts, Consecutive { unit_len: chunk_len }, f_parts);
            let keys = if final_keys(&spec.d_key) { &mut *key_out } else { &mut key_parts[..] };
            let keys = Shared::new(keys, parts(dim), f_key);
            let values = if final_keys(&spec.d_value) { &mut *value_out } else { &mut value_parts[..] };
            let values = Shared::new(values, parts(v_dim), f_value);
            let per_task = |len: usize| Consecutive { unit_len: len };
            let slab = plan.bias.map_or(0, |slab| slab.len());
            let slabs = Shared::new(bias_slabs, per_task(slab), f_bias);
            let of_heads = Consecutive { unit_len: plan.heads_of_group(forward) };
            let slopes = Shared::new(slopes, of_heads, f_slopes);
            let sinks = Shared::new(sinks, of_heads, f_sinks);
            let scale = Shared::new(scale, per_task(1), f_scale);
            let work = |number: usize, work: &mut Workspace| {
                let (key_part, rest) = (number % plan.key_parts, number / plan.key_parts);
                let (row_part, of_task) = (rest % plan.row_parts, rest / plan.row_parts);
                let key_range = [key_part * plan.part_kv, ((key_part + 1) * plan.part_kv).min(kv_len)];
                let mut slab = spec.d_bias.map(|_| slabs.claim(number));
                let mut scale = spec.d_scale.then(|| scale.claim(number));
                slab.iter_mut().for_each(|slab| slab.row(0).fill(0.0));
                for &group in &plan.groups_per_task[of_task] {
                    let unit = (row_part * map.groups() + group) * plan.key_parts + key_part;
                    let mut units = (spec.d_key.map(|_| keys.claim(unit)), spec.d_value.map(|_| values.claim(unit)));
                    let mut heads =
                        (spec.d_alibi_slopes.then(|| slopes.claim(unit)), spec.d_sinks.then(|| sinks.claim(unit)));
                    let mut others = OtherSums {
                        d_bias: slab.as_mut().map(|slab| slab.row(0)),
                        d_slopes: heads.0.as_mut().map(|slopes| slopes.row(0)),
                        d_sinks: heads.1.as_mut().map(|sinks| sinks.row(0)),
                        d_scale: scale.as_mut().map(|scale| scale.row(0)),
                    };
                    let mut sums = KeySums {
                        d_key: units.0.as_mut().map(|unit| unit.row(0)),
                        d_value: units.1.as_mut().map(|unit| unit.row(0)),
                    };
                    let first = row_part * plan.chunks_per_part;
                    let last = (first + plan.chunks_per_part).min(map.chunks_per_group());
                    if first >= last {
                        sums.d_key.iter_mut().chain(&mut sums.d_value).for_each(|sums| sums.fill(0.0));
                    }
                    for in_group in first..last {
                        let chunk = group * map.chunks_per_group() + in_group;
                        let share =
                            Share { chunk, keys: key_range, first: in_group == first, first_keys: key_part == 0 };
                        task.compute(share, &mut sums, &mut others, work);
                        if spec.d_query.is_none() {
                            continue;
                        }
                        if plan.key_parts == 1 {
                            let mut rows = query_rows.claim(chunk);
                            task.finish_query(chunk, work, |row, line| rows.row(row).copy_from_slice(line));
                        } else {
                            let mut part = of_parts.claim(chunk * plan.key_parts + key_part);
                            let part = part.row(0);
                            task.finish_query(chunk, work, |row, line| {
                                part[row * dim..][..dim].copy_from_slice(line);
                            });
                        }
                    }
                }
            };
            let make = || Workspace::new(plan, problem);
            pool.for_each(plan.tasks(), plan.scores.serial, make, work);
        }
        if plan.key_parts > 1 && spec.d_query.is_some() {
            let rows = Shared::new(&mut *query_out, TensorRows::new_dense(map, dim), f_query);
            let (chunk_len, parts): (usize, &[f32]) = (plan.scores.chunk_rows() * dim, query_parts);
            self.each(map.chunks(), |chunk| {
                let mut out = rows.claim(chunk);
                for r in 0..map.rows(chunk) {
                    let part = |n: usize| &parts[(chunk * plan.key_parts + n) * chunk_len + r * dim..][..dim];
                    let row = out.row(r);
                    row.copy_from_slice(part(0));
                    (1..plan.key_parts).for_each(|n| row.iter_mut().zip(part(n)).for_each(|(x, y)| *x += y));
                }
            });
        }
        for (gradient, out, parts) in
            [(&spec.d_key, &mut *key_out, key_parts), (&spec.d_value, &mut *value_out, value_parts)]
        {
            let Some(gradient) = gradient.as_ref().filter(|gradient| !plan.keys_are_final(gradient)) else { continue };
            let [batch, heads, len, width] = gradient.layout.shape;
            let (slab, parts): (usize, &[f32]) = (len * width, parts);
            // what lies `step` apart goes to one place: groups of other entries where the batch is summed, and parts of rows
            let step = batch * heads * slab;
            let count = (plan.row_parts * map.groups() * slab).checked_div(step).unwrap_or(0);
            let pieces = Shared::new(
                out,
                Parts { slab_len: step, part_len: PIECE, parts: step.div_ceil(PIECE).max(1) },
                f_pieces,
            );
            self.each(step.div_ceil(PIECE), |piece| {
                let mut unit = pieces.claim(piece);
                let out = unit.row(0);
                out.fill(0.0);
                (0..count).for_each(|n| {
                    let from = &parts[n * step + piece * PIECE..][..out.len()];
                    out.iter_mut().zip(from).for_each(|(x, y)| *x += y);
                });
            });
        }
        if let (Some(gradient), Some(slab)) = (&spec.d_bias, plan.bias) {
            self.add_slabs(gradient.layout.shape, slab.shape, bias_slabs, bias_out);
        }
        let of_head = |sums: &[f64], b: usize, h: usize| plan.of_head(forward, sums, [b, h]);
        let (batch, q_heads) = (forward.batch(), forward.q_heads());
        let over_batch = |sums: &[f64], h: usize| narrow((0..batch).map(|b| of_head(sums, b, h)).sum());
        if let Some(out) = d_alibi_slopes {
            let per_entry = spec.attention.alibi_slopes == Some(AlibiSlopes::PerBatchAndHead);
            for (n, out) in out.iter_mut().enumerate() {
                *out =
                    if per_entry { narrow(of_head(slopes, n / q_heads, n % q_heads)) } else { over_batch(slopes, n) };
            }
        }
        if let Some(out) = d_sinks {
            out.iter_mut().enumerate().for_each(|(h, out)| *out = over_batch(sinks, h));
        }
        if let Some(out) = d_scale {
            *out = narrow(scale.iter().sum());
        }
        for (gradient, spec, dense) in [
            (d_query, &spec.d_query, of_query),
            (d_key, &spec.d_key, of_key),
            (d_value, &spec.d_value, of_value),
            (d_bias, &spec.d_bias, of_bias),
        ] {
            if let (Some(gradient), Some(spec)) = (gradient, spec.as_ref().filter(|spec| !is_plain(spec))) {
                scatter(&spec.layout, dense, gradient);
            }
        }
    }

    /// Adds the slabs of all tasks, in their order, to the gradient of the bias.
    fn add_slabs(&self, shape: [usize; 4], [heads, rows, columns]: [usize; 3], slabs: &[f32], out: &mut [f32]) {
        let (plan, forward) = (&self.plan, self.problem.forward());
        out.fill(0.0);
        let layout = Layout::bhld(shape);
        let (kv_heads, len) = (forward.kv_heads(), heads * rows * columns);
        for (number, slab) in slabs.chunks_exact(len.max(1)).enumerate().take(plan.tasks()) {
            let (key_part, of_task) = (number % plan.key_parts, number / plan.key_parts / plan.row_parts);
            let Some(&group) = plan.groups_per_task[of_task].first() else { continue };
            let (b, kv_head) = (group / kv_heads, group % kv_heads);
            let first_key = if shape[3] == 1 { 0 } else { key_part * plan.part_kv };
            let n = columns.min(shape[3] - first_key.min(shape[3]));
            for (at, line) in slab.chunks_exact(columns.max(1)).enumerate() {
                let (h, i) = (at / rows, at % rows);
                let head = if shape[1] == 1 { 0 } else { kv_head * forward.group_size() + h };
                let b = if shape[0] == 1 { 0 } else { b };
                let to = layout.index([b, head, i, first_key]);
                out[to..to + n].iter_mut().zip(line).for_each(|(x, y)| *x += y);
            }
        }
    }

    /// Tasks that need no workspace.
    fn each(&self, n: usize, task: impl Fn(usize) + Send + Sync) {
        let none: Pool<()> = Pool::new(vec![]);
        none.for_each(n, self.plan.scores.serial, || (), |number, ()| task(number));
    }
}

/// The elements of a result that can be computed where they lie.
fn in_place<'r>(result: &'r mut Option<TensorMut<'_>>, spec: &Option<TensorSpec>) -> Option<&'r mut [f32]> {
    match (result, spec) {
        (Some(TensorMut::F32(data)), Some(spec)) if is_plain(spec) => Some(data),
        _ => None,
    }
}
