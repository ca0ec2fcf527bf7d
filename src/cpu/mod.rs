//! Attention on the CPU: the executor for machines without a GPU, the twins of the algorithms, and the oracle.

mod fused;
#[cfg(feature = "layer")]
mod linear;
mod merge;
#[cfg(feature = "threads")]
mod peak;
mod plain;
pub mod reference;
#[expect(unsafe_code, reason = "vector instructions, and buffers shared by tasks; the invariants stand at its head")]
mod simd;
mod terms;
#[cfg(test)]
mod trials;
mod weights;

pub use fused::{CpuAttention, CpuBackward, CpuOutputs, CpuPlan, CpuStrategy, GradientsMut, TensorMut};
#[cfg(feature = "layer")]
pub(crate) use linear::linear;
pub(crate) use merge::check_parts;
#[cfg(feature = "mpi")]
pub(crate) use merge::check_state_parts;
pub use merge::{MergeError, MergedState, MergedStates, PartialState, StatePart, merge, merge_states};
#[cfg(feature = "threads")]
pub use peak::roofline;
pub use simd::SimdLevel;
pub(crate) use weights::reference_weights;
pub use weights::weights;

use half::{bf16, f16};

use crate::backward::{BackwardInputs, BackwardProblem, Gradients};
use crate::inputs::{AttentionInputs, AttentionOutput, CheckedInputs, InputError, RowState};
use crate::problem::AttentionProblem;
use crate::tensor::{Element, Layout, TensorData, TensorSpec};

/// An algorithm on the CPU. All of them compute in f32 and take every problem.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum CpuKernel {
    /// Online softmax over blocks of keys; never holds the scores. The default.
    #[default]
    Fused,
    /// The direct algorithm: all scores of a row, softmax, weighted sum, each added up in order.
    Plain,
}

impl CpuKernel {
    /// Every kernel.
    pub const ALL: [Self; 2] = [Self::Fused, Self::Plain];

    /// `cpu_fused` or `cpu_plain`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fused => "cpu_fused",
            Self::Plain => "cpu_plain",
        }
    }
}

impl std::fmt::Display for CpuKernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Computes one attention with the default kernel, on all cores (feature `threads`) or on one.
///
/// The same inputs give the same bits, whatever the number of threads.
///
/// ```
/// use cross_attention::{AttentionInputs, AttentionProblem, AttentionSpec, TensorData};
/// // one query row, two keys of width 2; the scores are equal, so the values are averaged
/// let problem = AttentionProblem::new(AttentionSpec::new([1, 1, 1, 2], [1, 1, 2, 2]))?;
/// let (query, key, value) = (vec![1.0f32, 0.0], vec![0.0f32; 4], vec![1.0f32, 2.0, 3.0, 4.0]);
/// let output = cross_attention::cpu::attention(&problem, &AttentionInputs::new(&query, &key, &value))?;
/// assert_eq!(output.output, TensorData::F32(vec![2.0, 3.0]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// An [`InputError`] if the data is not what the problem asks for.
pub fn attention(problem: &AttentionProblem, inputs: &AttentionInputs<'_>) -> Result<AttentionOutput, InputError> {
    attention_with(CpuKernel::default(), problem, inputs)
}

/// Computes one attention with the given kernel.
///
/// # Errors
/// An [`InputError`] if the data is not what the problem asks for.
pub fn attention_with(
    kernel: CpuKernel,
    problem: &AttentionProblem,
    inputs: &AttentionInputs<'_>,
) -> Result<AttentionOutput, InputError> {
    attention_checked(kernel, problem, inputs.checked(problem)?)
}

/// The same of inputs that were compared with the problem.
pub(crate) fn attention_checked(
    kernel: CpuKernel,
    problem: &AttentionProblem,
    inputs: CheckedInputs<'_, '_>,
) -> Result<AttentionOutput, InputError> {
    match kernel {
        CpuKernel::Fused => CpuAttention::for_one_call(problem, SimdLevel::best()).run_checked(inputs),
        CpuKernel::Plain => {
            check_memory(problem, size_of::<f32>())?;
            Ok(run(problem, 1, |task| plain::compute(problem, &inputs, task)))
        }
    }
}

/// Computes one attention with the fused kernel and the given instructions.
///
/// # Errors
/// An [`InputError`] if the data is not what the problem asks for.
pub fn attention_at(
    level: SimdLevel,
    problem: &AttentionProblem,
    inputs: &AttentionInputs<'_>,
) -> Result<AttentionOutput, InputError> {
    CpuAttention::for_one_call(problem, level).run(inputs)
}

