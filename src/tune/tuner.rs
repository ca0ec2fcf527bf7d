//! Trying the choices: each is checked against the oracle before it is timed, and timed in turns with the others.

use std::time::{Duration, Instant};

use super::class::{DeviceKey, ProblemClass};
use super::report::{Outcome, TuneCandidate, TuneProgress, TuneReport, choose};
use crate::dispatch::PlanChoice;
use crate::error::Error;
use crate::gpu::{AttentionTensors, BoundSteps, Gpu, GpuAttention, GpuError, Stopwatch};
use crate::inputs::{AttentionInputs, AttentionOutput, InputError};
use crate::plan::Plan;
use crate::problem::AttentionProblem;
use crate::timing::{Timing, TimingSource};
use crate::verify::{self, Report};
use crate::workload;

/// How much is tried.
#[derive(Clone, Debug, PartialEq)]
pub struct TuneOptions {
    /// The choices to try; `None`: [`Plan::candidates`].
    pub candidates: Option<Vec<PlanChoice>>,
    /// Time after which nothing new is begun. Half of it may go into making and checking candidates. The first candidate
    /// is always tried, and all that were found right are timed at least once.
    pub budget: Duration,
    /// Rounds in which every candidate is timed once, at most; those that are clearly slower leave early.
    pub rounds: usize,
}

impl Default for TuneOptions {
    fn default() -> Self {
        Self { candidates: None, budget: Duration::from_secs(10), rounds: 25 }
    }
}

/// After the round that warms up, candidates slower than the fastest by this factor are timed no more.
const TOO_SLOW_AT_ONCE: f64 = 4.0;
/// The same after [`ENOUGH_ROUNDS`].
const TOO_SLOW: f64 = 1.5;
const ENOUGH_ROUNDS: usize = 3;
/// Products that the oracle may compute for one candidate's check, about: what rows are checked follows from it.
const CHECKED_PRODUCTS: usize = 1 << 25;

