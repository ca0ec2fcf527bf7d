//! The fused kernel: blocks of keys, online softmax, vectors and threads; the scores never leave the cache.
//!
//! FlashAttention-2, Dao 2023 (arXiv:2307.08691), Algorithm 1, with the keys split over tasks where rows are few. How a
//! problem is cut up is in [`plan`] and depends on its shape and the vector unit alone, so the bits do not depend on the
//! threads.

mod as_stored;
mod backward;
mod handful;
mod held;
mod not_finite;
mod plan;
mod pool;
mod rows;
mod score;
mod scratch;
mod stages;
mod store;
mod task;

use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use half::{bf16, f16};

pub use backward::{CpuBackward, GradientsMut};
pub use plan::{CpuPlan, CpuStrategy};

use crate::inputs::{AttentionInputs, AttentionOutput, CheckedInputs, InputError, RowState};
use crate::problem::{AttentionProblem, ScoreStage};
use crate::tensor::{Element, TensorData};

use super::simd::SimdLevel;
use super::simd::shared::{Consecutive, Shared, TensorRows, written};
use super::simd::{self};
use held::with_held;
use pool::Pool;
use scratch::{Buffer, Scratch};
use stages::RowEnd;
use store::Store;
use store::scatter;
use task::Job;

/// An attention that is planned for the CPU and holds its workspace; it may be called many times.
///
/// A call of [`run_into`](Self::run_into) allocates nothing, unless the pool has more threads than the one it was prepared
/// on, or calls overlap. It runs on the caller's thread and, with feature `threads`, on the others of the rayon pool that it
/// is called from. (From outside any pool, rayon itself allocates a few words for each thread of the global one.)
#[derive(Debug)]
pub struct CpuAttention {
    problem: AttentionProblem,
    plan: CpuPlan,
    /// Where the rows of the output go; `None` if they are gathered first, as their elements are no neighbours.
    rows: Option<TensorRows>,
    scratch: Pool<Scratch>,
    /// `None` where there was no memory for it.
    shared: Mutex<Option<SharedState>>,
    held_bytes: u64,
}

/// What the tasks of one call share.
#[derive(Debug)]
struct SharedState {
    /// State of every part of every chunk.
    partial: Buffer,
    /// Gathered output, `[batch, q_heads, q_len, v_head_dim]`.
    gathered: Vec<f32>,
    /// `[batch, q_heads, q_len]`, if more than the output is asked for.
    ends: Vec<RowEnd>,
    flags: [Vec<AtomicBool>; 4],
}

/// Where a call puts its results.
#[derive(Debug)]
pub struct CpuOutputs<'a> {
    /// `[batch, q_heads, q_len, v_head_dim]` in the layout of the spec's `output`; gaps are left as they are.
    pub output: TensorMut<'a>,
    /// `[batch, q_heads, q_len]`; needed if the spec asks for it.
    pub lse: Option<&'a mut [f32]>,
    /// Both `[batch, q_heads, q_len]`; needed if the spec asks for it.
    pub row_state: Option<&'a mut RowState>,
    /// `[batch, q_heads, q_len, kv_len]`; needed if the spec asks for it.
    pub scores: Option<&'a mut [f32]>,
}

/// [`CpuOutputs`] within.
struct Results<'a> {
    output: Target<'a>,
    lse: Option<&'a mut [f32]>,
    row_state: Option<&'a mut RowState>,
    scores: Option<&'a mut [f32]>,
}

enum Target<'a> {
    Given(TensorMut<'a>),
    /// To be replaced by a tensor of the same element.
    New(&'a mut TensorData),
}

impl<'a> From<&'a mut TensorData> for TensorMut<'a> {
    fn from(data: &'a mut TensorData) -> Self {
        match data {
            TensorData::F32(data) => Self::F32(data),
            TensorData::F16(data) => Self::F16(data),
            TensorData::Bf16(data) => Self::Bf16(data),
            TensorData::I8(data) => Self::I8(data),
        }
    }
}

impl<'a> From<&'a mut AttentionOutput> for CpuOutputs<'a> {
    fn from(of: &'a mut AttentionOutput) -> Self {
        let output = (&mut of.output).into();
        let (lse, row_state, scores) = (of.lse.as_deref_mut(), of.row_state.as_mut(), of.scores.as_deref_mut());
        Self { output, lse, row_state, scores }
    }
}

