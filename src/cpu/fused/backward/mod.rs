//! The backward of the fused kernel: blocks of keys, weights made anew from maxima and sums, five products a block; no scores
//! leave the cache.
//!
//! FlashAttention-2, Dao 2023 (arXiv:2307.08691), Algorithm 2, in one pass over queries and keys. What several tasks sum up each sums
//! for itself, and the sums are added in order, so the bits do not depend on the threads.

mod chosen;
mod compute;
mod load;
mod plan;
mod state;
mod task;
mod terms;
mod workspace;

use std::sync::Mutex;

use self::chosen::Chosen;
use self::plan::BackwardPlan;
use self::state::State;
use self::workspace::Workspace;
use super::TensorMut;
use super::held::with_held;
use super::plan::CpuStrategy;
use super::pool::Pool;
use crate::backward::{BackwardInputs, BackwardProblem, Gradients};
use crate::cpu::simd::SimdLevel;
use crate::inputs::InputError;
use crate::tensor::{TensorData, TensorSpec};

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
        text(&self.plan, &self.problem)
    }

    /// [`plan_text`](Self::plan_text) of what [`new`](Self::new) would make.
    pub(crate) fn explain(problem: &BackwardProblem, level: SimdLevel) -> String {
        text(&BackwardPlan::new(problem, level), problem)
    }

    /// Bytes that a call needs beside its inputs and results: of each thread, and shared by all.
    #[must_use]
    pub fn workspace_bytes(&self) -> [usize; 2] {
        bytes(&self.plan, &self.problem)
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
        let make = || State::new(&self.problem, &self.plan);
        with_held(&self.shared, make, |state| self.compute(inputs, results, state))
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
}

impl Clone for CpuBackward {
    /// The same plan, with a workspace of its own.
    fn clone(&self) -> Self {
        Self::new(&self.problem, self.plan.scores.level())
    }
}

/// A line for each part of a plan.
fn text(plan: &BackwardPlan, problem: &BackwardProblem) -> String {
    let rows = plan.scores.map.group_rows();
    let why = match plan.scores.strategy() {
        CpuStrategy::FewQueries => format!("few queries: only {rows} rows share their keys and values"),
        CpuStrategy::HandfulOfKeys => format!("a handful of keys: {rows} rows share them"),
        _ => format!("many queries, as the forward has them: {rows} rows share their keys and values"),
    };
    let (level, [each, shared]) = (plan.scores.level(), bytes(plan, problem));
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

/// Of a workspace for each thread, and of what they share.
fn bytes(plan: &BackwardPlan, problem: &BackwardProblem) -> [usize; 2] {
    [Workspace::bytes(plan, problem), State::bytes(problem, plan).unwrap_or(usize::MAX)]
}

/// Workspaces that a call uses at once.
fn workspaces(plan: &BackwardPlan) -> usize {
    #[cfg(feature = "threads")]
    let threads = if plan.scores.serial { 1 } else { rayon::current_num_threads() };
    #[cfg(not(feature = "threads"))]
    let threads = 1;
    threads.min(plan.tasks())
}

#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
fn narrow(x: f64) -> f32 {
    // a sum of nothing is -0.0
    (x + 0.0) as f32
}
