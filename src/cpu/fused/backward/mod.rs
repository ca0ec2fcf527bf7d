//! The backward of the fused kernel: blocks of keys, weights made anew from maxima and sums, five products a block; no scores
//! leave the cache.
//!
//! FlashAttention-2, Dao 2023 (arXiv:2307.08691), Algorithm 2, in one pass over queries and keys. What several tasks sum up each sums
//! for itself, and the sums are added in order, so the bits do not depend on the threads.

mod chosen;
mod plan;
mod task;

use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, TryLockError};

use self::chosen::Chosen;
use self::plan::{BackwardPlan, is_plain};
use self::task::{Backward, KeySums, OtherSums, Share, Workspace};
use super::TensorMut;
use super::plan::CpuStrategy;
use super::pool::Pool;
use super::scratch::Buffer;
use super::store::scatter;
use crate::backward::{BackwardInputs, BackwardProblem, Gradients};
use crate::cpu::simd::SimdLevel;
use crate::cpu::simd::shared::{Consecutive, Parts, Shared, TensorRows};
use crate::inputs::InputError;
use crate::problem::AlibiSlopes;
use crate::tensor::{Layout, TensorData, TensorSpec};

/// A backward that is planned for the CPU and holds its workspace; it may be called many times.
///
/// A call of [`run_into`](Self::run_into) allocates nothing, unless the pool has more threads than the one it was prepared on, or
/// calls overlap. Nothing that it holds grows with `q_len * kv_len`, but a gradient of a bias that does.
#[derive(Debug)]
pub struct CpuBackward {
    problem: BackwardProblem,
    plan: BackwardPlan,
    chosen: Option<Chosen>,
    pool: Pool<Workspace>,
    /// `None` where there was no memory for it.
    shared: Mutex<Option<State>>,
}

/// Where a call puts its results: what the spec asks for, and nothing else.
#[derive(Debug, Default)]
pub struct GradientsMut<'a> {
    /// In the layout of the spec's `d_query`; gaps are left as they are.
    pub d_query: Option<TensorMut<'a>>,
    /// In the layout of the spec's `d_key`.
    pub d_key: Option<TensorMut<'a>>,
    /// In the layout of the spec's `d_value`.
    pub d_value: Option<TensorMut<'a>>,
    /// In the layout of the spec's `d_bias`.
    pub d_bias: Option<TensorMut<'a>>,
    /// As many as there are slopes.
    pub d_alibi_slopes: Option<&'a mut [f32]>,
    /// `[q_heads]`.
    pub d_sinks: Option<&'a mut [f32]>,
    /// One number.
    pub d_scale: Option<&'a mut f32>,
}

impl<'a> From<&'a mut Gradients> for GradientsMut<'a> {
    fn from(of: &'a mut Gradients) -> Self {
        Self {
            d_query: of.d_query.as_mut().map(TensorMut::from),
            d_key: of.d_key.as_mut().map(TensorMut::from),
            d_value: of.d_value.as_mut().map(TensorMut::from),
            d_bias: of.d_bias.as_mut().map(TensorMut::from),
            d_alibi_slopes: of.d_alibi_slopes.as_deref_mut(),
            d_sinks: of.d_sinks.as_deref_mut(),
            d_scale: of.d_scale.as_mut(),
        }
    }
}

/// What the tasks of one call share.
#[derive(Debug)]
struct State {
    /// Rows of each chunk by each part of the keys, if there are several.
    query_parts: Buffer,
    /// Sums of each part of the rows, if there are several or they are not what is asked for.
    key_parts: Buffer,
    value_parts: Buffer,
    /// Gradients without gaps, of those that do not go where they are computed.
    gathered: [Vec<f32>; 4],
    /// Of each task.
    bias_slabs: Buffer,
    /// Of each head of a group, by each part of its rows and keys.
    slopes: Vec<f64>,
    sinks: Vec<f64>,
    /// Of each task.
    scale: Vec<f64>,
    flags: [Vec<AtomicBool>; 9],
}

/// Elements that one thread adds up at a time.
const PIECE: usize = 1 << 14;

impl CpuBackward {
    /// Plans a problem for the given instructions and makes a workspace for each thread of the current pool.
    ///
    /// Memory that is not there ends the process, as everywhere in Rust; [`Device::prepare_backward`](crate::Device::prepare_backward) and
    /// [`cpu::backward`](crate::cpu::backward) ask for it first.
    #[must_use]
    pub fn new(problem: &BackwardProblem, level: SimdLevel) -> Self {
        let plan = BackwardPlan::new(problem, level);
        let made = (0..workspaces(&plan)).map(|_| Workspace::new(&plan, problem)).collect();
        let shared = Mutex::new(State::new(problem, &plan).ok());
        let chosen = problem.weights().map(Chosen::new);
        Self { problem: problem.clone(), plan, chosen, pool: Pool::new(made), shared }
    }