/// Computes the gradients of one attention, on all cores (feature `threads`) or on one.
///
/// The same inputs give the same bits, whatever the number of threads. An example stands at [`backward`](crate::backward).
///
/// # Errors
/// An [`InputError`] if the data is not what the problem asks for.
pub fn backward(problem: &BackwardProblem, inputs: &BackwardInputs<'_>) -> Result<Gradients, InputError> {
    let prepared = CpuBackward::try_new(problem, SimdLevel::best());
    let bytes = |bytes: u128| InputError::Memory { bytes: u64::try_from(bytes).unwrap_or(u64::MAX) };
    prepared.map_err(bytes)?.run(inputs)
}

/// Plans a problem for the fused kernel and the best instructions of this machine; any number of calls can follow.
#[must_use]
pub fn prepare(problem: &AttentionProblem) -> CpuAttention {
    CpuAttention::new(problem, SimdLevel::best())
}

/// Whether there is memory for what an attention gives back, computed in elements of so many bytes. Asked for and given back:
/// a vector that cannot be allocated would end the process.
pub(crate) fn check_memory(problem: &AttentionProblem, element_bytes: usize) -> Result<(), InputError> {
    let spec = problem.spec();
    let rows = problem.rows();
    let stored = spec.output.layout.extent().and_then(|n| n.checked_mul(spec.output.element.size_bytes()));
    let row = problem
        .v_head_dim()
        .checked_add(if spec.row_state { 4 } else { 2 })
        .and_then(|n| n.checked_add(spec.scores.map_or(0, |_| problem.kv_len())));
    let computed = row.and_then(|n| n.checked_mul(rows)).and_then(|n| n.checked_mul(element_bytes));
    check_bytes(stored.and_then(|n| n.checked_add(computed?)))
}

/// Whether so many bytes can be allocated; `None` is more than can be counted.
pub(crate) fn check_bytes(bytes: Option<usize>) -> Result<(), InputError> {
    if bytes.is_some_and(|bytes| Vec::<u8>::new().try_reserve_exact(bytes).is_ok()) {
        return Ok(());
    }
    Err(InputError::Memory { bytes: bytes.and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(u64::MAX) })
}

/// Neighbouring rows of one head, and where their results go.
struct Task<'a> {
    b: usize,
    h: usize,
    first_row: usize,
    /// `[rows, v_head_dim]`, zeros
    output: &'a mut [f32],
    /// `[rows]`
    lse: &'a mut [f32],
    /// `[rows]`
    row_max: &'a mut [f32],
    /// `[rows]`
    row_sum: &'a mut [f32],
    /// `[rows, kv_len]` of zeros; empty if not asked for
    scores: &'a mut [f32],
}