impl Gpu {
    /// Tries choices for a problem on this device, with inputs made from a seed.
    ///
    /// Every candidate runs on the same tensors on the device. Its result is compared with the oracle, by the rule of
    /// [`verify`](crate::verify), on a spread of rows and on those where it differs most from the first right candidate.
    /// Only what is right is timed: round by round in turns, by the device's timestamps where it has them, else by the
    /// host's clock over several calls. The median counts.
    ///
    /// # Errors
    /// [`Error::Plan`] if no kernel will do, [`Error::Gpu`] if the device is lost or a tensor is too large for it,
    /// [`Error::HostMemory`]. What a single candidate meets is in the report.
    pub async fn tune(
        &self,
        problem: &AttentionProblem,
        options: &TuneOptions,
        on_progress: &mut (dyn FnMut(TuneProgress) + '_),
    ) -> Result<TuneReport, Error> {
        self.check_sizes(problem)?;
        let data = workload::inputs(problem, "tune");
        self.tune_with(problem, &data.as_inputs(), options, on_progress).await
    }

    /// [`tune`](Self::tune), blocking.
    ///
    /// # Errors
    /// As [`tune`](Self::tune).
    pub fn tune_blocking(
        &self,
        problem: &AttentionProblem,
        options: &TuneOptions,
        on_progress: &mut (dyn FnMut(TuneProgress) + '_),
    ) -> Result<TuneReport, Error> {
        self.block_on(self.tune(problem, options, on_progress))
    }

    /// [`tune`](Self::tune) with inputs of the caller's: key lengths and masks as they are usual there.
    ///
    /// # Errors
    /// As [`tune`](Self::tune), and [`Error::Input`].
    pub async fn tune_with(
        &self,
        problem: &AttentionProblem,
        inputs: &AttentionInputs<'_>,
        options: &TuneOptions,
        on_progress: &mut (dyn FnMut(TuneProgress) + '_),
    ) -> Result<TuneReport, Error> {
        inputs.check(problem)?;
        let begin = Instant::now();
        let planned = Plan::new(problem, self.caps(), None)?.choice();
        let choices = options.candidates.clone().unwrap_or_else(|| Plan::candidates(problem, self.caps()));
        let mut tuner = Tuner { context: self, problem, inputs, on_device: None, reference: None };
        let mut tried = vec![];
        for (n, choice) in choices.iter().enumerate() {
            let state = if problem.is_empty() {
                State::Out(Outcome::NotTried { reason: "the output has no elements" })
            } else if n > 0 && begin.elapsed() >= options.budget / 2 {
                State::Out(Outcome::NotTried { reason: "the time was up" })
            } else {
                on_progress(TuneProgress::Checking { candidate: n, of: choices.len(), choice: *choice });
                tuner.check(choice).await?
            };
            tried.push((*choice, state));
        }
        time(&mut tried, options, begin, on_progress).await?;
        let candidates: Vec<_> =
            tried.into_iter().map(|(choice, state)| TuneCandidate { choice, outcome: state.into_outcome() }).collect();
        let chosen = choose(&candidates, &planned);
        Ok(TuneReport {
            device: DeviceKey::of(self.info()),
            class: ProblemClass::of(problem),
            candidates,
            planned,
            chosen,
            flops: workload::flops(problem, inputs),
        })
    }

    /// Whether the tensors can be made: on the device each by itself, on the host all together.
    fn check_sizes(&self, problem: &AttentionProblem) -> Result<(), Error> {
        let spec = problem.spec();
        let tensors = [("query", spec.query), ("key", spec.key), ("value", spec.value), ("output", spec.output)];
        let bias = spec.bias.map(|bias| ("bias", bias));
        let max = self.caps().max_buffer_size;
        let mut all = spec.mask.map_or(0, |mask| mask.extent().unwrap_or(usize::MAX) as u128);
        for (what, tensor) in tensors.into_iter().chain(bias) {
            let elements = tensor.layout.extent().unwrap_or(usize::MAX) as u128;
            let bytes = elements * tensor.element.size_bytes() as u128;
            if bytes > u128::from(max) {
                let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
                return Err(GpuError::BufferTooLarge { what: what.to_owned(), bytes, max }.into());
            }
            // the values before they are rounded to their elements, and after
            all += bytes + 4 * elements;
        }
        let reserved = usize::try_from(all).map(|bytes| Vec::<u8>::new().try_reserve_exact(bytes));
        if matches!(reserved, Ok(Ok(()))) { Ok(()) } else { Err(Error::HostMemory { bytes: all }) }
    }
}

/// A candidate on its way.
enum State {
    /// Found right.
    Ready(Box<Ready>),
    Out(Outcome),
}

struct Ready {
    prepared: GpuAttention,
    bound: BoundSteps,
    first_ms: f64,
    worst_ratio: f64,
    millis: Vec<f64>,
    source: TimingSource,
    /// Whether it is still timed.
    running: bool,
}

impl Ready {
    fn median(&self) -> f64 {
        Timing { millis: self.millis.clone(), source: self.source }.quantile(0.5)
    }

    fn fastest(&self) -> f64 {
        self.millis.iter().copied().fold(f64::INFINITY, f64::min)
    }
}

impl State {
    fn into_outcome(self) -> Outcome {
        match self {
            Self::Out(outcome) => outcome,
            Self::Ready(ready) => {
                let Ready { first_ms, worst_ratio, millis, source, .. } = *ready;
                Outcome::Timed { timing: Timing { millis, source }, first_ms, worst_ratio }
            }
        }
    }
}

/// What all candidates share.
struct Tuner<'a> {
    context: &'a Gpu,
    problem: &'a AttentionProblem,
    inputs: &'a AttentionInputs<'a>,
    on_device: Option<AttentionTensors>,
    /// The result of the first candidate that was right.
    reference: Option<AttentionOutput>,
}

impl Tuner<'_> {
    /// Makes and checks a candidate.
    async fn check(&mut self, choice: &PlanChoice) -> Result<State, Error> {
        match self.try_one(choice).await {
            // nothing works any more
            Err(error @ Error::Gpu(GpuError::DeviceLost { .. })) => Err(error),
            Err(error) => Ok(State::Out(Outcome::Failed { error: Box::new(error) })),
            Ok(state) => Ok(state),
        }
    }

    async fn try_one(&mut self, choice: &PlanChoice) -> Result<State, Error> {
        let mut start = Instant::now();
        let plan = Plan::with_choice(self.problem, self.context.caps(), choice)?;
        let prepared = self.context.prepare_plan(plan).await?;
        let tensors = match self.on_device.take() {
            Some(tensors) => tensors,
            None => {
                let before = Instant::now();
                let tensors = prepared.upload(self.inputs).await?;
                start += before.elapsed();
                tensors
            }
        };
        let tensors = &*self.on_device.insert(tensors);
        // what the last candidate left would pass as this one's
        for buffer in [Some(&tensors.output), tensors.lse.as_ref(), tensors.scores.as_ref()].into_iter().flatten() {
            self.context.fill_with_nan(buffer).await?;
        }
        let bound = prepared.bind(&tensors.buffers())?;
        prepared.submit(&bound).await?;
        let output = prepared.read_output(tensors).await?;
        let first_ms = start.elapsed().as_secs_f64() * 1e3;
        let report = judge(self.problem, self.inputs, &output, self.reference.as_ref())?;
        if !report.passed() {
            return Ok(State::Out(Outcome::Wrong { report: Box::new(report) }));
        }
        self.reference.get_or_insert(output);
        let worst_ratio = report.worst_ratio;
        let source = TimingSource::Wall;
        let millis = vec![];
        let ready = Ready { prepared, bound, first_ms, worst_ratio, millis, source, running: true };
        Ok(State::Ready(Box::new(ready)))
    }
}

/// Compares rows of an output with the oracle: a spread of them, and those where it differs most from the reference.
fn judge(
    problem: &AttentionProblem,
    inputs: &AttentionInputs<'_>,
    output: &AttentionOutput,
    reference: Option<&AttentionOutput>,
) -> Result<Report, InputError> {
    verify::verify_rows(problem, inputs, output, &rows_to_check(problem, output, reference))
}

/// Rows spread evenly, first and last among them, and those where an output differs most from the reference.
fn rows_to_check(
    problem: &AttentionProblem,
    output: &AttentionOutput,
    reference: Option<&AttentionOutput>,
) -> Vec<usize> {
    let products = problem.kv_len() * (problem.head_dim() + problem.v_head_dim());
    let count = (CHECKED_PRODUCTS / products.max(1)).clamp(16, 128);
    let last = problem.rows().saturating_sub(1);
    let spread = count / 2;
    let mut rows: Vec<_> =
        (0..spread).map(|n| usize::try_from(n as u128 * last as u128 / (spread - 1) as u128).unwrap_or(last)).collect();
    if let Some(reference) = reference {
        let mut differences: Vec<_> =
            (0..problem.rows()).map(|row| (row_difference(problem, row, output, reference), row)).collect();
        differences.sort_by(|(a, _), (b, _)| b.total_cmp(a));
        rows.extend(differences.into_iter().take(count - spread).map(|(_, row)| row));
    }
    rows.sort_unstable();
    rows.dedup();
    rows
}

/// How far two outputs are apart in a row, relative to the row's largest magnitude; infinite where they differ in what is
/// finite. Not a judgement: it tells where to look.
fn row_difference(problem: &AttentionProblem, n: usize, a: &AttentionOutput, b: &AttentionOutput) -> f32 {
    let layout = &problem.spec().output.layout;
    let (batch, h, i) = crate::cpu::row_place(problem, n);
    let (mut difference, mut magnitude) = (0f32, f32::MIN_POSITIVE);
    let mut add = |a: f32, b: f32| {
        if a.to_bits() != b.to_bits() {
            let apart = (a - b).abs();
            difference = difference.max(if apart.is_finite() { apart } else { f32::INFINITY });
        }
        if b.is_finite() {
            magnitude = magnitude.max(b.abs());
        }
    };
    for d in 0..problem.v_head_dim() {
        let at = layout.index([batch, h, i, d]);
        add(a.output.as_ref().get(at), b.output.as_ref().get(at));
    }
    if let (Some(a), Some(b)) = (&a.lse, &b.lse) {
        add(a[n], b[n]);
    }
    difference / magnitude
}

/// Times the candidates that are right, round by round in turns.
async fn time(
    tried: &mut [(PlanChoice, State)],
    options: &TuneOptions,
    begin: Instant,
    on_progress: &mut (dyn FnMut(TuneProgress) + '_),
) -> Result<(), Error> {
    let mut all: Vec<_> = tried
        .iter_mut()
        .filter_map(|(_, state)| if let State::Ready(ready) = state { Some(ready) } else { None })
        .collect();
    let Some(first) = all.first() else { return Ok(()) };
    let clock = Stopwatch::new(first.prepared.gpu()).await?;
    let rounds = options.rounds.max(1) + 1;
    for round in 0..rounds {
        on_progress(TuneProgress::Timing { round, of: rounds });
        for ready in all.iter_mut().filter(|ready| ready.running) {
            let millis = clock.call(&ready.bound).await?;
            ready.source = clock.source();
            // what warms up does not count where there is more
            if round == 1 {
                ready.millis.clear();
            }
            ready.millis.push(millis);
        }
        let best = all.iter().map(|ready| ready.median()).fold(f64::INFINITY, f64::min);
        let too_slow = match round {
            0 => TOO_SLOW_AT_ONCE,
            _ if round >= ENOUGH_ROUNDS => TOO_SLOW,
            _ => f64::INFINITY,
        };
        for ready in &mut all {
            // by its best round: other work on the machine makes single rounds long, none short
            ready.running &= ready.fastest() <= best * too_slow;
        }
        if round > 0 && begin.elapsed() >= options.budget {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::AttentionSpec;
    use crate::tensor::TensorData;

    /// One wrong element among 49152 is found, wherever it is.
    #[test]
    fn what_is_wrong_is_not_right() {
        let mut spec = AttentionSpec::new([2, 4, 768, 8], [2, 2, 33, 8]);
        spec.lse = true;
        let problem = AttentionProblem::new(spec).unwrap();
        let data = workload::inputs(&problem, "judge");
        let inputs = data.as_inputs();
        let right = crate::cpu::attention(&problem, &inputs).unwrap();
        assert!(judge(&problem, &inputs, &right, None).unwrap().passed());
        assert!(judge(&problem, &inputs, &right, Some(&right)).unwrap().passed());
        for row in [0, 1, 777, 3001, 6143] {
            for wrong in [f32::NAN, f32::INFINITY, 0.5] {
                let mut output = right.clone();
                let TensorData::F32(elements) = &mut output.output else { panic!("f32 was asked for") };
                elements[row * 8 + 3] += wrong;
                let report = judge(&problem, &inputs, &output, Some(&right)).unwrap();
                assert_eq!(report.failures, 1, "row {row}: {report}");
                let mut output = right.clone();
                output.lse.as_mut().unwrap()[row] += wrong;
                let report = judge(&problem, &inputs, &output, Some(&right)).unwrap();
                assert_eq!(report.failures, 1, "lse of row {row}: {report}");
            }
        }
    }
}