    /// The same where there is memory for it, else the bytes that it takes.
    pub(crate) fn try_new(problem: &BackwardProblem, level: SimdLevel) -> Result<Self, u128> {
        let plan = BackwardPlan::new(problem, level);
        let shared = State::bytes(problem, &plan).unwrap_or(usize::MAX);
        let bytes = workspaces(&plan) as u128 * Workspace::bytes(&plan, problem) as u128 + shared as u128;
        match crate::cpu::check_bytes(usize::try_from(bytes).ok()) {
            Ok(()) => Ok(Self::new(problem, level)),
            Err(_) => Err(bytes),
        }
    }

    /// The problem it is prepared for.
    #[must_use]
    pub const fn problem(&self) -> &BackwardProblem {
        &self.problem
    }

    /// What will run, and why, a line for each part of it.
    #[must_use]
    pub fn plan_text(&self) -> String {
        let Self { plan, problem, .. } = self;
        let rows = plan.scores.map.group_rows();
        let why = match plan.scores.strategy() {
            CpuStrategy::FewQueries => format!("few queries: only {rows} rows share their keys and values"),
            _ => format!("many queries: {rows} rows share their keys and values"),
        };
        let (level, [each, shared]) = (plan.scores.level(), self.workspace_bytes());
        let parts = match (plan.row_parts, plan.key_parts) {
            (1, 1) => "all rows and keys of a head in one task".to_owned(),
            (parts, 1) => format!("rows in {parts} parts, whose sums over keys are added in order"),
            (_, parts) => format!("keys in {parts} parts, whose sums over rows are added in order"),
        };
        format!(
            "kernel     cpu_backward, {why}\nsimd       {level}, {} lanes\nblocks     {} rows a tile, {} tiles read keys \
             together, {} keys a block; {parts}\ntasks      {}{}\nworkspace  {each} bytes a thread, {shared} bytes shared\n\
             flops      {:.0}, five products where the forward has two\n",
            level.lanes(),
            plan.scores.tile_rows,
            plan.scores.tiles,
            plan.scores.block_kv,
            plan.tasks(),
            if plan.scores.serial { ", one after another: too little for threads" } else { "" },
            problem.flops(),
        )
    }

    /// Bytes that a call needs beside its inputs and results: of each thread, and shared by all.
    #[must_use]
    pub fn workspace_bytes(&self) -> [usize; 2] {
        [Workspace::bytes(&self.plan, &self.problem), State::bytes(&self.problem, &self.plan).unwrap_or(usize::MAX)]
    }

    /// Computes the gradients into new vectors.
    ///
    /// # Errors
    /// An [`InputError`] if the data is not what the problem asks for.
    pub fn run(&self, inputs: &BackwardInputs<'_>) -> Result<Gradients, InputError> {
        let spec = self.problem.spec();
        let tensors = [&spec.d_query, &spec.d_key, &spec.d_value, &spec.d_bias];
        let bytes = tensors.into_iter().flatten().try_fold(0usize, |sum, tensor| {
            sum.checked_add(tensor.layout.extent()?.checked_mul(tensor.element.size_bytes())?)
        });
        crate::cpu::check_bytes(bytes)?;
        let zeros = |tensor: &Option<TensorSpec>| {
            tensor.map(|tensor| TensorData::zeros(tensor.element, tensor.layout.extent().unwrap_or(0)))
        };
        let slopes = inputs.attention.terms.alibi_slopes.map_or(0, <[f32]>::len);
        let mut gradients = Gradients {
            d_query: zeros(&spec.d_query),
            d_key: zeros(&spec.d_key),
            d_value: zeros(&spec.d_value),
            d_bias: zeros(&spec.d_bias),
            d_alibi_slopes: spec.d_alibi_slopes.then(|| vec![0.0; slopes]),
            d_sinks: spec.d_sinks.then(|| vec![0.0; self.problem.forward().q_heads()]),
            d_scale: spec.d_scale.then_some(0.0),
        };
        self.run_into(inputs, (&mut gradients).into())?;
        Ok(gradients)
    }