/// Cuts the rows of every head into tasks, computes them all, and stores the results as the spec asks.
fn run(problem: &AttentionProblem, rows_per_task: usize, compute: impl Fn(Task<'_>) + Send + Sync) -> AttentionOutput {
    let spec = problem.spec();
    let (q_len, kv_len, v_head_dim) = (problem.q_len(), problem.kv_len(), problem.v_head_dim());
    let score_len = if spec.scores.is_some() { kv_len } else { 0 };
    let mut output = vec![0.0f32; problem.rows() * v_head_dim];
    let mut lse = vec![0.0f32; problem.rows()];
    let mut state = RowState { row_max: lse.clone(), row_sum: lse.clone() };
    let mut scores = vec![0.0f32; problem.rows() * score_len];

    let mut tasks = Vec::new();
    let (mut output_left, mut lse_left, mut scores_left) = (&mut output[..], &mut lse[..], &mut scores[..]);
    let (mut max_left, mut sum_left) = (&mut state.row_max[..], &mut state.row_sum[..]);
    for b in 0..problem.batch() {
        for h in 0..problem.q_heads() {
            for first_row in (0..q_len).step_by(rows_per_task) {
                let rows = rows_per_task.min(q_len - first_row);
                let (output, lse, row_max, row_sum, scores);
                (output, output_left) = output_left.split_at_mut(rows * v_head_dim);
                (lse, lse_left) = lse_left.split_at_mut(rows);
                (row_max, max_left) = max_left.split_at_mut(rows);
                (row_sum, sum_left) = sum_left.split_at_mut(rows);
                (scores, scores_left) = scores_left.split_at_mut(rows * score_len);
                tasks.push(Task { b, h, first_row, output, lse, row_max, row_sum, scores });
            }
        }
    }
    for_each(tasks, compute);

    AttentionOutput {
        output: stored(problem, output, |x| x, f16::from_f32, bf16::from_f32),
        lse: spec.lse.then_some(lse),
        row_state: spec.row_state.then_some(state),
        scores: spec.scores.map(|_| scores),
    }
}

/// Rounds `dense` (`[batch, q_heads, q_len, v_head_dim]`, no gaps) into the layout and element of the output.
fn stored<T: Copy>(
    problem: &AttentionProblem,
    dense: Vec<T>,
    to_f32: impl Fn(T) -> f32,
    to_f16: impl Fn(T) -> f16,
    to_bf16: impl Fn(T) -> bf16,
) -> TensorData {
    scattered(&problem.spec().output, dense, to_f32, to_f16, to_bf16)
}

/// Rounds what lies without gaps into the layout and element of a tensor.
fn scattered<T: Copy>(
    tensor: &TensorSpec,
    dense: Vec<T>,
    to_f32: impl Fn(T) -> f32,
    to_f16: impl Fn(T) -> f16,
    to_bf16: impl Fn(T) -> bf16,
) -> TensorData {
    fn scatter<T: Copy, E: Copy>(layout: &Layout, dense: Vec<T>, zero: E, round: impl Fn(T) -> E) -> Vec<E> {
        if *layout == Layout::bhld(layout.shape) {
            return dense.into_iter().map(round).collect();
        }
        let mut data = vec![zero; layout.extent().unwrap_or(0)];
        let [_, heads, len, dim] = layout.shape;
        for (row, values) in dense.chunks_exact(dim.max(1)).enumerate() {
            let start = layout.index([row / (heads * len), row / len % heads, row % len, 0]);
            for (d, &value) in values.iter().enumerate() {
                data[start + d * layout.strides[3]] = round(value);
            }
        }
        data
    }
    match tensor.element {
        Element::F32 => TensorData::F32(scatter(&tensor.layout, dense, 0.0, to_f32)),
        Element::F16 => TensorData::F16(scatter(&tensor.layout, dense, f16::ZERO, to_f16)),
        Element::Bf16 => TensorData::Bf16(scatter(&tensor.layout, dense, bf16::ZERO, to_bf16)),
        // refused as an output where problems are made
        Element::I8 => TensorData::zeros(Element::I8, 0),
    }
}

/// Batch entry, head and position of a row, counted over `[batch, q_heads, q_len]`.
pub(crate) const fn row_place(problem: &AttentionProblem, row: usize) -> (usize, usize, usize) {
    let (heads, len) = (problem.q_heads(), problem.q_len());
    (row / (heads * len), row / len % heads, row % len)
}

/// Computes `compute(0), compute(1), ..` on all cores, and returns them in order.
pub(crate) fn map<T: Send>(n: usize, compute: impl Fn(usize) -> T + Send + Sync) -> Vec<T> {
    #[cfg(feature = "threads")]
    {
        use rayon::prelude::*;
        (0..n).into_par_iter().map(compute).collect()
    }
    #[cfg(not(feature = "threads"))]
    (0..n).map(compute).collect()
}

fn for_each<T: Send>(tasks: Vec<T>, compute: impl Fn(T) + Send + Sync) {
    #[cfg(feature = "threads")]
    {
        use rayon::prelude::*;
        tasks.into_par_iter().for_each(compute);
    }
    #[cfg(not(feature = "threads"))]
    tasks.into_iter().for_each(compute);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AttentionSpec;

    #[test]
    fn a_softmax_by_hand() {
        let mut spec = AttentionSpec::new([1, 1, 1, 1], [1, 1, 2, 1]);
        spec.lse = true;
        let problem = AttentionProblem::new(spec).unwrap();
        let (query, key, value) = (vec![1.0f32], vec![0.0f32, 3f32.ln()], vec![1.0f32, 5.0]);
        let inputs = AttentionInputs::new(&query, &key, &value);
        // weights 1/4 and 3/4
        for kernel in CpuKernel::ALL {
            let output = attention_with(kernel, &problem, &inputs).unwrap();
            assert!((output.output.to_f32()[0] - 4.0).abs() < 1e-6, "{kernel}: {output:?}");
            assert!((output.lse.unwrap()[0] - 4f32.ln()).abs() < 1e-6, "{kernel}");
        }
        let reference = reference::attention(&problem, &inputs).unwrap();
        assert!((reference.output[0] - 4.0).abs() < 1e-6);
    }
}