/// Elements of a tensor in host memory that are written.
#[derive(Debug)]
pub enum TensorMut<'a> {
    /// Stored as f32.
    F32(&'a mut [f32]),
    /// Stored as f16.
    F16(&'a mut [f16]),
    /// Stored as bf16.
    Bf16(&'a mut [bf16]),
    /// Stored as signed bytes, which no output is.
    I8(&'a mut [i8]),
}

impl TensorMut<'_> {
    /// The element, and how many there are.
    const fn describe(&self) -> (Element, usize) {
        match self {
            Self::F32(data) => (Element::F32, data.len()),
            Self::F16(data) => (Element::F16, data.len()),
            Self::Bf16(data) => (Element::Bf16, data.len()),
            Self::I8(data) => (Element::I8, data.len()),
        }
    }
}

impl CpuAttention {
    /// Plans a problem for the given instructions and makes a workspace for each thread of the current pool.
    #[must_use]
    pub fn new(problem: &AttentionProblem, level: SimdLevel) -> Self {
        Self::with_workspace(problem, level, true)
    }

    /// The same for one call: each thread makes its workspace as it begins, where its own cache holds it.
    pub(in crate::cpu) fn for_one_call(problem: &AttentionProblem, level: SimdLevel) -> Self {
        Self::with_workspace(problem, level, false)
    }

    fn with_workspace(problem: &AttentionProblem, level: SimdLevel, made: bool) -> Self {
        let plan = CpuPlan::new(problem, level);
        let output = &problem.spec().output.layout;
        let rows = TensorRows::new(plan.map, output);
        let shared = SharedState::new(problem, &plan, rows.is_some()).ok();
        #[cfg(feature = "threads")]
        let threads = if plan.serial { 1 } else { rayon::current_num_threads() };
        #[cfg(not(feature = "threads"))]
        let threads = 1;
        let most = if made { threads.min(plan.map.chunks() * plan.splits) } else { 0 };
        let pool = (0..most).map(|_| Scratch::new(&plan, problem)).collect();
        let of_shared =
            shared.as_ref().map_or(0, |s| 4 * (s.partial.len() + s.gathered.len()) + size_of_val(s.ends.as_slice()));
        let held_bytes = most.saturating_mul(Scratch::bytes(&plan, problem)).saturating_add(of_shared) as u64;
        let (scratch, shared) = (Pool::new(pool), Mutex::new(shared));
        Self { problem: problem.clone(), plan, rows, scratch, shared, held_bytes }
    }

    /// Bytes of the workspace that it was made with. Told without a lock: a call holds the workspace to its end.
    pub(crate) const fn held_bytes(&self) -> u64 {
        self.held_bytes
    }

    /// What will run, and why.
    #[must_use]
    pub const fn plan(&self) -> &CpuPlan {
        &self.plan
    }

    /// The problem it is prepared for.
    #[must_use]
    pub const fn problem(&self) -> &AttentionProblem {
        &self.problem
    }

    /// Computes one attention into new vectors.
    ///
    /// # Errors
    /// An [`InputError`] if the data is not what the problem asks for.
    pub fn run(&self, inputs: &AttentionInputs<'_>) -> Result<AttentionOutput, InputError> {
        self.run_checked(inputs.checked(&self.problem)?)
    }

    /// The same of inputs that were compared with the problem.
    pub(crate) fn run_checked(&self, inputs: CheckedInputs<'_, '_>) -> Result<AttentionOutput, InputError> {
        super::check_memory(&self.problem, size_of::<f32>())?;
        let spec = self.problem.spec();
        let rows = self.problem.rows();
        let written = !self.problem.is_empty() && self.rows.is_some_and(|rows| rows.is_whole());
        let len = if written { 0 } else { spec.output.layout.extent().unwrap_or(0) };
        let mut result = AttentionOutput {
            output: TensorData::zeros(spec.output.element, len),
            lse: spec.lse.then(|| vec![0.0; rows]),
            row_state: spec.row_state.then(|| RowState { row_max: vec![0.0; rows], row_sum: vec![0.0; rows] }),
            scores: spec.scores.map(|_| vec![0.0; rows * self.problem.kv_len()]),
        };
        if self.problem.is_empty() {
            return Ok(result);
        }
        let AttentionOutput { output, lse, row_state, scores } = &mut result;
        let results = Results {
            output: if written { Target::New(output) } else { Target::Given(output.into()) },
            lse: lse.as_deref_mut(),
            row_state: row_state.as_mut(),
            scores: scores.as_deref_mut(),
        };
        self.with_shared(|shared| self.compute(&inputs, results, shared))?;
        Ok(result)
    }

    /// Computes one attention into the caller's memory.
    ///
    /// # Errors
    /// An [`InputError`] if inputs or outputs are not what the problem asks for.
    pub fn run_into(&self, inputs: &AttentionInputs<'_>, outputs: CpuOutputs<'_>) -> Result<(), InputError> {
        let inputs = inputs.checked(&self.problem)?;
        self.check(&outputs)?;
        if self.problem.is_empty() {
            return Ok(());
        }
        let CpuOutputs { output, lse, row_state, scores } = outputs;
        let results = Results { output: Target::Given(output), lse, row_state, scores };
        self.with_shared(|shared| self.compute(&inputs, results, shared))
    }

    /// Calls with the state that is held, or with one of its own.
    fn with_shared(&self, call: impl FnOnce(&mut SharedState)) -> Result<(), InputError> {
        with_held(&self.shared, || SharedState::new(&self.problem, &self.plan, self.rows.is_some()), call)
    }

    fn check(&self, outputs: &CpuOutputs<'_>) -> Result<(), InputError> {
        let (spec, rows) = (self.problem.spec(), self.problem.rows());
        let (element, found) = outputs.output.describe();
        if element != spec.output.element {
            return Err(InputError::Element {
                name: "output",
                wanted: spec.output.element.into(),
                found: element.into(),
            });
        }
        let needed = spec.output.layout.extent().unwrap_or(usize::MAX);
        if found < needed {
            return Err(InputError::TooShort { name: "output", needed, found });
        }
        let exactly = |name, asked: bool, given: Option<usize>, wanted: usize| match (asked, given) {
            (true, None) => Err(InputError::Missing { name }),
            (false, Some(_)) => Err(InputError::Unexpected { name }),
            (true, Some(found)) if found != wanted => Err(InputError::Len { name, wanted, found }),
            _ => Ok(()),
        };
        exactly("lse", spec.lse, outputs.lse.as_ref().map(|lse| lse.len()), rows)?;
        let state = outputs.row_state.as_ref();
        exactly("row_max", spec.row_state, state.map(|state| state.row_max.len()), rows)?;
        exactly("row_sum", spec.row_state, state.map(|state| state.row_sum.len()), rows)?;
        let scores = outputs.scores.as_ref().map(|scores| scores.len());
        exactly("scores", spec.scores.is_some(), scores, rows.saturating_mul(self.problem.kv_len()))
    }

    fn compute(&self, inputs: &AttentionInputs<'_>, results: Results<'_>, shared: &mut SharedState) {
        let Self { problem, plan, .. } = self;
        let job = Job { plan, problem, inputs };
        let Results { output, lse, row_state, scores } = results;
        let SharedState { partial, gathered, ends, flags: [of_output, of_ends, of_partial, of_scores] } = shared;
        {
            let wanted = !ends.is_empty();
            let ends = Shared::new(ends, TensorRows::new_dense(plan.map, 1), of_ends);
            let ends = wanted.then_some(&ends);
            match (self.rows, output) {
                (Some(rows), Target::Given(TensorMut::F32(data))) => {
                    self.attend(job, &Shared::new(data, rows, of_output), ends, partial, of_partial);
                }
                (Some(rows), Target::Given(TensorMut::F16(data))) => {
                    self.attend(job, &Shared::new(data, rows, of_output), ends, partial, of_partial);
                }
                (Some(rows), Target::New(TensorData::F32(data))) => {
                    *data = written(rows, of_output, |output| self.attend(job, output, ends, partial, of_partial));
                }
                (Some(rows), Target::New(TensorData::F16(data))) => {
                    *data = written(rows, of_output, |output| self.attend(job, output, ends, partial, of_partial));
                }
                (Some(rows), Target::Given(TensorMut::Bf16(data))) => {
                    self.attend(job, &Shared::new(data, rows, of_output), ends, partial, of_partial);
                }
                (Some(rows), Target::New(TensorData::Bf16(data))) => {
                    *data = written(rows, of_output, |output| self.attend(job, output, ends, partial, of_partial));
                }
                // refused as an output where problems are made
                (_, Target::Given(TensorMut::I8(_)) | Target::New(TensorData::I8(_))) => {}
                (None, output) => {
                    let dense = TensorRows::new_dense(plan.map, problem.v_head_dim());
                    self.attend(job, &Shared::new(gathered, dense, of_output), ends, partial, of_partial);
                    let output = match output {
                        Target::Given(output) => output,
                        Target::New(data) => data.into(),
                    };
                    scatter(&problem.spec().output.layout, gathered, output);
                }
            }
        }
        if let Some(lse) = lse {
            lse.iter_mut().zip(&*ends).for_each(|(lse, end)| *lse = end.lse);
        }
        if let Some(RowState { row_max, row_sum }) = row_state {
            row_max.iter_mut().zip(&*ends).for_each(|(max, end)| *max = end.row_max);
            row_sum.iter_mut().zip(&*ends).for_each(|(sum, end)| *sum = end.row_sum);
        }
        if let (Some(scores), Some(stage)) = (scores, problem.spec().scores) {
            let scores = Shared::new(scores, TensorRows::new_dense(plan.map, problem.kv_len()), of_scores);
            self.for_each(plan.map.chunks(), |chunk, scratch| {
                job.stage(stage, chunk, scratch, ends, scores.claim(chunk))
            });
        }
    }

    fn attend<T: Store>(
        &self,
        job: Job<'_>,
        output: &Shared<'_, T, TensorRows>,
        ends: Option<&Shared<'_, RowEnd, TensorRows>>,
        partial: &mut Buffer,
        flags: &mut [AtomicBool],
    ) {
        let (plan, chunks) = (&self.plan, self.plan.map.chunks());
        if plan.splits == 1 {
            self.for_each(chunks, |chunk, scratch| {
                let ends = ends.map(|ends| ends.claim(chunk));
                if plan.strategy() == CpuStrategy::HandfulOfKeys {
                    job.handful(chunk, scratch, &mut output.claim(chunk), ends);
                    return;
                }
                job.attend(chunk, 0, scratch);
                job.finish(chunk, scratch, &mut output.claim(chunk), ends);
            });
            return;
        }
        let v_dim = self.problem.v_head_dim();
        let (unit_len, rows) = (plan.partial_len(v_dim), plan.chunk_rows());
        {
            let partial = Shared::new(partial, Consecutive { unit_len }, flags);
            self.for_each(chunks * plan.splits, |task, scratch| {
                job.attend(task / plan.splits, task % plan.splits, scratch);
                let mut unit = partial.claim(task);
                let (acc, rest) = unit.row(0).split_at_mut(rows * v_dim);
                for tile in job.tiles(task / plan.splits) {
                    let at = tile.number * plan.tile_rows * v_dim;
                    let len = tile.width * v_dim;
                    if scratch.fresh[tile.number] {
                        acc[at..at + len].fill(0.0);
                    } else {
                        acc[at..at + len].copy_from_slice(&scratch.acc[at..at + len]);
                    }
                }
                rest[..rows].copy_from_slice(&scratch.row_max[..rows]);
                rest[rows..].copy_from_slice(&scratch.row_sum[..rows]);
            });
        }
        let partial: &[f32] = partial;
        self.for_each(chunks, |chunk, scratch| {
            scratch.fresh.fill(false);
            let state = |split: usize| {
                let (acc, rest) =
                    partial[(chunk * plan.splits + split) * unit_len..][..unit_len].split_at(rows * v_dim);
                let (max, sum) = rest.split_at(rows);
                (acc, max, sum)
            };
            let (acc, max, sum) = state(0);
            scratch.acc[..acc.len()].copy_from_slice(acc);
            scratch.row_max[..rows].copy_from_slice(max);
            scratch.row_sum[..rows].copy_from_slice(sum);
            for split in 1..plan.splits {
                let (acc, max, sum) = state(split);
                for tile in job.tiles(chunk) {
                    let row = tile.number * plan.tile_rows;
                    simd::merge_into(
                        plan.level(),
                        tile.vectors,
                        v_dim,
                        &mut scratch.acc[row * v_dim..],
                        &mut scratch.row_max[row..],
                        &mut scratch.row_sum[row..],
                        &acc[row * v_dim..],
                        &max[row..],
                        &sum[row..],
                        plan.exponents,
                    );
                }
            }
            job.finish(chunk, scratch, &mut output.claim(chunk), ends.map(|ends| ends.claim(chunk)));
        });
    }

    /// Runs tasks `0..n`, each with a workspace, on the pool that this is called from.
    fn for_each(&self, n: usize, task: impl Fn(usize, &mut Scratch) + Send + Sync) {
        self.scratch.for_each(n, self.plan.serial, || Scratch::new(&self.plan, &self.problem), task);
    }
}

impl Clone for CpuAttention {
    /// The same plan, with a workspace of its own.
    fn clone(&self) -> Self {
        Self::new(&self.problem, self.plan.level())
    }
}

impl SharedState {
    fn new(problem: &AttentionProblem, plan: &CpuPlan, direct: bool) -> Result<Self, InputError> {
        // it has a share of what the results take
        super::check_memory(problem, size_of::<f32>())?;
        let flags = |n: usize| (0..n).map(|_| AtomicBool::new(false)).collect();
        let (chunks, rows) = (plan.map.chunks(), problem.rows());
        let spec = problem.spec();
        let wanted = spec.lse || spec.row_state || spec.scores == Some(ScoreStage::Probs);
        let parts = if plan.splits > 1 { chunks * plan.splits } else { 0 };
        Ok(Self {
            partial: Buffer::new(parts * plan.partial_len(problem.v_head_dim())),
            gathered: vec![0.0; if direct { 0 } else { rows * problem.v_head_dim() }],
            ends: vec![RowEnd::default(); if wanted { rows } else { 0 }],
            flags: [flags(chunks), flags(chunks), flags(parts), flags(chunks)],
        })
    }
}