    /// Computes the gradients into the caller's memory.
    ///
    /// # Errors
    /// An [`InputError`] if inputs or results are not what the problem asks for.
    pub fn run_into(&self, inputs: &BackwardInputs<'_>, results: GradientsMut<'_>) -> Result<(), InputError> {
        inputs.check(&self.problem)?;
        self.check(inputs, &results)?;
        let mut fresh = None;
        let mut held;
        // a call that overlaps another gets a state of its own; waiting here could block a thread of the pool
        let state = match self.shared.try_lock() {
            Ok(state) => {
                held = state;
                &mut *held
            }
            Err(TryLockError::Poisoned(poisoned)) => {
                held = poisoned.into_inner();
                &mut *held
            }
            Err(TryLockError::WouldBlock) => &mut fresh,
        };
        let state = match state {
            Some(state) => state,
            none => none.insert(State::new(&self.problem, &self.plan)?),
        };
        self.compute(inputs, results, state);
        Ok(())
    }

    fn check(&self, inputs: &BackwardInputs<'_>, results: &GradientsMut<'_>) -> Result<(), InputError> {
        let spec = self.problem.spec();
        for (name, given, asked) in [
            ("d_query", &results.d_query, &spec.d_query),
            ("d_key", &results.d_key, &spec.d_key),
            ("d_value", &results.d_value, &spec.d_value),
            ("d_bias", &results.d_bias, &spec.d_bias),
        ] {
            match (given, asked) {
                (None, Some(_)) => return Err(InputError::Missing { name }),
                (Some(_), None) => return Err(InputError::Unexpected { name }),
                (None, None) => {}
                (Some(given), Some(asked)) => {
                    let (element, found) = given.describe();
                    if element != asked.element {
                        let (wanted, found) = (asked.element.into(), element.into());
                        return Err(InputError::Element { name, wanted, found });
                    }
                    let needed = asked.layout.extent().unwrap_or(usize::MAX);
                    if found < needed {
                        return Err(InputError::TooShort { name, needed, found });
                    }
                }
            }
        }
        let slopes = inputs.attention.terms.alibi_slopes.map_or(0, <[f32]>::len);
        for (name, given, asked, wanted) in [
            ("d_alibi_slopes", results.d_alibi_slopes.as_ref().map(|d| d.len()), spec.d_alibi_slopes, slopes),
            ("d_sinks", results.d_sinks.as_ref().map(|d| d.len()), spec.d_sinks, self.problem.forward().q_heads()),
            ("d_scale", results.d_scale.as_ref().map(|_| 1), spec.d_scale, 1),
        ] {
            match (given, asked) {
                (None, true) => return Err(InputError::Missing { name }),
                (Some(_), false) => return Err(InputError::Unexpected { name }),
                (Some(found), true) if found != wanted => return Err(InputError::Len { name, wanted, found }),
                _ => {}
            }
        }
        Ok(())
    }

    fn compute(&self, inputs: &BackwardInputs<'_>, results: GradientsMut<'_>, state: &mut State) {
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

    fn bytes(problem: &BackwardProblem, plan: &BackwardPlan) -> Option<usize> {
        let units = plan.row_parts.checked_mul(plan.scores.map.groups())?.checked_mul(plan.key_parts)?;
        // slopes and sinks, and what tells who has what
        let of_heads = units.checked_mul(plan.heads_of_group(problem.forward()))?.checked_mul(16)?;
        let rest = of_heads.checked_add(units.checked_mul(8)?)?;
        Self::sizes(problem, plan)?.into_iter().try_fold(rest, |sum, n| sum.checked_add(n.checked_mul(4)?))
    }

    fn new(problem: &BackwardProblem, plan: &BackwardPlan) -> Result<Self, InputError> {
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

impl Clone for CpuBackward {
    /// The same plan, with a workspace of its own.
    fn clone(&self) -> Self {
        Self::new(&self.problem, self.plan.scores.level())
    }
}

/// Workspaces that a call uses at once.
fn workspaces(plan: &BackwardPlan) -> usize {
    #[cfg(feature = "native")]
    let threads = if plan.scores.serial { 1 } else { rayon::current_num_threads() };
    #[cfg(not(feature = "native"))]
    let threads = 1;
    threads.min(plan.tasks())
}

#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
fn narrow(x: f64) -> f32 {
    x as f32
}

/// The elements of a result that can be computed where they lie.
fn in_place<'r>(result: &'r mut Option<TensorMut<'_>>, spec: &Option<TensorSpec>) -> Option<&'r mut [f32]> {
    match (result, spec) {
        (Some(TensorMut::F32(data)), Some(spec)) if is_plain(spec) => Some(data),
        _ => None,
    }
}
